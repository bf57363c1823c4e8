"""Lesson 2: an actor-critic that teaches itself tic-tac-toe, until it never loses.

What you will learn
    What a critic is for, and how an agent can be its own teacher: it sees no example
    games, it does not search ahead, and its only opponent is an older copy of itself,
    some of whose moves are random. The game is tictactoe_env.py. The lesson follows
    lesson 1, train_cartpole.py, where the policy gradient is derived slowly; what is
    needed of it is derived here again.

Who is who
    The *actor* is a network that gives each move a probability: the policy. The
    *critic* is a second network; it predicts how a game will end. In training, the
    actor plays against the *opponent*, a frozen copy of what it was some updates ago.
    The actor's side of such a game is called the *learner*. Both sides *sample* their
    moves with the probabilities that their networks give. The *agent* is the finished
    player: the actor playing *greedily*, that is, always making its most likely move.

The algorithm in 7 steps
    1. Start from an actor and a critic that know nothing. The opponent is a frozen copy
       of the actor.
    2. Play many whole games against the opponent. The learner moves first in every
       second game. In each game, some moves of the opponent are *random*: all empty
       cells are equally likely.
    3. Give each move of the learner its *return*: +1 if the game was won, 0 if it was
       drawn, -1 if it was lost. A bad move in a won game gets +1 too, but over many
       games the good moves get it more often.
    4. Subtract what the critic expected in that position. What is left is the
       *advantage* of the move.
    5. Take one gradient step (steps 2 to 5 together are one *update*). The actor makes
       moves with a positive advantage more likely, and gets a bonus for its *entropy*,
       which says how varied its moves are, so that it goes on trying other moves. The
       critic moves its predictions towards the returns. The bonus and the learning rate
       shrink with time.
    6. Every REFRESH_EVERY updates, the opponent becomes a copy of the present actor.
    7. Repeat from step 2. From NUM_UPDATES updates on, stop at the first test (there is
       one every REPORT_EVERY updates) in which the agent cannot be beaten: whatever an
       opponent does, it never loses.
    The function `train` is these steps and nothing else, but for the test of step 7. A
    reader who stops at its end has read the whole algorithm. Below it stands how the
    test can know that the agent cannot be beaten, and then only housekeeping. On a
    first reading, read the Symbols, and then go straight on to the Settings.

Symbols
    N games are played side by side. A *step* is one move of one side, and the longest
    of the games has T steps. B is the number of moves of the learner in all games.
    s_t         observations   (T, N, 9)  the board as the side to move sees it: +1 is
                                          its own mark, -1 the other's, 0 an empty cell
    a_t         actions        (T, N)     the cell that was taken: 0 to 8, row by row
                                          from the top left
    -           masks          (T, N, 9)  1 where a cell may be taken, else 0
    -           learner_moved  (T, N)     True for the B moves of the learner
    G_t         returns        (B,)       how the game ended for the learner
    V(s_t)      values         (B,)       the critic's prediction of G_t
    A_t         advantages     (B,)       G_t - V(s_t)
    ln pi(a|s)  log_probs      (B,)       log-probability of the move that was made
    From step 3 of the algorithm on, only the moves of the learner are kept. There, t
    counts the B moves of all games, and mean_t is the mean over them.

Run it, and what you should see
    python tictactoe_actorcritic.py     12 seconds on one core of a server CPU, no GPU
    It prints a table. "wins" are the agent's wins in % against random moves, when it
    moves first and when it moves second. "lost" counts the ways in which an opponent
    can still beat it. The entropy of the actor is 0 if it is certain of each move, and
    ln k if it finds k moves equally likely: ln 9 = 2.2 for nine. "loss" is the actor's
    part of the loss; it need not fall. For SEED = 0, three of the rows are
        wins 1st  wins 2nd  lost 1st  lost 2nd  updates  entropy (nats)      loss
            95.8      84.6         6        81       50           1.431   -0.0900
            98.7      91.5         0         2      200           0.985   -0.0784
            99.0      91.6         0         0      800           0.582    0.0114
    Each of the seeds 0 to 9 ends after 800 updates with an agent that cannot be beaten.
    Against random moves, each of the ten wins exactly 98.96 % of the games in which it
    moves first and 91.64 % of the others. The most that a player can win without ever
    taking the risk of a loss is 99.48 % and 91.64 % (tictactoe_eval.py computes these
    bounds). The agent was trained against another opponent, so it need not reach them.

Try this (medians of seeds 0 to 2)
    | Change                   | What happens                                          |
    |--------------------------|-------------------------------------------------------|
    | ENTROPY_BONUS = 0.0      | After 1,600 updates, an opponent still has 143 ways   |
    |                          | to win.                                               |
    | MAX_RANDOM_CHANCE = 0.0  | The agent cannot be beaten, but it wins only 94.8 and |
    |                          | 80.4 % against random moves.                          |
    | REFRESH_EVERY = 2_000    | The opponent stays a beginner for ever. The agent     |
    |                          | wins 92.6 % moving second, more than the bound above, |
    |                          | by taking risks: an opponent has 8 ways to win.       |

When it goes wrong
    * The loss stays near 0 and does not fall. This is normal: see `actor_loss`.
    * The loss is far from 0 for ever. The actor does not subtract what the critic
      expects, or the critic does not learn to expect the returns.
    * The entropy is near 0 after a few rows. The sign of the bonus is wrong, or the
      mask is missing in the loss.
    * The wins fall below those of an untrained agent, about 50 and 11 % (it is
      greedy with random weights, so it always prefers the same few cells). The reward
      was given to the wrong side: it belongs to the side that has just moved, not to
      the side whose turn it is now.
    * The agent learns one seat only ("wins 1st" or "wins 2nd" stays low). The board is
      not shown as the second player sees it, or the learner always moves first.
    * tests/bugs/README.md shows many more mistakes, and by what each can be recognised.

Another task
    Try *misere* tic-tac-toe, in which three in a row lose: tictactoe_env.py says which
    line to change. With SEED = 0, the agent cannot be beaten after 800 updates; against
    random moves it wins 60 % of the games moving first, and 99.9 % moving second.
    In the same way, any game for two players can take the place of tic-tac-toe if one
    of them wins what the other loses, and if both see the whole board. This file takes
    from tictactoe_env.py the number CELLS of inputs and of moves to choose from, which
    is also the length of the longest game, and the functions `legal_moves` and
    `play_moves`. ENV_ID is the name under which Gymnasium knows the game. If there are
    so many ways to play that they cannot all be tried, replace the check in main() by a
    number of games against a strong player.

Where this differs from the book (Sutton & Barto, *Reinforcement Learning*, 2nd edition,
chapter 13, free at incompleteideas.net), and why
    * Is this an actor-critic? We wait for the result of the game, and the critic only
      supplies the baseline V(s_t). The book calls this "REINFORCE with baseline"
      (section 13.4). It keeps the name actor-critic for methods that do not wait: they
      replace the rewards still to come by the critic's prediction, so that the return
      becomes r_t + gamma V(s_{t+1}) (section 13.5, and lesson 3). Most programs call
      both actor-critic, and so do we. Waiting costs little in a game of nine moves.
    * We add an entropy bonus, as A3C does (Mnih et al., 2016, arXiv 1602.01783), so
      that no move is given up too early.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import contextlib
import copy
import hashlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm.auto import tqdm

from tictactoe_env import CELLS, legal_moves, play_moves

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

ENV_ID = "TicTacToe-v0"  # registered by tictactoe_env

# Games that are played before each gradient step. The learner makes about four moves in
# a game, so a gradient is a mean over about 2,000 moves. With more games it is less
# noisy, but each update takes longer. It must be at least 2: in half of the games the
# learner moves first.
GAMES_PER_UPDATE = 512

# Updates from one new opponent to the next. If the opponent is renewed too rarely, the
# actor learns to beat one weak player, and to rely on the mistakes of this player.
REFRESH_EVERY = 20

# In each game, a random number from 0 to MAX_RANDOM_CHANCE is the probability that a
# move of the opponent is random. With MAX_RANDOM_CHANCE = 0, the learner sees too few
# mistakes to learn how each of them is punished. Section "Step 2" says what a large one
# does.
MAX_RANDOM_CHANCE = 0.5

# Step size of Adam at the start. If it is too small, learning takes more updates. If it
# is too large, each batch of games moves the weights so far that much of what earlier
# batches taught is lost: with 0.1, two of three seeds could still be beaten after 1,600
# updates.
LEARNING_RATE = 0.01

# What an entropy of 1 is worth at the start, on the scale of the results, where a win
# is worth 1. If the bonus is too small, the actor stops trying whole branches of the
# game. If it is too large, the actor plays many moves that it knows to be bad.
ENTROPY_BONUS = 0.25

# The learning rate and the bonus shrink evenly until NUM_UPDATES updates are done, but
# not below this share of what they were at the start. With 1 they never shrink.
LAST_SHARE = 0.05

# Width of the two hidden layers of each network. With very few units, a network cannot
# learn a good move for every position; more units than needed cost time.
HIDDEN_UNITS = 64

# The seed of all random numbers. On the same machine and with the same versions, the
# same seed gives the same weights, bit for bit.
SEED = 0

# The run makes at least NUM_UPDATES updates (turns of the loop in `train`). If the
# agent can still be beaten then, the run goes on, to MAX_UPDATES at most.
NUM_UPDATES = 800
MAX_UPDATES = 1_600

# Updates from one printed row to the next. For each row, the agent is tested.
REPORT_EVERY = 50

# The files that are written, beside this script.
ACTOR_PATH = Path(__file__).with_name("tictactoe_actor.pth")
CRITIC_PATH = Path(__file__).with_name("tictactoe_critic.pth")
CURVE_PATH = Path(__file__).with_name("tictactoe_learning_curve.png")

# ------------------------------------------------------------------------------------
# Step 1: the actor and the critic
# ------------------------------------------------------------------------------------


def make_layers(outputs: int, hidden_units: int) -> nn.Sequential:
    """A network with nine inputs (the cells), two hidden layers and some outputs."""
    return nn.Sequential(
        nn.Linear(CELLS, hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, outputs),
    )


class ActorNetwork(nn.Module):
    """The policy pi(a|s). It maps boards (B, 9) to logits (B, 9), one for each cell.

    A logit is any real number. Taken cells have logits too; `mask_illegal` removes
    them. Then softmax turns the logits into probabilities.
    """

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = make_layers(CELLS, hidden_units)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations.float())


class CriticNetwork(nn.Module):
    """The value V(s). It maps boards (B, 9) to values (B,): the mean result to expect.

    A value is about +1 if the side to move will surely win, and about -1 if it will
    surely lose; nothing keeps the network from saying 1.1. A result depends on who
    plays. V is the mean result of the learner, whose moves are sampled, against this
    opponent with its random moves. Two perfect players would draw from the empty board,
    so V would be 0 there; the trained critic says about +0.46, because this opponent
    blunders.

    Without the `squeeze`, values would be (B, 1). Then returns (B,) minus values (B, 1)
    would be a table (B, B) of every return minus every value, without an error.
    """

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = make_layers(1, hidden_units)

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations.float()).squeeze(-1)


def mask_illegal(logits: Tensor, action_mask: Tensor) -> Tensor:
    """Make illegal moves impossible: their logits become minus infinity.

    pi(a|s) = exp(logit of a) / sum of exp(logit) over all cells

    With exp(-inf) = 0, an illegal move has exactly the probability 0, whatever the
    network says about its cell.

    `logits` is (..., 9); `action_mask` is (..., 9), with 1 where a cell may be taken.
    It must be the mask of the same boards as `logits`. Returns (..., 9).
    By hand: logits [5, 1] with the mask [0, 1] become [-inf, 1], that is, the
    probabilities 0 and 1.
    """
    return logits.masked_fill(action_mask == 0, -torch.inf)


# ------------------------------------------------------------------------------------
# Step 2: play games against a frozen copy
# ------------------------------------------------------------------------------------

# WHY A FROZEN COPY? To the learner, its opponent is a part of the environment. As long
# as the copy is frozen, this environment stays the same, and a move that did better in
# this batch really is better against this opponent. If the opponent were the actor
# itself, it would be another player after each gradient step, and two players who
# answer each other's last change can go in circles for ever, as in rock, paper,
# scissors. Tic-tac-toe is so small that it works even then, but in general nothing
# guarantees that a player who learns against itself gets better, with a frozen copy or
# without. So we measure it (step 7).
#
# WHY RANDOM MOVES? A good opponent does not make a beginner's mistakes. The learner
# would hardly ever see the positions after such mistakes, and not learn to punish them.
#
# WHY WITH A DIFFERENT PROBABILITY IN EACH GAME? So that the learner meets all kinds of
# opponents. If the probability is near 0, the opponent plays as its policy says, and
# the learner finds out which of its own moves lose. If it is near 1/2, the opponent
# blunders in nearly every game, and the learner finds out how to win. (In a game as
# small as this one, we measured no advantage over a fixed probability of 1/4.) With the
# probability 1 in every game, the opponent would be a random player, and the best
# answer to a random player is to gamble: whoever takes the right risks moving second
# wins 93.2 % of the games instead of 91.6 %, but a good player can punish them.
#
# The example that goes through this lesson: N = 2 games of 5 and 7 steps, so T = 7. In
# game 0 the learner moves first (it is X) and wins with 0, 1, 2. In game 1 it moves
# second (it is O), and the opponent wins with 1, 4, 7. [ ] marks the moves of the
# learner, of which there are B = 6:
#
#     step        0    1    2    3    4    5    6     result for the learner
#     game 0     [0]   3   [1]   4   [2]                       +1
#     game 1      4   [0]   8   [2]   1   [3]   7              -1
#
# At step 5 of game 1, the learner should have taken 7. The board that it saw there, row
# by row: [1, -1, 1,  0, -1, 0,  0, 0, -1], and the mask: [0, 0, 0,  1, 0, 1,  1, 1, 0].

Policy = Callable[[Tensor], Tensor]  # maps boards (B, 9) to logits (B, 9)


@torch.no_grad()
def play_games(
    env: gym.vector.VectorEnv,
    learner: Policy,
    opponent: Policy,
    learner_first: Tensor,
    random_chances: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Play one whole game on each of N boards, learner against opponent.

    In `env`, a board whose game has ended stays as it is until the next reset.
    `learner_first` is (N,) bool. `random_chances` is (N,): the probability, the same in
    the whole game, that a move of the opponent is random (all legal cells are equally
    likely) instead of sampled from its policy.

    Returns observations (T, N, 9) and masks (T, N, 9), int8; actions (T, N) int64;
    learner_moved (T, N) bool; and results (N,) float32: +1 where the learner won, 0
    where the game was drawn, -1 where it lost. The steps after the end of a game are
    padding (the final board, a mask of 0, action 0), and learner_moved is False there.
    """
    steps = []
    results = torch.zeros(env.num_envs)
    alive = torch.ones(env.num_envs, dtype=torch.bool)  # is this game still going on?
    observations, infos = env.reset()
    for step in range(CELLS):  # each move takes a cell, so there are no more steps
        if not alive.any():  # if there are few games, all may end before step 8
            break
        boards = torch.from_numpy(observations)
        masks = torch.from_numpy(infos["action_mask"])
        learner_turn = learner_first if step % 2 == 0 else ~learner_first  # (N,)
        learner_moved, opponent_moved = alive & learner_turn, alive & ~learner_turn
        # A board is shown as the side to move sees it, so either network can read it.
        logits = torch.zeros(env.num_envs, CELLS)
        logits[learner_moved] = learner(boards[learner_moved])
        logits[opponent_moved] = opponent(boards[opponent_moved])
        # Equal logits make all legal cells equally likely: a random move.
        logits[opponent_moved & (torch.rand(env.num_envs) < random_chances)] = 0
        # Categorical is the distribution over cells that logits stand for. Only games
        # that are going on may be sampled: on an ended board no cell is legal, all nine
        # logits would be -inf, and softmax would be 0 / 0.
        actions = torch.zeros(env.num_envs, dtype=torch.int64)
        legal_logits = mask_illegal(logits, masks)[alive]
        actions[alive] = Categorical(logits=legal_logits).sample()
        steps.append((boards, masks, actions, learner_moved))

        observations, rewards, terminated, _, infos = env.step(actions.numpy())
        # The reward is that of the side that moved; the other side gets minus this.
        rewards = torch.from_numpy(rewards).float()
        results += torch.where(learner_turn, rewards, -rewards)  # 0 on an ended board
        alive = torch.from_numpy(~terminated)  # a finished board stays terminated
    # From T tuples of four tensors (N, ...) to four tensors (T, N, ...).
    observations, masks, actions, learner_moved = map(
        torch.stack, zip(*steps, strict=True)
    )
    return observations, masks, actions, learner_moved, results


# ------------------------------------------------------------------------------------
# Steps 3 and 4: returns and advantages
# ------------------------------------------------------------------------------------

# WHY THIS WORKS, in short (lesson 1 has the same argument with more words). Let J be
# the mean result of the learner over all games that can happen. We want to raise J by
# changing the weights of the actor; `grad` is the gradient with respect to them.
#
#     J = sum over all games of  P(game) G(game)
#
# P(game), the probability of a game, is the product of the probabilities of its moves:
# pi(a_t|s_t) for a move of the learner, and for a move of the opponent a number that
# does not depend on the weights, because the opponent is frozen. The logarithm turns
# the product into a sum, whose terms for the opponent have the gradient 0:
#
#     grad ln P(game) = sum_t grad ln pi(a_t|s_t)
#
# Here t runs over the moves of the learner in this one game, not yet over all B moves.
# By the chain rule, grad ln P = grad P / P, so that grad P = P grad ln P. The result
# G(game) of a given game does not depend on the weights, and therefore
#
#     grad J = sum over all games of  P(game) G(game) grad ln P(game)
#            = E[ sum_t G grad ln pi(a_t|s_t) ]                                      (1)
#
# where E[ ] is the mean over games that are played. This grad J is called the *policy
# gradient*. It can be estimated by playing, without knowing how the opponent chooses
# its moves. G is the result of the game, the same for all its moves: the only reward is
# paid at the end, so the rewards that follow a move add up to the result. (Many tasks
# let later rewards count less, by a factor gamma for each step, as lesson 1 does. Here
# gamma is 1: the game is short, and a win counts in full however late it comes.)
#
# In (1), all moves of a game that was won are pushed up, the bad ones too. The mean
# over many games corrects this, but slowly. It helps to subtract a *baseline*: a number
# b(s_t), for what was to be expected in s_t anyway, that does not depend on the move.
# For example, nearly every game from a position that is as good as won is won, so
# nearly every move that happens to be sampled there is pushed up by 1, whether it is
# the best one or not. Which moves these are is chance, and this chance is noise. With
# b = 0.95, such a move is pushed up by 0.05 only, and a move after which the game is
# drawn is pushed down by 0.95: what is left tells the moves apart.
#
# A baseline leaves grad J as it is. To see this, look at all games that come to a
# position s. There the move a is sampled with the probability pi(a|s), when s is known
# already, so b(s) is the same number for each a. On average over these moves, what is
# subtracted from the sum in (1) is
#
#     sum_a pi(a|s) b(s) grad ln pi(a|s) = b(s) sum_a grad pi(a|s) = b(s) grad 1 = 0,
#
# where the first step is again pi grad ln pi = grad pi, and the second one holds
# because the probabilities of all moves add up to 1, whatever the weights are. Lesson 1
# subtracts the mean of all returns, one number for all states. But a position can be
# good or bad, and the critic knows which: b(s) = V(s).


def subtract_values(returns: Tensor, values: Tensor) -> Tensor:
    """Advantages: how much better the game ended than the critic expected.

    A_t = G_t - V(s_t)

    To win a position that is as good as won is no merit. But to draw a lost one is:
    with G = 0 and V = -0.9, the advantage is 0.9.

    V may be wrong: by the argument above, grad J stays what it is with any V. A good V
    only makes the estimate of it less noisy.

    `detach` says that the advantages are plain numbers for the actor's loss. Without
    it, this loss would train the critic too, and push V up in every position:
    `critic_loss` shows by how much.

    `returns` is (B,), `values` is (B,). The result is (B,); no gradient flows through
    it. The example, its six moves in the order in which they were made:
        game          0      1      0      1      0      1
        cell          0      0      1      2      2      3
        G             1     -1      1     -1      1     -1
        V          0.25   -0.5    0.5  -0.25      1      0
        A          0.75   -0.5    0.5  -0.75      0     -1
    The winning move (cell 2 in game 0) gets nothing, because the critic was sure of the
    win already. The blunder (cell 3 in game 1) gets the largest part of the blame.
    """
    return returns - values.detach()


# ------------------------------------------------------------------------------------
# Step 5: the loss
# ------------------------------------------------------------------------------------

# The loss is  actor_loss - entropy_bonus + critic_loss.  The first two train the actor,
# the last one trains the critic. The networks share no weights, so neither disturbs the
# other. And critic_loss needs no factor in front of it, because the size of Adam's
# steps does not depend on the scale of a gradient.


def actor_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """The loss whose gradient is minus the policy gradient, estimated from a batch.

    loss = -mean_t( A_t * ln pi(a_t|s_t) )

    Sutton & Barto, eq. (13.11): theta <- theta + alpha (G_t - b) grad ln pi(a_t|s_t),
    where theta are the weights, alpha is the learning rate, and b is our V(s_t). The
    minus is there because PyTorch's optimizers go downhill, and we want to go uphill.
    Equation (1) has a sum over the moves of a game; the mean over all moves is the same
    but for a factor, the mean number of moves in a game.

    The value of this loss says nothing about how well the actor plays, only its
    gradient counts. Soon the critic is right on average: in each position, the mean of
    A over the sampled moves is about 0. If A had nothing to do with how likely a move
    is, the mean of A ln pi would then be 0 as well. But moves with A < 0 tend to be the
    unlikely ones, whose ln pi is far below 0. Their products A ln pi are positive, so
    the loss is mostly below 0; only slightly, because such moves are rare.

    `log_probs` is (B,), those of the moves that were made, with gradient; `advantages`
    is (B,). Returns a scalar.
    The example: to keep the numbers simple, let the actor choose each time between two
    moves that it finds equally likely. Then all log-probabilities are ln 0.5 = -0.6931.
    The advantages add up to -1, so the loss is -(-0.6931 * -1) / 6 = -0.1155.
    """
    return -(log_probs * advantages).mean()


def entropy_bonus(entropies: Tensor, beta: float) -> Tensor:
    """What variety is worth. It is subtracted from the loss, which keeps entropy high.

    bonus = beta * mean_t( H_t ),   H_t = -sum_a pi(a|s_t) ln pi(a|s_t)   (in nats)

    H_t is 0 if one move is certain, and ln k if k moves are equally likely (a nat is
    the unit that belongs to ln). A move that is no longer tried is no longer judged,
    even if it only had bad luck in the first games. The bonus keeps every move
    possible.

    But the bonus also changes which policy is the best. Take a single position, where
    q_a is the mean result after the move a, and pi_a its probability. Result and bonus
    together are worth sum_a pi_a q_a + beta H. The derivative of this with respect to
    pi_a is q_a - beta ln pi_a - beta. At the maximum it is the same for all moves, or
    moving a little probability from one to another would gain something. So ln pi_a is
    q_a / beta plus a constant, which means that pi_a is proportional to
    exp(q_a / beta). For two moves with q = 1 and q = 0.9, and beta = 0.25, that is 60
    and 40 %: as long as beta stays as it is, the second-best move is played very often.
    Therefore the bonus has to shrink.

    `entropies` is (B,), with gradient; `beta` is what one nat is worth. Returns a
    scalar. (An illegal move has 0 ln 0 in its sum, which counts as 0; PyTorch's
    `entropy` sees to that.)
    The example: a choice between two equally likely moves has H = ln 2 = 0.6931. With
    beta = 0.25 the bonus is 0.1733.
    """
    return beta * entropies.mean()


def critic_loss(values: Tensor, returns: Tensor) -> Tensor:
    """The mean squared error, which is smallest where V(s) is the mean return from s.

    loss = mean_t( (G_t - V(s_t))^2 )

    (For one position, the derivative is -2 mean(G_t - V). It is 0 at V = mean(G_t).)

    And if the `detach` of `subtract_values` were missing? The derivative of actor_loss
    with respect to V(s_t) is ln pi(a_t|s_t) / B. It is never positive, so gradient
    descent would push every V up. Take all visits to one position, and leave out the
    1 / B, which both losses have. The mean of ln pi over the visits is -H, the negative
    entropy; the derivative of critic_loss is 2 (V - mean(G_t)). Their sum is 0 at
    V = mean(G_t) + H / 2: every V ends up too high by H / 2.

    `values` is (B,), with gradient; `returns` is (B,). Returns a scalar.
    The example: (0.75^2 + 0.5^2 + 0.5^2 + 0.75^2 + 0 + 1) / 6 = 0.4375. All three parts
    together: -0.1155 - 0.1733 + 0.4375 = 0.1487.
    """
    return ((returns - values) ** 2).mean()


def share_left(updates_done: int) -> float:
    """The share of LEARNING_RATE and ENTROPY_BONUS that is left: 1, then less.

    share = max(1 - updates_done / NUM_UPDATES, LAST_SHARE)

    `entropy_bonus` says why the bonus shrinks. Why does the learning rate? The results
    of 512 games are partly luck. The size of Adam's steps does not shrink with the
    gradient, so with a constant learning rate, luck would keep all weights moving for
    ever.

    By hand: after 200 of 800 updates, 0.75 is left.
    """
    return max(1 - updates_done / NUM_UPDATES, LAST_SHARE)


# ------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------


def train(
    actor: ActorNetwork, critic: CriticNetwork, env: gym.vector.VectorEnv
) -> Iterator[tuple[Categorical, Tensor]]:
    """The whole algorithm. Each turn of the loop is one update.

    main() prints what is yielded (the distributions over moves in the B positions, and
    the actor's loss), tests the agent, and decides when to stop.
    """
    # 1. Actor and critic start with random weights. One optimizer changes both (step 5
    #    sets its learning rate); it does not change the opponent, which is a copy.
    opponent = copy.deepcopy(actor)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    learner_first = torch.arange(GAMES_PER_UPDATE) % 2 == 0  # in every second game
    for update in range(1, MAX_UPDATES + 1):
        # 2. Play whole games, each with its own chance of random moves.
        random_chances = MAX_RANDOM_CHANCE * torch.rand(GAMES_PER_UPDATE)
        games = play_games(env, actor, opponent, learner_first, random_chances)
        observations, masks, actions, learner_moved, results = games

        # 3. The return of a move is the result of its game. `expand_as` copies results
        #    (N,) to all steps, (T, N). [learner_moved] then picks the moves of the
        #    learner, one step after the other: (B,). What the opponent did is left out.
        returns = results.expand_as(learner_moved)[learner_moved]
        observations = observations[learner_moved]  # (T, N, 9) -> (B, 9)
        masks, actions = masks[learner_moved], actions[learner_moved]

        # 4. Did the games end better or worse than the critic expected?
        values = critic(observations)
        advantages = subtract_values(returns, values)

        # 5. Take one gradient step. The probabilities are computed once more, for all
        #    moves together and now with gradients; they are the same as in the games,
        #    because the actor has not changed since.
        distribution = Categorical(logits=mask_illegal(actor(observations), masks))
        share = share_left(update - 1)
        bonus = entropy_bonus(distribution.entropy(), beta=share * ENTROPY_BONUS)
        policy_loss = actor_loss(distribution.log_prob(actions), advantages)
        loss = policy_loss - bonus + critic_loss(values, returns)
        optimizer.param_groups[0]["lr"] = share * LEARNING_RATE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # 6. Now and then, the opponent becomes a copy of the present actor.
        if update % REFRESH_EVERY == 0:
            opponent.load_state_dict(actor.state_dict())

        # 7. Repeat, until main() finds that the agent cannot be beaten.
        yield distribution, policy_loss


# ------------------------------------------------------------------------------------
# How step 7 knows: every line of play
# ------------------------------------------------------------------------------------

# A *line of play* is one way in which a whole game can go. The agent is greedy, so in
# each position it has one move, and only the moves of the opponent can differ. If the
# agent moves first, the opponent has 8, 6, 4 and 2 cells to choose from, so there are
# at most 8 * 6 * 4 * 2 = 384 lines of play. If it moves second, there are at most
# 9 * 7 * 5 * 3 * 1 = 945. So few can be played out, all of them, in some milliseconds.
#
# This is stronger than ten thousand games. A game shows only what this one opponent did
# this time. Two greedy players play the same game ten thousand times. And random moves
# give an estimate only: in a thousand games, a line with the probability 1 / 945 does
# not occur at all with a probability of 35 %. But if no line of play is lost, then it
# is proved that nobody can beat the agent.

SEATS = (True, False)  # does the agent move first?


@torch.no_grad()
def best_moves(policy: Policy, boards: np.ndarray) -> np.ndarray:
    """The agent's moves (N,) int64: the most likely legal one on each board (N, 9)."""
    logits = policy(torch.from_numpy(boards).float())
    masks = torch.from_numpy(legal_moves(boards))
    return mask_illegal(logits, masks).argmax(dim=1).numpy()


def play_every_line(
    policy: Policy,
    agent_first: bool,
    opponent_moves: Callable[[np.ndarray], np.ndarray] = legal_moves,
) -> tuple[list[int], list[float]]:
    """Play the agent against *everything* that an opponent can do.

    The opponent may make each move that the mask `opponent_moves(boards)` (N, 9)
    allows, by default every legal one, and each of them opens a branch. All branches
    are followed together, move by move.

    Returns two lists, each for (win, draw, loss) of the agent: how many lines of play
    end so, and with which probability a game ends so if the opponent's moves are random
    (sampled from those that the mask allows). The probability of a line is the product
    of 1 / (number of moves to choose from) over the turns of the opponent.
    """
    boards, chances = np.zeros((1, CELLS), dtype=np.int8), np.ones(1)
    counts, probabilities = np.zeros(3, dtype=int), np.zeros(3)
    for step in range(CELLS):
        agent_turn = agent_first == (step % 2 == 0)
        if agent_turn:
            rows, actions = np.arange(len(boards)), best_moves(policy, boards)
        else:
            masks = opponent_moves(boards)
            rows, actions = np.nonzero(masks)  # one row for each move of the opponent
            chances = (chances / masks.sum(axis=1))[rows]
        boards, rewards, ended, _ = play_moves(boards[rows], actions)
        results = rewards if agent_turn else -rewards
        for i, result in enumerate((1, 0, -1)):
            counts[i] += (ended & (results == result)).sum()
            probabilities[i] += chances[ended & (results == result)].sum()
        boards, chances = boards[~ended], chances[~ended]
    return counts.tolist(), probabilities.tolist()


# ------------------------------------------------------------------------------------
# Housekeeping: nothing below this line is about reinforcement learning
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until no line of play is lost, and save both networks."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    torch.manual_seed(SEED)
    actor, critic = ActorNetwork(HIDDEN_UNITS), CriticNetwork(HIDDEN_UNITS)
    env = gym.make_vec(ENV_ID, num_envs=GAMES_PER_UPDATE)  # N boards, side by side
    history = []
    with keep_unfinished_run(
        lambda: save_run(actor, critic, history, "_interrupted")
    ) as stop:
        hidden = False if "ipykernel" in sys.modules else None  # None: if no terminal
        bar = tqdm(train(actor, critic, env), "", NUM_UPDATES, False, disable=hidden)
        for update, (distribution, loss) in enumerate(bar, 1):
            last = bool(stop) or update == MAX_UPDATES
            if last or update == NUM_UPDATES or update % REPORT_EVERY == 0:
                played = [play_every_line(actor, first) for first in SEATS]
                lost = [counts[2] for counts, _ in played]
                wins = [100 * probabilities[0] for _, probabilities in played]
                history.append((update * GAMES_PER_UPDATE, *wins, sum(lost)))
                row = f"{wins[0]:8.1f}{wins[1]:10.1f}{lost[0]:10}{lost[1]:10}{update:9}"
                entropy = distribution.entropy().mean()
                tqdm.write(f"{row}{entropy:16.3f}{loss:10.4f}")
                if last or update >= NUM_UPDATES and sum(lost) == 0:
                    break
        unbeaten = update >= NUM_UPDATES and sum(lost) == 0
        suffix = "" if unbeaten else "_interrupted" if stop else "_unsolved"
        facts = {"updates": update, "lost_lines": sum(lost)}
        files = save_run(actor, critic, history, suffix, **facts)
    if unbeaten:
        print(f"\nNo line of play is lost after {update} updates. Written:\n{files}")
        print("Play against it: python tictactoe_eval.py")
    else:
        print(f"\nThis run is kept in\n{files}\nOlder weights are as they were.")
        ending = "Stopped" if stop else f"{sum(lost)} lines of play are still lost"
        end_with(f"{ending} after {update} updates.")


def print_header() -> None:
    """Say what runs, for how long, and what the columns of the table mean."""
    print(f"Actor-critic on {ENV_ID}, on the CPU: {NUM_UPDATES} updates, 12 seconds.")
    print("wins: what the agent wins in % against random moves, moving 1st and 2nd.")
    print("lost: the lines of play (ways in which a whole game can go) that it loses.")
    print("The wins should rise to 99 and 92, the lost lines fall to 0, the entropy to")
    print("0.6. The loss, the actor's, stays near 0: in a healthy run, too.\n")
    print("wins 1st  wins 2nd  lost 1st  lost 2nd  updates  entropy (nats)      loss")


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    counts = NUM_UPDATES, REPORT_EVERY, REFRESH_EVERY, HIDDEN_UNITS
    rules = {
        "SEED must be from 0 to 499,999": 0 <= SEED < 500_000,
        "NUM_UPDATES, REPORT_EVERY, REFRESH_EVERY and HIDDEN_UNITS must be 1 or more": (
            min(counts) >= 1
        ),
        "MAX_UPDATES must be NUM_UPDATES or more": MAX_UPDATES >= NUM_UPDATES,
        "GAMES_PER_UPDATE must be 2 or more": GAMES_PER_UPDATE >= 2,
        "MAX_RANDOM_CHANCE must be from 0 to 1": 0 <= MAX_RANDOM_CHANCE <= 1,
        "LEARNING_RATE must be above 0, at most 1": 0 < LEARNING_RATE <= 1,
        "ENTROPY_BONUS must be from 0 to 10": 0 <= ENTROPY_BONUS <= 10,
        "LAST_SHARE must be above 0, at most 1": 0 < LAST_SHARE <= 1,
        "the folders of ACTOR_PATH, CRITIC_PATH and CURVE_PATH must exist and be "
        "writable": all(map(can_write, (ACTOR_PATH, CRITIC_PATH, CURVE_PATH))),
        "ACTOR_PATH and CRITIC_PATH must be two files in one folder": (
            ACTOR_PATH.parent == CRITIC_PATH.parent
            and ACTOR_PATH.name != CRITIC_PATH.name
        ),
        "CURVE_PATH must end in .png": CURVE_PATH.suffix == ".png",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def can_write(path: Path) -> bool:
    """True if a file of this name can be written: its folder is there and is ours."""
    return path.parent.is_dir() and os.access(path.parent, os.W_OK)


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C, `kill` and a closed terminal only leave a mark in the list that this yields,
    and main() looks at it once per update: so no signal can disturb the writing of a
    file.
    """
    stopped, before = [], {}
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():  # the only one that may
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                before[number] = signal.signal(number, lambda *_: stopped.append(True))
    try:
        yield stopped
    except BaseException:
        kept = save()
        with contextlib.suppress(OSError):  # a closed terminal cannot be printed to
            print(f"\nThis run is kept in\n{kept}\nOlder weights are as they were.")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(line: str) -> None:
    """End a run that missed its aim, with one line and status 1 (in a notebook: 0)."""
    if "ipykernel" in sys.modules:  # there, SystemExit would look like a crash
        print(line)
    else:
        sys.exit(line)


def save_run(
    actor: nn.Module, critic: nn.Module, history: list, suffix: str, **facts: float
) -> str:
    """Write networks and curve, with `suffix` in their names; return their paths."""
    paths = [ACTOR_PATH, CRITIC_PATH, CURVE_PATH]
    *paths, curve = [path.with_stem(path.stem + suffix) for path in paths]
    older = any(path.exists() for path in paths)
    # Both files get one fingerprint of both networks, so that a pair from two runs is
    # noticed when it is loaded.
    tensors = [*actor.state_dict().values(), *critic.state_dict().values()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    facts |= {"seed": SEED, "run": digest.hexdigest()[:16]}
    with tempfile.TemporaryDirectory(dir=paths[0].parent, suffix=".tmp") as folder:
        for network, path in zip((actor, critic), paths, strict=True):
            checkpoint = {"weights": network.state_dict(), "env_id": ENV_ID, **facts}
            checkpoint["network"] = type(network).__name__
            checkpoint["hidden_units"] = HIDDEN_UNITS
            torch.save(checkpoint, Path(folder, path.name))
        for path in paths:  # both files are whole now; renaming them is a moment
            os.replace(Path(folder, path.name), path)
    try:
        draw_learning_curve(history, curve)
        show_in_notebook(curve)
    except Exception as problem:  # a picture is not worth a run
        curve = f"The learning curve could not be drawn: {problem}"
    replaced = ["Replaced: the older files of these names."] if older else []
    return "\n".join(map(str, [*paths, curve, *replaced]))


def load_actor(path: Path | str = ACTOR_PATH) -> ActorNetwork:
    """Read an actor back, boards (B, 9) to logits (B, 9), or stop with one line."""
    return load_network(ActorNetwork, path)


def load_critic(path: Path | str = CRITIC_PATH) -> CriticNetwork:
    """Read a critic back, boards (B, 9) to values (B,), or stop with one line."""
    return load_network(CriticNetwork, path)


def load_network(kind: type[nn.Module], path: Path | str) -> nn.Module:
    """Read a network of the class `kind`, its fingerprint as `.run`, or stop."""
    try:
        checkpoint = torch.load(path, weights_only=True)  # never runs code from a file
        weights = checkpoint["weights"]
        network = kind(len(weights["layers.0.bias"]))
        network.load_state_dict(weights)
        network.run = checkpoint["run"]
        finite = all(tensor.isfinite().all() for tensor in weights.values())
        if checkpoint["env_id"] != ENV_ID or not finite:
            raise ValueError("another game, or weights that are NaN or infinite")
    except Exception as problem:  # a damaged file can fail in any way at all
        why = f"no usable {kind.__name__} in {path} ({type(problem).__name__})"
        sys.exit(f"There is {why}. Make it with: python tictactoe_actorcritic.py")
    return network


def draw_learning_curve(history: list[tuple[float, ...]], path: Path) -> None:
    """Write a picture of the checks: wins against random moves, lines of play lost."""
    games, wins_first, wins_second, lost = np.array(history).reshape(-1, 4).T
    figure = Figure(figsize=(8, 5), dpi=120)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(games, wins_first, label="moving first")
    above.plot(games, wins_second, label="moving second")
    above.set(title=f"Self-play on {ENV_ID}", ylabel="wins against random moves (%)")
    above.legend()
    below.plot(games, lost, color="red")
    below.set(xlabel="games played", ylabel="lines of play lost", yscale="symlog")
    figure.savefig(path)


def show_in_notebook(picture: Path) -> None:
    """Display a picture where the script runs in a notebook."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=picture))


if __name__ == "__main__":
    main()
