"""The lessons as the tests see them: one entry each, and the tools that all tests use.

A new lesson needs one entry in LESSONS; tests/test_contract.py then holds it to what
every lesson promises.
"""

import ast
import functools
import importlib
import inspect
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAN, INF = math.nan, math.inf


def zero(names):
    """Settings that must not be 0."""
    return {name: [0] for name in names.split()}


@dataclass(frozen=True)
class Lesson:
    """What the tests have to know about a lesson."""

    scripts: tuple[str, ...]  # the first one trains, the last one shows the result
    weights: dict[str, str]  # Setting with the path of a file: the function to load it
    short: dict  # Settings for three updates or more, too few to reach its aim
    impossible: dict  # Settings of any of the scripts, and values that make no sense
    save_dir: str = ""  # Setting with the folder that is written instead of weights
    folders: tuple[str, ...] = ()  # what a copy of the scripts needs beside it

    @property
    def module(self):
        """The training script, imported."""
        return importlib.import_module(self.scripts[0].removesuffix(".py"))

    def module_with(self, name):
        """The first script that has this Setting, imported."""
        texts = {script: (ROOT / script).read_text() for script in self.scripts}
        script = next(script for script in texts if name in settings_in(texts[script]))
        return importlib.import_module(script.removesuffix(".py"))

    @property
    def paths(self):
        """The Settings of all its scripts that say where something is written."""
        texts = [(ROOT / script).read_text() for script in self.scripts]
        names = [name for text in texts for name in settings_in(text)]
        return [name for name in names if name.endswith(("_PATH", "_DIR"))]


LESSONS = {
    "cartpole": Lesson(
        scripts=("train_cartpole.py", "cartpoleinference.py"),
        weights={"WEIGHTS_PATH": "load_policy"},
        short={"MAX_EPISODES": 64, "EPISODES_PER_UPDATE": 8, "REPORT_EVERY": 1}
        | {"CHECK_EPISODES": 2, "HELD_OUT_EPISODES": 2},
        impossible=zero("MAX_EPISODES EPISODES_PER_UPDATE CHECK_EPISODES REPORT_EVERY")
        | zero("HELD_OUT_EPISODES HIDDEN_UNITS GIF_EVERY")
        | {"LEARNING_RATE": [-0.01, 0, NAN], "GAMMA": [1.1, -0.1, NAN]}
        | {"SEED": [-1, 10**6]},
    ),
    "tictactoe": Lesson(
        scripts=("tictactoe_actorcritic.py", "tictactoe_env.py", "tictactoe_eval.py"),
        weights={"ACTOR_PATH": "load_actor", "CRITIC_PATH": "load_critic"},
        short={"NUM_UPDATES": 3, "MAX_UPDATES": 3, "REPORT_EVERY": 1}
        | {"GAMES_PER_UPDATE": 64},
        impossible=zero("NUM_UPDATES REFRESH_EVERY REPORT_EVERY HIDDEN_UNITS")
        | {"MAX_UPDATES": [-1], "GAMES_PER_UPDATE": [1], "SEED": [-1, 500_000]}
        | {"LEARNING_RATE": [-0.01, 0, NAN], "ENTROPY_BONUS": [-0.1, NAN]}
        | {"MAX_RANDOM_CHANCE": [1.1, -0.1], "LAST_SHARE": [0, 1.1]},
    ),
    "lunarlander": Lesson(
        scripts=("lunarlander_ppo.py", "lunar_eval.py"),
        weights={"WEIGHTS_PATH": "load_agent"},
        short={"TOTAL_STEPS": 1_024, "NUM_ENVS": 4, "ROLLOUT_STEPS": 64}
        | {"REPORT_EVERY": 1, "HELD_OUT_EPISODES": 2},
        impossible=zero("NUM_ENVS ROLLOUT_STEPS EPOCHS MINIBATCH_SIZE REPORT_EVERY")
        | zero("CLIP_EPS MAX_GRAD_NORM REWARD_SCALE HIDDEN_UNITS HELD_OUT_EPISODES")
        | zero("GIF_EVERY")
        | {"LEARNING_RATE": [-0.01, 0, NAN], "FINAL_RATE": [1.5, -0.1]}
        | {"TOTAL_STEPS": [0, 100], "GAMMA": [1.1, NAN], "GAE_LAMBDA": [-0.1, 1.1]}
        | {"ENTROPY_BONUS": [-1], "VALUE_WEIGHT": [-1], "SEED": [-1, 10**6]},
    ),
    "grpo": Lesson(
        scripts=("grpo_training.py",),
        weights={},
        save_dir="SAVE_DIR",
        folders=("grpo_tiny",),
        short={"POLICY_MODEL_NAME": "grpo_tiny/policy", "DEVICE": "cpu"}
        | {"REWARD_MODEL_NAME": "grpo_tiny/reward", "NUM_STEPS": 3}
        | {"NUM_SAMPLES": 4, "EVAL_SAMPLES": 2, "MAX_NEW_TOKENS": 8},
        impossible=zero("NUM_STEPS MAX_NEW_TOKENS INNER_STEPS MICRO_BATCH_SIZE")
        | zero("PROMPTS_PER_STEP REPORT_EVERY")
        | {"LR": [-1e-5, 0, 2, NAN], "DEVICE": ["gpu"], "EVAL_PROMPTS": [[], "a text"]}
        | {"PROMPTS": [[], "a text", [""], ["a text", " "]]}
        | {"NUM_SAMPLES": [1], "EVAL_SAMPLES": [1], "SEED": [-1, 500_000]}
        | {"TOP_P": [0, 1.5], "CLIP_EPS": [0, INF], "TEMPERATURE": [0, NAN]}
        | {"KL_COEF": [-0.1, NAN], "MAX_GRAD_NORM": [-1, 0], "LORA_RANK": [-1]}
        | {"MIXED_PRECISION": ["fp16", None], "SAVE_EVERY": [-1]}
        | {"SAVE_DIR": ["grpo_tiny", "grpo_tiny/new", ".", "tests"]},
    ),
}


# ------------------------------------------------------------------------------------
# Scripts with other Settings, run as a person would run them
# ------------------------------------------------------------------------------------


@functools.cache
def settings_in(text):
    """The Settings of a script: their names, and the code of their values."""
    lines, found = text.encode().splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            last = lines[node.end_lineno - 1][: node.end_col_offset]
            code = b"".join([*lines[node.lineno - 1 : node.end_lineno - 1], last])
            name, _, value = code.decode().partition(" = ")
            if name.isupper() and name.isidentifier():
                found[name] = value
    return found


def with_settings(text, **settings):
    """The text of a script with these values of its Settings, whatever they are now."""
    present = settings_in(text)
    for name, value in settings.items():
        old, new = f"\n{name} = {present[name]}", f"\n{name} = {value!r}"
        assert text.count(old) == 1, name
        text = text.replace(old, new)
    return text


def copy_lesson(folder, lesson, **settings):
    """Copy a lesson's scripts; a Setting goes into the first script that has it."""
    for name in lesson.folders:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    left = dict(settings)
    for name in lesson.scripts:
        text = (ROOT / name).read_text()
        here = {key: left.pop(key) for key in settings_in(text) if key in left}
        (folder / name).write_text(with_settings(text, **here))
    assert not left, f"no script has the Settings {', '.join(left)}"


def quiet_environment(folder):
    """Variables for a program that may use one core, no display and no network."""
    unset = "DISPLAY", "WAYLAND_DISPLAY", "HF_TOKEN"
    variables = {name: os.environ[name] for name in os.environ if name not in unset}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return variables | {
        "PATH": programs,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "SDL_VIDEODRIVER": "dummy",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(folder / ".hub"),
    }


def run_copy(folder, lesson, command, **settings):
    """Run `python command...` in a folder with an edited copy of the lesson."""
    copy_lesson(folder, lesson, **settings)
    where = {"cwd": folder, "env": quiet_environment(folder)}
    how = {"capture_output": True, "text": True, "timeout": 300}
    program = [sys.executable, "-u", *command]
    return subprocess.run(program, stdin=subprocess.DEVNULL, **how, **where)


def assert_one_plain_line(done, *words):
    """The program ended with status 1 and one line on stderr that holds these words."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ------------------------------------------------------------------------------------
# Inside the test's own process
# ------------------------------------------------------------------------------------


def spy_on(monkeypatch, module, name):
    """A list that gets a dict for each call of module.name, from now on.

    The dict has the arguments by their names, and the result under "return".
    """
    calls, real = [], getattr(module, name)
    signature = inspect.signature(real)

    def spy(*positional, **named):
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        calls[-1]["return"] = result = real(*positional, **named)
        return result

    monkeypatch.setattr(module, name, spy)
    return calls
