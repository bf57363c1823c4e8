"""REINFORCE on CartPole-v1: the simplest policy gradient, with no value function.

What you will learn
    How an agent improves from nothing but the rewards of the episodes it played:
    each action becomes more likely the better things went after it.

The task
    A pole stands on a cart. 50 times a second the agent pushes the cart to the left or
    to the right and gets a reward of 1. The episode ends when the pole leans over by
    12 degrees, when the cart is 2.4 m away from the middle, or after 500 steps.

The algorithm in 6 steps
    1. Start from a policy: a network that gives each action a probability.
    2. Play whole episodes with it, drawing each action with that probability.
    3. Give each step its return, the discounted sum of the rewards that followed, and
       its advantage: how far that return lies above the average return.
    4. Take one gradient step that makes the actions with a positive advantage more
       likely, and those with a negative advantage less likely.
    5. Go back to 2 with the new policy, until it never fails, even when it plays
       greedily: always the likeliest action.
    6. Measure it on held-out episodes, which played no part so far, and save it.

Symbols (T steps, N episodes side by side, B steps in all that are trained on)
    s_t        observations  (T, N, 4)  cart m, cart m/s, pole rad, pole rad/s
    a_t        actions       (T, N)     0 pushes the cart left, 1 pushes it right
    r_t        rewards       (T, N)     1 for each step, 0 after the episode's end
    -          alive         (T, N)     True up to the episode's end: B = alive.sum()
    G_t        returns       (T, N)     r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
    A_t        advantages    (B,)       G_t minus the mean of the batch
    ln pi(a|s) log_probs     (B,)       log-probability of the action that was taken

Where this differs from the book, and why
    Sutton & Barto, Reinforcement Learning, 2nd ed., section 13.3 (Williams, 1992):
    * 16 episodes an update, not 1, and Adam's steps, not plain ones: faster.
    * The mean return of the batch is subtracted: a baseline (section 13.4), the only
      one here, since no value function is learned.
    * The factor gamma^t of the book's update is left out, as nearly everybody does:
      it would fade out what the later steps of an episode have to teach.
    * The limit of 500 steps counts as an end like any other, so the last steps of a
      perfect episode get low returns. The agent cannot see the clock: to it, noise.

Run it
    python train_cartpole.py     4 seconds on one core of a server CPU, no GPU

What you should see (seeds 0-19, tests/benchmarks/cartpole.py)
    Solved after 432 episodes and 3.5 seconds (median; 624 and 4.3 at most). All seeds
    then balance for 500 steps, greedily, in each of 100 held-out episodes.

If it does not learn
    * It drops to 10 steps, fewer than at random: the loss has the wrong sign.
    * It wanders between 20 and 200 steps: LEARNING_RATE is too big.
    * It climbs past 400 and falls back again and again: GAMMA is too small.

Try this (medians of seeds 0-2, with MAX_EPISODES = 1_500)
    * EPISODES_PER_UPDATE = 1 and LEARNING_RATE = 0.01, the textbook: solved after 376
      episodes. That is no more than with 16, but it takes 34 seconds.
    * GAMMA = 0.9: two of three seeds are solved, after 736 and 1,152 episodes.
    * LEARNING_RATE = 0.2: none is, and the best mean of 100 episodes is 138.
"""

import math
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
from tqdm import tqdm

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
SEED = 0  # below 500,000; same seed, machine and versions: same weights, bit for bit

# Budget
MAX_EPISODES = 4_000  # if this many have not solved it, stop with status 1
CHECK_EPISODES = 1_000  # greedy episodes, all of which must last 500 steps before we
#                         stop; of 100, an agent that falls once in 200 passes most
REPORT_EVERY = 3  # updates between two printed lines

# Algorithm
EPISODES_PER_UPDATE = 16  # 1 is the textbook's; more is steadier, but learns less often
LEARNING_RATE = 0.02  # size of Adam's step; too small is slow, too big never settles
GAMMA = 0.99  # discount of a reward one step later: 0.99 looks about 100 steps ahead;
#               0.9 looks 10 ahead and learns far more slowly; 1.0 works as well
HIDDEN_UNITS = 64  # width of the one hidden layer; a task this small needs few

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("cartpole_reinforce.pth")
CURVE_PATH = Path(__file__).with_name("cartpole_learning_curve.png")

# What the task itself fixes: change these only together with the network
ENV_ID = "CartPole-v1"
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 475, mean of the last 100 episodes
FULL_SCORE = gym.spec(ENV_ID).max_episode_steps  # 500: the pole never fell
CLASSIC_SCORE = 195  # "solved" for the older CartPole-v0, which ended at 200 steps

# Three seeds, so that no purpose replays the episodes of another: training draws its
# starts from SEED and the check before stopping from CHECK_SEED; the held-out episodes
# have a seed each, HELD_OUT_SEED and up.
CHECK_SEED = 500_000
HELD_OUT_SEED = 1_000_000
HELD_OUT_EPISODES = 100


def check_settings() -> None:
    """Stop with one plain line if a setting is impossible, before anything runs."""
    limits = {  # name: (type, lowest, highest)
        "SEED": (int, 0, CHECK_SEED - 1),
        "MAX_EPISODES": (int, 1, math.inf),
        "CHECK_EPISODES": (int, 1, math.inf),
        "REPORT_EVERY": (int, 1, math.inf),
        "EPISODES_PER_UPDATE": (int, 1, math.inf),
        "LEARNING_RATE": (float, 1e-9, 1),
        "GAMMA": (float, 0, 1),
        "HIDDEN_UNITS": (int, 1, math.inf),
    }
    problems = []
    for name, (kind, low, high) in limits.items():
        value = globals()[name]
        if type(value) not in (int, kind) or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            limit = f"from {low:g} to {high:g}" if high < math.inf else f"from {low} up"
            problems.append(f"{name} = {value!r} must be {noun} {limit}")
    for name in ("WEIGHTS_PATH", "CURVE_PATH"):
        if not os.access(Path(globals()[name]).parent, os.W_OK):
            problems.append(f"{name} must lie in a folder that can be written to")
    if problems:
        sys.exit(f"Settings: {'; '.join(problems)}.")


# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


class PolicyNetwork(nn.Module):
    """The policy pi(a|s): what is observed in, a preference for each action out."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden_units),  # position, speed, angle, angular speed
            nn.Tanh(),
            nn.Linear(hidden_units, 2),  # left, right
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Observations (B, 4) float32 -> logits (B, 2); softmax makes them pi(a|s)."""
        return self.layers(observations)


def save_policy(policy: PolicyNetwork, path: Path | str, **facts: float | str) -> None:
    """Write the weights and a few plain facts about them to `path`.

    The file is written under a temporary name and then renamed, so that a crash in the
    middle leaves the old weights whole instead of the new ones half-written.
    """
    checkpoint = {"weights": policy.state_dict(), "env_id": ENV_ID, **facts}
    checkpoint["hidden_units"] = policy.layers[0].out_features
    temporary = Path(f"{path}.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_policy(path: Path | str = WEIGHTS_PATH) -> PolicyNetwork:
    """Read a policy back: float32 observations (B, 4) to logits (B, 2).

    Errors: a file that is missing, damaged, of another network, or that holds anything
    but tensors and plain values ends the program with one line and status 1.
    """
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path.name} is missing. Make it with: python train_cartpole.py")
    try:
        # weights_only: a .pth file can hold code, and this refuses to run any.
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["env_id"] != ENV_ID:
            raise ValueError(f"made for {checkpoint['env_id']}")
        policy = PolicyNetwork(checkpoint["hidden_units"])
        policy.load_state_dict(checkpoint["weights"])
    except Exception as problem:  # a damaged file can fail in any way at all
        sys.exit(
            f"{path.name} does not hold a CartPole policy ({type(problem).__name__}). "
            "Make it anew with: python train_cartpole.py"
        )
    return policy


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


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
    likely, some only more than others. Sutton & Barto, section 13.4, where the mean
    stands for the baseline b.

    `returns` (B,) float32, all real steps of a batch, gives advantages (B,).
    By hand: [1, 2, 6]  ->  [-2, -1, 3].
    """
    return returns - returns.mean()


def reinforce_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient is REINFORCE's: minimise it to raise the reward.

    loss = -mean_t( A_t * ln pi(a_t | s_t) )

    Sutton & Barto, eq. (13.11): theta <- theta + alpha (G_t - b) grad ln pi(a_t | s_t).
    The minus is there because PyTorch's optimizers go downhill. A_t is a plain number,
    made of rewards, so no gradient flows through it.

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
    env: gym.vector.VectorEnv,
    policy: Policy,
    seed: int | None = None,
    greedy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play one whole episode in each of the N copies of the environment.

    `seed` seeds the starts (None goes on from the last ones); `greedy` takes the
    likeliest action instead of drawing one. T is the length of the longest episode.

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
    observations, actions, rewards, alive = map(np.array, zip(*steps, strict=True))
    return (
        torch.from_numpy(observations),
        torch.from_numpy(actions),
        torch.from_numpy(rewards).float(),
        torch.from_numpy(alive),
    )


def evaluate(
    policy: Policy, episodes: int, first_seed: int, greedy: bool
) -> torch.Tensor:
    """Scores (episodes,) of fresh episodes, number i with the seed first_seed + i."""
    env = gym.make_vec(ENV_ID, num_envs=episodes, vectorization_mode="sync")
    _, _, rewards, _ = play_episodes(env, policy, first_seed, greedy)
    env.close()
    return rewards.sum(0)


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


def holds_every_time(policy: Policy, episodes: int) -> bool:
    """True if the greedy policy never drops the pole in this many fresh episodes."""
    env = make_fast_env(episodes)
    _, _, rewards, _ = play_episodes(env, policy, CHECK_SEED, greedy=True)
    return bool((rewards.sum(0) == FULL_SCORE).all())


def make_fast_env(copies: int) -> gym.vector.VectorEnv:
    """Gymnasium's own CartPole in NumPy, which moves all copies in one call."""
    return gym.make_vec(
        ENV_ID, num_envs=copies, vectorization_mode="vector_entry_point"
    )


def draw_learning_curve(scores: list[float], path: Path | str) -> None:
    """Write a picture of the scores, episode by episode, with their running mean."""
    last_100 = [np.mean(scores[max(0, i - 99) : i + 1]) for i in range(len(scores))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(scores, ".", color="0.7", markersize=3, label="one episode")
    axes.plot(last_100, label="mean of the last 100")
    axes.axhline(SOLVED_SCORE, color="green", linestyle="--", label="solved: 475")
    axes.set(title=f"REINFORCE on {ENV_ID}", xlabel="episode", ylabel="steps balanced")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def save_run(
    policy: PolicyNetwork, scores: list[float], suffix: str = "", **facts: float
) -> str:
    """Write weights and curve, with `suffix` added to both names; give the names."""
    weights_path, curve_path = Path(WEIGHTS_PATH), Path(CURVE_PATH)
    weights_path = weights_path.with_stem(weights_path.stem + suffix)
    curve_path = curve_path.with_stem(curve_path.stem + suffix)
    save_policy(policy, weights_path, seed=SEED, episodes=len(scores), **facts)
    draw_learning_curve(scores, curve_path)
    return f"{weights_path.name} and {curve_path.name}"


def print_header() -> None:
    """Say what runs, for how long, and how to read the table that follows."""
    print(f"REINFORCE on {ENV_ID}, seed {SEED}, on the CPU (a GPU is slower here).")
    print(f"At most {MAX_EPISODES:,} episodes; most seeds need about 500, 5 seconds.")
    print(
        f"'last 100', a mean, should rise to {SOLVED_SCORE:g}; 500 is the most. Entropy"
    )
    print("falls from 0.693 (a coin flip) towards 0 (certain). The loss does not show")
    print("progress: it compares the episodes of one update with each other.\n")
    print("last 100  this batch  episodes  entropy (nats)      loss")


def main() -> None:
    """Train until the pole stays up, then measure, draw and save."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the network is so small that more threads only wait

    # 1. A policy that knows nothing.
    torch.manual_seed(SEED)
    policy = PolicyNetwork(HIDDEN_UNITS)
    scores, milestones, solved = [], [CLASSIC_SCORE, SOLVED_SCORE], False
    bar = tqdm(total=MAX_EPISODES, unit="episode", leave=False, disable=None)
    try:
        optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
        env = make_fast_env(EPISODES_PER_UPDATE)
        while len(scores) < MAX_EPISODES and not solved:
            # 2. Play whole episodes.
            seed = None if scores else SEED
            observations, actions, rewards, alive = play_episodes(env, policy, seed)

            # 3. The return of each step, and its advantage.
            advantages = subtract_mean(returns_to_go(rewards, GAMMA)[alive])

            # 4. One gradient step. The probabilities are computed again, in one pass
            #    and with gradients; the policy has not changed since it acted.
            choice = Categorical(logits=policy(observations[alive]))
            loss = reinforce_loss(choice.log_prob(actions[alive]), advantages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # 5. Again, until the mean passes the threshold and the pole never falls.
            batch_scores = rewards.sum(0)
            scores += batch_scores.tolist()
            last_100 = np.mean(scores[-100:])
            passed = len(scores) >= 100 and last_100 >= SOLVED_SCORE
            solved = passed and holds_every_time(policy, CHECK_EPISODES)

            bar.update(len(batch_scores))
            last = solved or len(scores) >= MAX_EPISODES
            if last or len(scores) // EPISODES_PER_UPDATE % REPORT_EVERY == 0:
                bar.write(
                    f"{last_100:8.1f}{batch_scores.mean():12.1f}{len(scores):10}"
                    f"{choice.entropy().mean():16.3f}{loss:10.4f}"
                )
            while len(scores) >= 100 and milestones and last_100 >= milestones[0]:
                bar.write(f"-- {milestones.pop(0):g} after {len(scores)} episodes --")
            if passed and not solved:
                bar.write("-- but greedily it still falls at times: on it goes --")
        bar.close()

        # 6. The final score, and the files.
        greedy_score = print_held_out_scores(policy)
    except KeyboardInterrupt:
        bar.close()
        names = save_run(policy, scores, "_interrupted")
        print(f"\nStopped after {len(scores)} episodes. This run is kept in {names};")
        print("older weights are as they were.")
        return
    if not solved:
        names = save_run(policy, scores, "_unsolved", greedy_score=greedy_score)
        sys.exit(f"Not solved within {MAX_EPISODES} episodes; kept in {names}.")
    names = save_run(policy, scores, greedy_score=greedy_score)
    print(f"Solved after {len(scores)} episodes. Written: {names}.")
    print("Watch it: python cartpoleinference.py")


if __name__ == "__main__":
    main()
