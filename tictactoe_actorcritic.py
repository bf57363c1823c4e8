"""Actor-critic by self-play on tic-tac-toe: from random moves to never losing.

What you will learn
    What a critic is for, and how an agent becomes its own teacher: no example games,
    no search, and no opponent but an older copy of itself.

The task
    Tic-tac-toe, written as an environment in tictactoe_env.py. Against perfect play
    nobody can win it, so the aim is: never lose, and win whenever the other side errs.

The algorithm in 7 steps
    1. Start from an actor (a policy: how likely is each move?) and a critic (how will
       this end?) that know nothing. The opponent is a frozen copy of the actor.
    2. Play many whole games against it, moving first in half of them. Each opponent
       makes some of its moves at random, one seldom, another every second time.
    3. Give each own move its return: how the game ended, +1 won, 0 drawn, -1 lost.
    4. Subtract what the critic expected. What is left is the advantage: did it end
       better or worse than usual from this position?
    5. One gradient step each: the actor makes moves with a positive advantage more
       likely, the critic moves its expectation towards the returns.
    6. Every so many updates the opponent becomes a copy of what the actor is now.
    7. Go back to 2, until the greedy agent (always its likeliest move) loses no line
       of play at all, whatever the other side does. Then save both networks.

Symbols (T plies, single moves, at most 9; N games side by side; B own moves in all)
    s_t        observations  (T, N, 9)  cells: +1 side to move, -1 other side, 0 empty
    a_t        actions       (T, N)     the cell that was taken, 0 to 8
    -          own           (T, N)     True where the learner moved: B = own.sum()
    G_t        returns       (B,)       how the game ended for the learner
    V(s_t)     values        (B,)       what the critic expects G_t to be
    A_t        advantages    (B,)       G_t - V(s_t)
    ln pi(a|s) log_probs     (B,)       log-probability of the move that was made
    H          entropy       scalar     variety in nats: 0 none, ln 9 = 2.2 all alike

Where this differs from the book, and why
    Sutton & Barto, Reinforcement Learning, 2nd ed., sections 13.4 and 13.5:
    * The book's actor-critic cuts the return short and lets the critic complete it
      (13.5). A game has at most five own moves, so we wait for its end, as in
      "REINFORCE with baseline" (13.4). In lesson 3 the critic completes returns.
    * Nothing is discounted (gamma = 1), and the opponent changes as the agent learns.
    * An entropy bonus, as in A3C (Mnih et al., 2016), keeps the moves varied.

Run it
    python tictactoe_actorcritic.py     10 seconds on one core of a server CPU, no GPU

What you should see (seeds 0-9, tests/benchmarks/tictactoe.py)
    No line of play lost from either seat, for every seed; 98.96 % wins against random
    play moving first and 91.64 % moving second, where no player who never loses can
    have more than 99.48 and 91.64; 10 seconds (median; 19 at most).

If it does not learn
    * 'lost 2nd' stays near 100: ENTROPY_BONUS is too small.
    * 'wins 2nd' passes 91.64 while lines are lost: it gambles on blunders that it sees
      too often. REFRESH_EVERY is too big.
    * The wins fall instead of rising: the sign of the loss or of a reward is wrong, or
      a board is seen from the wrong side.

Try this (medians of seeds 0-2)
    * ENTROPY_BONUS = 0.0: 143 lines are lost after 1,600 updates.
    * MAX_RANDOM_CHANCE = 0.0: none is lost, but the wins against random play fall to
      94.8 and 80.4 %: it has not seen enough blunders to punish them all.
    * REFRESH_EVERY = 2_000, an opponent that never learns: 92.6 % wins moving second,
      but 8 lines lost. It pays to gamble against a beginner.
"""

import copy
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical
from tqdm import tqdm

from tictactoe_env import legal_moves, play_moves

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
SEED = 0  # below 500,000; same seed, machine and versions: same weights, bit for bit

# Budget
NUM_UPDATES = 800  # at least so many; LEARNING_RATE and ENTROPY_BONUS shrink meanwhile
MAX_UPDATES = 1_600  # if a line is still lost after this many, stop with status 1
REPORT_EVERY = 50  # updates between two checks of every line of play

# Algorithm
GAMES_PER_UPDATE = 512  # more is steadier but slower; half of them are begun by us
REFRESH_EVERY = 20  # updates between two new opponents; never to renew it teaches to
#                     gamble on the blunders of a beginner
MAX_RANDOM_CHANCE = 0.5  # the opponent of each game moves at random with a chance drawn
#                          from 0 to this; 0 rarely shows us how to punish bad moves
LEARNING_RATE = 0.01  # size of Adam's first steps; too small needs more updates
ENTROPY_BONUS = 0.25  # what a nat of variety is worth, a won game being 1; too little
#                       and whole branches of the game are never tried again
LAST_SHARE = 0.05  # share of both that is left after NUM_UPDATES; 1: they never shrink
HIDDEN_UNITS = 64  # width of both hidden layers

# Files, written beside this script
ACTOR_PATH = Path(__file__).with_name("tictactoe_actor.pth")
CRITIC_PATH = Path(__file__).with_name("tictactoe_critic.pth")
CURVE_PATH = Path(__file__).with_name("tictactoe_learning_curve.png")

# What the task itself fixes
ENV_ID = "TicTacToe-v0"  # registered by tictactoe_env
PLIES = 9  # no game is longer
SEATS = (True, False)  # does the agent move first?


def check_settings() -> None:
    """Stop with one plain line if a setting is impossible, before anything runs."""
    limits = {  # name: (type, lowest, highest)
        "SEED": (int, 0, 499_999),
        "NUM_UPDATES": (int, 1, math.inf),
        "MAX_UPDATES": (int, 1, math.inf),
        "REPORT_EVERY": (int, 1, math.inf),
        "GAMES_PER_UPDATE": (int, 2, math.inf),
        "REFRESH_EVERY": (int, 1, math.inf),
        "MAX_RANDOM_CHANCE": (float, 0, 1),
        "LEARNING_RATE": (float, 1e-9, 1),
        "ENTROPY_BONUS": (float, 0, 10),
        "LAST_SHARE": (float, 1e-9, 1),
        "HIDDEN_UNITS": (int, 1, math.inf),
    }
    problems = []
    for name, (kind, low, high) in limits.items():
        value = globals()[name]
        if type(value) not in (int, kind) or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            limit = f"from {low:g} to {high:g}" if high < math.inf else f"from {low} up"
            problems.append(f"{name} = {value!r} must be {noun} {limit}")
    if not problems and MAX_UPDATES < NUM_UPDATES:
        problems.append(f"MAX_UPDATES = {MAX_UPDATES!r} must be NUM_UPDATES or more")
    for name in ("ACTOR_PATH", "CRITIC_PATH", "CURVE_PATH"):
        if not os.access(Path(globals()[name]).parent, os.W_OK):
            problems.append(f"{name} must lie in a folder that can be written to")
    if problems:
        sys.exit(f"Settings: {'; '.join(problems)}.")


# ------------------------------------------------------------------------------------
# The networks
# ------------------------------------------------------------------------------------


class ActorNetwork(nn.Module):
    """The policy pi(a|s): a board in, a preference for each of the nine cells out."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, hidden_units),
            nn.ReLU(),
            nn.Linear(hidden_units, hidden_units),
            nn.ReLU(),
            nn.Linear(hidden_units, 9),
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Boards (B, 9) -> logits (B, 9), taken cells too: see mask_illegal."""
        return self.layers(observations.float())


class CriticNetwork(nn.Module):
    """The value V(s): a board in, the expected result out, from +1 won to -1 lost."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(9, hidden_units),
            nn.ReLU(),
            nn.Linear(hidden_units, hidden_units),
            nn.ReLU(),
            nn.Linear(hidden_units, 1),
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Boards (B, 9) -> values (B,).

        Without the squeeze it would be (B, 1), and returns (B,) minus values (B, 1) is
        a table (B, B) of every return against every value, without an error.
        """
        return self.layers(observations.float()).squeeze(-1)


def mask_illegal(logits: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
    """Make illegal moves impossible: their logit becomes minus infinity.

    softmax(-inf) = exp(-inf) / sum = 0 exactly, however the network likes the cell.

    `logits` (..., 9); `action_mask` (..., 9), 1 for a cell that may be taken: the mask
    of this very board, not of the one before the opponent moved. Gives (..., 9).
    Training, evaluation and the game against a human all choose through this function.
    By hand: logits = [5, 1], mask = [0, 1]  ->  [-inf, 1], probabilities [0, 1].
    """
    return logits.masked_fill(action_mask == 0, -torch.inf)


def save_network(network: nn.Module, path: Path | str, **facts: float) -> None:
    """Write the weights and a few plain facts about them to `path`.

    The file is written under a temporary name and then renamed, so that a crash in the
    middle leaves the old weights whole instead of the new ones half-written.
    """
    checkpoint = {"weights": network.state_dict(), "env_id": ENV_ID, **facts}
    checkpoint["network"] = type(network).__name__
    checkpoint["hidden_units"] = network.layers[0].out_features
    temporary = Path(f"{path}.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_actor(path: Path | str = ACTOR_PATH) -> ActorNetwork:
    """Read an actor back: boards (B, 9) to logits (B, 9).

    Errors: as load_network.
    """
    return load_network(ActorNetwork, path)


def load_critic(path: Path | str = CRITIC_PATH) -> CriticNetwork:
    """Read a critic back: boards (B, 9) to values (B,).

    Errors: as load_network.
    """
    return load_network(CriticNetwork, path)


def load_network(kind: type[nn.Module], path: Path | str) -> nn.Module:
    """Read a network of the class `kind` from `path`.

    Errors: a file that is missing, damaged, of another network, or that holds anything
    but tensors and plain values ends the program with one line and status 1.
    """
    path = Path(path)
    if not path.is_file():
        command = "python tictactoe_actorcritic.py"
        sys.exit(f"{path.name} is missing. Make it with: {command}")
    try:
        # weights_only: a .pth file can hold code, and this refuses to run any.
        checkpoint = torch.load(path, weights_only=True)
        made_for = (checkpoint["env_id"], checkpoint["network"])
        if made_for != (ENV_ID, kind.__name__):
            raise ValueError(f"made for {made_for}")
        network = kind(checkpoint["hidden_units"])
        network.load_state_dict(checkpoint["weights"])
    except Exception as problem:  # a damaged file can fail in any way at all
        sys.exit(
            f"{path.name} does not hold a tic-tac-toe {kind.__name__} "
            f"({type(problem).__name__}). "
            "Make it anew with: python tictactoe_actorcritic.py"
        )
    return network


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def subtract_values(returns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Advantages: how much better the game ended than the critic expected.

    A_t = G_t - V(s_t)

    Lesson 1 subtracted the mean of the batch, one number for all positions; the critic
    knows the position. To win a won position is no merit, to draw a lost one is.
    Whatever is subtracted, as long as it does not depend on the move, leaves the
    expected gradient as it is and only changes how noisy it is.

    The critic is a yardstick here and must not be bent: without the `detach` the
    actor's loss would also train it, to expect whatever makes that loss small.

    `returns` (B,), `values` (B,) -> (B,), without gradient.
    By hand: returns = [1, -1], values = [0.75, 0.5]  ->  [0.25, -1.5].
    """
    return returns - values.detach()


def actor_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient is the policy gradient: lesson 1's, with A_t for G_t.

    loss = -mean_t( A_t * ln pi(a_t | s_t) )

    Sutton & Barto, eq. (13.11): theta <- theta + alpha (G_t - b(s_t)) grad ln pi.

    `log_probs` (B,) of the moves made, with gradient; `advantages` (B,). A scalar.
    By hand: log_probs = [ln 0.5, ln 0.5], advantages = [1, -3]  ->  -ln 2 = -0.6931.
    """
    return -(log_probs * advantages).mean()


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

Policy = Callable[[torch.Tensor], torch.Tensor]  # boards (B, 9) -> logits (B, 9)


@torch.no_grad()
def play_games(
    env: gym.vector.VectorEnv,
    learner: Policy,
    opponent: Policy,
    learner_first: torch.Tensor,
    random_chances: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Play one whole game on each of N boards, ply by ply, the learner against another.

    `env` must leave a board alone once its game has ended (AutoresetMode.DISABLED).
    `learner_first` (N,) bool: who begins. `random_chances` (N,) from 0 to 1: the chance
    that a move of the opponent is drawn from all legal ones, the same all game long.

    Gives observations (T, N, 9) int8, masks (T, N, 9) int8, actions (T, N) int64, own
    (T, N) bool: True where the learner moved, the only steps to train on; and results
    (N,) float32: +1 where the learner won, 0 drawn, -1 lost. T is the longest game.
    """
    steps = []
    results = torch.zeros(env.num_envs)
    alive = torch.ones(env.num_envs, dtype=torch.bool)
    observations, infos = env.reset()
    for ply in range(PLIES):
        if not alive.any():  # with few games, all may be over before the ninth ply
            break
        boards = torch.from_numpy(observations)
        masks = torch.from_numpy(infos["action_mask"])
        learner_moves = learner_first if ply % 2 == 0 else ~learner_first
        own, theirs = alive & learner_moves, alive & ~learner_moves
        # Every board is seen by the side to move, so either network can read it.
        logits = torch.zeros(env.num_envs, 9)
        logits[own] = learner(boards[own])
        logits[theirs] = opponent(boards[theirs])
        # Equal logits make all legal cells equally likely: a random move.
        logits[theirs & (torch.rand(env.num_envs) < random_chances)] = 0
        # Categorical draws a cell, each with the chance softmax(logits) gives it.
        actions = torch.zeros(env.num_envs, dtype=torch.int64)
        legal_logits = mask_illegal(logits, masks)[alive]
        actions[alive] = Categorical(logits=legal_logits).sample()
        steps.append((boards, masks, actions, own))

        observations, rewards, terminated, _, infos = env.step(actions.numpy())
        # The reward belongs to the side that moved: what the opponent gains, we lose.
        rewards = torch.from_numpy(rewards).float()
        results += torch.where(learner_moves, rewards, -rewards)
        alive = torch.from_numpy(~terminated)
    return *(torch.stack(column) for column in zip(*steps, strict=True)), results


@torch.no_grad()
def best_moves(policy: Policy, boards: np.ndarray) -> np.ndarray:
    """The likeliest legal move on each board (N, 9): greedy play. Gives (N,) int64."""
    logits = policy(torch.from_numpy(boards).float())
    masks = torch.from_numpy(legal_moves(boards))
    return mask_illegal(logits, masks).argmax(dim=1).numpy()


def follow_every_line(
    policy: Policy,
    agent_first: bool,
    other_side: Callable[[np.ndarray], np.ndarray] = legal_moves,
) -> tuple[np.ndarray, np.ndarray]:
    """Play the greedy agent against *everything* the other side can do.

    One line of play is one complete game. The agent has one move in each position; the
    other side has all that the mask `other_side(boards)` (N, 9) allows, as a rule every
    legal one, and each opens a branch. All branches are walked together, ply by ply.
    Nothing is left to chance: an agent that loses no line cannot be beaten.

    Gives for each line how it ended for the agent (lines,): +1, 0 or -1; and how likely
    it is (lines,) if the other side picks its moves at random: the product of
    1 / (number of its moves) over its turns. These sum to 1.
    """
    boards, chances = np.zeros((1, 9), dtype=np.int8), np.ones(1)
    results, likelihoods = [], []
    for ply in range(PLIES):
        agent_moves = agent_first == (ply % 2 == 0)
        if agent_moves:
            rows, actions = np.arange(len(boards)), best_moves(policy, boards)
        else:
            masks = other_side(boards)
            rows, actions = np.nonzero(masks)  # one row for each legal move
            chances = (chances / masks.sum(axis=1))[rows]
        boards, rewards, ended, _ = play_moves(boards[rows], actions)
        results.append((rewards if agent_moves else -rewards)[ended])
        likelihoods.append(chances[ended])
        boards, chances = boards[~ended], chances[~ended]
    return np.concatenate(results), np.concatenate(likelihoods)


def play_every_line(policy: Policy, agent_first: bool) -> tuple[int, int, int]:
    """(wins, draws, losses) of the greedy agent over every line of play."""
    results, _ = follow_every_line(policy, agent_first)
    return tuple(int((results == outcome).sum()) for outcome in (1, 0, -1))


def against_random(policy: Policy, agent_first: bool) -> tuple[float, float, float]:
    """Chances (win, draw, loss) of the greedy agent against random play; exact."""
    results, likelihoods = follow_every_line(policy, agent_first)
    return tuple(float(likelihoods[results == outcome].sum()) for outcome in (1, 0, -1))


def draw_learning_curve(history: list[tuple[float, ...]], path: Path | str) -> None:
    """Write a picture of the checks: wins against random play, and lines lost."""
    games, wins_first, wins_second, lost = zip(*history, strict=True)
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(games, wins_first, label="moving first")
    above.plot(games, wins_second, label="moving second")
    above.set(title="Self-play actor-critic on tic-tac-toe")
    above.set(ylabel="wins against random play (%)")
    above.legend(loc="lower right")
    below.plot(games, lost, color="red")
    below.set_yscale("symlog", linthresh=1)
    below.set(xlabel="games played", ylabel="lines of play lost")
    below.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def save_run(
    actor: ActorNetwork,
    critic: CriticNetwork,
    history: list[tuple[float, ...]],
    suffix: str = "",
    **facts: float,
) -> str:
    """Write networks and curve, `suffix` added to their names; give the names."""
    paths = [Path(path) for path in (ACTOR_PATH, CRITIC_PATH, CURVE_PATH)]
    paths = [path.with_stem(path.stem + suffix) for path in paths]
    save_network(actor, paths[0], seed=SEED, **facts)
    save_network(critic, paths[1], seed=SEED, **facts)
    if not history:  # stopped before the first check: there is no curve yet
        paths.pop()
    else:
        draw_learning_curve(history, paths[2])
    return "\n".join(path.name for path in paths)


def print_header() -> None:
    """Say what is going to run, how long it takes and how to read the table."""
    print(f"Self-play actor-critic on {ENV_ID}, seed {SEED}, on the CPU.")
    print(f"{NUM_UPDATES} updates of {GAMES_PER_UPDATE} games, about 10 seconds.")
    print("wins: % against random play, moving 1st and 2nd; should rise to 99 and 92.")
    print("lost: how many of all lines of play end lost; should fall to 0. The loss is")
    print("not progress: it is measured against a critic that learns as well.\n")
    print("wins 1st  wins 2nd  lost 1st  lost 2nd  updates  entropy (nats)      loss")


def main() -> None:
    """Train until no line of play is lost, then draw and save."""
    check_settings()
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    print_header()

    # 1. An actor and a critic that know nothing, and a frozen copy of the actor.
    torch.manual_seed(SEED)
    actor, critic = ActorNetwork(HIDDEN_UNITS), CriticNetwork(HIDDEN_UNITS)
    opponent = copy.deepcopy(actor)
    update, history, solved = 0, [], False
    bar = tqdm(total=NUM_UPDATES, unit="update", leave=False, disable=None)
    try:
        # The networks share no weights, so one optimizer can train both at once.
        optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()])
        env = gym.make_vec(
            ENV_ID, num_envs=GAMES_PER_UPDATE, autoreset_mode=AutoresetMode.DISABLED
        )
        learner_first = torch.arange(GAMES_PER_UPDATE) % 2 == 0
        while update < MAX_UPDATES and not solved:
            # 2. Play whole games, each against an opponent of its own carelessness.
            random_chances = MAX_RANDOM_CHANCE * torch.rand(GAMES_PER_UPDATE)
            observations, masks, actions, own, results = play_games(
                env, actor, opponent, learner_first, random_chances
            )

            # 3. Each own move returns what its game came to. 4. Was that expected?
            returns = results.expand_as(own)[own]  # (N,) -> (T, N) -> (B,)
            values = critic(observations[own])
            advantages = subtract_values(returns, values)

            # 5. One gradient step: big and for much variety at first, small at the end.
            share = max(1 - update / NUM_UPDATES, LAST_SHARE)
            logits = mask_illegal(actor(observations[own]), masks[own])
            choice = Categorical(logits=logits)
            entropy = choice.entropy().mean()
            loss = actor_loss(choice.log_prob(actions[own]), advantages)
            bonus = share * ENTROPY_BONUS * entropy
            optimizer.param_groups[0]["lr"] = share * LEARNING_RATE
            optimizer.zero_grad()
            (loss - bonus + critic_loss(values, returns)).backward()
            optimizer.step()
            update += 1
            bar.update()

            # 6. Now and then a new opponent.
            if update % REFRESH_EVERY == 0:
                opponent.load_state_dict(actor.state_dict())

            # 7. Again, until the greedy agent loses no line of play from either seat.
            if update % REPORT_EVERY == 0 or update in (NUM_UPDATES, MAX_UPDATES):
                wins = [100 * against_random(actor, first)[0] for first in SEATS]
                lost = [play_every_line(actor, first)[2] for first in SEATS]
                history.append((update * GAMES_PER_UPDATE, *wins, sum(lost)))
                solved = update >= NUM_UPDATES and sum(lost) == 0
                bar.write(
                    f"{wins[0]:8.1f}{wins[1]:10.1f}{lost[0]:10}{lost[1]:10}{update:9}"
                    f"{entropy:16.3f}{loss:10.4f}"
                )
    except KeyboardInterrupt:
        bar.close()
        names = save_run(actor, critic, history, "_interrupted")
        print(f"\nStopped after {update} updates. The good weights are as they were.")
        print(f"This run is kept in\n{names}")
        return
    bar.close()

    facts = {"updates": update, "lost_lines": sum(lost)}
    if not solved:
        names = save_run(actor, critic, history, "_unsolved", **facts)
        names = names.replace("\n", ", ")
        sys.exit(f"{sum(lost)} lines lost after {update} updates; kept in {names}.")
    names = save_run(actor, critic, history, **facts)
    print(f"\nNo line of play is lost after {update} updates. Written:\n{names}")
    print("Play against it: python tictactoe_eval.py")


if __name__ == "__main__":
    main()
