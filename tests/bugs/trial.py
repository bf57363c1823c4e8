"""Runs tests of a lesson on a changed copy of the repository: does one of them fail?"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from plant import CARTPOLE, GRPO, LANDER, ROOT, TICTACTOE

TESTS = {
    CARTPOLE: "tests/test_cartpole.py",
    TICTACTOE: "tests/test_tictactoe.py",
    LANDER: "tests/test_lunarlander.py",
    GRPO: "tests/test_grpo.py",
}
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
    """A plugin of pytest: the fastest tests first, and what failed, to a file."""

    def __init__(self, seconds: dict[str, float], slowest: float) -> None:
        self.seconds, self.slowest = seconds, slowest
        self.outcome = {"failed": [], "seconds": {}}

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Leave out the slow ones and sort the others."""
        known = [(self.seconds.get(item.nodeid, 0.0), item) for item in items]
        known = [pair for pair in known if pair[0] <= self.slowest]
        items[:] = [item for _, item in sorted(known, key=lambda pair: pair[0])]

    def pytest_runtest_logreport(self, report) -> None:
        """Add up setup, test and teardown."""
        before = self.outcome["seconds"].get(report.nodeid, 0.0)
        self.outcome["seconds"][report.nodeid] = before + report.duration
        if report.failed and report.nodeid not in self.outcome["failed"]:
            self.outcome["failed"].append(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be imported fails as a whole."""
        if report.failed:
            self.outcome["failed"].append(report.nodeid)


def run_tests(
    folder: Path,
    lesson: str,
    seconds: dict[str, float] | None = None,
    slowest: float = float("inf"),
    options: tuple = (),
) -> dict:
    """Run the lesson's tests in a fork, which has the libraries already.

    `seconds` says how long each takes. Gives the names of those that failed, and how
    long each took. Needs os.fork, so not on Windows.
    """
    path = folder / "outcome.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.dont_write_bytecode = True
        import pytest

        watch = Watch(seconds or {}, slowest)
        command = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *options]
        pytest.main([*command, TESTS[lesson]], plugins=[watch])
        path.write_text(json.dumps(watch.outcome))
        os._exit(0)
    os.waitpid(child, 0)
    if not path.exists():
        return {"failed": ["the program did not end"], "seconds": {}}
    return json.loads(path.read_text())


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
