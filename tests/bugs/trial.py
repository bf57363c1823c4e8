"""Runs tests of a lesson on a changed copy of the repository: does one of them fail?"""

import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plant import FACTS, ROOT

LIMIT = 300  # seconds; a program that never ends is killed
SLOW = 1  # seconds; a test that takes longer is left out if another one has failed
PYTEST = ["-q", "-p", "no:cacheprovider"]
LIBRARIES = "accelerate gymnasium matplotlib.figure pygame pytest torch"
LIBRARIES += " transformers.models.gpt2.modeling_gpt2"
LIBRARIES += " transformers.models.llama.modeling_llama"


def import_libraries() -> None:
    """What every test imports, once for all forks; the lessons are not among it."""
    for name in LIBRARIES.split():
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


@contextlib.contextmanager
def copy_of_repository() -> Iterator[Path]:
    """Scripts, tests and weights in a folder, for tests to run on."""
    skip = shutil.ignore_patterns("exercise", "__pycache__", "results")
    with tempfile.TemporaryDirectory() as folder:
        for pattern in ("*.py", "*.pt", "*.pth", "*.toml", "*.txt", "*.md"):
            for file in ROOT.glob(pattern):
                shutil.copy(file, folder)
        for name in ("tests", "grpo_tiny", "assets"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=skip)
        yield Path(folder)


def passes(texts: dict[str, str], tests: list[str]) -> bool:
    """Do these tests, as pytest names them, pass with these scripts?

    If one of them is there no more, all of their files are run instead.
    """
    with copy_of_repository() as folder:
        for file, text in texts.items():
            (folder / file).write_text(text)
        files = sorted({name.split("::")[0] for name in tests})
        for names in (tests, files):
            command = [sys.executable, "-m", "pytest", "-x", *PYTEST, *names]
            status = subprocess.run(command, cwd=folder, capture_output=True).returncode
            if status < 2:  # 0: all pass, 1: one fails, more: a name is not known
                return status == 0
        return False


class Watch:
    """A plugin of pytest: the fastest tests first, and which of them fail."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.failed, self.took = seconds, [], {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.seconds.get(item.nodeid, 0.0))

    def pytest_runtest_setup(self, item) -> None:
        if self.failed and self.seconds.get(item.nodeid, 0.0) > SLOW:
            sys.modules["pytest"].skip()

    def pytest_runtest_logreport(self, report) -> None:
        """Add up setup, test and teardown."""
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be imported fails as a whole."""
        self.failed += [report.nodeid] if report.failed else []


@functools.cache
def seconds_of(folder: Path, lesson: str) -> dict[str, float]:
    """How long each of the lesson's tests takes on the copy; all have to pass."""
    failed, seconds = run_tests(folder, lesson, {})
    if failed:
        sys.exit(f"Without a change, these tests fail: {', '.join(failed)}")
    return seconds


def red_tests(
    folder: Path, lesson: str, file: str, text: str, at_most: int
) -> list[str]:
    """Which of the lesson's tests fail on the copy with this text in a script?"""
    seconds = seconds_of(folder, lesson)
    (folder / file).write_text(text)
    failed, _ = run_tests(folder, lesson, seconds, at_most)
    shutil.copy(ROOT / file, folder)
    return failed


def run_tests(
    folder: Path, lesson: str, seconds: dict[str, float], at_most: int = 0
) -> tuple[list[str], dict[str, float]]:
    """Run the lesson's tests in a fork, which has the libraries already.

    `seconds` says how long each takes; with `at_most`, this many failures are enough.
    Gives the names of those that failed, and how long each took. Needs os.fork, so not
    on Windows.
    """
    path = folder / "outcome.json"
    path.write_text(json.dumps([["the program did not end"], {}]))
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.modules.pop("lessons", None)  # those of the copy are tested
        sys.dont_write_bytecode = True
        import pytest

        watch = Watch(seconds)
        options = [*PYTEST, f"--maxfail={at_most}", f"--rootdir={folder}"]
        tests = FACTS[lesson]["tests"].split()
        pytest.main([*options, *tests], plugins=[watch])
        path.write_text(json.dumps([watch.failed, watch.took]))
        os._exit(0)
    os.waitpid(child, 0)
    return tuple(json.loads(path.read_text()))
