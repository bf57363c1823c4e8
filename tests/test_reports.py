"""Results know the code that they were measured with; all of them can be renewed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402  (the line above finds it)
import report  # noqa: E402

LESSON = '''"""What it teaches."""
RATE = 0.5  # a step
def gradient(x):
    """2 x"""
    slope = 2 * x  # by hand
    return RATE * slope
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with one lesson, one result and a short page."""
    (folder := tmp_path / "tests" / "benchmarks").mkdir(parents=True)
    for name in ("common.py", "report.py", "run_all.py"):
        shutil.copy(BENCHMARKS / name, folder)
    (tmp_path / "lesson.py").write_text(LESSON)
    for module in (common, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", folder / "results")
    monkeypatch.setattr(report, "FOLDER", folder)
    origin = {"date": "2026-01-31", "minutes": 1.5, "machine": common.machine()}
    origin |= {"versions": {"torch": "2"}, "code": common.code_of(["lesson.py"])}
    common.write_results("a", "seeds", {"summary": {"score": 12.5}}, origin)
    common.write_results("a", "edits", {"runs": [{"seed": 0, "steps": 37}]}, origin)
    (folder / "page.md").write_text("{measured}\n\n* It is {a seeds: score}.\n")
    return folder


def test_the_hash_sees_the_code_and_not_comments_and_docstrings():
    same = ["# a step", "# half\n"], ["2 x", "The slope."], ["What it", "It"]
    other = ["0.5", "0.25"], ["2 * x", "3 * x"], ["slope", "k"], ["gradient", "g"]
    for old, new in same + other:
        edited = LESSON.replace(old, new)
        unchanged = common.code_hash(edited) == common.code_hash(LESSON)
        assert edited != LESSON and unchanged == ([old, new] in same), new


def test_a_result_of_other_code_is_marked_on_the_page_and_fails_nothing(house):
    assert report.STALE not in report.page()
    (common.ROOT / "lesson.py").write_text(LESSON.replace("0.5", "0.25"))
    lines = [line for line in report.page().splitlines() if report.STALE in line]
    assert len(lines) == 3 and "12.5" in lines[2]  # a row for each part, and the figure
    (common.ROOT / "lesson.py").write_text(LESSON.replace("# by hand", ""))
    assert report.STALE not in report.page()


def test_a_figure_that_no_result_has_is_missing_on_the_page_and_fails_nothing(house):
    (house / "page.md").write_text("{a seeds: speed}\n{rows b seeds runs: seed}\n")
    assert report.page().count(report.MISSING) == 2


def test_check_lists_the_figures_of_the_readme_that_no_result_has(house, capsys):
    (common.ROOT / "README.md").write_text("It has 12.5 or 37.\n\n12.4 or 0.5.\n")
    assert report.check() == 1 and "README.md:3" in capsys.readouterr().out


def test_every_result_has_a_day_versions_and_the_hash_of_a_script():
    for path in common.RESULTS.glob("*.json"):
        for origin in (d["origin"] for d in json.loads(path.read_text()).values()):
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", origin["date"])
            assert origin["versions"]["torch"] and origin["machine"]["processor"]
            for script, code in origin["code"].items():
                assert (ROOT / script).is_file() and re.fullmatch("[0-9a-f]{12}", code)


def test_patched_puts_everything_back_and_refuses_what_is_not_there():
    root = common.ROOT
    with pytest.raises(KeyError), common.patched(common, ROOT=1, RESULTS=2):
        assert (common.ROOT, common.RESULTS) == (1, 2)
        raise KeyError
    assert common.ROOT is root and common.RESULTS != 2
    with pytest.raises(AttributeError):
        common.patched(common, ROOTS=1).__enter__()


def test_run_all_goes_on_where_it_stopped(house):
    log = common.ROOT / "log.txt"

    def run_all(*words):
        log.write_text("")
        command = [sys.executable, house / "run_all.py", *words]
        status = subprocess.run(command, capture_output=True).returncode
        return log.read_text(), status

    def write(name, *, works):
        code = "from common import run_parts\n"
        for part in "xy":
            code += f"def {part}():\n    open('log.txt', 'a').write('{name}{part} ')\n"
            code += f"    return {{}} if {works or part == 'x'} else 1 / 0\n"
        code += "if __name__ == '__main__':\n    run_parts(['lesson.py'], [], "
        (house / f"{name}.py").write_text(code + "{'x': x, 'y': y})\n")

    write("b", works=False)
    write("c", works=True)
    assert run_all() == ("bx by cx cy ", 1)
    write("b", works=True)
    assert run_all() == ("by ", 0)
    assert run_all() == run_all("2000-01-01") == ("", 0)
    assert run_all("2999-01-01") == ("bx by cx cy ", 0)
    (common.ROOT / "lesson.py").write_text(LESSON.replace("0.5", "0.25"))
    assert run_all() == ("bx by cx cy ", 0)


def test_parts_that_the_page_names_exist_and_no_mark_is_left_over():
    page = (BENCHMARKS / "README.md").read_text()
    assert "{" not in page
    for script, part in re.findall(r"([a-z_/]+\.py) ([a-z_]+)`", page):
        folders = ROOT, BENCHMARKS, ROOT / "grpo_tiny"
        found = [path / script for path in folders if (path / script).is_file()]
        is_part = re.compile(rf'"{part}": |^def {part}\(', re.M)
        assert found and is_part.search(found[0].read_text()), script
