"""One training run of a lesson, with a bug or without, and the figures read off it."""

import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from catalogue import BUGS, CARTPOLE, GRPO, LANDER, TICTACTOE, Bug
from plant import FACTS, ROOT, files_of, lessons, text_of


def copy_lesson(folder: Path, bug: Bug, with_bug: bool, settings: dict) -> None:
    """Write the lesson with its Settings, and what it needs, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    scripts = (entry.scripts for entry in lessons.LESSONS.values())
    for file in next(files for files in scripts if bug.lesson in files):
        (folder / file).write_text(text_of(file, bug, with_bug, settings))
    for part in ("policy", "reward") if bug.lesson == GRPO else ():
        models = Path("grpo_tiny", part)
        shutil.copytree(ROOT / models, folder / models, dirs_exist_ok=True)


def rows_of(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of the table that a lesson prints, by the names of their columns.

    A row has numbers only. The line above the first one is the head, if it is as long:
    the name of a column ends where its numbers end.
    """
    names, said = [], ""
    for line in map(str.rstrip, lines):
        words = list(re.finditer(r"\S+", line))
        try:
            [number(word[0]) for word in words]
        except ValueError:
            said = line
            continue
        if not names and len(said) == len(line) > 0:
            ends = [0, *(word.end() for word in words)]
            names = [said[a:b] for a, b in itertools.pairwise(ends)]
            names = [re.sub(r"\(.*\)", "", name).strip() for name in names]
            said = ""
        if len(words) == len(names) > 1:
            yield dict(zip(names, (word[0] for word in words), strict=True))


def number(word: str) -> float:
    """A number as the tables have it: 1,600 or 12% or 0.5."""
    return float(word.replace(",", "").removesuffix("%"))


def curve(xs: Sequence, ys: list, points: int = 40) -> dict:
    """A learning curve in few points, each a mean; with its start, end and best."""
    size = max(1, len(ys) // points)
    pieces = [slice(i, i + size) for i in range(0, len(ys) - size + 1, size)]
    means = [statistics.fmean(ys[piece]) for piece in pieces]
    return {
        "x": [xs[piece][-1] for piece in pieces],
        "y": means,
        "start": means[0],
        "end": statistics.fmean(means[-2:]),
        "best": max(means),
    }


def entropies(rows: list[dict]) -> dict:
    """Entropy in the first row of the table, after a fifth of them, and at the end."""
    column = [row["entropy"] for row in rows]
    places = {"entropy first": 0, "entropy early": len(column) // 5, "entropy": -1}
    return {name: column[place] for name, place in places.items()}


def read_cartpole(module, healthy, saved, rows) -> dict:
    """Figures of lesson 1; `budget used` is in episodes."""
    scores, policy, seed = saved["scores"], saved["policy"], healthy.HELD_OUT_SEED
    greedy, sampled = (
        healthy.evaluate(policy, 100, seed, way).mean() for way in (True, False)
    )
    return (
        curve(range(1, len(scores) + 1), scores, 50)
        | {"start": statistics.fmean(scores[:32])}
        | {"end": statistics.fmean(scores[-100:]), "budget used": len(scores)}
        | {"greedy": float(greedy), "sampled": float(sampled)}
        | entropies(rows)
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
    """Figures of lesson 3; the score is the return."""
    early, actor = rows[: len(rows) // 2], saved["agent"].actor
    greedy = healthy.evaluate(actor, 100, healthy.HELD_OUT_SEED, True)[0].mean()
    return (
        curve([row["steps"] for row in rows], [row["return"] for row in rows], 30)
        | {"end": rows[-1]["return"], "length": rows[-1]["length"]}
        | {"KL": statistics.median(row["KL"] for row in early)}
        | {"clipped": statistics.median(row["clipped"] for row in early) / 100}
        | {"explained": statistics.median(row["explained"] for row in rows)}
        | {"greedy": float(greedy)}
        | entropies(rows)
    )


def read_grpo(module, healthy, saved, rows) -> dict:
    """Figures of lesson 4; the score is the mean reward of a group."""
    policy, tokenizer, prompt = saved["policy"], saved["tokenizer"], healthy.PROMPTS[0]
    policy = policy.float().eval()
    healthy.POLICY_MODEL_NAME = "grpo_tiny/policy"
    healthy.REWARD_MODEL_NAME = "grpo_tiny/reward"
    *_, reward = healthy.load_models()
    healthy.torch.manual_seed(healthy.HELD_OUT_SEED)
    group = healthy.generate_group(policy, tokenizer, prompt, 64)
    scores = healthy.score_responses(reward, prompt, group["responses"])
    rewards = [row["reward"] for row in rows]
    return (
        curve([row["step"] for row in rows], rewards, 25)
        | {"end": statistics.fmean(rewards[-5:]), "greedy": scores.mean().item()}
        | entropies(rows)
        | {"cut off": statistics.fmean(group["mask"].sum(1) == healthy.MAX_NEW_TOKENS)}
        | {"KL": statistics.fmean(row["KL"] for row in rows)}
        | {"clipped": max(row["clipped"] for row in rows) / 100}
        | {"first loss": rows[0]["loss"], "first gradient": rows[0]["gradient"]}
    )


READERS = {CARTPOLE: read_cartpole, TICTACTOE: read_tictactoe}
READERS |= {LANDER: read_lander, GRPO: read_grpo}


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        return super().write(text)


def load(folder: Path, lesson: str):
    """Import a lesson from a folder, whatever was imported under its name before."""
    for file in files_of(lesson):
        sys.modules.pop(Path(file).stem, None)
    sys.path.insert(0, str(folder))
    module = importlib.import_module(Path(lesson).stem)
    sys.path.remove(str(folder))
    return module


def train(bug: Bug, with_bug: bool, settings: dict) -> dict:
    """Train with a bug, or without; gives the figures that symptoms.py reads.

    Scores of training and the printed table are those that one would see. `greedy` and
    `sampled` are measured by the healthy lesson on what was trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_lesson(Path(folder), bug, with_bug, settings)
        module = load(Path(folder), bug.lesson)
        saves, said = [], Tee()
        signature = inspect.signature(module.save_run)

        def save_run(*arguments, **named) -> str:
            saves.append(signature.bind(*arguments, **named).arguments)
            return "nothing"

        module.save_run = save_run
        # A run that misses its aim ends in SystemExit, and counts like any other.
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            module.main()
        lines = said.getvalue().splitlines()
        rows = [{x: number(row[x]) for x in row} for row in rows_of(lines)]
        module.torch.manual_seed(settings["SEED"])  # for a network as it was at first
        figures = READERS[bug.lesson](module, load(ROOT, bug.lesson), saves[-1], rows)
        return {"seed": settings["SEED"]} | figures


def settings_of(bug: Bug, seed: int) -> dict:
    """The Settings of a run with a bug, and of the healthy run beside it."""
    return FACTS[bug.lesson]["settings"] | bug.settings | {"SEED": seed}


class Run:
    """A training run in a process of its own."""

    def __init__(self, bug: Bug, with_bug: bool, seed: int) -> None:
        facts = json.dumps([bug.name, with_bug, settings_of(bug, seed)])
        command = [sys.executable, "-u", __file__, facts]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdout=pipe, text=True)

    def lines(self) -> Iterator[str]:
        """What it prints, as it comes."""
        for line in self.process.stdout:
            self.last = line
            yield line

    def figures(self) -> dict:
        """What was read off it: its last line."""
        list(self.lines())
        if self.process.wait():
            sys.exit("A run failed.")
        return json.loads(self.last)


def main() -> None:
    """What a Run starts."""
    name, *others = json.loads(sys.argv[1])
    bug = next(bug for bug in BUGS if bug.name == name)
    print(json.dumps(train(bug, *others)))


if __name__ == "__main__":
    main()
