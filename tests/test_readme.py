"""What the pages say works: commands and code run, and what a page names exists."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.test_utils.testing import AccelerateTestCase
from lessons import LESSONS, ROOT, copy_lesson, quiet_environment

FOLDERS = ROOT / "grpo_tiny", ROOT / "tests", ROOT / "assets"
FILES = [*ROOT.iterdir(), *(path for top in FOLDERS for path in top.rglob("*"))]
PAGES = sorted(str(path.relative_to(ROOT)) for path in FILES if path.suffix == ".md")
EACH_PAGE = pytest.mark.parametrize("page", [ROOT / page for page in PAGES], ids=PAGES)
CODE = "\n".join(path.read_text() for path in FILES if path.suffix == ".py")
README = ROOT / "README.md"


def blocks(page, *languages):
    """The blocks of code on a page that are in one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page):
    """The lines of a page that a shell runs."""
    text = "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def quoted(page):
    """What stands in `backticks` on a page."""
    return sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))))


def anchors(page):
    """Where a link into a page can lead: headings as GitHub names them, and ids."""
    text = prose(page)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.M)
    names = [re.sub(r"[^\w\- ]", "", x).lower().replace(" ", "-") for x in headings]
    again = [f"{name}-{names[:i].count(name)}" for i, name in enumerate(names)]
    return {*names, *again, *re.findall(r"(?:id|name)=\"([^\"]+)\"", text)}


def is_there(name):
    """Does such a file exist somewhere, or does a run of a lesson write it?"""
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    patterns = [p.strip("/") for p in patterns if p and not p.startswith("#")]
    name = name.strip("./")
    by_running = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    return by_running or any(f"/{file}".endswith(f"/{name}") for file in FILES)


@EACH_PAGE
def test_every_file_that_a_page_names_exists_or_is_written_by_running(page):
    endings = (".py", ".pth", ".pt", ".png", ".gif", ".txt", ".json", ".md", "/")
    names = [word for word in quoted(page) if word.endswith(endings)]
    names += re.findall(r"(?<![\w/])[\w./]+\.py\b", "\n".join(commands(page)))
    names = [name for name in names if not set(name) & set(" ()<>*")]
    assert not [name for name in names if not is_there(name)]


@EACH_PAGE
def test_every_setting_that_a_page_names_stands_in_the_code(page):
    names = [re.match(r"[A-Z][A-Z0-9_]+(?=$| = )", word) for word in quoted(page)]
    names = {match[0] for match in names if match and not is_there(match[0])}
    missing = [n for n in names if not re.search(rf'^ *{n}\b.*=|"{n}"', CODE, re.M)]
    assert not missing


@EACH_PAGE
def test_every_link_and_picture_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page))
    for link in [a or b for a, b in links if "://" not in a + b]:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@EACH_PAGE
def test_no_formula_has_an_escape_that_github_would_eat(page):
    text = re.sub(r"`[^`\n]+`", "", prose(page))  # in ```math, everything is left alone
    assert "$$" not in text
    inline = re.findall(r"\$([^$]+)\$", text)
    assert not [x for x in inline if re.search(r"\\[!-/:-@\[-`{-~]", x)]


def test_every_lesson_is_named_in_the_readme():
    names = quoted(README)
    assert not [s for x in LESSONS.values() for s in x.scripts if s not in names]


# ------------------------------------------------------------------------------------
# What the README lets a reader run
# ------------------------------------------------------------------------------------

PROGRAM = r"python \S+\.py|accelerate|torchrun"
RUN = [line for line in commands(README) if re.match(PROGRAM, line)]
PYTHON = blocks(README, "python")


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The repository with short Settings, in a folder of its own."""
    folder = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "exercise")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    facts = json.loads((ROOT / "tests" / "bugs" / "lessons.json").read_text())
    for lesson in LESSONS.values():
        copy_lesson(folder, lesson, **lesson.short)
        facts[lesson.scripts[0]]["settings"] = lesson.short  # of the museum
    (folder / "tests" / "bugs" / "lessons.json").write_text(json.dumps(facts))
    for weights in (*ROOT.glob("*.pth"), *ROOT.glob("*.pt")):
        shutil.copy(weights, folder)
    return folder


@pytest.mark.parametrize("line", RUN)
def test_every_command_of_the_readme_runs(copied, line):
    if "--num_machines" in line:  # there is no second machine here
        assert launch_command_parser().parse_args(shlex.split(line)[2:])
        return
    line = line.replace("--num_processes 4", "--num_processes 2")  # of two cores
    how = {"capture_output": True, "text": True, "input": "q\n", "timeout": 600}
    how |= {"cwd": copied, "env": quiet_environment(copied)}
    done = subprocess.run(shlex.split(line, comments=True), **how)
    assert "Traceback" not in done.stderr and done.stdout
    # A training that is cut so short misses its aim, and says so in one line.
    assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch, capsys, block):
    shutil.copytree(ROOT / "grpo_tiny" / "policy", tmp_path / "trained_model")
    monkeypatch.chdir(tmp_path)
    exec(block, names := {})
    if "REWARD_FUNCTION" in names:  # it takes the place of a Setting
        lesson, folder = LESSONS["grpo"], str(tmp_path / "rewarded")
        for name, value in (lesson.short | names | {"SAVE_DIR": folder}).items():
            if name.isupper():
                monkeypatch.setattr(lesson.module, name, value)
        lesson.module.main()
        AccelerateTestCase().tearDown()  # it keeps its state for the whole process
    assert capsys.readouterr().out
