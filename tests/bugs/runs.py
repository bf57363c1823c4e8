"""One training run of a lesson, with a bug or without, and the figures read off it."""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import plant
from catalogue import GRPO, Bug
from plant import ROOT, files_of, lesson_of


def copy_lesson(folder: Path, lesson: str, bug: Bug | None, settings: dict) -> None:
    """Write the lesson with its bug and Settings, and what it needs, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in plant.scripts_of(lesson):
        text = (ROOT / file).read_text()
        text = plant.planted(bug) if bug and bug.file == file else text
        text = plant.with_settings(text, **settings) if file == lesson else text
        (folder / file).write_text(text)
    for part in ("policy", "reward") if lesson == GRPO else ():
        models = Path("grpo_tiny", part)
        shutil.copytree(ROOT / models, folder / models, dirs_exist_ok=True)


# ------------------------------------------------------------------------------------
# What a lesson prints
# ------------------------------------------------------------------------------------


class Table:
    """Finds the rows of the table that a lesson prints, whatever columns it has.

    A row has numbers only. The line above the first one is the head, if it is as long:
    the name of a column ends where its numbers end.
    """

    def __init__(self) -> None:
        self.names, self.said = [], ""

    def row(self, line: str) -> dict[str, str] | None:
        """The words of a line by the names of their columns, if it is a row."""
        line = line.rstrip()
        words = list(re.finditer(r"\S+", line))
        try:
            [number(word[0]) for word in words]
        except ValueError:
            self.said = line
            return None
        if len(self.said) == len(line) > 0:
            ends = [0, *(word.end() for word in words)]
            names = [self.said[a:b] for a, b in zip(ends, ends[1:], strict=False)]
            self.names = [re.sub(r"\(.*\)", "", name).strip() for name in names]
            self.said = ""
        if len(words) < 2 or len(words) != len(self.names):
            return None
        return dict(zip(self.names, (word[0] for word in words), strict=True))


def number(word: str) -> float:
    """A number as the tables have it: 1,600 or 12% or 0.5."""
    return float(word.replace(",", "").removesuffix("%"))


def rows_of(text: str) -> list[dict[str, float]]:
    """All rows of the printed table."""
    table = Table()
    rows = [row for line in text.splitlines() if (row := table.row(line))]
    return [{name: number(word) for name, word in row.items()} for row in rows]


def curve(xs: list, ys: list, points: int = 40) -> dict:
    """A learning curve in few points, each a mean; with its start, end and best."""
    size = max(1, len(ys) // points)
    pieces = [slice(i, i + size) for i in range(0, len(ys) - size + 1, size)]
    means = [statistics.fmean(ys[piece]) for piece in pieces]
    return {
        "x": [round(xs[piece][-1], 1) for piece in pieces],
        "y": [round(mean, 3) for mean in means],
        "start": means[0],
        "end": statistics.fmean(means[-2:]),
        "best": max(means),
        "budget used": xs[-1],
    }


def entropies(rows: list[dict]) -> dict:
    """Entropy in the first row of the table, after a fifth of them, and at the end."""
    column = [row["entropy"] for row in rows]
    places = {"entropy first": 0, "entropy early": len(column) // 5, "entropy": -1}
    return {name: column[place] for name, place in places.items()}


def held_out(healthy, policy, pick=lambda scores: scores) -> dict:
    """The mean scores of 100 held-out episodes, by the healthy lesson."""
    seed, ways = healthy.HELD_OUT_SEED, {"greedy": True, "sampled": False}
    scores = {
        name: healthy.evaluate(policy, 100, seed, way) for name, way in ways.items()
    }
    return {name: float(pick(each).mean()) for name, each in scores.items()}


# ------------------------------------------------------------------------------------
# The figures of each lesson, from what it saved and printed
# ------------------------------------------------------------------------------------


def read_cartpole(module, healthy, saved, rows) -> dict:
    """Figures of lesson 1; `budget used` in episodes."""
    scores = saved["scores"]
    return (
        curve(list(range(1, len(scores) + 1)), scores, 50)
        | {"start": statistics.fmean(scores[:32])}
        | {"end": statistics.fmean(scores[-100:])}
        | entropies(rows)
        | held_out(healthy, saved["policy"])
    )


def read_tictactoe(module, healthy, saved, rows) -> dict:
    """Figures of lesson 2; the score is the mean of wins in both seats, in %."""
    first = module.ActorNetwork(healthy.HIDDEN_UNITS)  # the actor before its training
    wins = [healthy.play_every_line(first, seat)[1][0] for seat in healthy.SEATS]
    score = [(row["wins 1st"] + row["wins 2nd"]) / 2 for row in rows]
    last = rows[-1]
    return (
        curve([0.0] + [row["updates"] for row in rows], [50 * sum(wins), *score])
        | {"end": score[-1], "greedy": score[-1]}
        | {seat: last[seat] for seat in ("wins 1st", "wins 2nd")}
        | {"lines lost": last["lost 1st"] + last["lost 2nd"]}
        | {"loss": statistics.median(row["loss"] for row in rows)}
        | entropies(rows)
    )


def read_lander(module, healthy, saved, rows) -> dict:
    """Figures of lesson 3; the score is the return, the budget is in steps."""
    early = rows[: len(rows) // 2]
    return (
        curve([row["steps"] for row in rows], [row["return"] for row in rows], 30)
        | {"end": rows[-1]["return"], "length": rows[-1]["length"]}
        | {"KL": statistics.median(row["KL"] for row in early)}
        | {"clipped": statistics.median(row["clipped"] for row in early) / 100}
        | {"explained": statistics.median(row["explained"] for row in rows)}
        | entropies(rows)
        | held_out(healthy, saved["agent"].actor, lambda scores: scores[0])
    )


def read_grpo(module, healthy, saved, rows) -> dict:
    """Figures of lesson 4; the score is the mean reward of a group."""
    import torch

    policy, tokenizer, prompt = saved["policy"], saved["tokenizer"], healthy.PROMPTS[0]
    policy = policy.float().eval()
    healthy.POLICY_MODEL_NAME = "grpo_tiny/policy"
    healthy.REWARD_MODEL_NAME = "grpo_tiny/reward"
    *_, reward = healthy.load_models()
    torch.manual_seed(healthy.HELD_OUT_SEED)
    group = healthy.generate_group(policy, tokenizer, prompt, 64)
    scores = healthy.score_responses(reward, prompt, group["responses"])
    length = group["mask"].sum(1).float()
    rewards = [row["reward"] for row in rows]
    return (
        curve([row["step"] for row in rows], rewards, 25)
        | {"end": statistics.fmean(rewards[-5:]), "budget used": len(rewards)}
        | entropies(rows)
        | {"greedy": scores.mean().item(), "length": length.mean().item()}
        | {"cut off": (length == healthy.MAX_NEW_TOKENS).float().mean().item()}
        | {"KL": statistics.fmean(row["KL"] for row in rows)}
        | {"clipped": max(row["clipped"] for row in rows) / 100}
        | {"first loss": rows[0]["loss"], "first gradient": rows[0]["gradient"]}
    )


READERS = [read_cartpole, read_tictactoe, read_lander, read_grpo]

# ------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def load(folder: Path, lesson: str):
    """Import a lesson from a folder, whatever was imported under its name before."""
    for file in files_of(lesson):
        sys.modules.pop(Path(file).stem, None)
    sys.path.insert(0, str(folder))
    module = importlib.import_module(Path(lesson).stem)
    sys.path.remove(str(folder))
    return module


def train(lesson: str, bug: Bug | None, settings: dict) -> dict:
    """Train with a bug, or without; gives the figures that symptoms.py reads.

    Scores of training and the printed table are those that one would see. `greedy` and
    `sampled` are measured by the healthy lesson on what was trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_lesson(Path(folder), lesson, bug, settings)
        module = load(Path(folder), lesson)
        saves, out = [], Tee()
        signature = inspect.signature(module.save_run)

        def save_run(*arguments, **named) -> str:
            saves.append(signature.bind(*arguments, **named).arguments)
            return "nothing"

        module.save_run, ended_by = save_run, ""
        with contextlib.redirect_stdout(out):
            try:
                module.main()
            except SystemExit as stop:
                ended_by = str(stop.code)
            except Exception as problem:
                ended_by = f"{type(problem).__name__}: {problem}"
        found = {"seed": settings["SEED"], "ended by": ended_by.replace(folder, "")}
        if saves:
            import torch

            torch.manual_seed(settings["SEED"])  # for a network as it was at first
            healthy = load(ROOT, lesson)
            rows = rows_of(out.getvalue())
            found |= READERS[plant.LESSONS.index(lesson)](
                module, healthy, saves[-1], rows
            )
        return found


def start(bug: Bug, plant_it: bool, seed: int, path: Path) -> subprocess.Popen:
    """Begin a run in a process of its own, which writes its figures to a file."""
    command = [sys.executable, "-u", __file__, bug.name, str(plant_it), str(seed), path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe, errors = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=errors, text=True)


def main() -> None:
    """What `start` starts."""
    name, plant_it, seed, path = sys.argv[1:]
    bug = next(bug for bug in plant.BUGS if bug.name == name)
    lesson = lesson_of(bug)
    settings = plant.FACTS[lesson]["settings"] | bug.settings | {"SEED": int(seed)}
    found = train(lesson, bug if plant_it == "True" else None, settings)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
