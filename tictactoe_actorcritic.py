"""Lesson 2: an actor-critic that teaches itself tic-tac-toe, until it never loses.

What you will learn
    What a critic is for, and how a learner can be its own teacher: no example games, no
    search, and no opponent but an older copy of itself. The game is tictactoe_env.py.

The algorithm in 7 steps
    1. Start from an actor (the policy: how likely is each move?) and a critic (how will
       the game end?) that know nothing. The opponent is a frozen copy of the actor.
    2. Play many whole games against it. The actor (the *learner*) moves first in half.
       Each game has its own chance that a move of the opponent is random, 0 to 1/2.
    3. Give each move of the learner its return: +1 for a game won, 0 drawn, -1 lost. A
       bad move in a won game gets +1 too; over many games the good ones get it more.
    4. Subtract what the critic expected. What is left is the advantage of the move.
    5. Take one gradient step. The actor makes moves with a positive advantage more
       likely, and gets a bonus for variety (entropy); the critic moves its expectation
       towards the returns. The bonus and the size of the steps shrink with time.
    6. Every REFRESH_EVERY updates the opponent becomes a copy of what the actor is now.
    7. Repeat from 2, at least NUM_UPDATES times, until the agent (the actor's likeliest
       move) loses no *line of play*: no game that an opponent can bring about. Save.

Symbols (T steps of one move each; N games side by side; B moves of the learner in all)
    s_t         observations   (T, N, 9)  stones: +1 side to move, -1 other side, 0 none
    a_t         actions        (T, N)     the cell that was taken, 0 to 8
    -           learner_moved  (T, N)     True for the B moves of the learner
    G_t         returns        (B,)       how the game ended for the learner
    V(s_t)      values         (B,)       what the critic expects G_t to be
    A_t         advantages     (B,)       G_t - V(s_t)
    ln pi(a|s)  log_probs      (B,)       log-probability of the move that was made

Where this differs from the book (Sutton & Barto, 2nd ed., chapter 13), and why
    * We wait for the end of a game (gamma = 1): "REINFORCE with baseline" (13.4). The
      book's actor-critic (13.5; lesson 3) puts V(s_{t+1}) in place of later rewards.
    * An entropy bonus, as in A3C (Mnih et al., 2016), so that no branch is forgotten.

Run it, and what you should see (what goes wrong: tests/bugs/)
    python tictactoe_actorcritic.py     12 seconds on one core of a server CPU, no GPU
    Seeds 0-9 lose no line of play. Against random play each wins 98.96 % moving first,
    91.64 % second; at most 99.48, 91.64 without risking a loss. Seed 0 (lost: lines):
        wins 1st  wins 2nd  lost 1st  lost 2nd  updates  entropy (nats)      loss
            95.8      84.6         6        81       50           1.431   -0.0900
            98.7      91.5         0         2      200           0.985   -0.0784
            99.0      91.6         0         0      800           0.582    0.0114

Try this (medians of seeds 0-2; the Settings say why)
    * ENTROPY_BONUS = 0.0: 143 lines of play are lost after 1,600 updates.
    * MAX_RANDOM_CHANCE = 0.0: none is lost, but the wins fall to 94.8 and 80.4 %.
    * REFRESH_EVERY = 2_000 (never): 92.6 % wins moving second, but 8 lines are lost.
"""

import copy
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical

from tictactoe_env import legal_moves, play_moves

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
ENV_ID = "TicTacToe-v0"  # registered by tictactoe_env
SEED = 0  # below 500,000; same seed, machine and versions: same weights, bit for bit

# Budget
NUM_UPDATES = 800  # at least so many; LEARNING_RATE and ENTROPY_BONUS shrink meanwhile
MAX_UPDATES = 1_600  # if a line of play is still lost after these, stop with status 1
REPORT_EVERY = 50  # updates between two checks of every line of play

# Algorithm
GAMES_PER_UPDATE = 512  # more is steadier but slower; in half the learner moves first
REFRESH_EVERY = 20  # updates between two new opponents; never: it learns to gamble on
#                     a beginner's blunders
MAX_RANDOM_CHANCE = 0.5  # the largest chance of a random move in step 2; 0: too few
#                          blunders are seen to learn how each is punished
LEARNING_RATE = 0.01  # size of Adam's first steps; too small needs more updates
ENTROPY_BONUS = 0.25  # of a nat (a won game is 1); too little: whole branches of the
#                       game are never tried again
LAST_SHARE = 0.05  # share of both that is left after NUM_UPDATES; 1: they never shrink
HIDDEN_UNITS = 64  # width of both hidden layers
# Hence an update is one gradient step on about 2,000 moves, 4 of the learner in a game.

# Files, written beside this script
ACTOR_PATH = Path(__file__).with_name("tictactoe_actor.pth")
CRITIC_PATH = Path(__file__).with_name("tictactoe_critic.pth")
CURVE_PATH = Path(__file__).with_name("tictactoe_learning_curve.png")

# Given by the task
PLIES = 9  # a ply is one move of one side, and no game has more than nine
SEATS = (True, False)  # does the agent move first?

# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


def make_layers(outputs: int, hidden_units: int) -> nn.Sequential:
    """Nine cells in, two hidden layers, `outputs` numbers out."""
    return nn.Sequential(
        nn.Linear(9, hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, hidden_units),
        nn.ReLU(),
        nn.Linear(hidden_units, outputs),
    )


class ActorNetwork(nn.Module):
    """The policy pi(a|s): a board in, a logit for each of the nine cells out."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = make_layers(9, hidden_units)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Boards (B, 9) -> logits (B, 9), taken cells too: see mask_illegal."""
        return self.layers(observations.float())


class CriticNetwork(nn.Module):
    """The value V(s): a board in, the expected result for the side to move out."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = make_layers(1, hidden_units)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Boards (B, 9) -> values (B,), from about -1 (lost) to about +1 (won).

        Without the squeeze it would be (B, 1), and returns (B,) minus values (B, 1) is
        a table (B, B) of every return against every value, without an error.
        """
        return self.layers(observations.float()).squeeze(-1)


def mask_illegal(logits: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """Make illegal moves impossible: their logit becomes minus infinity.

    softmax(-inf) = exp(-inf) / sum = 0 exactly, whatever the network says of the cell.

    `logits` (..., 9); `action_mask` (..., 9), 1 for a cell that may be taken: the mask
    of this very board, not of the one before the opponent moved. Gives (..., 9).
    By hand: logits = [5, 1], mask = [0, 1]  ->  [-inf, 1], probabilities [0, 1].
    """
    return logits.masked_fill(action_mask == 0, -torch.inf)


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------

# main() minimises  actor_loss - entropy_bonus + critic_loss.  The first two parts train
# the actor, the last one trains the critic.


def subtract_values(returns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Advantages: how much better the game ended than the critic expected.

    A_t = G_t - V(s_t)

    Lesson 1 subtracted the mean of the batch, one number for all positions; the critic
    knows the position. To win a won position is no merit, to draw a lost one is.

    Why is this allowed? V(s) is the same for every move in s, so what it adds to the
    expected gradient is V(s) sum_a pi grad ln pi = V(s) grad sum_a pi = V(s) grad 1 = 0
    however wrong V is. A good V makes the gradient less noisy.

    Without the `detach` the actor's loss would train the critic too, to expect whatever
    makes that loss small.

    `returns` (B,), `values` (B,) -> (B,), without gradient.
    By hand: returns = [1, -1], values = [0.75, 0.5]  ->  [0.25, -1.5].
    """
    return returns - values.detach()


def actor_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient is the policy gradient: lesson 1's, with another A_t.

    loss = -mean_t( A_t * ln pi(a_t | s_t) )

    Sutton & Barto, eq. (13.11), b being V: theta <- theta + alpha (G_t - b) grad ln pi.

    `log_probs` (B,) of the moves made, with gradient; `advantages` (B,). A scalar.
    By hand: log_probs = [ln 0.5, ln 0.5], advantages = [1, -3]  ->  -ln 2 = -0.6931.
    """
    return -(log_probs * advantages).mean()


def entropy_bonus(entropies: torch.Tensor, beta: float) -> torch.Tensor:
    """What variety is worth; the loss has it with a minus, so that entropy is kept up.

    bonus = beta * mean_t( H_t ),   H_t = -sum_a pi(a|s_t) ln pi(a|s_t)   (in nats)

    H is 0 if one move is certain and ln k if k moves are equally likely (the unit of ln
    is called nat). A move that is never tried is never judged again, even if it only
    had bad luck in the first games: the bonus keeps every move possible.

    `entropies` (B,): H_t with gradient; beta: what a nat is worth. Gives a scalar.
    By hand: two moves at 1/2 each, then one that is certain, beta = 0.5
        ->  H = [ln 2, 0], bonus = 0.5 * 0.3466 = 0.1733.
    """
    return beta * entropies.mean()


def critic_loss(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """The mean squared error, smallest where V(s) is the mean return from s.

    loss = mean_t( (G_t - V(s_t))^2 )

    `values` (B,) with gradient, `returns` (B,); gives a scalar.
    By hand: values = [0.5, 0], returns = [1, -1]  ->  (0.25 + 1) / 2 = 0.625.
    """
    return ((returns - values) ** 2).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------

# Why is the opponent a frozen copy, and not the actor itself? To the learner it is part
# of the environment: frozen, it is one and the same player for REFRESH_EVERY updates.
# The actor would be another player after each gradient step, and two players that
# answer each other's last change can go in circles, as in rock, paper, scissors.

Policy = Callable[[torch.Tensor], torch.Tensor]  # boards (B, 9) -> logits (B, 9)


@torch.no_grad()
def play_games(
    env: gym.vector.VectorEnv,
    learner: Policy,
    opponent: Policy,
    learner_first: torch.Tensor,
    random_chances: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Play one whole game on each of N boards, move by move, learner against opponent.

    `env` leaves a board alone once its game has ended (AutoresetMode.DISABLED).
    `learner_first` (N,) bool: who begins. `random_chances` (N,) from 0 to 1: the chance
    that a move of the opponent is drawn from all legal ones, the same all game long.

    Gives observations (T, N, 9) and masks (T, N, 9), int8; actions (T, N), int64;
    learner_moved (T, N), bool, the moves to train on; and results (N,), float32: +1
    where the learner won, 0 drawn, -1 lost. T is the length of the longest game.
    """
    steps = []
    results = torch.zeros(env.num_envs)
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    observations, infos = env.reset()
    for ply in range(PLIES):
        if not alive.any():  # with few games, all may be over before the ninth move
            break
        boards = torch.from_numpy(observations)
        masks = torch.from_numpy(infos["action_mask"])
        learner_turn = learner_first if ply % 2 == 0 else ~learner_first  # (N,)
        learner_moved, opponent_moved = alive & learner_turn, alive & ~learner_turn
        # Every board is seen by the side to move, so either network can read it.
        logits = torch.zeros(env.num_envs, 9)
        logits[learner_moved] = learner(boards[learner_moved])
        logits[opponent_moved] = opponent(boards[opponent_moved])
        # Equal logits make all legal cells equally likely: a random move.
        logits[opponent_moved & (torch.rand(env.num_envs) < random_chances)] = 0
        # Categorical draws a cell, each with the probability softmax(logits) gives it.
        actions = torch.zeros(env.num_envs, dtype=torch.int64)
        legal_logits = mask_illegal(logits, masks)[alive]
        actions[alive] = Categorical(logits=legal_logits).sample()
        steps.append((boards, masks, actions, learner_moved))

        observations, rewards, terminated, _, infos = env.step(actions.numpy())
        # The reward is that of the side that moved; the other side gets minus this.
        rewards = torch.from_numpy(rewards).float()
        results += torch.where(learner_turn, rewards, -rewards)
        alive = torch.from_numpy(~terminated)
    # T rows of four tensors (N, ...) become four tensors (T, N, ...).
    return *(torch.stack(column) for column in zip(*steps, strict=True)), results


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def share_left(updates_done: int) -> float:
    """The share of LEARNING_RATE and ENTROPY_BONUS that is left, from 1 to LAST_SHARE.

    share = max(1 - updates_done / NUM_UPDATES, LAST_SHARE)

    Why the bonus shrinks: early, variety finds the good moves; later it only pays for
    moves that are known to be worse. Why the rate shrinks: the results of 512 games are
    partly luck. Adam moves each weight by about the rate however small the gradient is,
    so at a constant rate luck would keep all weights moving.
    By hand: 200 of 800 updates done  ->  0.75.
    """
    return max(1 - updates_done / NUM_UPDATES, LAST_SHARE)


@torch.no_grad()
def best_moves(policy: Policy, boards: np.ndarray) -> np.ndarray:
    """The agent's moves: the most likely legal one on each board (N, 9). (N,) int64."""
    logits = policy(torch.from_numpy(boards).float())
    masks = torch.from_numpy(legal_moves(boards))
    return mask_illegal(logits, masks).argmax(dim=1).numpy()


def play_every_line(
    policy: Policy,
    agent_first: bool,
    opponent_moves: Callable[[np.ndarray], np.ndarray] = legal_moves,
) -> tuple[list[int], list[float]]:
    """Play the agent against *everything* that an opponent can do.

    A line of play is one complete game. The agent has one move in each position; the
    opponent has all that the mask `opponent_moves(boards)` (N, 9) allows, by default
    every legal one, and each opens a branch. All branches are followed together, move
    by move. An agent that loses no line of play cannot be beaten.

    Gives, for (win, draw, loss) of the agent: how many lines of play end so; and how
    probable that is against random play. The probability of a line is the product of
    1 / (number of moves) over the turns of the opponent.
    """
    boards, probabilities = np.zeros((1, 9), dtype=np.int8), np.ones(1)
    results, result_probabilities = [], []
    for ply in range(PLIES):
        agent_turn = agent_first == (ply % 2 == 0)
        if agent_turn:
            rows, actions = np.arange(len(boards)), best_moves(policy, boards)
        else:
            masks = opponent_moves(boards)
            rows, actions = np.nonzero(masks)  # one row for each move of the opponent
            probabilities = (probabilities / masks.sum(axis=1))[rows]
        boards, rewards, ended, _ = play_moves(boards[rows], actions)
        results.append((rewards if agent_turn else -rewards)[ended])
        result_probabilities.append(probabilities[ended])
        boards, probabilities = boards[~ended], probabilities[~ended]
    results, probabilities = map(np.concatenate, (results, result_probabilities))
    ends = [results == end for end in (1, 0, -1)]
    return [int(e.sum()) for e in ends], [float(probabilities[e].sum()) for e in ends]


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until no line of play is lost, and save both networks."""
    check_settings()
    print(f"Actor-critic on {ENV_ID}, on the CPU: {NUM_UPDATES} updates, 12 seconds.")
    print("wins: % against random play, moving 1st and 2nd; should rise to 99 and 92.")
    print("lost: lines of play that are lost; should fall to 0, entropy slowly to 0.6.")
    print("The loss is the actor's. It shows no progress: the critic learns as well.\n")
    print("wins 1st  wins 2nd  lost 1st  lost 2nd  updates  entropy (nats)      loss")
    torch.set_num_threads(1)  # the networks are so small that more threads only wait

    # 1. An actor and a critic that know nothing, and a frozen copy of the actor.
    torch.manual_seed(SEED)
    actor, critic = ActorNetwork(HIDDEN_UNITS), CriticNetwork(HIDDEN_UNITS)
    opponent = copy.deepcopy(actor)
    # One optimizer for both networks; step 5 sets its learning rate.
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
    env = gym.make_vec(ENV_ID, num_envs=GAMES_PER_UPDATE)
    learner_first = torch.arange(GAMES_PER_UPDATE) % 2 == 0  # in every second game
    history = []

    try:
        for update in range(1, MAX_UPDATES + 1):
            # 2. Play whole games, each with its own chance of random moves.
            random_chances = MAX_RANDOM_CHANCE * torch.rand(GAMES_PER_UPDATE)
            games = play_games(env, actor, opponent, learner_first, random_chances)
            observations, masks, actions, learner_moved, results = games

            # 3. The return of each move of the learner; the others are not trained on.
            returns = results.expand_as(learner_moved)[learner_moved]  # (N,) -> (B,)
            observations = observations[learner_moved]  # (T, N, 9) -> (B, 9)
            masks, actions = masks[learner_moved], actions[learner_moved]

            # 4. Better or worse than expected?
            values = critic(observations)
            advantages = subtract_values(returns, values)

            # 5. One gradient step. The probabilities are computed again, in one pass
            #    and with gradients; the actor has not changed since it played.
            choice = Categorical(logits=mask_illegal(actor(observations), masks))
            share = share_left(update - 1)
            bonus = entropy_bonus(choice.entropy(), beta=share * ENTROPY_BONUS)
            policy_loss = actor_loss(choice.log_prob(actions), advantages)
            loss = policy_loss - bonus + critic_loss(values, returns)
            optimizer.param_groups[0]["lr"] = share * LEARNING_RATE
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 6. Now and then a new opponent.
            if update % REFRESH_EVERY == 0:
                opponent.load_state_dict(actor.state_dict())

            # 7. Again, until rate and bonus have shrunk and no line of play is lost.
            if update % REPORT_EVERY == 0 or update in (NUM_UPDATES, MAX_UPDATES):
                played = [play_every_line(actor, first) for first in SEATS]
                lost = [counts[2] for counts, _ in played]
                wins = [100 * probabilities[0] for _, probabilities in played]
                history.append((update * GAMES_PER_UPDATE, *wins, sum(lost)))
                row = f"{wins[0]:8.1f}{wins[1]:10.1f}{lost[0]:10}{lost[1]:10}{update:9}"
                print(f"{row}{choice.entropy().mean():16.3f}{policy_loss:10.4f}")
                if update >= NUM_UPDATES and sum(lost) == 0:
                    break
        facts = {"updates": update, "lost_lines": sum(lost)}
        suffix = "_unsolved" if sum(lost) else ""
        names = save_run(actor, critic, history, suffix, **facts)
    except BaseException as end:  # Ctrl-C or an error
        kept = save_run(actor, critic, history, "_interrupted")
        print(f"\nThis run is kept in {kept}; older weights are as they were.")
        if isinstance(end, KeyboardInterrupt):
            sys.exit("Stopped.")
        raise
    if sum(lost):
        sys.exit(f"{sum(lost)} lines of play lost in the end; kept in {names}.")
    print(f"\nNo line of play is lost after {update} updates. Written:\n{names}")
    print("Play against it: python tictactoe_eval.py")


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    paths = ACTOR_PATH, CRITIC_PATH, CURVE_PATH
    rules = {
        "SEED must be from 0 to 499,999": 0 <= SEED < 500_000,
        "NUM_UPDATES, REPORT_EVERY, REFRESH_EVERY and HIDDEN_UNITS must be 1 or more": (
            min(NUM_UPDATES, REPORT_EVERY, REFRESH_EVERY, HIDDEN_UNITS) >= 1
        ),
        "MAX_UPDATES must be NUM_UPDATES or more": MAX_UPDATES >= NUM_UPDATES,
        "GAMES_PER_UPDATE must be 2 or more": GAMES_PER_UPDATE >= 2,
        "MAX_RANDOM_CHANCE must be from 0 to 1": 0 <= MAX_RANDOM_CHANCE <= 1,
        "LEARNING_RATE must be above 0, at most 1": 0 < LEARNING_RATE <= 1,
        "ENTROPY_BONUS must be from 0 to 10": 0 <= ENTROPY_BONUS <= 10,
        "LAST_SHARE must be above 0, at most 1": 0 < LAST_SHARE <= 1,
        "the folders of all paths must exist": all(p.parent.is_dir() for p in paths),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def save_run(
    actor: nn.Module, critic: nn.Module, history: list, suffix: str, **facts: float
) -> str:
    """Write networks and curve, with `suffix` added to their names; give the names."""
    paths = ACTOR_PATH, CRITIC_PATH, CURVE_PATH
    paths = [path.with_stem(path.stem + suffix) for path in paths]
    # One fingerprint of both networks in both files: a pair from two runs is noticed.
    tensors = [*actor.state_dict().values(), *critic.state_dict().values()]
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    facts |= {"seed": SEED, "run": digest.hexdigest()[:16]}
    for network, path in ((actor, paths[0]), (critic, paths[1])):
        checkpoint = {"weights": network.state_dict(), "env_id": ENV_ID, **facts}
        checkpoint |= {"network": type(network).__name__, "hidden_units": HIDDEN_UNITS}
        aside = path.with_name(f"{path.name}.tmp")
        torch.save(checkpoint, aside)
        os.replace(aside, path)  # all at once: a crash never leaves half a file
    draw_learning_curve(history, paths[2])
    return ", ".join(path.name for path in paths)


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


def draw_learning_curve(history: list[tuple[float, ...]], path: Path | str) -> None:
    """Write a picture of the checks: wins against random play, lines of play lost."""
    games, wins_first, wins_second, lost = np.array(history).reshape(-1, 4).T
    figure = Figure(figsize=(8, 5), dpi=120)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(games, wins_first, label="moving first")
    above.plot(games, wins_second, label="moving second")
    above.set(title=f"Self-play on {ENV_ID}", ylabel="wins against random play (%)")
    above.legend()
    below.plot(games, lost, color="red")
    below.set(xlabel="games played", ylabel="lines of play lost", yscale="symlog")
    figure.savefig(path)


if __name__ == "__main__":
    main()
