"""Puts a bug of the catalogue into the text of its lesson."""

import ast
import difflib
import hashlib
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]
import lessons  # noqa: E402
from catalogue import BUGS, GAME, TICTACTOE, Bug  # noqa: E402
from lessons import settings_in, with_settings  # noqa: E402, F401

FACTS = json.loads((HERE / "lessons.json").read_text())  # of each lesson
LESSONS = list(FACTS)  # lesson 1 to 4


class Gone(Exception):
    """The place of a bug is no longer in the lesson; the message says which."""


def files_of(lesson: str) -> list[str]:
    """The scripts that a lesson trains with."""
    return [lesson, GAME] if lesson == TICTACTOE else [lesson]


def scripts_of(lesson: str) -> list[str]:
    """All scripts of a lesson, also those that show what was trained."""
    return next(s for s in (x.scripts for x in lessons.LESSONS.values()) if lesson in s)


def lesson_of(bug: Bug) -> str:
    """The script that trains: the bugs of the game are seen in lesson 2."""
    return TICTACTOE if bug.file == GAME else bug.file


def bugs_of(lesson: str) -> list[Bug]:
    """The bugs of a lesson."""
    return [bug for bug in BUGS if lesson_of(bug) == lesson]


def bare(text: str) -> ast.Module:
    """The code of a script, without its docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        kinds = ast.Module | ast.FunctionDef | ast.ClassDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return tree


def same_code(one: str, other: str) -> bool:
    """Are two scripts the same, but for comments and docstrings?"""
    return ast.dump(bare(one)) == ast.dump(bare(other))


def code_hash(lesson: str) -> str:
    """What a result was measured with: the code without comments and docstrings."""
    texts = [(ROOT / file).read_text() for file in files_of(lesson)]
    return hashlib.sha256(
        "".join(ast.dump(bare(t)) for t in texts).encode()
    ).hexdigest()[:12]


def planted(bug: Bug) -> str:
    """The text of the bug's script with the bug in it."""
    text = (ROOT / bug.file).read_text()
    new = with_function(bug, text) if bug.function else with_lines(bug, text)
    if same_code(new, text):
        raise Gone(f"{bug.name}: {bug.file} has this bug already, without planting it")
    return new


def with_lines(bug: Bug, text: str) -> str:
    """The text with the wrong lines; a line of which nothing is left goes."""
    code = only_code(text)
    places = []
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
    lines = [list(line) for line in text.splitlines(keepends=True)]
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (first, start), (last, end) = token.start, token.end
        docstring = token.type == tokenize.STRING and before in (
            tokenize.NEWLINE,
            tokenize.INDENT,
        )
        if token.type == tokenize.COMMENT or docstring:
            for number in range(first - 1, last):
                line = lines[number]
                left = start if number == first - 1 else 0
                right = end if number == last - 1 else len(line) - 1
                line[left:right] = " " * (right - left)
        if token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.DEDENT):
            before = token.type
    return "".join(map("".join, lines))


def with_function(bug: Bug, text: str) -> str:
    """The text with the wrong body; lines and comments that fit are the lesson's."""
    *owner, name = bug.function.split(".")
    body = ast.parse(text).body
    for each in owner:
        body = next((node.body for node in body if named(node, each)), [])
    target = next((node for node in body if named(node, name)), None)
    wrong = ast.parse(textwrap.dedent(inspect.getsource(bug.wrong))).body[0]
    if target is None or len(target.args.args) != len(wrong.args.args):
        what = "no longer there" if target is None else "called with other arguments"
        raise Gone(f"{bug.name}: the function {bug.function} of {bug.file} is {what}")
    start = target.body[ast.get_docstring(target) is not None].lineno - 1
    lines = text.splitlines()
    old, new = lines[start : target.end_lineno], wrong_body(bug)
    for there, here in zip(wrong.args.args, target.args.args, strict=True):
        new = [re.sub(rf"\b{there.arg}\b", here.arg, line) for line in new]
    indent = " " * (target.col_offset + 4)
    new = [indent + line if line else line for line in new]
    keys = [[re.sub(r"\s*#.*", "", line) for line in part] for part in (old, new)]
    merged = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *keys).get_opcodes():
        comments = [line for line in old[a:b] if line.strip().startswith("#")]
        merged += old[a:b] if tag == "equal" else comments + new[c:d]
    return "\n".join([*lines[:start], *merged, *lines[target.end_lineno :]]) + "\n"


def named(node: ast.AST, name: str) -> bool:
    """Is this the function or class of that name?"""
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name


def wrong_body(bug: Bug) -> list[str]:
    """The lines of the wrong function after its docstring, not marked."""
    source = inspect.getsource(bug.wrong)
    tree = ast.parse(source).body[0]
    lines = textwrap.dedent("\n".join(source.splitlines()[tree.body[1].lineno - 1 :]))
    lines = re.sub(r"^ *# WRONG\n", "", lines, flags=re.M)
    return lines.replace("  # WRONG", "").split("\n")


def diff(bug: Bug) -> list[str]:
    """The lines that differ (- lesson, + bug), and a line of code beside them."""
    texts = (ROOT / bug.file).read_text(), planted(bug)
    both = list(difflib.unified_diff(*(text.splitlines() for text in texts), n=1))[2:]
    near = re.compile(r"[+-]| +[^ #\"]")  # no comments, no ends of docstrings
    lines = [line for line in both if near.match(line)]
    indent = min(len(line) - len(line[1:].lstrip()) for line in lines) - 1
    return [line[0] + line[1 + indent :] for line in lines]


def trouble(bug: Bug) -> str:
    """Why a bug cannot be planted; "" if it can."""
    try:
        planted(bug)
    except Gone as problem:
        return str(problem)
    return ""
