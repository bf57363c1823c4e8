"""The README names only what exists: commands, files, constants, links."""

import fnmatch
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
CODE_BLOCKS = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL))
QUOTED = sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE)))
SCRIPTS = sorted(ROOT.glob("*.py"))
RESULTS = sorted(ROOT.glob("tests/benchmarks/results/*.json"))


def written_by_running(name: str) -> bool:
    """True for files that git ignores: what the lessons write when they are run."""
    patterns = (ROOT / ".gitignore").read_text().split("\n")
    patterns = [p.strip("/") for p in patterns if p and not p.startswith("#")]
    return any(fnmatch.fnmatch(name.strip("/"), pattern) for pattern in patterns)


def test_the_two_commands_stand_at_the_top():
    top = README[:2000]
    assert "\npip install -r requirements.txt && python train_cartpole.py\n" in top
    assert "\npip install -r requirements.txt && python -m pytest\n" in top


def test_every_script_that_a_command_runs_exists():
    scripts = re.findall(r"(\S+\.py)\b", CODE_BLOCKS)
    assert "train_cartpole.py" in scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_every_file_that_the_text_names_exists_or_is_written_by_running():
    endings = (".py", ".pth", ".pt", ".png", ".gif", ".txt", ".json", ".md", "/")
    names = [word for word in QUOTED if word.endswith(endings) and " " not in word]
    assert len(names) > 5
    for name in names:
        assert (ROOT / name).exists() or written_by_running(name), name


def test_every_constant_that_the_text_names_stands_in_a_script():
    code = "\n".join(script.read_text() for script in SCRIPTS)
    constants = [
        re.match(r"[A-Z0-9_]+", word).group()
        for word in QUOTED
        if re.fullmatch(r"[A-Z][A-Z0-9_]+( = .*)?", word) and word != "LICENSE"
    ]
    assert "EPISODES_PER_UPDATE" in constants
    for name in constants:
        assert re.search(rf"^{name}\b.*=", code, re.MULTILINE), name


def test_every_local_link_and_picture_resolves():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    links += re.findall(r"(?:src|href)=\"([^\"]+)\"", README)
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
    local = [link for link in links if "://" not in link]
    assert local
    for link in local:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (ROOT / link.split("#")[0]).exists(), link


def test_every_lesson_of_the_top_level_is_in_the_table_of_lessons():
    table = [line for line in README.splitlines() if line.startswith("|")]
    for script in SCRIPTS:
        assert any(f"`{script.name}`" in line for line in table), script.name


@pytest.mark.parametrize("results", RESULTS, ids=lambda results: results.stem)
def test_every_figure_of_a_summary_table_is_the_one_that_was_measured(results):
    for name, value in json.loads(results.read_text())["summary"].items():
        assert f"| {name} | {value:g} |" in README, name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_line_of_a_lesson_is_wider_than_88_columns(script):
    lines = script.read_text().splitlines()
    assert max(len(line) for line in lines) <= 88
