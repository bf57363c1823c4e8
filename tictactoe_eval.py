"""Lesson 2, the result: a report card of the agent, exact, and then a game against it.

What you will learn
    How to judge a player. Games against itself say little: two greedy players always
    play the same game. A sample of games against somebody else gives an estimate. But
    tic-tac-toe is so small that the agent can be tested in *every line of play*, that
    is, in every way in which a whole game can go, moving first and moving second.
    Draws and losses are counted apart, because a player who never wins and never loses
    is not the same as one who wins half of its games. And beside what the agent wins
    stands what could be won at most: dynamic programming finds it.

Run it
    python tictactoe_eval.py

    It prints the report card, and then plays against you for as long as you like,
    wherever something can be typed: in a terminal or in a notebook.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import itertools
import random
import sys
from collections.abc import Sequence
from functools import cache

import gymnasium as gym
import numpy as np
import torch

import tictactoe_actorcritic as lesson
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
from tictactoe_env import WINS, board_text, legal_moves, play_moves

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# False: no report card, the game begins at once.
SHOW_REPORT = True

# True: the report card also has draws and losses against random moves, the games
# against a perfect player, and in how many positions the agent's move is perfect.
FULL_REPORT = False

# False: no game, only the report card.
SHOW_GAME = True

# True: you play against an agent with random weights, as it was before the training.
PLAY_UNTRAINED = False

# Whether the game shows with which probability the actor would have taken each cell if
# its moves were sampled, and how the critic expected the game to end.
SHOW_PROBABILITIES = True
SHOW_VALUE = True

# The seed of the coin that decides who begins a game: a whole number gives the same
# beginners each time, None others.
SEED = None

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

    The minus turns the view round: what one side wins, the other side loses.
    By hand: if the side to move has two in a row and the third cell is free, v = 1.
    """
    return max(
        reward if ended else -minimax(after)
        for _, reward, ended, after in moves_from(board)
    )


def perfect_moves(board: Board) -> list[int]:
    """The moves that keep what minimax promises; often there is more than one."""
    return [
        cell
        for cell, reward, ended, after in moves_from(board)
        if (reward if ended else -minimax(after)) == minimax(board)
    ]


@cache
def best_win_probability(board: Board) -> float:
    """The highest probability of beating random moves without ever risking a loss.

    W(s) = max over the safe moves a of   1 if a wins, 0 if it ends in a draw, else
           mean over the replies b of     1 if b loses, 0 if b ends the game otherwise,
                                          else W(s after a and b)

    A move is safe if the side to move does not lose after it in perfect play. This is
    dynamic programming, from the end of the game back to its start: a mean over what
    the random moves do, and a maximum over what the player can do.
    """
    wins = []
    for _, reward, ended, after in moves_from(board):
        if ended:
            wins.append(float(reward > 0))
        elif minimax(after) <= 0:  # the opponent cannot force a win: safe
            replies = [
                float(lost < 0) if over else best_win_probability(later)
                for _, lost, over, later in moves_from(after)
            ]
            wins.append(sum(replies) / len(replies))
    return max(wins, default=0.0)


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
    """1 for each perfect move, else 0: maps boards (N, 9) to (N, 9) int8."""
    masks = np.zeros_like(boards)
    for row, board in enumerate(boards.tolist()):
        masks[row, perfect_moves(tuple(board))] = 1
    return masks


# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def best_move(actor: ActorNetwork, board: Sequence[int]) -> int:
    """The agent's move, a cell, on one board: nine numbers, +1 the side to move."""
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


def untrained() -> tuple[ActorNetwork, CriticNetwork]:
    """An actor and a critic with random weights, those with which a training begins."""
    torch.manual_seed(lesson.SEED)
    return ActorNetwork(), CriticNetwork()


def print_report(actor: ActorNetwork) -> None:
    """Print how the agent does from both seats, trained and untrained."""
    print("The agent, tested in every line of play: it always makes the actor's most")
    print("likely move, the opponent may make any.\n")
    print("agent      moves    lines   wins  draws  losses     win %   at most")
    for name, player in (("trained", actor), ("untrained", untrained()[0])):
        for seat, first in SEAT_NAMES.items():
            (wins, draws, losses), (win, _, _) = play_every_line(player, first)
            row = f"{wins + draws + losses:6}{wins:7}{draws:7}{losses:8}"
            most = 100 * best_possible(first)
            print(f"{name:11}{seat:7}{row}{100 * win:10.2f}{most:10.2f}")
    print("\nlines: the lines of play, that is, all ways in which a game can go. If no")
    print("line is lost, nobody can beat the agent. win %: what it wins against random")
    print("moves. at most: what a player can win so without ever risking a loss.")


def print_full_report(actor: ActorNetwork) -> None:
    """Print more: random moves, perfect opponents, and single positions."""
    print("\nThe trained agent against random moves, exact probabilities in %, and in")
    print("all lines of play that a perfect opponent (minimax) may choose")
    print("moves        win     draw     loss      lines   wins  draws  losses")
    for seat, first in SEAT_NAMES.items():
        shares = "".join(f"{100 * p:9.2f}" for p in play_every_line(actor, first)[1])
        counts, _ = play_every_line(actor, first, perfect_masks)
        row = f"{sum(counts):11}{counts[0]:7}{counts[1]:7}{counts[2]:8}"
        print(f"{seat:7}{shares}{row}")
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
    """The human wants to stop, or nothing can be typed. The text says why."""


def ask(question: str) -> str:
    """One line from the human, in small letters. Raises Leave at q, or if it ends."""
    try:
        answer = input(question).strip().lower()
    except EOFError:
        raise Leave("\nNothing more can be typed here: the input has ended.") from None
    except RuntimeError as problem:  # no stdin at all, or a notebook that has no input
        raise Leave(f"\nNothing can be typed here: {problem}") from None
    except UnicodeDecodeError:  # keys that make no text at all
        return "?"
    if answer in ("q", "quit", "exit"):
        raise Leave
    return answer


def ask_move(board: np.ndarray, adviser: ActorNetwork) -> int:
    """The human's move: asks again until it is the number of a free cell."""
    free = [str(cell) for cell in np.flatnonzero(legal_moves(board))]
    while True:
        answer = ask("Your move (a free cell; h: advice, q: leave): ")
        if answer in free:
            return int(answer)
        if answer in ("h", "help"):
            cell = best_move(adviser, board)
            print(f"In your place, the trained agent would take {cell}.")
        else:
            print(f"{answer!a} is not the number of a free cell: {', '.join(free)}.")


@torch.no_grad()
def thoughts(
    actor: ActorNetwork, critic: CriticNetwork, board: np.ndarray
) -> tuple[np.ndarray, float]:
    """What the networks make of `board` (9,): pi(a|s) of each cell (9,), and V(s).

    No game ends better than +1 or worse than -1, so V(s) is cut off there.
    """
    observation = torch.from_numpy(board)[None]
    masks = torch.from_numpy(legal_moves(board))[None]
    probabilities = mask_illegal(actor(observation), masks).softmax(dim=1)[0]
    return probabilities.numpy(), critic(observation).clamp(-1, 1).item()


def probabilities_text(board: np.ndarray, probabilities: np.ndarray) -> str:
    """The probabilities in %, laid out like board_text; a dot where a mark was."""
    cells = [
        "  .  " if cell else f"{100 * probability:4.0f} "
        for cell, probability in zip(board, probabilities, strict=True)
    ]
    rows = ["|".join(cells[start : start + 3]) for start in (0, 3, 6)]
    return "\n-----+-----+-----\n".join(rows) + "\nprobability of each cell, %"


def picture(board: np.ndarray, beside: str = "") -> str:
    """The board, moved in a little, with the lines of another text to its right.

    Three in a row stand in brackets: [X].
    """
    rows = [list(row) for row in board_text(board).splitlines()]
    for cell in WINS[abs(board[WINS].sum(axis=1)) == 3].flatten():
        left = 4 * (cell % 3)  # a cell is three characters wide, and followed by a |
        rows[2 * (cell // 3)][left : left + 3 : 2] = "[]"
    rows = map("".join, rows)
    lines = itertools.zip_longest(rows, beside.splitlines(), fillvalue="")
    return "\n".join(f"    {left:17}{right}".rstrip() for left, right in lines)


def play_game(
    actor: ActorNetwork, critic: CriticNetwork, adviser: ActorNetwork, agent_first: bool
) -> str:
    """One game against the human; returns who won: "agent", "you" or "draws"."""
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
            if SHOW_VALUE:
                print(f"Its critic expected {value:+.2f} (+1: it wins, -1: you win).")
            print(f"\n{picture(board, shown if SHOW_PROBABILITIES else '')}\n")
        else:
            board, reward, ended, _, _ = env.step(ask_move(board, adviser))
            print(f"\n{picture(board)}\n" if ended else "")
        agent_to_move = not agent_to_move
    if reward == 0:
        print("A draw.")
        return "draws"
    # The reward belongs to the side that moved last; the turn has passed since.
    winner = "you" if agent_to_move == (reward > 0) else "agent"
    print("You win!" if winner == "you" else "The agent wins.")
    return winner


def play_until_bored(
    actor: ActorNetwork, critic: CriticNetwork, adviser: ActorNetwork
) -> None:
    """Game after game, the starting player drawn at random, until the human leaves."""
    coin = random.Random(SEED)
    score = {"you": 0, "agent": 0, "draws": 0}
    try:
        again = "y"
        while again in ("y", "yes"):
            score[play_game(actor, critic, adviser, coin.random() < 0.5)] += 1
            print(score_text(score))
            again = ""
            while again not in ("y", "yes", "n", "no"):
                again = ask("Play again? (y or n): ")
    except Leave as why:
        print(why)
    except KeyboardInterrupt:
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
    if not (SEED is None or isinstance(SEED, int)):
        sys.exit("Settings: SEED must be None or a whole number.")
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    actor, critic = load_actor(ACTOR_PATH), load_critic(CRITIC_PATH)
    if actor.run != critic.run:  # for instance, one of the files was copied
        names = f"{ACTOR_PATH.name} and {CRITIC_PATH.name} come from different runs"
        sys.exit(f"{names}. Make them anew with: python tictactoe_actorcritic.py")
    try:
        if SHOW_REPORT:
            print_report(actor)
        if SHOW_REPORT and FULL_REPORT:
            print_full_report(actor)
        if SHOW_GAME and PLAY_UNTRAINED:
            print("\nThis agent is untrained: its weights are random.")
            play_until_bored(*untrained(), adviser=actor)
        elif SHOW_GAME:
            play_until_bored(actor, critic, adviser=actor)
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    main()
