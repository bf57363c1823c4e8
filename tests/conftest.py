"""For all tests: Ctrl-C reaches the programs that they start, and this is no notebook.

A shell starts a background job with Ctrl-C (SIGINT) ignored, and a program hands that
on to those that it starts. The tests that press Ctrl-C would then fail.
"""

import signal
import sys

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    """A test that starts a notebook imports what a lesson takes for the sign of one."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
