"""The README names what exists, its code runs, and its figures were measured."""

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
CODE_BLOCKS = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL))
QUOTED = sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PROSE)))
SHELL_LINES = CODE_BLOCKS.replace("\\\n", " ").splitlines()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
SCRIPTS = sorted(ROOT.glob("*.py"))
RESULTS = ROOT / "tests" / "benchmarks" / "results"


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
    assert "NUM_SAMPLES" in constants
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


# How figures of the benchmarks stand in the text: <name in the summary|format>.
FIGURES = {
    "cartpole": [
        "<median episodes|g> episodes and <median seconds|.1f> seconds (medians)",
    ],
    "tictactoe": [
        "after <median seconds|.0f> seconds (median)",
        "at least <lowest wins % moving first|g> %",
        "<lowest wins % moving second|g> % moving second",
        "can win <best possible wins % moving first|g> %",
    ],
    "lunarlander": [
        "land: <mean of the seeds|g> on average, at least <worst seed|.1f>",
        "| <median seconds|.0f> seconds | `lunarlander_ppo.py`",
        "<share of all episodes >= 200|.1%> of all episodes",
        "a mean of <mean of 10 seeds, 400,000 steps, FINAL_RATE = 1|.1f> "
        "(the worst seed <worst of 10 seeds, 400,000 steps, FINAL_RATE = 1|.1f>)",
    ],
    "grpo": [
        "in <random gpt2-small: time / TRL, all 8 at once|g> of its time",
        "<random gpt2-small: peak memory / TRL, all 8 at once|g> of its peak memory",
        "<default pair: seconds a step|g> seconds a step",
        "<default pair: peak GB|g> GB",
        "`gpt2` <gpt2: peak GB|g> GB, "
        "`EleutherAI/gpt-neo-125M` <EleutherAI/gpt-neo-125M: peak GB|g>, "
        "`facebook/opt-350m` <facebook/opt-350m: peak GB|g>, "
        "`gpt2-medium` <gpt2-medium: peak GB|g>, "
        "`EleutherAI/pythia-410m` <EleutherAI/pythia-410m: peak GB|g>, "
        "`gpt2-large` <gpt2-large: peak GB|g>.",
    ],
    "grpo_tiny": [
        "<CPU seconds of a run, most|.0f> seconds with the bundled models",
        "by at least <seeds 0 to 4: gain on the prompt, stds, least|.1f> standard",
    ],
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_a_result_is_the_one_that_was_measured(name):
    summary = json.loads((RESULTS / f"{name}.json").read_text())["summary"]
    text = " ".join(README.split())
    for phrase in FIGURES[name]:
        expected = re.sub(
            r"<(.+?)\|(.*?)>", lambda match: format(summary[match[1]], match[2]), phrase
        )
        assert expected in text, expected


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 320


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_line_of_a_lesson_is_wider_than_88_columns(script):
    lines = script.read_text().splitlines()
    assert max(len(line) for line in lines) <= 88


# ------------------------------------------------------------------------------------
# The code blocks
# ------------------------------------------------------------------------------------

# The shortest runs of the lessons: what is tested here is that the commands work.
SHORT = {
    "MAX_EPISODES": 16,
    "CHECK_EPISODES": 2,
    "HELD_OUT_EPISODES": 2,
    "NUM_UPDATES": 2,
    "MAX_UPDATES": 2,
    "TOTAL_STEPS": 5_000,
    "NUM_STEPS": 1,
    "NUM_SAMPLES": 4,
    "EVAL_SAMPLES": 4,
    "MAX_NEW_TOKENS": 8,
}


def shorten(script):
    """The text of a script, with the settings above."""
    text = script.read_text()
    for name, value in SHORT.items():
        text = re.sub(rf"^{name} = [\d_]+", f"{name} = {value}", text, flags=re.M)
    return text


@pytest.fixture(scope="module")
def copy_of_repository(tmp_path_factory):
    """Scripts (shortened), weights and bundled models, in a folder of their own."""
    folder = tmp_path_factory.mktemp("repository")
    for script in SCRIPTS:
        (folder / script.name).write_text(shorten(script))
    for weights in (*ROOT.glob("*.pth"), *ROOT.glob("*.pt")):
        shutil.copy(weights, folder)
    for part in ("policy", "reward"):
        shutil.copytree(ROOT / "grpo_tiny" / part, folder / "grpo_tiny" / part)
    shutil.copytree(ROOT / "tests" / "bugs", folder / "tests" / "bugs")
    for file in (ROOT / "tests").glob("test_*.py"):
        shutil.copy(file, folder / "tests")
    return folder


def run(command, folder, given=""):
    """Run a command in a folder, without a display and without the Hub."""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "empty")}
    env |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "SDL_VIDEODRIVER": "dummy"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(
        shlex.split(command, comments=True),
        cwd=folder,
        env=env,
        input=given,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "line", [x for x in SHELL_LINES if x and not x.startswith("pip")]
)
def test_every_command_of_the_readme_runs(copy_of_repository, line):
    if "--num_machines" in line:  # there is no second machine here
        options = set(re.findall(r"--\w+", line))
        known = run("accelerate launch --help", copy_of_repository).stdout
        assert options and all(option in known for option in options)
        return
    line = line.replace("--num_processes 4", "--num_processes 2")  # of two cores
    done = run(line, copy_of_repository, given="q\n")
    # A training that was cut short says in its last line that it missed its aim.
    assert done.returncode == 0 or "kept in" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) > 3


def test_the_part_of_a_script_that_the_readme_shows_stands_there():
    block = re.search(r"```text\n(def returns_to_go.*?)```", README, re.DOTALL)[1]
    script = (ROOT / "train_cartpole.py").read_text()
    for part in block.split("    ...\n"):
        assert part in script


def edited(name, folder, edit):
    """grpo_training.py on the bundled models, shortened and edited, as a module."""
    text = edit((folder / "grpo_training.py").read_text())
    for kind in ("policy", "reward"):
        text = re.sub(
            rf"^{kind.upper()}_MODEL_NAME = \"[^\"]*\"",
            f'{kind.upper()}_MODEL_NAME = "grpo_tiny/{kind}"',
            text,
            flags=re.M,
        )
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DEVICE = "cpu"
    return module


def apply(diff, text):
    """Apply a diff of the README: what it keeps or removes stands in the text once."""
    lines, place = text.splitlines(), 0
    for line in diff.splitlines():
        sign, line = line[0], line[1:]
        if sign == "+":
            lines.insert(place, line)
            place += 1
            continue
        assert lines.count(line) == 1, line
        place = lines.index(line) + (sign == " ")
        if sign == "-":
            del lines[place]
    return "\n".join(lines)


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_edit_for_lora_trains_only_the_small_matrices(copy_of_repository):
    diff = next(diff for diff in DIFFS if "peft" in diff)
    module = edited("lora", copy_of_repository, lambda text: apply(diff, text))
    trained, step = [], module.grpo_step

    def spy(accelerator, policy, *others):
        trained.append({n for n, p in policy.named_parameters() if p.requires_grad})
        return step(accelerator, policy, *others)

    module.grpo_step, module.TINY_LR = spy, 3e-4
    module.main()
    assert trained and all("lora_" in name for name in trained[0])
    before = weights_of(copy_of_repository / "grpo_tiny" / "policy")
    after = weights_of(copy_of_repository / "trained_model")
    assert before.keys() == after.keys()  # merged: a plain model that anyone can load
    moved = {n for n in before if not before[n].float().equal(after[n].float())}
    assert moved and not any("wte" in name or "ln_" in name for name in moved)


def test_the_edit_for_gradient_checkpointing_gives_the_same_weights(copy_of_repository):
    diff = next(diff for diff in DIFFS if "checkpointing" in diff)
    results, calls = [], []
    for name, edit in [("plain", str), ("saving", lambda text: apply(diff, text))]:
        module = edited(name, copy_of_repository, edit)
        step = module.grpo_step

        def spy(accelerator, policy, *others, step=step):
            layer, count = policy.transformer.h[0].mlp, []
            handle = layer.register_forward_pre_hook(lambda *_: count.append(1))
            figures = step(accelerator, policy, *others)
            handle.remove()
            calls.append(len(count))
            return figures

        module.grpo_step = spy
        module.main()
        results.append(weights_of(copy_of_repository / "trained_model"))
    assert calls == [1, 2]  # once more in the backward pass
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-5), name


def test_the_reward_function_of_the_readme_replaces_the_reward_model(
    copy_of_repository,
):
    block = next(block for block in PYTHON if "REWARD_FUNCTION" in block)

    def paste(text):
        return re.sub(r"^REWARD_FUNCTION = None.*$", lambda _: block, text, flags=re.M)

    module = edited("own_reward", copy_of_repository, paste)
    texts = ["good for health", "good", "health " + "and " * 24]
    assert module.REWARD_FUNCTION("", texts) == pytest.approx([2, 0, 1.9])
    module.main()


@pytest.mark.parametrize(
    "block", [x for x in PYTHON if "REWARD_FUNCTION" not in x], ids=lambda x: x[:20]
)
def test_every_python_block_of_the_readme_runs(copy_of_repository, block, monkeypatch):
    monkeypatch.chdir(copy_of_repository)
    model = copy_of_repository / "trained_model"
    shutil.copytree(ROOT / "grpo_tiny" / "policy", model, dirs_exist_ok=True)
    written = []
    exec(block, {"print": written.append})
    assert written
