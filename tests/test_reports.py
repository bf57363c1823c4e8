"""The evidence page says what the benchmarks measured, and all of them can be rerun."""

import copy
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()


def load(name):
    """A script of tests/benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = load("report")
RESULTS = {p.stem: json.loads(p.read_text()) for p in report.RESULTS.glob("*.json")}
RESULTS.pop("times", None)


def page_of(results, folder):
    """The page that report.py writes from these results."""
    folder.mkdir(exist_ok=True)
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return report.page(folder)


def claimed(page):
    """The cells of the table of claims, row by row."""
    table = page.split("## At a glance")[1].split("\n## ")[0].strip()
    return [re.split(r" \| ", row.strip("| ")) for row in table.splitlines()[2:]]


# ------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------


def test_the_page_is_what_report_writes_from_the_results():
    message = "run: python tests/benchmarks/report.py"
    assert report.page() == PAGE, message


def test_every_claim_has_a_figure_and_a_command_that_exists():
    rows = claimed(PAGE)
    assert len(rows) == len(report.CLAIMS) and {row[0][1] for row in rows} == {*"1234"}
    for _, claim, figure, command in rows:
        assert report.MISSING not in figure + command, claim
        assert re.search(r"\d", figure), claim
        assert (ROOT / re.search(r"\S+\.py", command)[0]).is_file(), claim


@pytest.mark.parametrize("name", RESULTS)
def test_every_figure_of_a_summary_is_on_the_page(name):
    section = PAGE.split(f"\n### `{name}.py`\n")[1].split("\n### ")[0]
    for key, value in RESULTS[name]["summary"].items():
        assert f"| {key} | {report.show(value)} |" in section, key
    assert RESULTS[name]["command"] in section
    for fact in [
        *RESULTS[name]["machine"].values(),
        *RESULTS[name]["versions"].values(),
    ]:
        assert report.show(fact) in section


def test_every_run_is_on_the_page():
    for result in RESULTS.values():
        for run in result["runs"]:
            cells = [
                report.show(value)
                for key, value in run.items()
                if not isinstance(value, dict | list) and key != "fingerprint"
            ]
            assert f"| {' | '.join(cells)} |" in PAGE, run


def test_no_figure_of_a_claim_is_typed_in_by_hand(tmp_path):
    results, allowed = copy.deepcopy(RESULTS), set()
    for n, result in enumerate(results.values()):
        for part in filter(lambda part: isinstance(part, dict), result.values()):
            for key, value in part.items():
                if isinstance(value, int | float):
                    part[key] = 700_000_000 + 1_000 * n + len(allowed)
                    allowed.add(report.show(part[key]))
        result["runs"] = result["runs"][:1] * (31 + n)
        allowed.add(str(31 + n))
    for _, claim, figure, _ in claimed(page_of(results, tmp_path)):
        numbers = set(re.findall(r"\d[\d.,]*\d|\d", figure))
        assert numbers and numbers <= allowed, claim


def test_no_measured_figure_stands_in_the_words_of_report_py():
    source = (BENCHMARKS / "report.py").read_text()
    words = re.sub(r"\{[^{}]*\}", "", source.replace('"\n        "', ""))
    assert not re.findall(r"\d\.\d|\d ?%|\d s\b", words)


def test_what_a_benchmark_adds_appears_by_itself(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["lunarlander"]["frontier"] = [{"steps": 200_000, "greedy mean": 123.25}]
    results["lunarlander"]["frontier"] += [{"steps": 300_000, "greedy mean": 234.5}]
    results["lunarlander"]["peers"] = {
        "RL Zoo's settings": {"seed": 3, "greedy mean": 111.5},
        "our settings": {"seed": 3, "greedy mean": 112.5},
    }
    results["grpo"]["runs"][0]["new column"] = 9.75
    results["grpo"]["summary"]["new figure"] = 8.25
    results["cartpole"]["text"] = ["no rows, but no reason to fail"]
    results["sorting"] = {"command": "python sorting.py", "summary": {"speed": 77.5}}
    page = page_of(results, tmp_path)
    ours = next(r for r in results["lunarlander"]["runs"] if r["seed"] == 3)
    for line in (
        "#### Frontier\n\n| steps | greedy mean |\n",
        "\n| 200,000 | 123.2 |\n| 300,000 | 234.5 |\n",
        "| RL Zoo's settings | 3 | 111.5 |\n| our settings | 3 | 112.5 |\n"
        f"| this repository | 3 | {report.show(ours['greedy mean'])} |",
        "| new figure | 8.25 |",
        "| new column |",
        "| 9.75 |",
        "| speed | 77.5 |",
    ):
        assert line in page, line


@pytest.mark.parametrize("key", sorted({k for r in RESULTS.values() for k in r}))
def test_a_missing_key_leaves_a_page_that_says_so(tmp_path, key):
    results = {
        name: {k: v for k, v in result.items() if k != key}
        for name, result in RESULTS.items()
    }
    needed = key in ("summary", "runs", "end to end", "command", "machine", "versions")
    assert (report.MISSING in page_of(results, tmp_path)) == needed


def test_without_any_results_every_figure_is_missing(tmp_path):
    rows = claimed(page_of({}, tmp_path))
    assert len(rows) == len(report.CLAIMS)
    assert all(report.MISSING in figure for _, _, figure, _ in rows)


def test_every_link_and_picture_of_the_page_resolves():
    links = re.findall(r"\]\(([^)\s]+)\)", PAGE)
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
    assert sum(link.endswith(".png") for link in links) >= 4
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (BENCHMARKS / link).exists(), link


def test_what_is_not_measured_is_said():
    part = PAGE.split("## What is not measured")[1]
    assert "GPU" in part and "DeBERTa" in part


# ------------------------------------------------------------------------------------
# Rerunning all of them
# ------------------------------------------------------------------------------------


def test_all_runs_every_benchmark_and_every_claim_command():
    rerun = load("all")
    scripts = {command.split()[0] for command in rerun.COMMANDS}
    for script in {*scripts, rerun.REPORT}:
        assert (ROOT / script).is_file(), script
    others = {"all.py", "report.py"}
    present = {path.name for path in BENCHMARKS.glob("*.py")} - others
    assert {Path(script).name for script in scripts} == present
    commands = " ".join(f"{command}`" for command in rerun.COMMANDS)
    for *_, command in claimed(PAGE):
        assert re.search(r"tests/benchmarks/.*`", command)[0] in commands


@pytest.fixture
def rerun(tmp_path, monkeypatch):
    """all.py with three commands, each of which writes its name into log.txt."""
    module = load("all")
    write = "open('log.txt', 'a').write('{}')"
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(write.format(name))
    (tmp_path / "page.py").write_text(write.format("p"))
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(module, "COMMANDS", ["a.py", "b.py 1", "c.py"])
    monkeypatch.setattr(module, "REPORT", "page.py")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "TIMES", tmp_path / "times.json")
    monkeypatch.setattr(module, "REAL_MODEL", "model")
    return module


def ran(rerun):
    """What has been run since this was last asked."""
    log = rerun.ROOT / "log.txt"
    names = log.read_text() if log.exists() else ""
    log.write_text("")
    return names


def test_all_are_run_in_order_and_their_times_are_kept_and_shown(rerun, capsys):
    rerun.main()
    assert ran(rerun) == "abcp"
    assert "b.py 1: starts; last time never run" in capsys.readouterr().out
    kept = json.loads(rerun.TIMES.read_text())
    assert list(kept["seconds"]) == rerun.COMMANDS
    kept["seconds"]["b.py 1"] = 3_723.0
    rerun.TIMES.write_text(json.dumps(kept))
    rerun.main()  # a finished round is followed by a new one
    assert ran(rerun) == "abcp"
    assert re.search(r"b.py 1: 0:00:0\d; last time 1:02:03", capsys.readouterr().out)


def test_a_failure_does_not_stop_the_rest_and_only_it_is_repeated(rerun):
    good = (rerun.ROOT / "b.py").read_text()
    (rerun.ROOT / "b.py").write_text(good + "; raise SystemExit(3)")
    with pytest.raises(SystemExit, match="b.py 1"):
        rerun.main()
    assert ran(rerun) == "abcp"
    assert "b.py 1" not in json.loads(rerun.TIMES.read_text())["seconds"]
    (rerun.ROOT / "b.py").write_text(good)
    rerun.main()
    assert ran(rerun) == "bp"
    rerun.main()
    assert ran(rerun) == "abcp"


def test_an_interrupted_round_continues_where_it_was(rerun):
    good = (rerun.ROOT / "b.py").read_text()
    press = "; import os, signal, time; os.kill(os.getppid(), signal.SIGINT)"
    (rerun.ROOT / "b.py").write_text(good + press + "; time.sleep(20)")
    with pytest.raises(SystemExit, match="Interrupted"):
        rerun.main()
    assert ran(rerun) == "ab"
    (rerun.ROOT / "b.py").write_text(good)
    rerun.main()
    assert ran(rerun) == "bcp"


def test_without_the_pretrained_model_nothing_starts(rerun, monkeypatch):
    monkeypatch.setattr(rerun, "REAL_MODEL", "nowhere")
    with pytest.raises(SystemExit, match="nowhere"):
        rerun.main()
    assert ran(rerun) == ""


def test_the_times_are_on_the_page_and_no_result_of_their_own(tmp_path):
    (tmp_path / "times.json").write_text('{"seconds": {"a.py": 90.0, "b.py": 6.0}}')
    page = report.page(tmp_path)
    assert "| `a.py` | 1.5 |" in page.split("## How long each benchmark takes")[1]
    assert "times.py" not in page


def test_each_command_gets_this_python_the_model_and_one_core(rerun):
    (rerun.ROOT / "a.py").write_text(
        "import os, sys; cores = getattr(os, 'sched_getaffinity', lambda _: [0])(0); "
        "seen = sys.executable, os.environ['REAL_MODEL'], len(cores); "
        "open('log.txt', 'a').write(repr(seen))"
    )
    assert rerun.run("a.py")
    if shutil.which("taskset"):
        assert ran(rerun) == repr((sys.executable, "model", 1))
    assert not rerun.run("missing.py")
