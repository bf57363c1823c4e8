"""Benchmark of lesson 1: train_cartpole.py with seeds 0-19, and its "Try this" edits.

Run it on one core, alone:   taskset -c 0 python tests/benchmarks/cartpole.py

Each run calls the lesson's own main() and then scores the weights that it saved on 100
held-out episodes. Prints a table and writes results/cartpole.json beside this file, and
the learning curves of all seeds to assets/cartpole_learning_curves.png.
"""

import contextlib
import io
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import train_cartpole as lesson  # noqa: E402  (the line above finds it)

SEEDS = range(20)
TRY_THIS_SEEDS = range(3)
TRY_THIS_EPISODES = 1_500  # their budget
TRY_THIS = {
    "EPISODES_PER_UPDATE = 1, LEARNING_RATE = 0.01": {
        "EPISODES_PER_UPDATE": 1,
        "LEARNING_RATE": 0.01,
    },
    "EPISODES_PER_UPDATE = 1": {"EPISODES_PER_UPDATE": 1},
    "GAMMA = 0.9": {"GAMMA": 0.9},
    "GAMMA = 1.0": {"GAMMA": 1.0},
    "LEARNING_RATE = 0.2": {"LEARNING_RATE": 0.2},
    "no baseline": {"subtract_mean": lambda returns: returns},
}
RESULTS = Path(__file__).parent / "results" / "cartpole.json"
CURVES = ROOT / "assets" / "cartpole_learning_curves.png"


def machine() -> dict:
    """What ran it: processor, cores this process may use, Python and packages."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def train(seed: int, **changes) -> tuple[dict, list[float]]:
    """One run of the lesson's main(), parts of it changed: figures, and every score."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        changes |= {"SEED": seed, "WEIGHTS_PATH": Path(folder) / "w.pth"}
        changes |= {"CURVE_PATH": Path(folder) / "c.png"}
        for name, value in changes.items():
            undo.callback(setattr, lesson, name, getattr(lesson, name))
            setattr(lesson, name, value)
        curve, original = [], lesson.draw_learning_curve
        undo.callback(setattr, lesson, "draw_learning_curve", original)
        lesson.draw_learning_curve = lambda scores, path: curve.extend(scores)

        start, printed = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            lesson.main()
        seconds = time.perf_counter() - start

        weights = next(Path(folder).glob("w*.pth"))
        policy = lesson.load_policy(weights)
    scores = lesson.evaluate(policy, 100, lesson.HELD_OUT_SEED, greedy=True)
    reached = re.search(r"-- 475 after (\d+)", printed.getvalue())
    figures = {
        "seed": seed,
        "episodes to 475": int(reached.group(1)) if reached else None,
        "episodes": len(curve),
        "best mean of 100": float(max(running_mean(curve))),
        "seconds": round(seconds, 2),
        "perfect": weights.stem == "w",
        "greedy mean": scores.mean().item(),
        "greedy minimum": scores.min().item(),
    }
    return figures, curve


def running_mean(scores: list[float]) -> list[float]:
    """Mean of the last 100 scores at each episode from the 100th on."""
    return np.convolve(scores, np.full(100, 0.01), mode="valid").tolist()


def draw(curves: list[list[float]]) -> None:
    """Write a picture of all learning curves."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for scores in curves:
        running = running_mean(scores)
        axes.plot(range(100, 100 + len(running)), running, color="C0", alpha=0.5)
    axes.axhline(
        lesson.SOLVED_SCORE, color="green", linestyle="--", label="solved: 475"
    )
    axes.set(
        title=f"REINFORCE on {lesson.ENV_ID}, seeds 0-{len(curves) - 1}",
        xlabel="episode",
        ylabel="steps balanced, mean of 100 episodes",
    )
    axes.legend(loc="lower right")
    figure.savefig(CURVES, dpi=120)


def main() -> None:
    """Train all seeds and all variations, print the table, write JSON and picture."""
    runs, curves = [], []
    print("seed  episodes to 475  episodes  seconds  greedy mean  minimum")
    for seed in tqdm(SEEDS, disable=None, leave=False):
        figures, curve = train(seed)
        runs.append(figures)
        curves.append(curve)
        tqdm.write(
            f"{seed:4}{figures['episodes to 475'] or 'never':>17}"
            f"{figures['episodes']:10}{figures['seconds']:9.1f}"
            f"{figures['greedy mean']:13.2f}{figures['greedy minimum']:9.0f}"
        )
    summary = {
        "seeds that reached 475": sum(r["episodes to 475"] is not None for r in runs),
        "seeds with exactly 500.0 greedy": sum(r["greedy mean"] == 500 for r in runs),
        "lowest greedy mean": min(run["greedy mean"] for run in runs),
        "median episodes to 475": statistics.median(r["episodes to 475"] for r in runs),
        "median episodes": statistics.median(run["episodes"] for run in runs),
        "median seconds": statistics.median(run["seconds"] for run in runs),
        "slowest seconds": max(run["seconds"] for run in runs),
    }
    for name, value in summary.items():
        print(f"{name:35}{value:g}")

    try_this = {}
    print(f"\nTry this, at most {TRY_THIS_EPISODES} episodes; medians:")
    for name, changes in TRY_THIS.items():
        changes = {"MAX_EPISODES": TRY_THIS_EPISODES, **changes}
        try_this[name] = [train(seed, **changes)[0] for seed in TRY_THIS_SEEDS]
        middle = {
            figure: statistics.median(run[figure] for run in try_this[name])
            for figure in ("episodes", "best mean of 100", "greedy mean", "seconds")
        }
        solved = sum(run["episodes to 475"] is not None for run in try_this[name])
        perfect = sum(run["perfect"] for run in try_this[name])
        print(f"{name}: {solved} of {len(TRY_THIS_SEEDS)} solved, {perfect} perfect")
        print(f"    {middle}")

    draw(curves)
    report = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "numpy": np.__version__,
        },
        "command": "taskset -c 0 python tests/benchmarks/cartpole.py",
        "runs": runs,
        "summary": summary,
        "try_this": try_this,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
