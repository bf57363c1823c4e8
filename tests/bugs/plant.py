"""Puts a bug of the catalogue into the text of its lesson."""

import ast
import difflib
import inspect
import io
import itertools
import json
import re
import sys
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "benchmarks")]
import lessons  # noqa: E402, F401
from catalogue import BUGS, GAME, TICTACTOE, Bug  # noqa: E402
from common import code_hash  # noqa: E402
from lessons import with_settings  # noqa: E402

FACTS = json.loads((HERE / "lessons.json").read_text())  # of each lesson
LESSONS = list(FACTS)  # lesson 1 to 4
DOCSTRING = re.compile("r?(\"{3}|'{3})")


class Gone(Exception):
    """The place of a bug is no longer in the lesson; the message says which."""


def files_of(lesson: str) -> list[str]:
    """The scripts that a lesson trains with."""
    return [lesson, GAME] if lesson == TICTACTOE else [lesson]


def bugs_of(lesson: str) -> list[Bug]:
    return [bug for bug in BUGS if bug.lesson == lesson]


def code_of(lesson: str) -> str:
    """What a result was measured with: a hash of each script, but for comments."""
    return " ".join(code_hash((ROOT / file).read_text()) for file in files_of(lesson))


def planted(bug: Bug) -> str:
    """The text of the bug's script with the bug in it."""
    text = (ROOT / bug.file).read_text()
    new = (with_function if callable(bug.edits[0][1]) else with_lines)(bug, text)
    if new == text:
        raise Gone(f"{bug.name}: {bug.file} has this bug already, without planting it")
    return new


def text_of(file: str, bug: Bug, with_bug: bool, settings: dict) -> str:
    """A script of the bug's lesson with these Settings, and with the bug or without."""
    here = with_bug and bug.file == file
    text = planted(bug) if here else (ROOT / file).read_text()
    return with_settings(text, **settings) if file == bug.lesson else text


def trouble(bug: Bug) -> str:
    """Why a bug cannot be planted; "" if it can."""
    try:
        planted(bug)
    except Gone as problem:
        return str(problem)
    return ""


def with_lines(bug: Bug, text: str) -> str:
    """The text with the wrong lines; a line of which nothing is left goes."""
    code, places = only_code(text), []
    for right, wrong in bug.edits:
        if code.count(right) != 1:
            how_often = "is not" if right not in code else "stands more than once"
            raise Gone(f"{bug.name}: {how_often} in the code of {bug.file}: {right!r}")
        places.append((code.index(right), right, wrong))
    for start, right, wrong in sorted(places, reverse=True):
        before, after = text[:start], text[start + len(right) :]
        if not wrong and not before.split("\n")[-1].strip():
            before, after = before.rstrip(" "), after.split("\n", 1)[1]
        text = before + wrong + after
    return text


def only_code(text: str) -> str:
    """The text with blanks in the place of every comment and docstring."""
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    code = text
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or DOCSTRING.match(token.string):
            (row, column), (last, end) = token.start, token.end
            a, b = starts[row - 1] + column, starts[last - 1] + end
            code = code[:a] + re.sub(".", " ", code[a:b]) + code[b:]
    return code


def with_function(bug: Bug, text: str) -> str:
    """The text with the wrong body; lines and comments that fit are the lesson's."""
    ((name, function),) = bug.edits
    target, source = functions(text).get(name), inspect.getsource(function)
    wrong = ast.parse(source).body[0]
    if target is None or len(target.args.args) != len(wrong.args.args):
        what = "no longer there" if target is None else "called with other arguments"
        raise Gone(f"{bug.name}: the function {name} of {bug.file} is {what}")
    for there, here in zip(wrong.args.args, target.args.args, strict=True):
        source = re.sub(rf"\b{there.arg}\b", here.arg, source)
    start = target.body[ast.get_docstring(target) is not None].lineno - 1
    lines = text.splitlines()
    old = lines[start : target.end_lineno]
    new = [bare(line) for line in source.splitlines()[wrong.body[1].lineno - 1 :]]
    both, merged = difflib.SequenceMatcher(None, [bare(line) for line in old], new), []
    for tag, a, b, c, d in both.get_opcodes():
        comments = [line for line in old[a:b] if line.strip().startswith("#")]
        merged += old[a:b] if tag == "equal" else comments + new[c:d]
    return "\n".join([*lines[:start], *merged, *lines[target.end_lineno :]]) + "\n"


def bare(line: str) -> str:
    """A line without its comment."""
    return re.sub(r"\s*#.*", "", line)


def functions(text: str) -> dict[str, ast.FunctionDef]:
    """The functions of a script by their names."""
    nodes = ast.parse(text).body
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


def diff(bug: Bug) -> list[str]:
    """The lines that differ (- lesson, + bug), and a line of code beside them."""
    texts = (ROOT / bug.file).read_text(), planted(bug)
    both = list(difflib.unified_diff(*(text.splitlines() for text in texts), n=1))[2:]
    near = re.compile(r"[+-]| +[^ #\"]")  # no comments, no ends of docstrings
    lines = [line for line in both if near.match(line)]
    indent = min(len(line) - len(line[1:].lstrip()) for line in lines) - 1
    return [line[0] + line[1 + indent :] for line in lines]
