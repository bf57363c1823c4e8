"""Picture of lesson 2: two games of the shipped agent, assets/tictactoe.gif.

python tests/benchmarks/pictures_tictactoe.py
"""

import io

import numpy as np
import torch
from common import ASSETS
from matplotlib.figure import Figure
from PIL import Image

import tictactoe_actorcritic as lesson
from tictactoe_env import has_won


def main() -> None:
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
    main()
