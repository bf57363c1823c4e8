"""What does an edit cost that makes no claim false? Count the tests that it turns red.

Run it
    python tests/honest_edits.py                  all: half an hour on one core
    python tests/honest_edits.py cartpole README  only these

Each edit is made on a fresh copy of the repository, where the tests that can see it are
run: those of the lesson, its contracts, the museum, the reports and the README. Tests
that take longer than SLOW seconds, or are red without any edit, are left out. The aim
is 0 red; a rename may cost one, of a museum bug that is planted in such a line.
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

from lessons import LESSONS, ROOT, settings_in, with_settings

SLOW = 6  # seconds; the slower ones train until something is learned
RATE = {"grpo": "LR"}  # the other lessons: LEARNING_RATE
WIDTH = {"grpo": "NUM_SAMPLES"}  # the other lessons: HIDDEN_UNITS
EQUATION = {"cartpole": "returns_to_go", "tictactoe": "critic_loss"}
EQUATION |= {"lunarlander": "gae", "grpo": "grpo_loss"}


def scaled(text, name, factor):
    """Another value of a Setting."""
    value = ast.literal_eval(settings_in(text)[name])
    return with_settings(text, **{name: type(value)(value * factor)})


def function(text, name):
    """The syntax tree of a function."""
    tree = ast.parse(text).body
    return next(x for x in tree if isinstance(x, ast.FunctionDef) and x.name == name)


def renamed(text, name):
    """The most used local variable of a function gets another name."""
    nodes = [x for x in ast.walk(function(text, name)) if isinstance(x, ast.Name)]
    local = {x.id for x in nodes if isinstance(x.ctx, ast.Store)}
    often = Counter(x.id for x in nodes if x.id in local).most_common(1)[0][0]
    lines = text.splitlines(keepends=True)
    places = [(x.lineno, x.col_offset) for x in nodes if x.id == often]
    for line, start in sorted(places, reverse=True):
        old = lines[line - 1]
        lines[line - 1] = f"{old[:start]}{often}_so_far{old[start + len(often) :]}"
    return "".join(lines)


def commented(text, name):
    """A comment before the last statement of a function."""
    lines, last = text.splitlines(keepends=True), function(text, name).body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "# A comment.\n")
    return "".join(lines)


def edits(key):
    """Pairs of a name and a pair: the file, and its text after the edit."""
    if key == "README":
        path, text = ROOT / "README.md", (ROOT / "README.md").read_text()
        yield "a sentence reworded", (path, text.replace(" and ", " and also ", 1))
        two = "\n\nTwo lines that were\nnot here before.\n\n#"
        yield "two lines added", (path, text.replace("\n\n#", two, 1))
        return
    path = ROOT / LESSONS[key].scripts[0]
    test = min(ROOT.glob(f"tests/test_{key}*.py"))
    text, rate = path.read_text(), RATE.get(key, "LEARNING_RATE")
    yield "a rate", (path, scaled(text, rate, 0.5))
    yield "a width", (path, scaled(text, WIDTH.get(key, "HIDDEN_UNITS"), 2))
    yield "a local variable", (path, renamed(text, "train"))
    yield "a comment", (path, commented(text, EQUATION[key]))
    added = "\n\\g<1>\nADDED = 1.0  # a new setting, not yet used"
    yield "a new setting", (path, re.sub(rf"\n({rate} = .*)", added, text, count=1))
    new = re.sub(r"\ndef (test_\w+)", r"\ndef \1_renamed", test.read_text(), count=1)
    yield "a renamed test", (test, new)


def run_tests(key, folder, without):
    """Run what can see an edit; give the name of each test, its seconds, is it red?"""
    files = [path.relative_to(ROOT) for path in ROOT.glob(f"tests/test_{key}*.py")]
    shared = ("readme", "museum", "reports", "contract")[: 3 if key == "README" else 4]
    files += [f"tests/test_{name}.py" for name in shared]
    command = [sys.executable, "-m", "pytest", *map(str, files), "--junitxml=out.xml"]
    command += [f"--deselect={test}" for test in without]
    others = " or ".join(f"test_contract and {x}" for x in LESSONS if x != key)
    command += ["-k", f"not ({others})"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if not (folder / "out.xml").exists():
        sys.exit(done.stdout + done.stderr)
    for case in xml.parse(folder / "out.xml").iter("testcase"):
        file = case.get("classname").replace(".", "/") + ".py"
        red = any(child.tag in ("failure", "error") for child in case)
        yield f"{file}::{case.get('name')}", float(case.get("time")), red


def main():
    """Print a row for each edit: how many tests ran, how many are red, and which."""
    print("lesson       edit                  tests  red")
    for key in sys.argv[1:] or [*LESSONS, "README"]:
        without = []
        for name, edit in [("(none)", None), *edits(key)]:
            with tempfile.TemporaryDirectory() as folder:
                ignored = shutil.ignore_patterns(".git", "*venv*", "__pycache__")
                copy = Path(folder, "copy")
                shutil.copytree(ROOT, copy, ignore=ignored)
                if edit:
                    assert edit[1] != edit[0].read_text(), name
                    (copy / edit[0].relative_to(ROOT)).write_text(edit[1])
                tests = list(run_tests(key, copy, without))
            red = [test for test, _, failed in tests if failed]
            without = without or [t for t, time, bad in tests if bad or time > SLOW]
            row = f"{key:13}{name:22}{len(tests):5}{len(red):5}"
            print(row, *red, sep="\n    ", flush=True)


if __name__ == "__main__":
    main()
