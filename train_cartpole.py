"""Lesson 1: REINFORCE on CartPole-v1, the simplest policy gradient.

What you will learn
    How an agent improves from rewards alone: it tries actions at random, and each one
    becomes more likely the better things went after it.
    The task: a pole stands on a cart, which the agent pushes left or right 50 times a
    second. Each step brings a reward of 1. An episode ends when the pole leans by 12
    degrees, when the cart is 2.4 m from the middle, or after 500 steps.

The algorithm in 6 steps
    1. Start from a policy: a network that gives each action a probability.
    2. Play a batch of whole episodes, drawing each action with that probability.
    3. Give each step its return, the sum of the rewards that followed, later ones
       counting less, and its advantage: the return minus the mean over the batch.
    4. Take one gradient step that makes the actions with a positive advantage more
       likely, and those with a negative advantage less likely.
    5. Repeat from 2 with the new policy, until it is *perfect*: it never drops the pole
       when it plays greedily, that is, always takes its most likely action.
    6. Measure it on held-out episodes, with seeds never used before, and save it.

Symbols (T steps, N episodes side by side, B steps in all that are trained on)
    s_t         observations  (T, N, 4)  cart m, cart m/s, pole rad, pole rad/s
    a_t         actions       (T, N)     0 pushes the cart left, 1 pushes it right
    r_t         rewards       (T, N)     1 for each step, 0 after the episode's end
    -           alive         (T, N)     True up to the episode's end: B = alive.sum()
    G_t         returns       (T, N)     r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
    A_t         advantages    (B,)       G_t minus the mean of the batch
    ln pi(a|s)  log_probs     (B,)       log-probability of the action that was taken

Where this differs from the book (Sutton & Barto, 2nd ed., chapter 13), and why
    * One update by Adam after 16 episodes, where the book makes one by plain gradient
      ascent for each step. A batch gives a steadier direction; Adam scales the step.
    * The mean return of the batch is subtracted, where the book (section 13.4) has a
      *value function*: a second network, which predicts the return from s_t. Simpler.
    * The factor gamma^t is left out, as in nearly all code: with it, steps after the
      first few hundred would hardly count. `reinforce_loss` says what that costs.
    * The limit of 500 steps counts as an end like a fall, so the returns before it are
      too low. Completing them takes a value function; lesson 3 has one and does so.

Run it, and what you should see
    python train_cartpole.py     4 seconds on one core of a server CPU, no GPU
    Seeds 0-19 (tests/benchmarks/cartpole.py): all perfect after 432 episodes and 3.5
    seconds (median; 624 and 4.3 at most), then 500 steps in all held-out episodes.
        last 100  this batch  episodes  entropy (nats)      loss
            29.8        37.6        48           0.645   -0.3435   seed 0: early,
           274.8       472.6       240           0.526   -0.2052   middle
           485.3       500.0       320           0.494   -0.0116   and late
    The mean of the last 100 scores should rise; at 475 the task is *solved*. Entropy is
    how undecided the policy is: ln 2 = 0.693 nats (the unit of ln) for a coin flip, 0
    if certain. A slow fall is healthy, to 0.40-0.51 in seeds 0-7; below 0.1 with low
    scores LEARNING_RATE is too big. The loss (-0.6 to 0.4) is no measure of progress:
    it compares the steps of one batch. What else goes wrong: README.md, Debugging.

To change the task
    Acrobot-v1: change ENV_ID and the file names; in PolicyNetwork, 4 becomes 6 and 2
    becomes 3; in main(), `perfect = solved`, as no score is perfect. LEARNING_RATE =
    0.005 solves it with seeds 1 and 2, after 800 and 560 episodes. With seed 0 none of
    1,500 episodes reaches the goal: none is better than another, nothing is learned.

Try this (seeds 0-2, with MAX_EPISODES = 1_500; medians)
    * EPISODES_PER_UPDATE = 1 and LEARNING_RATE = 0.01: perfect after 376 episodes,
      about as many as with 16, but it takes 34 seconds.
    * GAMMA = 0.9: all are solved, but only two become perfect, after 736 and 1,152.
    * LEARNING_RATE = 0.2: none is solved; the best mean of 100 episodes is 138.
"""

import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
ENV_ID = "CartPole-v1"
SEED = 0  # below 500,000; same seed, machine and versions: same weights, bit for bit

# Budget
MAX_EPISODES = 4_000  # if the policy is not perfect by then, stop with status 1
CHECK_EPISODES = 1_000  # greedy episodes in which a perfect policy must never fall; of
#                         100, a policy that falls once in 200 passes most
HELD_OUT_EPISODES = 100  # for the final score; fewer make it less exact
REPORT_EVERY = 3  # updates between two printed lines

# Algorithm
EPISODES_PER_UPDATE = 16  # more: steadier, but fewer updates. 1: the mean that is
#                           subtracted is the episode's own, and at this LEARNING_RATE
#                           two of seeds 0-2 end at 9 steps, so halve that as well
LEARNING_RATE = 0.02  # size of Adam's step; too small is slow, too big never settles
GAMMA = 0.99  # discount of a reward one step later: 0.99 looks about 100 steps ahead;
#               0.9 looks 10 ahead and learns far more slowly; 1.0 works as well
HIDDEN_UNITS = 64  # width of the one hidden layer; a task this small needs few
# Derived: an update is one gradient step, on about 16 x 20 = 320 steps of play at first
# and 16 x 500 = 8,000 at last. The budget is 4,000 / 16 = 250 updates; seed 0 takes 20.

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("cartpole_reinforce.pth")
CURVE_PATH = Path(__file__).with_name("cartpole_learning_curve.png")

# Given by the task
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 475: solved, if the last 100
#                                                   training episodes reach this mean
FULL_SCORE = gym.spec(ENV_ID).max_episode_steps  # 500: the pole never fell
CLASSIC_SCORE = 195  # "solved" for the older CartPole-v0, which ended at 200 steps

# Three separate sets of starting states: training draws them from SEED, the check for a
# perfect policy from CHECK_SEED (the same CHECK_EPISODES each time), and held-out
# episode i has the seed HELD_OUT_SEED + i.
CHECK_SEED = 500_000
HELD_OUT_SEED = 1_000_000

# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


class PolicyNetwork(nn.Module):
    """The policy pi(a|s): an observation in, a preference for each action out."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden_units),  # position, speed, angle, angular speed
            nn.Tanh(),
            nn.Linear(hidden_units, 2),  # left, right
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, 4) float32 -> logits (B, 2).

        Logits are any real numbers; softmax makes them probabilities that add up to 1:
        pi(a|s) = exp(logit of a) / sum of exp(logit) over all actions.
        """
        return self.layers(observations)


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------

# Why ln pi? We want to raise J, the expected return, by changing the network's weights;
# grad is the derivative with respect to them. In a state s where action a brings the
# return G(a), J = sum_a pi(a|s) G(a). As grad ln pi = grad pi / pi, its gradient, the
# *policy gradient*, is
#
#     grad J = sum_a grad pi(a|s) G(a) = sum_a pi(a|s) * [ G(a) grad ln pi(a|s) ].
#
# The last sum is the mean of the bracket over actions drawn from pi. There is no need
# to try every action, nor to know how the pole moves: play, and average the bracket.
# Over an episode, such terms add up, one for each step (section 13.2). An action gets
# only the rewards that followed it, since it had no influence on earlier ones.
#
# Why may a *baseline* b be subtracted from the return? Probabilities add up to 1, so
#
#     sum_a pi(a|s) * [ b grad ln pi(a|s) ] = b grad sum_a pi(a|s) = b grad 1 = 0
#
# for every b that does not depend on the action: the expected gradient stays the same,
# and a good b makes the samples of it scatter less.


def returns_to_go(rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Returns: how much reward followed each step, later rewards counting less.

    G_t = r_t + gamma * G_{t+1},   and 0 after the last step

    Sutton & Barto, eq. (3.9), who write R_{t+1} for our r_t.

    `rewards` (T,) or (T, N) float32, one column an episode, filled up with zeros after
    its end: nothing more follows, whether the pole fell or the 500 steps were over.
    Gives the same shape.
    By hand: rewards = [1, 1, 1], gamma = 0.5  ->  returns = [1.75, 1.5, 1].
    """
    returns = torch.zeros_like(rewards)
    next_return = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_return = rewards[t] + gamma * next_return
        returns[t] = next_return
    return returns


def subtract_mean(returns: torch.Tensor) -> torch.Tensor:
    """Advantages: how much better than the average step of the batch things went.

    A_t = G_t - mean(G)

    In CartPole all returns are positive: as they are, they would make every action more
    likely, some only more than others. The mean is nearly a baseline, but not quite: it
    contains G_t, which depends on the action. In the tests' game of two steps, this
    turns the expected gradient away from the true one: their cosine is 0.62 if a batch
    has 1 episode and 0.95 if it has 2. The error there falls as 1 / episodes.

    `returns` (B,) float32, all real steps of a batch, gives advantages (B,).
    By hand: [1, 2, 6]  ->  [-2, -1, 3].
    """
    return returns - returns.mean()


def reinforce_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient is REINFORCE's: minimise it to raise the return.

    loss = -mean_t( A_t * ln pi(a_t | s_t) )

    Sutton & Barto, eq. (13.11): theta <- theta + alpha (G_t - b) grad ln pi(a_t | s_t).
    The minus is there because PyTorch's optimizers go downhill. A_t is a plain number,
    made of rewards, so no gradient flows through it.
    With gamma < 1, the gradient of the expected discounted return needs gamma^t A_t, as
    in the box of section 13.4. Without gamma^t, the usual choice and ours, it is the
    gradient of no function (Nota & Thomas, arXiv 1906.07073), but works well here.

    `log_probs` (B,) of the actions taken, with gradient; `advantages` (B,). Gives a
    scalar.
    By hand: log_probs = [ln 0.5, ln 0.5], advantages = [1, 3]  ->  2 ln 2 = 1.3863.
    """
    return -(log_probs * advantages).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------

Policy = Callable[[torch.Tensor], torch.Tensor]  # observations (N, 4) -> logits (N, 2)


@torch.no_grad()
def play_episodes(
    env: gym.vector.VectorEnv, policy: Policy, seed: int | None, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play one whole episode in each of the N copies of the environment.

    `seed` seeds the starts (None goes on from the last ones); `greedy` takes the most
    likely action instead of drawing one. T is the length of the longest episode.

    Gives observations (T, N, 4) and rewards (T, N) float32, actions (T, N) int64, and
    alive (T, N) bool: False where the episode had ended already and the copy only waits
    for the longest one. Such steps must not be trained on; their rewards are set to 0.
    """
    steps = []
    observations, _ = env.reset(seed=seed)
    alive = np.ones(env.num_envs, dtype=bool)
    while alive.any():
        logits = policy(torch.from_numpy(observations))
        actions = logits.argmax(1) if greedy else Categorical(logits=logits).sample()
        actions = actions.numpy()
        next_observations, rewards, terminated, truncated, _ = env.step(actions)
        steps.append((observations, actions, rewards * alive, alive))
        # Fallen (terminated) or 500 steps long (truncated): both end the episode, with
        # every reward counted. The copy then starts again by itself (autoreset), but
        # `alive` stays False and what it does from now on is ignored.
        alive = alive & ~(terminated | truncated)
        observations = next_observations
    observations, actions, rewards, alive = [  # T entries each, stacked
        torch.from_numpy(np.array(entries)) for entries in zip(*steps, strict=True)
    ]
    return observations, actions, rewards.float(), alive


def evaluate(
    policy: Policy, episodes: int, first_seed: int, greedy: bool
) -> torch.Tensor:
    """Scores (episodes,), the sums of rewards; number i has the seed first_seed + i."""
    env = gym.make_vec(ENV_ID, num_envs=episodes, vectorization_mode="sync")
    _, _, rewards, _ = play_episodes(env, policy, first_seed, greedy)
    return rewards.sum(0)


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def is_perfect(policy: Policy) -> bool:
    """When learning ends: no pole falls in CHECK_EPISODES episodes, played greedily."""
    env = gym.make_vec(ENV_ID, num_envs=CHECK_EPISODES)
    _, _, rewards, _ = play_episodes(env, policy, CHECK_SEED, greedy=True)
    return bool((rewards.sum(0) == FULL_SCORE).all())


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until the policy is perfect, then measure it and save it."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the network is so small that more threads only wait

    # 1. A policy that knows nothing.
    torch.manual_seed(SEED)
    policy = PolicyNetwork(HIDDEN_UNITS)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    env = gym.make_vec(ENV_ID, num_envs=EPISODES_PER_UPDATE)  # N copies at once
    scores, perfect, milestones = [], False, [CLASSIC_SCORE, SOLVED_SCORE]

    with keep_unfinished_run(
        lambda: save_run(policy, scores, "_interrupted")
    ) as stopped:
        while len(scores) < MAX_EPISODES and not perfect:
            if stopped:  # by Ctrl-C
                sys.exit(f"Stopped after {len(scores)} episodes.")

            # 2. Play whole episodes. Only the first ones need a seed.
            seed = None if scores else SEED
            observations, actions, rewards, alive = play_episodes(env, policy, seed)

            # 3. The return of each step, and its advantage.
            returns = returns_to_go(rewards, GAMMA)  # (T, N)
            advantages = subtract_mean(returns[alive])  # (B,)

            # 4. One gradient step. The probabilities are computed again, in one pass
            #    and with gradients; the policy has not changed since it acted.
            choice = Categorical(logits=policy(observations[alive]))
            loss = reinforce_loss(choice.log_prob(actions[alive]), advantages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 5. Again, until the task is solved and the policy is perfect.
            scores += rewards.sum(0).tolist()
            solved = len(scores) >= 100 and np.mean(scores[-100:]) >= SOLVED_SCORE
            perfect = solved and is_perfect(policy)
            report(scores, choice.entropy().mean(), loss, perfect, milestones)

        # 6. The final score, and the files.
        greedy_score = print_held_out_scores(policy)
        suffix = "" if perfect else "_unsolved"
        names = save_run(policy, scores, suffix, greedy_score=greedy_score)
    if not perfect:
        sys.exit(f"Not perfect after {len(scores)} episodes; kept in {names}.")
    print(f"Perfect after {len(scores)} episodes. Written: {names}.")
    print("Watch it: python cartpoleinference.py")


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""

    def whole(lowest, highest, *values):
        return all(type(v) is int and lowest <= v <= highest for v in values)

    def number(lowest, highest, *values):
        return all(type(v) in (int, float) and lowest <= v <= highest for v in values)

    def file(path, ending):
        path = Path(path) if isinstance(path, str | Path) else Path()
        fits = path.suffix == ending and not path.is_dir()
        return fits and os.access(path.parent, os.W_OK)

    counts = MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY
    rules = {
        "SEED must be a whole number from 0 to 499,999": whole(0, 499_999, SEED),
        "MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY, HIDDEN_UNITS "
        "and EPISODES_PER_UPDATE must be whole numbers from 1": whole(
            1, math.inf, *counts, HIDDEN_UNITS, EPISODES_PER_UPDATE
        ),
        "LEARNING_RATE must be a number in (0, 1]": number(1e-9, 1, LEARNING_RATE),
        "GAMMA must be a number from 0 to 1": number(0, 1, GAMMA),
        "WEIGHTS_PATH must be a .pth file, CURVE_PATH a .png file, in folders that can "
        "be written to": file(WEIGHTS_PATH, ".pth") and file(CURVE_PATH, ".png"),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C (or a `kill`) only leaves a mark in the list that this gives, and the loop of
    main() looks at it once an update: nothing is torn apart half-way. A second Ctrl-C
    interrupts at once.
    """
    marks = []

    def note(number, frame):
        marks.append(number)
        signal.signal(number, signal.default_int_handler)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    heard = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # not nohup's
    before = {n: signal.signal(n, note) for n in heard}
    try:
        yield marks
    except BaseException:
        print(f"\nThis run is kept in {save()}; older weights are as they were.")
        raise
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def save_run(policy: PolicyNetwork, scores: list, suffix: str, **facts: float) -> str:
    """Write weights and curve, with `suffix` added to both names; give the names.

    The weights are written aside, then renamed: a crash leaves the older file whole.
    """
    paths = [Path(path) for path in (WEIGHTS_PATH, CURVE_PATH)]
    path, curve_path = [path.with_stem(path.stem + suffix) for path in paths]
    checkpoint = {"weights": policy.state_dict(), "env_id": ENV_ID, "seed": SEED}
    checkpoint |= {"episodes": len(scores), **facts}
    checkpoint["hidden_units"] = policy.layers[0].out_features
    with tempfile.TemporaryDirectory(".tmp", path.name, path.parent) as folder:
        # torch.save writes this name into the file: same name, same bytes.
        temporary = Path(folder, f"{path.name}.tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    draw_learning_curve(scores, curve_path)
    return f"{path.name} and {curve_path.name}"


def load_policy(path: Path | str = WEIGHTS_PATH) -> PolicyNetwork:
    """Read a policy back, or stop with one line if the file does not hold one."""
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path.name} is missing. Make it with: python train_cartpole.py")
    try:  # weights_only: a .pth file can hold code, and this refuses to run any
        checkpoint = torch.load(path, weights_only=True)
        weights, units = checkpoint["weights"], checkpoint["hidden_units"]
        fits = checkpoint["env_id"] == ENV_ID and len(weights["layers.0.bias"]) == units
        if not fits or not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("another task, sizes that contradict the tensors, or NaN")
        policy = PolicyNetwork(units)
        policy.load_state_dict(weights)
    except Exception as problem:  # a damaged file can fail in any way at all
        sys.exit(
            f"{path.name} does not hold a {ENV_ID} policy of finite weights "
            f"({type(problem).__name__}). Make it anew with: python train_cartpole.py"
        )
    return policy


def draw_learning_curve(scores: list[float], path: Path) -> None:
    """Write a picture of the scores, episode by episode, with their running mean."""
    last_100 = [np.mean(scores[max(0, i - 99) : i + 1]) for i in range(len(scores))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(scores, ".", color="0.7", markersize=3, label="one episode")
    axes.plot(last_100, label="mean of the last 100")
    axes.axhline(SOLVED_SCORE, color="green", ls="--", label=f"solved: {SOLVED_SCORE}")
    axes.set(title=f"REINFORCE on {ENV_ID}", xlabel="episode", ylabel="score")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def print_header() -> None:
    """Say what runs, for how long, and how to read the table that follows."""
    print(f"REINFORCE on {ENV_ID}, seed {SEED}, on the CPU (a GPU is slower here).")
    print(f"At most {MAX_EPISODES:,} episodes; most seeds need about 500, 5 seconds.")
    print(f"'last 100', the mean score, should rise to {SOLVED_SCORE:g} (solved).")
    print("Entropy should fall slowly. The loss does not show progress.\n")
    print("last 100  this batch  episodes  entropy (nats)      loss")


def report(
    scores: list, entropy: float, loss: float, perfect: bool, milestones: list
) -> None:
    """Print a line of the table every REPORT_EVERY updates, and each milestone once."""
    last_100, episodes = np.mean(scores[-100:]), len(scores)
    over = perfect or episodes >= MAX_EPISODES
    if over or episodes // EPISODES_PER_UPDATE % REPORT_EVERY == 0:
        batch = np.mean(scores[-EPISODES_PER_UPDATE:])
        print(f"{last_100:8.1f}{batch:12.1f}{episodes:10}{entropy:16.3f}{loss:10.4f}")
    for score in [m for m in milestones if episodes >= 100 and last_100 >= m]:
        milestones.remove(score)
        print(f"-- {score:g} after {episodes} episodes --")
    if episodes >= 100 and last_100 >= SOLVED_SCORE and not perfect:
        print("-- solved, but not perfect: greedily it still falls at times --")


def print_held_out_scores(policy: Policy) -> float:
    """Print the scores on held-out episodes; give the mean of the greedy ones."""
    print(f"\n{HELD_OUT_EPISODES} held-out episodes: mean +- std (minimum)")
    means = []
    for name, greedy in [("greedy", True), ("sampled", False)]:
        scores = evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy)
        std, low = scores.std(correction=0), scores.min()
        print(f"  {name:8}{scores.mean():6.1f} +- {std:5.1f} ({low:g})")
        means.append(scores.mean().item())
    return means[0]


if __name__ == "__main__":
    main()
