"""Draw assets/tictactoe.gif: the untrained agent of lesson 2 beside the trained one.

    python tests/benchmarks/pictures_tictactoe.py

Four games each against random moves. Blue: the agent. Green: its actor's probabilities.
"""

from itertools import zip_longest

import numpy as np
from common import ASSETS
from PIL import Image, ImageDraw, ImageFont

import tictactoe_eval as card
from tictactoe_env import WINS, play_moves

LARGE, SMALL = ImageFont.load_default(size=32), ImageFont.load_default(size=13)


def films(name: str, actor, critic) -> list[list[Image.Image]]:
    """The frames of each game of this agent."""
    rng, score, games = np.random.default_rng(0), {1: 0, 0: 0, -1: 0}, []
    for marks in ("XO", "OX", "XO", "OX"):  # the agent's mark, the other's
        side, board, ended = 1 if marks == "XO" else -1, np.zeros(9, np.int8), False
        games.append([])  # side: +1 where the agent is to move, else -1
        while not ended:
            shades, cell = np.zeros(9), rng.choice(np.flatnonzero(board == 0))
            if side == 1:
                shades, _ = card.thoughts(actor, critic, board)
                cell = card.best_move(actor, board)
            boards, rewards, ends, _ = play_moves(board[None], np.array([cell]))
            board, ended, result = boards[0], ends[0], int(side * rewards[0])
            side = -side
            score[result] += ended
            caption = f"{name}\nwon {score[1]}, drew {score[0]}, lost {score[-1]}"
            games[-1].append(draw(side * board, marks, shades, caption))
    return games


def draw(board: np.ndarray, marks: str, shades: np.ndarray, text: str) -> Image.Image:
    """A picture of the board (9,), +1 the agent; three in a row are on yellow."""
    image = Image.new("RGB", (170, 200), "white")
    pen = ImageDraw.Draw(image)
    pen.multiline_text((10, 2), text, "black", SMALL)
    for cell, mark in enumerate(board):
        x, y = 10 + cell % 3 * 50, 40 + cell // 3 * 50
        pale = int(255 - 150 * shades[cell])
        won = cell in WINS[abs(board[WINS].sum(axis=1)) == 3]
        ground = "#ffe680" if won else (pale, 255, pale)
        pen.rectangle((x, y, x + 50, y + 50), ground, "#808080")
        letter, colour = ("", *marks)[mark], ("", "#1f4fd0", "#d03020")[mark]
        if mark:
            pen.text((x + 25, y + 25), letter, colour, LARGE, anchor="mm")
    return image


def main() -> None:
    """Play with both agents, and write their games side by side."""
    frames, durations = [], []
    trained = films("Trained", card.load_actor(), card.load_critic())
    for pair in zip(films("Untrained", *card.untrained()), trained, strict=True):
        for both in zip_longest(*pair):  # whose game is over waits for the other
            both = [frame or film[-1] for frame, film in zip(both, pair, strict=True)]
            frames.append(Image.fromarray(np.hstack(both)).quantize(32))
            durations.append(500)
        durations[-1] = 1500
    options = {"save_all": True, "append_images": frames[1:], "loop": 0}
    frames[0].save(ASSETS / "tictactoe.gif", duration=durations, **options)


if __name__ == "__main__":
    main()
