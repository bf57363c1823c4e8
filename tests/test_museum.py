"""Tests of the museum of bugs: catalogue, runner, page."""

import ast
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bugs"))
import museum  # noqa: E402
import page  # noqa: E402
import symptoms  # noqa: E402
from catalogue import BUGS  # noqa: E402

RESULTS = json.loads(museum.RESULTS.read_text())
NAMES = [bug["name"] for bug in BUGS]


def healthy_of(bug):
    return RESULTS["healthy"][museum.group_of(bug)]


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_each_bug_changes_one_to_three_lines_that_stand_in_the_lesson_once(bug):
    text = (ROOT / bug["file"]).read_text()
    for right, wrong in bug["edits"]:
        assert text.count(right) == 1 and right != wrong
    for sign in "+-":
        assert sum(line[0] == sign for line in museum.diff(bug)[2:]) <= 4
    assert 1 <= len(bug["edits"]) <= 3
    assert ast.dump(ast.parse(museum.planted(bug))) != ast.dump(ast.parse(text))
    assert bug["reported"] is None or bug["reported"] in symptoms.SYMPTOMS
    assert museum.test_of(bug)


def test_there_are_enough_bugs_of_each_lesson_and_enough_that_no_curve_shows():
    assert len(set(NAMES)) == len(NAMES) >= 44
    counts = [
        sum(museum.lesson_of(b) == lesson for b in BUGS) for lesson in page.LESSONS
    ]
    assert all(n >= least for n, least in zip(counts, (12, 10, 12, 10), strict=True))
    hidden = [bug for bug in BUGS if "hidden" in museum.seen(RESULTS, bug)]
    assert len(hidden) >= 6
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"plants {len(BUGS)} classic mistakes" in readme
    assert f"{len(hidden)} of them do not show" in readme


def test_every_bug_was_measured_with_three_seeds_and_so_were_the_healthy_runs():
    assert RESULTS["bugs"].keys() == set(NAMES)
    for runs in [*RESULTS["bugs"].values(), *map(healthy_of, BUGS)]:
        assert sorted(run["seed"] for run in runs) == [0, 1, 2]
        assert len(runs[0]["x"]) == len(runs[0]["y"]) > 3


def test_healthy_runs_show_no_symptom_but_that_of_a_healthy_curve():
    for bug in BUGS:
        assert symptoms.shown(healthy_of(bug), healthy_of(bug)) in (["hidden"], [])


def test_the_page_is_what_catalogue_and_results_say():
    assert page.PAGE.read_text() == page.text()
    for lesson in page.LESSONS:
        assert (museum.HERE / f"{Path(lesson).stem}.png").stat().st_size > 10_000


def test_the_readme_and_the_lessons_point_to_the_museum():
    for file in ("README.md", *page.LESSONS):
        assert "tests/bugs" in (ROOT / file).read_text(), file


QUICK = {
    "cartpole-sign": "falls",
    "cartpole-zero-grad-after-backward": "flat",
    "cartpole-action-drawn-again": "falls",
    "cartpole-argmax-while-collecting": "falls",
    "cartpole-returns-backwards": "entropy 0",
    "tictactoe-entropy-sign": "entropy 0",
}


def test_six_bugs_trained_again_show_their_symptoms(tmp_path):
    def train(name):
        path = tmp_path / f"{name}.json"
        said = museum.start(name, 3, path).communicate()[0]
        assert path.exists(), said
        return json.loads(path.read_text())

    shipped = {file: file.stat().st_mtime_ns for file in ROOT.glob("*.p*")}
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(train, QUICK))
    assert {file: file.stat().st_mtime_ns for file in ROOT.glob("*.p*")} == shipped
    for (name, symptom), run in zip(QUICK.items(), runs, strict=True):
        bug = museum.find(name)
        assert symptom in symptoms.shown([run], healthy_of(bug)), (name, run)
        assert symptom in museum.seen(RESULTS, bug), name


def test_an_exercise_has_one_bug_and_the_solution_names_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")
    found = set()
    for seed in range(12):
        museum.exercise(str(seed))
        asked = capsys.readouterr().out
        assert not any(name in asked for name in NAMES)
        museum.solution()
        told = capsys.readouterr().out
        name = told.split(":")[0]
        bug = museum.find(name)
        assert bug["file"].split(".")[0].split("_")[0] in asked or "game" in asked
        written = (tmp_path / "exercise" / bug["file"]).read_text()
        assert all(wrong in written for _, wrong in bug["edits"])
        found.add(name)
    assert len(found) > 6


def test_an_exercise_has_a_printed_symptom_and_a_seed_that_the_page_does_not_have(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")
    blind = {"hidden", "critic worse", "illegal", "nothing moves"}
    for seed in range(30):
        museum.exercise(str(seed))
        museum.solution()
        name = capsys.readouterr().out.split("solution\n")[1].split(":")[0]
        bug = museum.find(name)
        assert set(museum.seen(RESULTS, bug)) - blind, name
        lesson = tmp_path / "exercise" / museum.lesson_of(bug)
        assert "\nSEED = 3  #" in lesson.read_text()


def test_what_is_learned_later_is_not_said_to_be_hidden():
    keys = [museum.seen(RESULTS, bug) for bug in BUGS]
    assert any("later" in each for each in keys)
    assert not any({"later", "hidden"} <= set(each) for each in keys)


def test_a_run_of_skipped_steps_has_no_symptom_of_entropy_or_gradient():
    keys = museum.seen(RESULTS, museum.find("grpo-greedy-group"))
    assert "flat" in keys and not {"entropy 0", "gradient"} & set(keys)


def test_without_an_exercise_there_is_no_solution(tmp_path, monkeypatch):
    monkeypatch.setattr(museum, "EXERCISE", tmp_path / "exercise")
    with pytest.raises(SystemExit, match="no exercise"):
        museum.solution()


def test_eight_planted_bugs_are_caught_by_the_tests_that_are_named_for_them(capsys):
    names = [
        "cartpole-sign",
        "cartpole-padding-trained",
        "tictactoe-illegal-logits-0",
        "tictactoe-entropy-sign",
        "lander-sum-runs-across-the-end",
        "lander-max-for-min",
        "grpo-end-not-trained",
        "grpo-no-baseline",
    ]
    museum.check(names)
    assert "8 of 8 caught" in capsys.readouterr().out


def test_a_bug_that_no_test_catches_is_said(monkeypatch, capsys):
    bug = museum.find("cartpole-sign") | {"test": "test_equal_returns_give_zero_and_"}
    bug["test"] += "not_noise"
    monkeypatch.setattr(museum, "BUGS", [bug])
    with pytest.raises(SystemExit):
        museum.check([])
    assert "NOT CAUGHT" in capsys.readouterr().out


def test_a_name_that_is_no_bug_is_said_in_one_line():
    with pytest.raises(SystemExit, match="No bug is called"):
        museum.find("nothing")
