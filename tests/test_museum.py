"""Tests of the museum of bugs: catalogue, game, pages, mutations."""

import ast
import random
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lessons import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bugs"))
import museum  # noqa: E402
import mutations  # noqa: E402
import pages  # noqa: E402
from catalogue import BUGS, CARTPOLE, CHECKS  # noqa: E402
from museum import plant, runs, symptoms, trial  # noqa: E402
from plant import FACTS, LESSONS, bugs_of, code_hash  # noqa: E402


def edit(path, pattern, new):
    text, count = re.subn(pattern, new, path.read_text())
    assert count, pattern
    path.write_text(text)


def test_every_bug_can_be_planted():
    gone = [said for bug in BUGS if (said := plant.trouble(bug))]
    assert not gone, "\n".join(gone)


def test_a_line_of_text_as_long_as_the_row_below_it_is_no_new_head():
    lines = ["  step  reward", "     0    0.50", "    an answer.", "     1    0.75"]
    assert [row["reward"] for row in runs.rows_of(lines)] == ["0.50", "0.75"]


def test_every_bug_was_measured_beside_healthy_runs_that_show_no_symptom():
    for bug in BUGS:
        kept, healthy = museum.runs_of(bug)
        assert [run["seed"] for run in kept] == list(museum.SEEDS)
        assert symptoms.shown(healthy, healthy) in (["hidden"], [])
        assert bug.check in CHECKS


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A copy of lesson 1 that the museum takes for the original."""
    monkeypatch.setattr(plant, "ROOT", tmp_path)
    (tmp_path / CARTPOLE).write_text((ROOT / CARTPOLE).read_text())
    return tmp_path / CARTPOLE


def test_a_line_that_is_gone_is_said_with_its_entry(script, monkeypatch):
    right, wrong = "def main()", "def main(_=0)"
    bug = replace(museum.find("cartpole-sign"), edits=((right, wrong),))
    monkeypatch.setattr(plant, "BUGS", [bug])
    script.write_text(f"# {right}\n'''{right}'''\n{script.read_text()}")
    assert not plant.trouble(bug)  # comments and docstrings are no code
    edit(script, r"def main\(\)", "def another()")
    said = plant.trouble(bug)
    assert all(word in said for word in (bug.name, right, bug.file))
    assert said in pages.page(bug.file)


def test_a_bug_in_an_equation_survives_renamed_variables_and_arguments(script):
    bug = museum.find("cartpole-reward-one-step-late")
    ((name, _),) = bug.edits
    for old, new in [("", ""), (r"\bnext_return\b", "later"), (r"\bgamma\b", "x")]:
        script.write_text(re.sub(old, new, script.read_text()))
        wrong = plant.functions(plant.planted(bug))[name]
        names = {"torch": torch, "Tensor": torch.Tensor}
        exec(compile(ast.unparse(wrong), "planted", "exec"), names)
        assert names[name](torch.ones(3), 0.5).tolist() == [1.5, 1, 0]


@pytest.fixture
def game(tmp_path, monkeypatch):
    """Sets an exercise in a folder of its own; gives the path of its script."""
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")

    def start():
        bug, folder = museum.find("cartpole-sign"), museum.EXERCISE
        runs.copy_lesson(folder, bug, True, runs.settings_of(bug, museum.EXERCISE_SEED))
        museum.remember(bug, hints=0, drawn=[])
        return folder / bug.file

    return start


def test_an_exercise_is_a_new_bug_each_time_and_tells_nothing(game, capsys):
    drawn = []
    for number, level in enumerate(["", "", *"1" * 12, "2", "3", "hard", "hard", "4"]):
        random.seed(number // 2)  # the same dice twice
        museum.exercise(level)
        bug, _, wrong, right = museum.the_exercise()
        shown = [x for x in bugs_of(LESSONS[0]) if {*museum.seen(x)} - {"hidden"}]
        new = [x.name for x in shown if not plant.trouble(x) and x.name not in drawn]
        assert level != "1" or not new or bug.name in new
        assert bug.name not in drawn[-1:]
        assert level != "hard" or "hidden" in museum.seen(bug)
        assert not level.isdigit() or bug in bugs_of(LESSONS[int(level) - 1])
        told = capsys.readouterr().out + str((museum.EXERCISE / ".bug").read_bytes())
        assert not any(each.name in told for each in BUGS)
        assert (museum.EXERCISE / bug.file).read_text() == wrong
        assert code_hash(wrong) != code_hash(right) and "WRONG" not in wrong
        drawn.append(bug.name)


def test_the_solution_tells_a_fix_from_a_wrong_fix(game, capsys, monkeypatch):
    script, passed = game(), []
    monkeypatch.setattr(trial, "passes", lambda *_: bool(passed))
    with pytest.raises(SystemExit):
        museum.solution()
    assert "Not yet" in capsys.readouterr().out
    edit(script, r"(?m)^GAMMA = .*", "GAMMA = 0.5")
    with pytest.raises(SystemExit):
        museum.solution()
    said = capsys.readouterr().out  # the place of the change, and not that of the bug
    assert "Not yet" in said and len(re.findall(r"line \d+", said)) == 1
    edit(script, r"return \(log_probs", "return 2 * (log_probs")
    with pytest.raises(SystemExit):
        museum.solution()
    said, lines = capsys.readouterr().out, script.read_text().splitlines()
    (place,) = [lines[int(number) - 1] for number in re.findall(r"line (\d+)", said)]
    assert "Not yet" in said and "cartpole-sign" not in said and "GAMMA" in place
    passed.append("in other words")
    museum.solution()
    assert "You found it, in other words" in capsys.readouterr().out
    passed.clear()
    edit(script, r"return 2 \* \(log_probs", "return -(log_probs  ")
    museum.solution()
    said = capsys.readouterr().out
    assert "You found it." in said and "Also changed" in said
    edit(script, "^", "if:\n")
    with pytest.raises(SystemExit, match="line 1 .* not valid Python"):
        museum.solution()


def test_a_fix_is_tested_by_whole_files_once_a_test_has_another_name(monkeypatch):
    files, gone = [], "tests/test_cartpole.py::gone"

    def run(command, **options):
        files.append(command[-1])
        return SimpleNamespace(returncode=4 if command[-1] == gone else 0)

    monkeypatch.setattr(trial.subprocess, "run", run)
    assert trial.passes({}, [gone])
    assert files == [gone, "tests/test_cartpole.py"]


def test_hints_go_from_the_symptom_to_the_function_to_the_line(game, capsys):
    for command in (museum.hint, museum.solution):
        with pytest.raises(SystemExit, match="no exercise yet"):
            command()
    lines = game().read_text().splitlines()
    for expected in ("falls below", "reinforce_loss()", "line "):
        museum.hint()
        said = capsys.readouterr().out
        assert expected in said
    line = lines[int(re.search(r"line (\d+)", said)[1]) - 1]
    assert f"+{line.strip()}" in plant.diff(museum.find("cartpole-sign"))
    with pytest.raises(SystemExit, match="no other hint"):
        museum.hint()


WRONG_COMMANDS = {
    "shufled": "lander-not-shuffled",
    "kl-sing": "grpo-kl-sign",
    "entropy-sign": "tictactoe-entropy-sign or lander-entropy-sign",
    "sign 1": "Too many",
    "exercise 5": "exercise 1 to 4",
}


@pytest.mark.parametrize("words, said", WRONG_COMMANDS.items())
def test_a_wrong_command_is_answered_in_a_line_of_help(words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["museum.py", *words.split()])
    with pytest.raises(SystemExit, match=said):
        museum.main()


def test_a_bug_and_a_healthy_run_are_two_programs_in_one_table(capsys, monkeypatch):
    usual = FACTS[CARTPOLE]["settings"]
    shorter = usual | {"MAX_EPISODES": 288, "SOLVED_SCORE": 60}
    monkeypatch.setitem(FACTS[CARTPOLE], "settings", shorter)
    museum.show("sign")
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if re.match(r" +\d+ ", line)]
    assert len(rows) == 6 and rows[-1][2] == "-", said  # only one goes on to the end
    assert float(rows[0][1]) < float(rows[0][2])  # the last 100 episodes
    assert "falls below" in said and "Watch it" not in said


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_page_has_every_bug_and_says_if_the_code_has_changed(lesson, monkeypatch):
    monkeypatch.setattr(pages, "code_of", lambda _: "another")
    text = pages.page(lesson)
    heads = re.findall(r"^### (.*)$", text.replace(".", ""), re.M)
    links = set(re.findall(r"\]\(#(.*?)\)", text))
    assert links == {head.replace(" ", "-") for head in heads}
    assert all(bug.why in text for bug in bugs_of(lesson))
    assert "with other code" in text
    (code,) = {run["code"] for run in museum.results_of(lesson)["healthy"][""]}
    monkeypatch.setattr(pages, "code_of", lambda _: code)
    assert "with other code" not in pages.measured(lesson)


def test_the_tests_of_a_lesson_run_fastest_first_on_a_copy(tmp_path, monkeypatch):
    monkeypatch.setitem(FACTS, "a lesson", {"tests": "test_it.py"})
    bodies = {"slow": "import time; time.sleep(0.5)", "wrong": "assert 0", "right": "0"}
    text = "".join(f"def test_{name}(): {body}\n" for name, body in bodies.items())
    (tmp_path / "test_it.py").write_text(text)
    failed, seconds = trial.run_tests(tmp_path, "a lesson", {})
    assert failed == ["test_it.py::test_wrong"] and len(seconds) == 3
    again = trial.run_tests(tmp_path, "a lesson", seconds, at_most=1)[1]
    assert "test_it.py::test_wrong" in again and "test_it.py::test_slow" not in again
    monkeypatch.setattr(trial, "SLOW", 0.4)  # left out, as another one has failed
    assert max(trial.run_tests(tmp_path, "a lesson", seconds)[1].values()) < 0.4


@pytest.mark.parametrize("lesson", LESSONS)
def test_mutations_are_other_programs_and_miss_no_equation(lesson, monkeypatch):
    programs, found = [], mutations.mutants(lesson)
    for name, _, text in [*found, (found[-1][0], "", (ROOT / lesson).read_text())]:
        programs.append(ast.dump(plant.functions(text)[name]))
    assert len({*programs}) == len(found) + 1 > 9
    monkeypatch.setitem(mutations.EQUATIONS, lesson, "no_such_function")
    with pytest.raises(SystemExit, match="no_such_function"):
        mutations.mutants(lesson)
