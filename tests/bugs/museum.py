"""The museum of bugs: plant one in a lesson, train, and see what it looks like.

    python tests/bugs/museum.py                 lists the bugs
    python tests/bugs/museum.py cartpole-sign   trains with it, beside a healthy run
    python tests/bugs/museum.py exercise        writes a lesson with a bug in it; also
                                                exercise 1 to 4, that of a lesson, and
                                                exercise hard: the curve shows nothing
    python tests/bugs/museum.py hint            a little help, a little more each time
    python tests/bugs/museum.py solution        have you found it?

For those who change a lesson (NAMES: of bugs, or 1 to 4 for all of a lesson):

    python tests/bugs/museum.py check NAMES     does a test of the lesson fail?
    python tests/bugs/museum.py measure NAMES   trains three seeds; goes on where it was
    python tests/bugs/museum.py page            writes the pages and their pictures
"""

import base64
import difflib
import functools
import inspect
import itertools
import json
import os
import random
import re
import shutil
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import plant
import runs
import symptoms
import trial
from catalogue import BUGS, CHECKS, TICTACTOE, Bug
from common import code_hash, versions
from plant import FACTS, HERE, LESSONS, bugs_of, files_of, planted, trouble

EXERCISE, RESULTS = HERE / "exercise", HERE / "results"
SEEDS = (0, 1, 2)
EXERCISE_SEED = 3
ME = "python tests/bugs/museum.py"


def find(word: str) -> Bug:
    """The bug of that name, whole or without its lesson; or one line of help."""
    found = [bug for bug in BUGS if word in (bug.name, bug.name.split("-", 1)[1])]
    if len(found) == 1:
        return found[0]
    parts = {part: b.name for b in BUGS for part in (*b.name.split("-"), b.name)}
    alike = difflib.get_close_matches(word, parts)
    near = [bug.name for bug in found] or sorted({parts[part] for part in alike})
    maybe = f"Do you mean {' or '.join(near)}?" if near else f"All are in: {ME}"
    sys.exit(f"No bug is called {word}. {maybe}")


def chosen(words: tuple[str, ...]) -> list[Bug]:
    """The bugs of these names and lessons; without any, all."""
    found = []
    for word in words or "1234":
        found += bugs_of(LESSONS[int(word) - 1]) if word in "1234" else [find(word)]
    return found


def list_bugs() -> None:
    """How to use this, and every bug of each lesson."""
    print(__doc__)
    for number, lesson in enumerate(LESSONS, 1):
        names = [bug.name for bug in bugs_of(lesson)]
        page = f"tests/bugs/{FACTS[lesson]['page']}"
        print(f"Lesson {number}, {lesson}, {page}", *names, sep="\n    ")


def results_of(lesson: str) -> dict:
    """What was measured: runs of the healthy lesson, runs of each bug, its tests."""
    return json.loads((RESULTS / lesson).with_suffix(".json").read_text())


def keep(lesson: str, results: dict) -> None:
    """Write the file of a lesson, a line for each run, floats with four digits."""
    text = json.dumps(results)
    results = json.loads(text, parse_float=lambda word: float(f"{float(word):.4g}"))
    text = json.dumps(results).replace("[{", "[\n{").replace("}, {", "},\n{")
    (RESULTS / lesson).with_suffix(".json").write_text(text + "\n")


def group_of(bug: Bug) -> str:
    """The name of the healthy runs that a bug is compared with: its Settings."""
    return ", ".join(f"{name} = {value}" for name, value in bug.settings.items())


def runs_of(bug: Bug) -> tuple[list[dict], list[dict]]:
    """What was measured: the runs with a bug, and the healthy ones beside them."""
    results = results_of(bug.lesson)
    return results["bugs"].get(bug.name, []), results["healthy"].get(group_of(bug), [])


@functools.cache
def seen(bug: Bug) -> list[str]:
    """The symptoms of a bug in what was measured."""
    both = runs_of(bug)
    return symptoms.shown(*both) if all(both) else []


def measure(*words: str) -> None:
    """Train bugs and healthy lessons, unless it was done with the code of today."""
    jobs = {}
    for bug, seed in itertools.product(chosen(words), SEEDS):
        jobs[bug.lesson, "healthy", group_of(bug), seed] = bug
        jobs[bug.lesson, "bugs", bug.name, seed] = bug
    for (lesson, kind, name, seed), bug in jobs.items():
        results, code = results_of(lesson), plant.code_of(lesson)
        kept = results[kind].get(name, [])
        if any(run["seed"] == seed and run["code"] == code for run in kept):
            continue
        run = {"code": code, "date": str(date.today())}
        run |= runs.Run(bug, kind == "bugs", seed).figures()
        kept = [*(each for each in kept if each["seed"] != seed), run]
        results[kind][name] = sorted(kept, key=lambda each: each["seed"])
        machine = versions(["torch", "gymnasium", "transformers"])
        keep(lesson, results | {"machine": machine})
        print(f"{name or 'healthy':44} seed {seed} {run['end']:9.2f}", flush=True)


def check(*words: str) -> None:
    """Plant each bug: which of the lesson's tests fail? Keep their names."""
    trial.import_libraries()
    missed = []
    with trial.copy_of_repository() as folder:
        for bug in chosen(words):
            failed = trial.red_tests(folder, bug.lesson, bug.file, planted(bug), 5)
            missed += [] if failed else [bug.name]
            word = failed[0].split("::")[-1] if failed else "NOT CAUGHT"
            print(f"{bug.name:44} {word}", flush=True)
            results = results_of(bug.lesson)
            results["caught"][bug.name] = failed
            keep(bug.lesson, results)
    if missed:
        sys.exit(f"Not caught: {', '.join(missed)}")


def page() -> None:
    """Write the pages and their pictures."""
    import pages

    pages.write()


def side_by_side(columns: list[str], pair: list[runs.Run]) -> None:
    """Print the rows of both runs in one table as they come."""
    first, *others = columns
    print(" " * 8 + "".join(f"{name:>16}" for name in others))
    print(f"{first:>8}" + f"{'bug':>8} healthy" * len(others))
    tables = [runs.rows_of(run.lines()) for run in pair]
    for rows in itertools.zip_longest(*tables, fillvalue={}):
        place = next(row[first] for row in rows if row)
        cells = (row.get(name, "-") for name in others for row in rows)
        print(f"{place:>8}" + "".join(f"{cell:>8}" for cell in cells), flush=True)


def show(word: str) -> None:
    """Train with the bug and without, side by side, and say what was seen."""
    bug = find(word)
    facts = FACTS[bug.lesson]
    planted(bug)  # stops here if it cannot be planted
    print(f"{bug.lesson} with {bug.name} and without, seed {SEEDS[0]}.")
    print("'-': that run has ended. Importing the libraries takes seconds ...\n")
    pair = [runs.Run(bug, plant_it, SEEDS[0]) for plant_it in (True, False)]
    side_by_side(facts["columns"], pair)
    wrong, healthy = (run.figures() for run in pair)
    score = f"{wrong['greedy']:.4g}, healthy {healthy['greedy']:.4g}"
    print(f"\nEvaluated after training: {score}")
    for key in symptoms.shown([wrong], [healthy]):
        print(f"Seen in this run: {symptoms.words(key)}.")
    tell(bug)
    print(f"\nMore: tests/bugs/{facts['page']}, {bug.name}")


def tell(bug: Bug) -> None:
    """What the bug is."""
    print(f"\n{bug.name}: {bug.why}\n")
    print("\n".join(plant.diff(bug)))
    print(f"\nIt is {found_by(bug)}.")


def found_by(bug: Bug) -> str:
    """Which check finds a bug."""
    number = CHECKS.index(bug.check) + 1
    return f"found by check {number} of tests/bugs/README.md, {bug.check}"


# ------------------------------------------------------------------------------------
# The exercise
# ------------------------------------------------------------------------------------


def remember(bug: Bug, hints: int, drawn: list[str]) -> None:
    """Write down which bug was drawn, so that no glance at the folder tells it."""
    text = " ".join([bug.name, str(hints), *drawn])
    (EXERCISE / ".bug").write_bytes(base64.b64encode(text.encode()))


def remembered() -> list[str]:
    """The bug that was drawn, or "", the hints that were given, and earlier bugs."""
    path = EXERCISE / ".bug"
    text = base64.b64decode(path.read_bytes()).decode() if path.exists() else " 0"
    return text.split(" ")


def the_exercise() -> tuple[Bug, int, str, str]:
    """The bug that was drawn, the hints, and its script with the bug and without."""
    name, hints, *_ = remembered()
    if not name:
        sys.exit(f"There is no exercise yet: {ME} exercise")
    bug = find(name)
    texts = (exercise_text(bug, bug.file, with_bug) for with_bug in (True, False))
    return bug, int(hints), *texts


def exercise(level: str = "") -> None:
    """Write a lesson with a bug drawn at random, a new one as long as there are any."""
    if level not in ("", "1", "2", "3", "4", "hard"):
        sys.exit(f"exercise, exercise 1 to 4, or exercise hard; not exercise {level}")
    bugs = bugs_of(LESSONS[int(level) - 1]) if level.isdigit() else BUGS

    def fits(bug: Bug) -> bool:
        wanted = {"hidden"} if level == "hard" else {*symptoms.SYMPTOMS} - {"hidden"}
        return bool(wanted.intersection(seen(bug))) and not trouble(bug)

    last, _, *drawn = remembered()
    drawn.append(last)
    others = [bug for bug in bugs if fits(bug) and bug.name != last]
    bug = random.choice([bug for bug in others if bug.name not in drawn] or others)
    shutil.rmtree(EXERCISE, ignore_errors=True)
    lesson, folder = bug.lesson, os.path.relpath(EXERCISE)
    runs.copy_lesson(EXERCISE, bug, True, runs.settings_of(bug, EXERCISE_SEED))
    remember(bug, 0, drawn)
    beside = " (or the game beside it)" if lesson == TICTACTOE else ""
    meant = "".join(
        f"\n{name} = {value} is meant so: the healthy figures have a column for it."
        for name, value in bug.settings.items()
    )
    look = f"""\
Compare what it prints with the healthy figures of tests/bugs/{FACTS[lesson]["page"]},
look up there what differs, and find the lines. The run is as long as those on that
page, with another seed."""
    if level == "hard":
        look = """\
Its curve shows nothing. Which check of tests/bugs/README.md would find it? Read the
lines that a check is about, and try it on them."""
    print(f"""\
{folder}/{lesson}{beside} has a bug, in one to three lines.{meant}
Run it, {FACTS[lesson]["lasts"]} or more:  python {folder}/{lesson}
{look}
Stuck: {ME} hint
Fixed it: {ME} solution
Given up: {ME} solution show""")


def exercise_text(bug: Bug, file: str, with_bug: bool) -> str:
    """A script of the exercise as it was written, or as it would be without the bug."""
    return plant.text_of(file, bug, with_bug, runs.settings_of(bug, EXERCISE_SEED))


def code_lines(text: str) -> list[tuple[str, int]]:
    """The lines with code, without comments, and their numbers."""
    lines = enumerate(plant.only_code(text).splitlines(), 1)
    return [(re.sub(r"(?<=\S)\s+", "", line), n) for n, line in lines if line.strip()]


def changes(right: str, other: str) -> list[tuple[int, int, str]]:
    """Where a text is not the right one: which code lines of that one, and in words."""
    one, two = code_lines(right), code_lines(other)
    bare = [[line for line, _ in lines] for lines in (one, two)]
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, *bare).get_opcodes():
        if tag != "equal":
            first, last = two[min(c, len(two) - 1)][1], two[max(d, 1) - 1][1]
            where = f"line {first}" if d - c == 1 else f"lines {first} to {last}"
            where = f"after line {last} (a line is missing)" if c == d else where
            found.append((a, b, where))
    return found


def hint() -> None:
    """The symptom, then the function, then the line."""
    bug, number, wrong, right = the_exercise()
    places = changes(right, wrong)
    if number == 0:
        for said in map(symptoms.words, seen(bug)):
            print(f"Hint 1, seen in three other runs: {said}.")
        print(f"It is {found_by(bug)}.")
    elif number == 1:
        line = code_lines(right)[places[0][0]][1]
        before = "\n".join(right.splitlines()[:line])
        functions = re.findall(r"^ *def (\w+)", before, re.M)
        print(f"Hint 2: it is in {functions[-1]}() of {bug.file}.")
    elif number == 2:
        where = "; ".join(words for _, _, words in places)
        print(f"Hint 3: look at {bug.file}, {where} (as it was written).")
    else:
        sys.exit(f"There is no other hint. To see the bug: {ME} solution show")
    remember(bug, number + 1, remembered()[2:])


def solution(word: str = "") -> None:
    """Has the learner found it? With `show`: what was it?"""
    if word not in ("", "show"):
        sys.exit(f"solution, or solution show; not solution {word}")
    bug, _, wrong, right = the_exercise()
    if word == "show":
        return tell(bug)
    mine = {file: (EXERCISE / file).read_text() for file in files_of(bug.lesson)}
    for file, text in mine.items():
        try:
            compile(text, file, "exec")
        except SyntaxError as problem:
            sys.exit(f"Not yet: line {problem.lineno} of {file} is not valid Python.")
    bug_places, left, more = changes(right, wrong), [], []
    for file, text in mine.items():
        healthy = exercise_text(bug, file, False)
        same = code_hash(text) == code_hash(healthy)
        for a, b, where in [] if same else changes(healthy, text):
            near = any(a <= last and first <= b for first, last, _ in bug_places)
            (left if near and file == bug.file else more).append(f"{where} of {file}")
    found, tests = not left, results_of(bug.lesson)["caught"].get(bug.name)
    changed = code_hash(mine[bug.file]) != code_hash(wrong)
    if left and tests and changed:
        print("Not word for word as in the lesson: its tests will tell ...", flush=True)
        found = trial.passes(mine, tests)
    verdict = "You found it, in other words than ours." if left else "You found it."
    # The place is not told: whoever wants to know it asks for a hint.
    print(verdict if found else "Not yet: the bug is still there.")
    for where in more:
        print(f"Also changed, and no part of the bug: {where}")
    if not found:
        sys.exit(f"A hint: {ME} hint. To see the bug: {ME} solution show")
    tell(bug)


def main() -> None:
    """See the top of this file."""
    command, *words = sys.argv[1:] or ["list"]
    known = exercise, hint, solution, check, measure, page
    commands = {function.__name__: function for function in known}
    commands |= dict.fromkeys(("list", "help", "-h", "--help"), list_bugs)
    call = commands.get(command, functools.partial(show, command))
    try:
        inspect.signature(call).bind(*words)
    except TypeError:
        sys.exit(f"Too many arguments: {' '.join(words)}. For help: {ME} --help")
    try:
        call(*words)
    except plant.Gone as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
