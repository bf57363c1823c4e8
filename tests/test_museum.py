"""Tests of the museum of bugs: catalogue, game, pages, mutations."""

import ast
import random
import re
import subprocess
import sys

import pytest
from lessons import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bugs"))
import museum  # noqa: E402
import mutations  # noqa: E402
import pages  # noqa: E402
import plant  # noqa: E402
import runs  # noqa: E402
import symptoms  # noqa: E402
import trial  # noqa: E402
from catalogue import BUGS, CHECKS  # noqa: E402
from plant import LESSONS, bugs_of  # noqa: E402

PLANTABLE = [bug for bug in BUGS if not plant.trouble(bug)]


def test_every_bug_can_be_planted():
    gone = [plant.trouble(bug) for bug in BUGS if bug not in PLANTABLE]
    assert not gone, "\n".join(gone)
    assert 40 <= len(BUGS) <= 48
    assert all(len(bugs_of(lesson)) >= 10 for lesson in LESSONS)
    assert all(bug.check in CHECKS for bug in BUGS)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A copy of the lessons' scripts that the museum takes for the repository."""
    for lesson in LESSONS:
        for file in plant.files_of(lesson):
            (tmp_path / file).write_text((ROOT / file).read_text())
    monkeypatch.setattr(plant, "ROOT", tmp_path)
    return tmp_path


def edit(path, pattern, new):
    """Replace all that matches in a file."""
    text, count = re.subn(pattern, new, path.read_text())
    assert count
    path.write_text(text)


def test_a_missing_line_is_said_with_its_entry_and_harms_no_other_bug(scratch):
    bug = next(bug for bug in PLANTABLE if bug.name == "lander-not-shuffled")
    right = bug.edits[0][0]
    edit(scratch / bug.file, re.escape(right), "shuffled(")
    (said,) = [why for each in PLANTABLE if (why := plant.trouble(each))]
    assert bug.name in said and right in said and bug.file in said


def test_a_comment_or_a_docstring_that_quotes_a_line_does_not_count(scratch):
    bug = next(bug for bug in PLANTABLE if bug.name == "lander-not-shuffled")
    path = scratch / bug.file
    path.write_text(
        f'"""{bug.edits[0][0]}"""\n# {bug.edits[0][0]}\n' + path.read_text()
    )
    assert bug.edits[0][1] in plant.planted(bug)


def test_a_bug_in_an_equation_survives_renamed_variables_and_arguments(scratch):
    torch = pytest.importorskip("torch")
    bug = museum.find("lander-sum-runs-across-the-end")
    flags = torch.eye(4).bool().float()
    arguments = *torch.rand(3, 4, 4), flags, flags, 0.9, 0.8
    expected = None
    for old, new in [("gae", "gae"), (r"next_advantage\b", "later"), (r"\blam\b", "x")]:
        edit(scratch / bug.file, old, new)
        tree = ast.parse(plant.planted(bug))
        (function,) = [n for n in tree.body if plant.named(n, bug.function)]
        names = {"torch": torch, "Tensor": torch.Tensor}
        exec(compile(ast.Module([function], []), "planted", "exec"), names)
        result = names[bug.function](*arguments)
        expected = result if expected is None else expected
        assert result.equal(expected)


@pytest.fixture
def game(tmp_path, monkeypatch):
    """The game in a folder of its own; gives a function that draws a certain bug."""
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")

    def draw(name):
        bug, lesson = museum.find(name), plant.lesson_of(museum.find(name))
        runs.copy_lesson(museum.EXERCISE, lesson, bug, museum.exercise_settings(bug))
        museum.remember(name=name, hints=0)
        return museum.EXERCISE / bug.file

    return draw


def test_an_exercise_is_another_bug_each_time_that_shows_itself_or_is_hard(
    game, capsys
):
    last = None
    for number, level in enumerate(["", "1", "2", "3", "4", "hard", "hard"] * 3):
        museum.exercise(level, random.Random(number))
        bug, _ = museum.the_exercise()
        assert bug.name != last
        assert ("hidden" in museum.seen(bug)) == (level == "hard") or level != "hard"
        assert not level.isdigit() or bug in bugs_of(LESSONS[int(level) - 1])
        told = capsys.readouterr().out + str((museum.EXERCISE / ".bug").read_bytes())
        assert not any(each.name in told for each in BUGS)
        written = (museum.EXERCISE / bug.file).read_text()
        assert plant.same_code(written, museum.exercise_text(bug, bug.file, True))
        assert "WRONG" not in written
        last = bug.name


def test_the_solution_knows_a_fix_from_a_wrong_fix(game, capsys):
    script = game("cartpole-sign")
    museum.solution()
    assert "not changed" in capsys.readouterr().out
    edit(script, r"return \(log_probs", "return 2 * (log_probs")
    edit(script, r"next_return = rewards\[t\] \+", "next_return = rewards[t] -")
    with pytest.raises(SystemExit):
        museum.solution()
    said = capsys.readouterr().out
    numbers = [int(number) for number in re.findall(r"line (\d+)", said)]
    lines = script.read_text().splitlines()
    assert "Not yet" in said and "cartpole-sign" not in said
    assert "2 * (log" in lines[numbers[0] - 1] and "[t] -" in lines[numbers[1] - 1]
    edit(script, r"return 2 \* \(log_probs", "return -(log_probs  ")
    museum.solution()
    said = capsys.readouterr().out
    assert "You found it" in said and "more than needed" in said
    edit(script, r"rewards\[t\] -", "rewards[t] +")
    museum.solution()
    assert "more than needed" not in capsys.readouterr().out
    edit(script, "^", "if:\n")
    with pytest.raises(SystemExit, match="line 1 .* not valid Python"):
        museum.solution()


def test_a_fix_in_other_words_is_judged_by_the_tests_of_the_bug(
    game, capsys, monkeypatch
):
    edit(game("cartpole-sign"), r"return \(log_probs", "return -1 * (log_probs")
    results = museum.results_of(LESSONS[0]) | {"caught": {"cartpole-sign": ["a test"]}}
    monkeypatch.setattr(museum, "results_of", lambda lesson: results)
    for passed in (True, False):
        monkeypatch.setattr(
            trial, "passes", lambda folder, tests, passed=passed: passed
        )
        if not passed:
            with pytest.raises(SystemExit):
                museum.solution()
        else:
            museum.solution()
        assert ("You found it, in other words" in capsys.readouterr().out) == passed


def test_hints_go_from_the_symptom_to_the_function_to_the_line(game, capsys):
    script = game("cartpole-sign")
    said = []
    for _ in range(3):
        museum.hint()
        said.append(capsys.readouterr().out)
    assert "falls below" in said[0] and "reinforce_loss()" in said[1]
    line = int(re.search(r"line (\d+)", said[2])[1])
    assert "log_probs * advantages" in script.read_text().splitlines()[line - 1]
    with pytest.raises(SystemExit, match="no other hint"):
        museum.hint()


def test_without_an_exercise_there_is_no_hint_and_no_solution(game):
    for command in (museum.hint, museum.solution):
        with pytest.raises(SystemExit, match="no exercise yet"):
            command()


def test_a_short_name_is_understood_and_a_wrong_one_gets_help(capsys):
    assert museum.find("sign").name == "cartpole-sign"
    for wrong, near in [
        ("shufled", "lander-not-shuffled"),
        ("kl-sing", "grpo-kl-sign"),
    ]:
        with pytest.raises(SystemExit, match=near):
            museum.find(wrong)
    museum.list_bugs()
    said = capsys.readouterr().out
    assert all(bug.name in said for bug in BUGS)
    assert max(map(len, said.splitlines())) <= 88


def test_a_bug_beside_a_healthy_run_is_one_table_of_two_different_programs():
    command = [sys.executable, "tests/bugs/museum.py", "sign"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    rows = [row for row in rows if row and row[0].replace(",", "").isdigit()]
    assert len(rows) > 10 and "-" in rows[-1], done.stdout + done.stderr
    assert float(rows[0][1]) < float(rows[0][2])  # the last 100 episodes
    assert "falls below" in done.stdout and "Watch it" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 88
    too_many = subprocess.run([*command, "1", "2"], cwd=ROOT, capture_output=True)
    assert too_many.returncode == 1 and too_many.stderr.count(b"\n") == 1


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_page_has_every_bug_and_says_if_the_code_has_changed(lesson, monkeypatch):
    text = pages.page(lesson)
    anchors = {
        re.sub(r"[^\w-]", "", name.replace(" ", "-"))
        for name in re.findall(r"^### (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", text)) == anchors
    assert all(bug.name in text and bug.why in text for bug in bugs_of(lesson))
    assert all(line.count("](#") <= 6 for line in text.splitlines())  # on a phone
    results = museum.results_of(lesson)
    codes = [run["code"] for group in results["bugs"].values() for run in group]
    monkeypatch.setattr(pages, "code_hash", lambda lesson: codes[0])
    assert ("with other code" in pages.page(lesson)) == (len(set(codes)) > 1)
    monkeypatch.setattr(pages, "code_hash", lambda lesson: "another")
    assert "with other code" in pages.page(lesson)


def test_every_bug_was_measured_and_every_symptom_is_shown_by_one():
    shown = set()
    for bug in BUGS:
        kept = museum.results_of(plant.lesson_of(bug))["bugs"][bug.name]
        assert [run["seed"] for run in kept] == list(museum.SEEDS)
        healthy = museum.healthy_of(bug)
        assert symptoms.shown(healthy, healthy) in (["hidden"], [])
        shown |= set(museum.seen(bug))
    assert shown == symptoms.SYMPTOMS.keys()


def test_the_tests_of_a_lesson_run_fastest_first_on_a_copy(tmp_path, monkeypatch):
    monkeypatch.setitem(plant.FACTS, "a lesson", {"tests": "test_some.py"})
    bodies = {"slow": "import time; time.sleep(0.5)", "wrong": "assert 0", "right": ""}
    text = "".join(f"def test_{n}():\n    {b or 0}\n" for n, b in bodies.items())
    (tmp_path / "test_some.py").write_text(text)
    failed, seconds = trial.run_tests(tmp_path, "a lesson", {})
    assert failed == ["test_some.py::test_wrong"] and len(seconds) == 3
    _, again = trial.run_tests(tmp_path, "a lesson", seconds, "-x")
    assert (
        "test_some.py::test_wrong" in again and "test_some.py::test_slow" not in again
    )
    assert len(trial.run_tests(tmp_path, "a lesson", seconds, slowest=0.4)[1]) == 2
    with pytest.raises(SystemExit, match="test_wrong"):
        trial.seconds_of(tmp_path, "a lesson")


@pytest.mark.parametrize("lesson", LESSONS)
def test_mutations_are_other_programs_and_miss_no_equation(lesson, monkeypatch):
    found = mutations.mutants(lesson)
    healthy = (ROOT / lesson).read_text()
    assert len({text for _, _, text in found} | {healthy}) == len(found) + 1 > 8
    monkeypatch.setitem(mutations.EQUATIONS, lesson, "no_such_function")
    with pytest.raises(SystemExit, match="no_such_function"):
        mutations.mutants(lesson)
