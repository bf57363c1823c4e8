"""Tests of the museum of bugs: catalogue, game, pages, mutations."""

import ast
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
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


def test_every_bug_was_measured_beside_healthy_runs_that_show_no_symptom():
    for bug in BUGS:
        kept = museum.results_of(plant.lesson_of(bug))["bugs"][bug.name]
        assert [run["seed"] for run in kept] == list(museum.SEEDS)
        healthy = museum.healthy_of(bug)
        assert symptoms.shown(healthy, healthy) in (["hidden"], [])
        assert bug.check in CHECKS


def edit(path, pattern, new):
    """Replace all that matches in a file."""
    text, count = re.subn(pattern, new, path.read_text())
    assert count, pattern
    path.write_text(text)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A copy of the lessons that the museum takes for the repository."""
    for file in {bug.file for bug in BUGS}:
        (tmp_path / file).write_text((ROOT / file).read_text())
    monkeypatch.setattr(plant, "ROOT", tmp_path)
    return tmp_path


def test_a_line_that_is_gone_is_said_with_its_entry(scratch, monkeypatch):
    right, wrong = "def main()", "def main(_=0)"
    bug = replace(museum.find("cartpole-sign"), function="", edits=((right, wrong),))
    monkeypatch.setattr(plant, "BUGS", [bug])
    path = scratch / bug.file
    path.write_text(f"# {right}\n'''{right}'''\n{path.read_text()}")
    assert not plant.trouble(bug)  # comments and docstrings are no code
    edit(path, r"def main\(\)", "def another()")
    said = plant.trouble(bug)
    assert all(word in said for word in (bug.name, right, bug.file))
    assert said in pages.page(bug.file)


def test_a_bug_in_an_equation_survives_renamed_variables_and_arguments(scratch):
    bug, results = museum.find("lander-sum-runs-across-the-end"), []
    arguments = *torch.rand(3, 4, 4), torch.eye(4), torch.eye(4), 0.9, 0.8
    for old, new in [("", ""), (r"\bnext_advantage\b", "later"), (r"\blam\b", "x")]:
        edit(scratch / bug.file, old, new)
        tree = ast.parse(plant.planted(bug))
        tree.body = [node for node in tree.body if plant.named(node, bug.function)]
        names = {"torch": torch, "Tensor": torch.Tensor}
        exec(compile(tree, "planted", "exec"), names)
        results.append(names[bug.function](*arguments))
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.fixture
def game(tmp_path, monkeypatch):
    """The game in a folder of its own; gives a function that sets one exercise."""
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")

    def exercise(name="cartpole-sign"):
        bug, folder = museum.find(name), museum.EXERCISE
        runs.copy_lesson(folder, bug.file, bug, museum.exercise_settings(bug))
        museum.remember(name=name, hints=0)
        return folder / bug.file

    return exercise


def test_an_exercise_is_another_bug_each_time_and_tells_nothing(game, capsys):
    last = None
    levels = ["", "", "1", "1", "2", "3", "4", "hard", "hard", "hard", "hard"]
    for number, level in enumerate(levels):
        museum.exercise(level, random.Random(number // 2))  # the same dice twice
        bug, _ = museum.the_exercise()
        assert bug.name != last
        assert level != "hard" or "hidden" in museum.seen(bug)
        assert not level.isdigit() or bug in bugs_of(LESSONS[int(level) - 1])
        told = capsys.readouterr().out + str((museum.EXERCISE / ".bug").read_bytes())
        assert not any(each.name in told for each in BUGS)
        written = (museum.EXERCISE / bug.file).read_text()
        assert plant.same_code(written, museum.exercise_text(bug, bug.file, True))
        assert not plant.same_code(written, museum.exercise_text(bug, bug.file, False))
        assert "WRONG" not in written
        last = bug.name


def test_the_solution_tells_a_fix_from_a_wrong_fix(game, capsys, monkeypatch):
    script, passed = game(), []
    monkeypatch.setattr(museum, "passes_its_tests", lambda *_: bool(passed))
    museum.solution()
    assert "not changed" in capsys.readouterr().out
    edit(script, r"return \(log_probs", "return 2 * (log_probs")
    edit(script, r"next_return = rewards\[t\] \+", "next_return = rewards[t] -")
    with pytest.raises(SystemExit):
        museum.solution()
    said = capsys.readouterr().out
    lines = [
        script.read_text().splitlines()[int(n) - 1] for n in re.findall(r"\d+", said)
    ]
    assert "Not yet" in said and "cartpole-sign" not in said
    assert "2 * (log" in lines[0] and "[t] -" in lines[1]
    passed.append("in other words")
    museum.solution()
    assert "You found it, in other words" in capsys.readouterr().out
    edit(script, r"return 2 \* \(log_probs", "return -(log_probs  ")
    museum.solution()
    said = capsys.readouterr().out
    assert "You found it." in said and "more than needed" in said
    edit(script, "^", "if:\n")
    with pytest.raises(SystemExit, match="line 1 .* not valid Python"):
        museum.solution()


def test_hints_go_from_the_symptom_to_the_function_to_the_line(game, capsys):
    for command in (museum.hint, museum.solution):
        with pytest.raises(SystemExit, match="no exercise yet"):
            command()
    lines = game().read_text().splitlines()
    for expected in ("falls below", "reinforce_loss()", "line "):
        museum.hint()
        said = capsys.readouterr().out
        assert expected in said
    assert "log_probs * adv" in lines[int(re.search(r"line (\d+)", said)[1]) - 1]
    with pytest.raises(SystemExit, match="no other hint"):
        museum.hint()


def test_short_names_are_understood_and_wrong_ones_get_help(capsys):
    assert museum.find("sign").name == "cartpole-sign"
    for wrong, near in [
        ("shufled", "lander-not-shuffled"),
        ("kl-sing", "grpo-kl-sign"),
    ]:
        with pytest.raises(SystemExit, match=near):
            museum.find(wrong)
    museum.list_bugs()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 88


def test_a_bug_and_a_healthy_run_are_two_programs_in_one_table():
    command = [sys.executable, "tests/bugs/museum.py", "sign"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    rows = [line.split() for line in done.stdout.splitlines() if line[:9].strip("- ,")]
    rows = [row for row in rows if row[0].replace(",", "").isdigit()]
    assert len(rows) > 10 and "-" in rows[-1], done.stdout + done.stderr
    assert float(rows[0][1]) < float(rows[0][2])  # the last 100 episodes
    assert "falls below" in done.stdout and "Watch it" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 88
    too_many = subprocess.run([*command, "1", "2"], cwd=ROOT, capture_output=True)
    assert too_many.returncode == 1 and too_many.stderr.count(b"\n") == 1


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_page_has_every_bug_and_says_if_the_code_has_changed(lesson, monkeypatch):
    (code,) = {run["code"] for run in museum.results_of(lesson)["healthy"][""]}
    monkeypatch.setattr(pages, "code_hash", lambda lesson: "another")
    text = pages.page(lesson)
    heads = re.findall(r"^### (.*)$", text.replace(".", ""), re.M)
    links = set(re.findall(r"\]\(#(.*?)\)", text))
    assert links == {head.replace(" ", "-") for head in heads}
    assert all(bug.why in text for bug in bugs_of(lesson))
    assert all(line.count("](#") <= 6 for line in text.splitlines())  # on a phone
    assert "with other code" in text
    monkeypatch.setattr(pages, "code_hash", lambda lesson: code)
    assert "with other code" not in pages.measured(lesson)


def test_the_tests_of_a_lesson_run_fastest_first_on_a_copy(tmp_path, monkeypatch):
    monkeypatch.setitem(plant.FACTS, "a lesson", {"tests": "test_it.py"})
    bodies = {"slow": "import time; time.sleep(0.5)", "wrong": "assert 0", "right": "0"}
    text = "".join(f"def test_{name}(): {body}\n" for name, body in bodies.items())
    (tmp_path / "test_it.py").write_text(text)
    failed, seconds = trial.run_tests(tmp_path, "a lesson", {})
    assert failed == ["test_it.py::test_wrong"] and len(seconds) == 3
    again = trial.run_tests(tmp_path, "a lesson", seconds, "-x")[1]
    assert "test_it.py::test_wrong" in again and "test_it.py::test_slow" not in again
    assert len(trial.run_tests(tmp_path, "a lesson", seconds, slowest=0.4)[1]) == 2


@pytest.mark.parametrize("lesson", LESSONS)
def test_mutations_are_other_programs_and_miss_no_equation(lesson, monkeypatch):
    texts = [text for _, _, text in mutations.mutants(lesson)]
    assert len({*texts, (ROOT / lesson).read_text()}) == len(texts) + 1 > 8
    monkeypatch.setitem(mutations.EQUATIONS, lesson, "no_such_function")
    with pytest.raises(SystemExit, match="no_such_function"):
        mutations.mutants(lesson)
