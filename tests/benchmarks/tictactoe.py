"""Benchmark of lesson 2: tictactoe_actorcritic.py with seeds 0-9, and its "Try this".

    taskset -c 0 python tests/benchmarks/tictactoe.py     on one core, 5 minutes

Each run calls the lesson's own main() and then follows every line of play of the agent
that it saved. Prints a line for each run and writes results/tictactoe.json beside this
file. common.py lists the words that may follow the command. The parts:

    seeds    Seeds 0-9, and assets/tictactoe_learning_curves.png.
    edits    Each edit of "Try this", seeds 0-2.
"""

import torch
from common import ASSETS, run_main, run_parts
from matplotlib.figure import Figure

import tictactoe_actorcritic as lesson
import tictactoe_eval as report_card

SEEDS = range(10)
EDIT_SEEDS = range(3)
EDITS = {
    "MAX_RANDOM_CHANCE = 0.0": {"MAX_RANDOM_CHANCE": 0.0},
    "ENTROPY_BONUS = 0.0": {"ENTROPY_BONUS": 0.0},
    "REFRESH_EVERY = 2_000": {"REFRESH_EVERY": 2_000},
}


def train(seed: int, **settings: float) -> tuple[dict, list[tuple], list[str]]:
    """One run of the lesson's main(): figures, its checks, and what it printed."""
    with run_main(lesson, SEED=seed, **settings) as run:
        path = next(run.folder.glob(f"{lesson.ACTOR_PATH.stem}*"))
        actor = lesson.load_actor(path)
        updates = torch.load(path, weights_only=True)["updates"]
    (first, chances_first), (second, chances_second) = (
        lesson.play_every_line(actor, agent_first) for agent_first in (True, False)
    )
    positions = report_card.open_positions()
    perfect = report_card.count_perfect(actor, positions) / len(positions)
    games_to_zero = [games for games, *_, lost in run.history if lost == 0]
    figures = {
        "seed": seed,
        "updates": updates,
        "seconds": round(run.seconds, 2),
        "lost moving first": first[2],
        "lost moving second": second[2],
        "lines moving first": sum(first),
        "lines moving second": sum(second),
        "wins % moving first": round(100 * chances_first[0], 2),
        "wins % moving second": round(100 * chances_second[0], 2),
        "perfect moves %": round(100 * perfect, 1),
        "games to the first check without a loss": min(games_to_zero, default=None),
    }
    print(figures, flush=True)
    return figures, run.history, run.printed


def seeds() -> dict:
    """Every seed as the lesson is, and the picture of all learning curves."""
    runs, curves, printed = zip(*(train(seed) for seed in SEEDS), strict=True)
    draw(curves)
    lost = [run["lost moving first"] + run["lost moving second"] for run in runs]
    first, second = (report_card.best_possible(seat) for seat in (True, False))
    summary = {
        "seeds": len(runs),
        "seeds that lose no line of play": lost.count(0),
        "best possible wins % moving first": round(100 * first, 2),
        "best possible wins % moving second": round(100 * second, 2),
    }
    return {"summary": summary, "runs": runs, "printed by seed 0": printed[0]}


def edits() -> dict:
    """Every edit of "Try this"."""
    runs = []
    for edit, settings in EDITS.items():
        runs += [{"edit": edit} | train(seed, **settings)[0] for seed in EDIT_SEEDS]
    return {"runs": runs}


def draw(curves: tuple[list[tuple[float, ...]], ...]) -> None:
    """Write a picture of all learning curves."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for checks in curves:
        games, wins_first, wins_second, lost = zip(*checks, strict=True)
        above.plot(games, wins_first, color="C0", alpha=0.5)
        above.plot(games, wins_second, color="C1", alpha=0.5)
        below.plot(games, lost, color="red", alpha=0.5)
    above.plot([], color="C0", label="moving first")
    above.plot([], color="C1", label="moving second")
    above.legend(loc="lower right")
    above.set_title(f"Self-play actor-critic on tic-tac-toe, seeds 0-{len(curves) - 1}")
    above.set_ylabel("wins against random play (%)")
    below.set_yscale("symlog", linthresh=1)
    below.set(xlabel="games played", ylabel="lines of play lost")
    below.set_ylim(bottom=0)
    figure.savefig(ASSETS / "tictactoe_learning_curves.png", dpi=120)


if __name__ == "__main__":
    scripts = ["tictactoe_actorcritic.py", "tictactoe_env.py"]
    packages = ["torch", "gymnasium", "numpy"]
    run_parts(scripts, packages, {"seeds": seeds, "edits": edits})
