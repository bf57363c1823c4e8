"""Benchmark of lesson 1: train_cartpole.py with seeds 0-19, and its "Try this" edits.

    taskset -c 0 python tests/benchmarks/cartpole.py      on one core, 4 minutes

Each run calls the lesson's own main() and then scores the weights that it saved on 100
held-out episodes. Prints a line for each run and writes results/cartpole.json beside
this file. common.py lists the words that may follow the command. The parts:

    seeds    Seeds 0-19, and assets/cartpole_learning_curves.png.
    edits    Each edit of "Try this", and the lesson without a baseline, seeds 0-2.
"""

import numpy as np
from common import ASSETS, run_main, run_parts
from matplotlib.figure import Figure

import train_cartpole as lesson

SEEDS = range(20)
EDIT_SEEDS = range(3)
EDIT_EPISODES = 1_500  # their budget
SINGLE = {"EPISODES_PER_UPDATE": 1}
EDITS = {
    "EPISODES_PER_UPDATE = 1, LEARNING_RATE = 0.01": SINGLE | {"LEARNING_RATE": 0.01},
    "EPISODES_PER_UPDATE = 1": SINGLE,
    "GAMMA = 0.9": {"GAMMA": 0.9},
    "GAMMA = 1.0": {"GAMMA": 1.0},
    "LEARNING_RATE = 0.2": {"LEARNING_RATE": 0.2},
    "no baseline": {"subtract_mean": lambda returns: returns},
}


def train(seed: int, **changes) -> tuple[dict, list[float], list[str]]:
    """One run of the lesson's main(): figures, every score, and what it printed."""
    with run_main(lesson, SEED=seed, **changes) as run:
        (weights,) = run.folder.iterdir()
        policy = lesson.load_policy(weights)
    scores, means = run.history, running_mean(run.history)
    held_out = lesson.evaluate(policy, 100, lesson.HELD_OUT_SEED, greedy=True)
    batch = changes.get("EPISODES_PER_UPDATE", lesson.EPISODES_PER_UPDATE)
    # The lesson looks at the mean of the last 100 scores after each batch.
    looks = [n for n in range(batch, len(scores) + 1, batch) if n >= 100]
    solved = [n for n in looks if means[n - 100] >= lesson.SOLVED_SCORE]
    figures = {
        "seed": seed,
        "episodes to 475": next(iter(solved), None),
        "episodes": len(scores),
        "best mean of 100": round(max(means), 2),
        "seconds": round(run.seconds, 2),
        "perfect": weights.name == lesson.WEIGHTS_PATH.name,
        "greedy mean": round(held_out.mean().item(), 2),
        "greedy minimum": held_out.min().item(),
    }
    print(figures, flush=True)
    return figures, scores, run.printed


def running_mean(scores: list[float]) -> list[float]:
    """Mean of the last 100 scores at each episode from the 100th on."""
    sums = np.cumsum([0.0, *scores])
    return ((sums[100:] - sums[:-100]) / 100).tolist()


def seeds() -> dict:
    """Every seed as the lesson is, and the picture of all learning curves."""
    runs, curves, printed = zip(*(train(seed) for seed in SEEDS), strict=True)
    draw(curves)
    perfect = sum(run["greedy mean"] == 500 for run in runs)
    summary = {"seeds": len(runs), "seeds with exactly 500.0 greedy": perfect}
    return {"summary": summary, "runs": runs, "printed by seed 0": printed[0]}


def edits() -> dict:
    """Every edit, with a budget that is smaller than the lesson's."""
    runs = []
    for edit, changes in EDITS.items():
        for seed in EDIT_SEEDS:
            figures, *_ = train(seed, MAX_EPISODES=EDIT_EPISODES, **changes)
            runs.append({"edit": edit} | figures)
    return {"runs": runs}


def draw(curves: tuple[list[float], ...]) -> None:
    """Write a picture of all learning curves."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for scores in curves:
        running = running_mean(scores)
        axes.plot(range(100, 100 + len(running)), running, color="C0", alpha=0.5)
    axes.axhline(lesson.SOLVED_SCORE, color="green", ls="--", label="solved: 475")
    axes.set_title(f"REINFORCE on {lesson.ENV_ID}, seeds 0-{len(curves) - 1}")
    axes.set(xlabel="episode", ylabel="steps balanced, mean of 100 episodes")
    axes.legend(loc="lower right")
    figure.savefig(ASSETS / "cartpole_learning_curves.png", dpi=120)


if __name__ == "__main__":
    packages = ["torch", "gymnasium", "numpy"]
    run_parts(["train_cartpole.py"], packages, {"seeds": seeds, "edits": edits})
