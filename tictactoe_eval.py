"""Lesson 2, the result: a report card for the agent, exact; then you play against it.

What you will learn
    How to judge a player: not by games against itself (greedy play repeats one game),
    nor by a sample of games, but by every line of play (every complete game that an
    opponent can bring about), moving first and second, draws and losses counted apart,
    and beside it the most wins that a player who never risks a loss can have.

Run it
    python tictactoe_eval.py

    It prints the report card within two seconds and then, if standard input is a
    terminal, plays against you for as long as you like.
"""

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache

import gymnasium as gym
import numpy as np
import torch

from tictactoe_actorcritic import (
    ACTOR_PATH,
    CRITIC_PATH,
    ENV_ID,
    ActorNetwork,
    CriticNetwork,
    best_moves,
    load_actor,
    load_critic,
    mask_illegal,
    play_every_line,
)
from tictactoe_env import board_text, legal_moves, play_moves

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

SHOW_REPORT = True  # False: straight to the game
SHOW_GAME = True  # False: print the report card and end
SHOW_PROBABILITIES = True  # how likely the agent was to take each cell
SHOW_VALUE = True  # how the critic expected the game to end, before the agent's move
SEED = None  # who begins each game is drawn at random; a whole number repeats the draws

SEAT_NAMES = {"first": True, "second": False}  # True where the agent begins the game

# ------------------------------------------------------------------------------------
# Perfect play
# ------------------------------------------------------------------------------------

Board = tuple[int, ...]  # nine cells as the side to move sees them
EMPTY: Board = (0,) * 9


@cache
def moves_from(board: Board) -> list[tuple[int, float, bool, Board]]:
    """Every legal move: (cell, reward of the mover, is that the end, next board)."""
    cells = np.flatnonzero(legal_moves(np.array(board)))
    boards = np.tile(np.array(board, dtype=np.int8), (len(cells), 1))
    next_boards, rewards, ended, _ = play_moves(boards, cells)
    next_boards = map(tuple, next_boards.tolist())
    columns = (cells.tolist(), rewards.tolist(), ended.tolist(), next_boards)
    return list(zip(*columns, strict=True))


@cache
def minimax(board: Board) -> float:
    """How the game ends for the side to move if both sides play perfectly from here.

    v(s) = max_a (reward of a if it ends the game, else -v(s after a))

    The minus turns the view round: what one side can get, the other side loses.
    By hand: with two stones of the side to move in a row, the third cell free, v = 1.
    """
    return max(
        reward if ended else -minimax(after)
        for _, reward, ended, after in moves_from(board)
    )


def perfect_moves(board: Board) -> list[int]:
    """The moves that keep what minimax promises; often more than one."""
    return [
        cell
        for cell, reward, ended, after in moves_from(board)
        if (reward if ended else -minimax(after)) == minimax(board)
    ]


@cache
def best_win_probability(board: Board) -> float:
    """The highest probability of beating random play without ever risking a loss.

    W(s) = max over the safe moves a of   1 if a wins, 0 if it ends in a draw, else
           mean over the replies b of     0 if b ends it, else W(s after a and b)

    A move is safe if perfect play cannot beat it. This is dynamic programming: a mean
    over what the opponent's luck does, a maximum over what the player does, from the
    end of the game to the start.
    """
    wins = []
    for _, reward, ended, after in moves_from(board):
        if ended:
            wins.append(reward)
        elif minimax(after) <= 0:  # the opponent cannot force a win: safe
            replies = [
                0 if over else best_win_probability(later)
                for _, _, over, later in moves_from(after)
            ]
            wins.append(sum(replies) / len(replies))
    return max(wins)


def best_possible(agent_first: bool) -> float:
    """best_win_probability of a whole game, from either seat."""
    if agent_first:
        return best_win_probability(EMPTY)
    openings = moves_from(EMPTY)
    return sum(best_win_probability(after) for *_, after in openings) / len(openings)


@cache
def open_positions() -> list[Board]:
    """All 4,520 positions that can occur with a move still to make."""
    found, waiting = {EMPTY}, [EMPTY]
    while waiting:
        for _, _, ended, after in moves_from(waiting.pop()):
            if not ended and after not in found:
                found.add(after)
                waiting.append(after)
    return sorted(found)


def perfect_masks(boards: np.ndarray) -> np.ndarray:
    """1 for each perfect move, else 0: boards (N, 9) -> (N, 9) int8."""
    masks = np.zeros_like(boards)
    for row, board in enumerate(boards.tolist()):
        masks[row, perfect_moves(tuple(board))] = 1
    return masks


# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def best_move(actor: ActorNetwork, board: Sequence[int]) -> int:
    """The agent's move on one board: nine ints, +1 the side to move. Gives the cell."""
    return int(best_moves(actor, np.asarray(board, dtype=np.int8)[None])[0])


def met_positions(actor: ActorNetwork) -> list[Board]:
    """The positions in which the agent may have to move, from both seats."""
    found, waiting = set(), [EMPTY, *(after for *_, after in moves_from(EMPTY))]
    while waiting:
        board = waiting.pop()
        if board not in found:
            found.add(board)
            choice = best_move(actor, board)
            for cell, _, ended, after in moves_from(board):
                if cell == choice and not ended:
                    replies = moves_from(after)
                    waiting += [later for _, _, over, later in replies if not over]
    return sorted(found)


def count_perfect(actor: ActorNetwork, positions: list[Board]) -> int:
    """In how many of the positions is the agent's move one of minimax's best?"""
    boards = np.array(positions, dtype=np.int8)
    perfect = perfect_masks(boards)[np.arange(len(boards)), best_moves(actor, boards)]
    return int(perfect.sum())


def print_counts(actor: ActorNetwork, *opponent_moves: Callable) -> None:
    """A table of how the lines of play end, from each seat: see play_every_line."""
    print("agent moves    lines     wins    draws   losses")
    for name, first in SEAT_NAMES.items():
        counts, _ = play_every_line(actor, first, *opponent_moves)
        print(f"{name:11}" + "".join(f"{n:9}" for n in [sum(counts), *counts]))


def print_report(actor: ActorNetwork) -> None:
    """Print how the agent does from both seats, and what would be possible."""
    print("Every line of play: the agent's best move against all the opponent can do")
    print_counts(actor)

    print("\nAgainst random play: exact probabilities in %. Last column: the most")
    print("wins that a player who never risks a loss can have")
    print("agent moves      win     draw     loss   most wins")
    for name, first in SEAT_NAMES.items():
        cells = "".join(f"{100 * p:9.2f}" for p in play_every_line(actor, first)[1])
        print(f"{name:11}{cells}{100 * best_possible(first):12.2f}")

    print("\nAgainst perfect play: every line of play of an opponent by minimax")
    print_counts(actor, perfect_masks)

    print("\nIts move is one of minimax's best in")
    for kind, positions in [
        ("that it can meet in its games", met_positions(actor)),
        ("that can occur in any game", open_positions()),
    ]:
        perfect, number = count_perfect(actor, positions), len(positions)
        share = 100 * perfect / number
        print(f"{perfect:6,} of {number:5,} positions {kind} ({share:.1f} %)")


# ------------------------------------------------------------------------------------
# Playing against a human
# ------------------------------------------------------------------------------------


class Leave(Exception):
    """The human wants to stop."""


def ask(question: str) -> str:
    """One line from the human, in small letters. Raises Leave at q or end of input."""
    try:
        answer = input(question).strip().lower()
    except EOFError:
        print()
        raise Leave from None
    except UnicodeDecodeError:  # keys that make no text at all
        return "?"
    if answer in ("q", "quit", "exit"):
        raise Leave
    return answer


def ask_move(board: np.ndarray) -> int:
    """The human's move: asks again until it is the number of a free cell."""
    free = [str(cell) for cell in np.flatnonzero(legal_moves(board))]
    while True:
        answer = ask("Your move (the number of a cell, q to leave): ")
        if answer in free:
            return int(answer)
        print(f"{answer!a} is not the number of a free cell: {', '.join(free)}.")


@torch.no_grad()
def thoughts(
    actor: ActorNetwork, critic: CriticNetwork, board: np.ndarray
) -> tuple[np.ndarray, float]:
    """What the networks make of `board` (9,): pi(a|s) of each cell (9,), and V(s)."""
    observation = torch.from_numpy(board)[None]
    masks = torch.from_numpy(legal_moves(board))[None]
    probabilities = mask_illegal(actor(observation), masks).softmax(dim=1)[0]
    return probabilities.numpy(), critic(observation).item()


def probabilities_text(board: np.ndarray, probabilities: np.ndarray) -> str:
    """The probabilities in %, laid out like board_text; a dot where a stone lay."""
    marks = [
        "  .  " if cell else f"{100 * probability:4.0f} "
        for cell, probability in zip(board, probabilities, strict=True)
    ]
    rows = ["|".join(marks[start : start + 3]) for start in (0, 3, 6)]
    return "\n-----+-----+-----\n".join(rows) + "\nprobability of each cell, %"


def picture(board: np.ndarray, beside: str = "") -> str:
    """The board, moved in a little, with the lines of another text to its right."""
    texts = board_text(board).splitlines(), beside.splitlines()
    lines = itertools.zip_longest(*texts, fillvalue="")
    return "\n".join(f"    {left:17}{right}".rstrip() for left, right in lines)


def play_game(actor: ActorNetwork, critic: CriticNetwork, agent_first: bool) -> str:
    """One game against the human; gives who won: "agent", "you" or "draws"."""
    env = gym.make(ENV_ID)
    board, _ = env.reset()
    agent_mark, your_mark = ("X", "O") if agent_first else ("O", "X")
    begins = "The agent begins" if agent_first else "You begin"
    print(f"\n{begins}. You are {your_mark}, the agent is {agent_mark}.\n")
    if not agent_first:
        print(f"{picture(board)}\n")
    agent_to_move, ended = agent_first, False
    while not ended:
        if agent_to_move:
            cell = best_move(actor, board)
            probabilities, value = thoughts(actor, critic, board)
            shown = probabilities_text(board, probabilities)
            board, reward, ended, _, _ = env.step(cell)
            print(f"The agent takes {cell}.")
            print(f"{picture(board, shown if SHOW_PROBABILITIES else '')}\n")
            if SHOW_VALUE:
                print(f"Its critic expected {value:+.2f} (+1 it wins, -1 you win).")
        else:
            cell = ask_move(board)
            board, reward, ended, _, _ = env.step(cell)
            print(f"\n{picture(board)}\n" if ended else "")
        agent_to_move = not agent_to_move
    if reward == 0:
        print("A draw.")
        return "draws"
    # The reward belongs to the side that moved last; the turn has passed since.
    winner = "you" if agent_to_move else "agent"
    print("You win!" if winner == "you" else "The agent wins.")
    return winner


def play_until_bored(actor: ActorNetwork, critic: CriticNetwork) -> None:
    """Game after game, the starting player drawn at random, until the human leaves."""
    coin = random.Random(SEED)
    score, again = {"you": 0, "agent": 0, "draws": 0}, "y"
    try:
        while again != "n":
            score[play_game(actor, critic, agent_first=coin.random() < 0.5)] += 1
            print(score_text(score))
            again = ask("Play again? (y or n): ")
    except (Leave, KeyboardInterrupt):
        print()
    print(f"Bye. {score_text(score)}")


def score_text(score: dict[str, int]) -> str:
    """The score so far in one line."""
    return "Score: " + ", ".join(f"{name} {points}" for name, points in score.items())


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Load the networks, print the report card, play."""
    torch.set_num_threads(1)  # networks this small: more threads only wait
    actor, critic = load_actor(ACTOR_PATH), load_critic(CRITIC_PATH)
    if actor.run != critic.run:  # for instance: a run was killed between the two files
        names = f"{ACTOR_PATH.name} and {CRITIC_PATH.name} come from different runs"
        sys.exit(f"{names}. Make them anew with: python tictactoe_actorcritic.py")
    try:
        if SHOW_REPORT:
            print_report(actor)
        if SHOW_GAME and sys.stdin is not None and sys.stdin.isatty():
            play_until_bored(actor, critic)
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    main()
