"""Runs tests of a lesson on a changed copy of the repository: does one of them fail?"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from plant import FACTS, ROOT

LIMIT = 300  # seconds; a program that never ends is killed


def copy_of_repository(folder: Path) -> None:
    """Scripts, tests and weights in a folder, for tests to run on."""
    for pattern in ("*.py", "*.pt", "*.pth", "*.toml", "*.txt", "*.md"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    skip = shutil.ignore_patterns("exercise", "__pycache__", "results")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=skip)
    for name in ("grpo_tiny", "assets"):
        shutil.copytree(ROOT / name, folder / name)


def passes(folder: Path, tests: list[str]) -> bool:
    """Do these tests, as pytest names them, pass on the copy in the folder?"""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


class Watch:
    """A plugin of pytest: the fastest tests first, and which of them fail."""

    def __init__(self, seconds: dict[str, float], slowest: float) -> None:
        self.seconds, self.slowest = seconds, slowest
        self.failed, self.took = [], {}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Leave out the slow ones and sort the others."""
        known = {item: self.seconds.get(item.nodeid, 0.0) for item in items}
        fast = [item for item in items if known[item] <= self.slowest]
        items[:] = sorted(fast, key=known.get)

    def pytest_runtest_logreport(self, report) -> None:
        """Add up setup, test and teardown."""
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be imported fails as a whole."""
        self.failed += [report.nodeid] if report.failed else []


def seconds_of(folder: Path, lesson: str) -> dict[str, float]:
    """How long each of the lesson's tests takes on the copy; all have to pass."""
    failed, seconds = run_tests(folder, lesson, {})
    if failed:
        sys.exit(f"Without a change, these tests fail: {', '.join(failed)}")
    return seconds


def run_tests(
    folder: Path, lesson: str, seconds: dict, *options: str, slowest: float = 1e9
) -> tuple[list[str], dict[str, float]]:
    """Run the lesson's tests in a fork, which has the libraries already.

    `seconds` says how long each takes. Gives the names of those that failed, and how
    long each took. Needs os.fork, so not on Windows.
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
        sys.dont_write_bytecode = True
        import pytest

        watch = Watch(seconds, slowest)
        command = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *options]
        pytest.main([*command, *FACTS[lesson]["tests"].split()], plugins=[watch])
        path.write_text(json.dumps([watch.failed, watch.took]))
        os._exit(0)
    os.waitpid(child, 0)
    return tuple(json.loads(path.read_text()))


def import_libraries() -> None:
    """What every test imports, once for all forks; the lessons are not among it."""
    import accelerate  # noqa: F401
    import gymnasium  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pygame  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
