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

from plant import (
    CARTPOLE,
    GRPO,
    LANDER,
    ROOT,
    TICTACTOE,
    Bug,
    files_of,
    lesson_of,
    planted,
    settings_in,
    with_settings,
)

# Runs short enough to try; the healthy runs beside the bugs have these Settings too.
SHORT = {
    CARTPOLE: {"MAX_EPISODES": 1_600, "CHECK_EPISODES": 300},
    TICTACTOE: {"NUM_UPDATES": 400, "MAX_UPDATES": 400, "REPORT_EVERY": 20},
    LANDER: {"TOTAL_STEPS": 300_000, "REPORT_EVERY": 3},
    GRPO: {
        "POLICY_MODEL_NAME": "grpo_tiny/policy",
        "REWARD_MODEL_NAME": "grpo_tiny/reward",
    },
}
# How long such a run takes on a usual core, in words.
LASTS = {CARTPOLE: "10 seconds", TICTACTOE: "10 seconds", LANDER: "half a minute"}
LASTS |= {GRPO: "20 seconds"}


def copy_lesson(folder: Path, lesson: str, bug: Bug | None, settings: dict) -> None:
    """Write the lesson with its bug and Settings, and what it needs, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files_of(lesson):
        text = planted(bug) if bug and bug.file == file else (ROOT / file).read_text()
        here = {k: v for k, v in settings.items() if k in settings_in(text)}
        (folder / file).write_text(with_settings(text, **here))
    for part in ("policy", "reward") if lesson == GRPO else ():
        models = Path("grpo_tiny", part)
        shutil.copytree(ROOT / models, folder / models, dirs_exist_ok=True)


# ------------------------------------------------------------------------------------
# What a lesson prints
# ------------------------------------------------------------------------------------


class Table:
    """Finds the rows of the table that a lesson prints, whatever columns it has."""

    def __init__(self) -> None:
        self.columns, self.said = [], []

    def row(self, line: str) -> dict[str, str] | None:
        """The words of a line by the names of their columns, if it is a row."""
        words = line.split()
        try:
            [number(word) for word in words]
        except ValueError:
            names = re.split(r" {2,}", re.sub(r" *\([^)]*\)", "", line).strip())
            self.said = [name.strip() for name in names]
            return None
        if len(self.said) == len(words):
            self.columns = self.said  # the line above was the head of the table
        if len(words) < 2 or len(words) != len(self.columns):
            return None
        return dict(zip(self.columns, words, strict=True))


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


def moved(first, last) -> dict:
    """The share of weights that are not what they were."""
    first, last = first.state_dict(), last.state_dict()
    same = [(first[name] == last[name]).float().mean().item() for name in first]
    return {"weights moved": 1 - statistics.fmean(same)}


# ------------------------------------------------------------------------------------
# The figures of each lesson, from what it saved and printed
# ------------------------------------------------------------------------------------


def read_cartpole(module, healthy, saved, rows) -> dict:
    """Figures of lesson 1; `budget used` in episodes."""
    policy, scores = saved["policy"], saved["scores"]
    first = module.PolicyNetwork(healthy.HIDDEN_UNITS)
    held_out = {
        name: healthy.evaluate(policy, 100, healthy.HELD_OUT_SEED, greedy=greedy)
        for name, greedy in [("greedy", True), ("sampled", False)]
    }
    return (
        curve(list(range(1, len(scores) + 1)), scores, 50)
        | {"start": statistics.fmean(scores[:32])}
        | {"end": statistics.fmean(scores[-100:])}
        | entropies(rows)
        | {name: score.mean().item() for name, score in held_out.items()}
        | moved(first, policy)
    )


def read_tictactoe(module, healthy, saved, rows) -> dict:
    """Figures of lesson 2; the score is the mean of wins in both seats, in %."""
    import torch

    actor, critic = saved["actor"], saved["critic"]
    first = module.ActorNetwork(healthy.HIDDEN_UNITS)

    def results(actor, kind: int) -> list:  # 0: numbers of lines, 1: probabilities
        return [healthy.play_every_line(actor, seat)[kind] for seat in healthy.SEATS]

    wins = [100 * result[0] for result in results(actor, 1)]
    at_first = [100 * result[0] for result in results(first, 1)]
    # How often the planted code lets the trained actor make an illegal move.
    torch.manual_seed(0)
    env = module.gym.make_vec(module.ENV_ID, num_envs=200)
    both, never = torch.arange(200) % 2 == 0, torch.zeros(200)
    boards, _, actions, mine, _ = module.play_games(env, actor, actor, both, never)
    taken = (boards.gather(2, actions[..., None])[..., 0] != 0)[mine]
    # The critic's error where it can be known: on games of the healthy code.
    env = healthy.gym.make_vec(healthy.ENV_ID, num_envs=2_000)
    both, chances = torch.arange(2_000) % 2 == 0, torch.full((2_000,), 0.25)
    boards, _, _, mine, outcome = healthy.play_games(env, actor, actor, both, chances)
    values = critic(boards[mine]).detach().flatten()
    score = [sum(at_first) / 2] + [(r["wins 1st"] + r["wins 2nd"]) / 2 for r in rows]
    return (
        curve([0.0] + [row["updates"] for row in rows], score)
        | {"end": score[-1], "wins 1st": wins[0], "wins 2nd": wins[1]}
        | {"greedy": sum(wins) / 2}
        | entropies(rows)
        | {"lines lost": sum(result[2] for result in results(actor, 0))}
        | {"loss": statistics.median(row["loss"] for row in rows)}
        | {"illegal moves": taken.float().mean().item()}
        | {
            "critic error": ((outcome.expand_as(mine)[mine] - values) ** 2)
            .mean()
            .item()
        }
        | moved(first, actor)
    )


def read_lander(module, healthy, saved, rows) -> dict:
    """Figures of lesson 3; the score is the return, the budget is in steps."""
    agent, early = saved["agent"], rows[: len(rows) // 2]
    first = module.ActorCritic(healthy.HIDDEN_UNITS)
    held_out = {
        name: healthy.evaluate(agent.actor, 100, healthy.HELD_OUT_SEED, greedy=greedy)
        for name, greedy in [("greedy", True), ("sampled", False)]
    }
    return (
        curve([row["steps"] for row in rows], [row["return"] for row in rows], 30)
        | {"end": rows[-1]["return"], "length": rows[-1]["length"]}
        | entropies(rows)
        | {"KL": statistics.median(row["KL"] for row in early)}
        | {"clipped": statistics.median(row["clipped"] for row in early) / 100}
        | {"explained": statistics.median(row["explained"] for row in rows)}
        | {name: float(scores[0].mean()) for name, scores in held_out.items()}
        | moved(first.actor, agent.actor)
    )


def read_grpo(module, healthy, saved, rows) -> dict:
    """Figures of lesson 4; the score is the mean reward of a group."""
    import torch
    import transformers

    policy, tokenizer, history = saved["policy"], saved["tokenizer"], saved["history"]
    folder = ROOT / "grpo_tiny" / "policy"
    first = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=policy.dtype
    )
    policy = policy.float().eval()
    healthy.POLICY_MODEL_NAME = "grpo_tiny/policy"
    healthy.REWARD_MODEL_NAME = "grpo_tiny/reward"
    *_, judge, judge_tokenizer = healthy.load_models()
    torch.manual_seed(healthy.HELD_OUT_SEED)
    prompt = healthy.PROMPTS[0]
    _, ids = healthy.generate_group(policy, tokenizer, prompt, 64)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    mask = healthy.completion_mask(ids, tokenizer.eos_token_id)
    scored = healthy.score_responses(judge, judge_tokenizer, prompt, texts)
    rewards = [group.mean().item() for group in history]
    return (
        curve(list(range(len(rewards))), rewards, 25)
        | {"end": statistics.fmean(rewards[-5:]), "budget used": len(rewards)}
        | entropies(rows)
        | {"greedy": scored.mean().item(), "length": mask.sum(1).float().mean().item()}
        | {"cut off": (mask.sum(1) == healthy.MAX_NEW_TOKENS).float().mean().item()}
        | {"KL": statistics.fmean(row["KL"] for row in rows)}
        | {"clipped": max(row["clipped"] for row in rows)}
        | {"first loss": rows[0]["loss"], "first gradient": rows[0]["gradient"]}
        | moved(first.float(), policy)
    )


READERS = {
    CARTPOLE: read_cartpole,
    TICTACTOE: read_tictactoe,
    LANDER: read_lander,
    GRPO: read_grpo,
}

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
            found |= READERS[lesson](module, healthy, saves[-1], rows)
        return found


def start(bug: Bug, plant_it: bool, seed: int, path: Path) -> subprocess.Popen:
    """Begin a run in a process of its own, which writes its figures to a file."""
    command = [sys.executable, "-u", __file__, bug.name, str(plant_it), str(seed), path]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe, errors = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=errors, text=True)


def main() -> None:
    """What `start` starts."""
    from plant import BUGS

    name, plant_it, seed, path = sys.argv[1:]
    bug = next(bug for bug in BUGS if bug.name == name)
    lesson = lesson_of(bug)
    settings = SHORT[lesson] | bug.settings | {"SEED": int(seed)}
    found = train(lesson, bug if plant_it == "True" else None, settings)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
