"""For all tests: Ctrl-C must reach the programs that they start.

A shell starts a background job with Ctrl-C (SIGINT) ignored, and a program hands that
on to those that it starts. The tests that press Ctrl-C would then fail.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
