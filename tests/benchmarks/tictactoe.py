"""Benchmark of lesson 2: tictactoe_actorcritic.py with seeds 0-9, and its "Try this".

Run it on one core, alone:   taskset -c 0 python tests/benchmarks/tictactoe.py

Each run calls the lesson's own main() and then follows every line of play of the agent
that it saved. Prints a table, and writes results/tictactoe.json beside this file and
the learning curves of all seeds to assets/tictactoe_learning_curves.png. With `game` it
only writes assets/tictactoe.gif, two games of the shipped agent.
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
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import tictactoe_actorcritic as lesson  # noqa: E402  (the line above finds it)
import tictactoe_eval as card  # noqa: E402
from tictactoe_env import has_won  # noqa: E402

SEEDS = range(10)
TRY_THIS_SEEDS = range(3)
TRY_THIS = [
    {"MAX_RANDOM_CHANCE": 0.0},
    {"ENTROPY_BONUS": 0.0},
    {"REFRESH_EVERY": 2_000},
]
RESULTS = Path(__file__).parent / "results" / "tictactoe.json"
CURVES = ROOT / "assets" / "tictactoe_learning_curves.png"


def machine() -> dict:
    """What ran it: processor, cores this process may use, Python and packages."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def train(seed: int, **settings: float) -> tuple[dict, list[tuple[float, ...]]]:
    """One run of the lesson's main(): figures for the table, and its checks."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        settings |= {"SEED": seed, "ACTOR_PATH": Path(folder) / "a.pth"}
        settings |= {"CRITIC_PATH": Path(folder) / "c.pth"}
        settings |= {"CURVE_PATH": Path(folder) / "curve.png"}
        for name, value in settings.items():
            undo.callback(setattr, lesson, name, getattr(lesson, name))
            setattr(lesson, name, value)
        checks, original = [], lesson.draw_learning_curve
        undo.callback(setattr, lesson, "draw_learning_curve", original)
        lesson.draw_learning_curve = lambda history, path: checks.extend(history)

        start, printed = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            lesson.main()
        seconds = time.perf_counter() - start

        actor_path = next(Path(folder).glob("a*.pth"))
        actor = lesson.load_actor(actor_path)
        facts = torch.load(actor_path, weights_only=True)
    first, second = (card.play_every_line(actor, seat)[0] for seat in lesson.SEATS)
    wins_first, wins_second = (
        round(100 * card.play_every_line(actor, seat)[1][0], 2) for seat in lesson.SEATS
    )
    positions = card.open_positions()
    perfect = 100 * card.count_perfect(actor, positions) / len(positions)
    games_to_zero = [games for games, _, _, lost in checks if lost == 0]
    figures = {
        "seed": seed,
        "updates": facts["updates"],
        "seconds": round(seconds, 2),
        "lost moving first": first[2],
        "lost moving second": second[2],
        "lines moving first": sum(first),
        "lines moving second": sum(second),
        "wins % moving first": wins_first,
        "wins % moving second": wins_second,
        "perfect moves %": round(perfect, 1),
        "games to the first check without a loss": min(games_to_zero, default=None),
    }
    return figures, checks


def draw(curves: list[list[tuple[float, ...]]]) -> None:
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
    figure.savefig(CURVES, dpi=120)


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
    path = ROOT / "assets" / "tictactoe.gif"
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


def main() -> None:
    """Train all seeds and all variations, print the table, write JSON and picture."""
    best = [round(100 * card.best_possible(seat), 2) for seat in lesson.SEATS]
    runs, curves = [], []
    print("seed  lost 1st  lost 2nd  wins 1st  wins 2nd  perfect %  updates  seconds")
    for seed in tqdm(SEEDS, disable=None, leave=False):
        figures, checks = train(seed)
        runs.append(figures)
        curves.append(checks)
        tqdm.write(
            f"{seed:4}{figures['lost moving first']:10}"
            f"{figures['lost moving second']:10}"
            f"{figures['wins % moving first']:10.2f}"
            f"{figures['wins % moving second']:10.2f}"
            f"{figures['perfect moves %']:11.1f}"
            f"{figures['updates']:9}{figures['seconds']:9.1f}"
        )
    print(f"best if never losing{best[0]:14.2f}{best[1]:10.2f}\n")
    lost = [run["lost moving first"] + run["lost moving second"] for run in runs]
    summary = {
        "seeds that lose no line of play": lost.count(0),
        "best possible wins % moving first": best[0],
        "lowest wins % moving first": min(run["wins % moving first"] for run in runs),
        "best possible wins % moving second": best[1],
        "lowest wins % moving second": min(run["wins % moving second"] for run in runs),
        "lowest perfect moves %": min(run["perfect moves %"] for run in runs),
        "median seconds": statistics.median(run["seconds"] for run in runs),
        "slowest seconds": max(run["seconds"] for run in runs),
    }
    for name, value in summary.items():
        print(f"{name:38}{value:g}")

    try_this = []
    print(f"\nTry this: median of seeds 0-{len(TRY_THIS_SEEDS) - 1}")
    for settings in TRY_THIS:
        variations = [train(seed, **settings)[0] for seed in TRY_THIS_SEEDS]
        try_this.append({"settings": settings, "runs": variations})
        names = [name for name in variations[0] if re.match("lost|wins|updates", name)]
        middle = {
            name: statistics.median(run[name] for run in variations) for name in names
        }
        print(f"{settings}: {middle}")

    draw(curves)
    report = {
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "numpy": np.__version__,
        },
        "command": "taskset -c 0 python tests/benchmarks/tictactoe.py",
        "runs": runs,
        "summary": summary,
        "try_this": try_this,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    draw_game() if sys.argv[1:] == ["game"] else main()
