"""Benchmark of lesson 2: tictactoe_actorcritic.py with seeds 0-9, and its "Try this".

    taskset -c 0 python tests/benchmarks/tictactoe.py     on one core, 5 minutes

Each run calls the lesson's own main() and then follows every line of play of the agent
that it saved. Prints a line for each run and writes results/tictactoe.json beside this
file. common.py lists the words that may follow the command. The parts:

    seeds    Seeds 0-9, and assets/tictactoe_learning_curves.png.
    edits    Each edit of "Try this", seeds 0-2.

With `game` it only writes assets/tictactoe.gif, two games of the shipped agent.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ASSETS, run_main, run_parts
from matplotlib.figure import Figure
from PIL import Image

import tictactoe_actorcritic as lesson
import tictactoe_eval as report_card
from tictactoe_env import has_won

SEEDS = range(10)
EDIT_SEEDS = range(3)
EDITS = {
    "MAX_RANDOM_CHANCE = 0.0": {"MAX_RANDOM_CHANCE": 0.0},
    "ENTROPY_BONUS = 0.0": {"ENTROPY_BONUS": 0.0},
    "REFRESH_EVERY = 2_000": {"REFRESH_EVERY": 2_000},
}


def train(seed: int, **settings: float) -> tuple[dict, list[tuple], list[str]]:
    """One run of the lesson's main(): figures, its checks, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "ACTOR_PATH": Path(folder, "a.pth"),
            "CRITIC_PATH": Path(folder, "c.pth"),
        }
        files["CURVE_PATH"] = Path(folder, "curve.png")
        checks, seconds, printed = run_main(lesson, SEED=seed, **files, **settings)
        actor_path = next(Path(folder).glob("a*.pth"))
        actor = lesson.load_actor(actor_path)
        updates = torch.load(actor_path, weights_only=True)["updates"]
    (first, chances_first), (second, chances_second) = (
        lesson.play_every_line(actor, agent_first) for agent_first in (True, False)
    )
    positions = report_card.open_positions()
    perfect = report_card.count_perfect(actor, positions) / len(positions)
    games_to_zero = [games for games, *_, lost in checks if lost == 0]
    figures = {
        "seed": seed,
        "updates": updates,
        "seconds": round(seconds, 2),
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
    return figures, checks, printed


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
    return {
        "runs": [
            {"edit": edit} | train(seed, **settings)[0]
            for edit, settings in EDITS.items()
            for seed in EDIT_SEEDS
        ]
    }


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
    above.set(
        title=f"Self-play actor-critic on tic-tac-toe, seeds 0-{len(curves) - 1}",
        ylabel="wins against random play (%)",
    )
    below.set_yscale("symlog", linthresh=1)
    below.set(xlabel="games played", ylabel="lines of play lost")
    below.set_ylim(bottom=0)
    figure.savefig(ASSETS / "tictactoe_learning_curves.png", dpi=120)


def draw_game() -> None:
    """Write two games against random moves; green: how likely the agent moves there."""
    actor = lesson.load_actor()
    random, frames = np.random.default_rng(1), []
    for agent_first in (True, False):
        board, agents_turn, won = np.zeros(9, dtype=np.int8), agent_first, False
        while not won and (board == 0).any():
            chances = np.zeros(9)
            if agents_turn:
                legal = torch.from_numpy(board == 0)[None]
                logits = actor(torch.from_numpy(board[None]).float())
                masked = lesson.mask_illegal(logits, legal)
                chances = masked.softmax(1)[0].detach().numpy()
                move = int(chances.argmax())
                frames.append(frame(board, agents_turn == agent_first, chances))
            else:
                move = int(random.choice(np.flatnonzero(board == 0)))
            board[move] = 1
            won = bool(has_won(board[None])[0])
            frames.append(frame(board, agents_turn == agent_first, np.zeros(9)))
            board, agents_turn = -board, not agents_turn
        frames += frames[-1:] * 2
    path = ASSETS / "tictactoe.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=700, loop=0)


def frame(board: np.ndarray, x_to_move: bool, chances: np.ndarray) -> Image.Image:
    """A picture of the board (9,), +1 the side to move; the chances (9,) are shaded."""
    figure = Figure(figsize=(2, 2), dpi=100)
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axes.imshow(chances.reshape(3, 3), cmap="Greens", vmin=0, vmax=1.3)
    for cell in np.flatnonzero(board):
        x = (board[cell] == 1) == x_to_move
        axes.text(
            cell % 3,
            cell // 3,
            "X" if x else "O",
            size=30,
            ha="center",
            va="center",
            color="tab:red" if x else "tab:blue",
        )
    for edge in (0.5, 1.5):
        axes.axhline(edge, color="0.3")
        axes.axvline(edge, color="0.3")
    axes.axis("off")
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file).convert("RGB")


if __name__ == "__main__":
    if sys.argv[1:] == ["game"]:
        sys.exit(draw_game())
    scripts = ["tictactoe_actorcritic.py", "tictactoe_env.py"]
    packages = ["torch", "gymnasium", "numpy"]
    run_parts(scripts, packages, {"seeds": seeds, "edits": edits})
