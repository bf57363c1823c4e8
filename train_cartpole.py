"""Lesson 1: REINFORCE on CartPole-v1, the simplest policy gradient.

What you will learn
    How an agent improves from rewards alone: it tries actions at random, and each one
    becomes more likely the better things went after it. The task: push a cart left or
    right at each step, so that the pole on it stays up; each step brings a reward of 1.
    An episode ends at 12 degrees of lean, 2.4 m from the middle, or after 500 steps.

The algorithm in 6 steps
    1. Start from a policy: a network that gives each action a probability.
    2. Play a batch of whole episodes, drawing each action with that probability.
    3. Give each step its return (the sum of the rewards from here on, each one weighted
       gamma = 0.99 times the one before) and its advantage (return minus mean return).
    4. Take one gradient step that makes the actions with a positive advantage more
       likely, and those with a negative advantage less likely.
    5. Repeat from 2 until 100 episodes average 475 steps (the task is *solved*) and the
       policy is *perfect*: greedy (always the likeliest action), 1,000 without a fall.
    6. Measure it on held-out episodes (with seeds never used before) and save it.

Symbols (T steps of play, N episodes side by side, B steps in all before their ends)
    s_t         observations  (T, N, 4)  cart m, cart m/s, pole rad, pole rad/s
    a_t         actions       (T, N)     0 pushes the cart left, 1 pushes it right
    r_t         rewards       (T, N)     1 for each step, 0 after the episode's end
    G_t         returns       (T, N)     r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
    A_t         advantages    (B,)       G_t minus the mean of the batch
    ln pi(a|s)  log_probs     (B,)       log-probability of the action that was taken

Where this differs from the book (Sutton & Barto, 2nd ed., chapter 13), and why
    * One gradient step (Adam) for 16 episodes, not one for each step: it is steadier.
    * The mean of the batch is subtracted. Section 13.4 subtracts the prediction of a
      second network, the *value function*: that is lesson 2.
    * The factor gamma^t is left out, as in nearly all code: see `reinforce_loss`.
    * Reaching 500 steps counts as an end like a fall; lesson 3 tells the two apart.

Run it, and what you should see (what goes wrong: tests/bugs/)
    python train_cartpole.py     4 seconds on one core of a server CPU, no GPU
    Seeds 0-19: perfect after 432 episodes (median; 624 at most), then 500 steps in
    every held-out episode. Seed 0 ("last 100": mean score, a score the sum of rewards):
        last 100  episodes  entropy (nats)      loss
            29.8        48           0.645   -0.3435
           274.8       240           0.526   -0.2052
        -- 475 after 320 episodes, perfect = True
    Entropy is how undecided the policy is: ln 2 = 0.69 nats (the unit of ln) for a coin
    flip, 0 if certain.

Try this (seeds 0-2, with MAX_EPISODES = 1_500; medians)
    * EPISODES_PER_UPDATE = 1, LEARNING_RATE = 0.01: perfect after 376, but in 34 s.
    * GAMMA = 0.9: all are solved, but only two become perfect, after 736 and 1,152.
    * LEARNING_RATE = 0.2: none is solved; the best means of 100 episodes: 83 to 158.
"""

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

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
ENV_ID = "CartPole-v1"
SEED = 0  # same seed, machine and versions: same weights, bit for bit
CHECK_SEED = 500_000  # of the check for a perfect policy: the same starts each time
HELD_OUT_SEED = 1_000_000  # of held-out episode 0; episode i has HELD_OUT_SEED + i

# Budget
MAX_EPISODES = 4_000  # if the policy is not perfect by then, stop with status 1
CHECK_EPISODES = 1_000  # greedy episodes without a single fall make a policy perfect;
#                         with 100, one that falls once in 200 would mostly pass
HELD_OUT_EPISODES = 100  # for the final score; fewer make it less exact
REPORT_EVERY = 3  # updates between two printed lines

# Algorithm
EPISODES_PER_UPDATE = 16  # more: steadier, but fewer updates. With 1 the mean that is
#                           subtracted is the episode's own: halve LEARNING_RATE as well
LEARNING_RATE = 0.02  # size of Adam's step; too small is slow, too big never settles
GAMMA = 0.99  # discount: looks about 1 / (1 - GAMMA) = 100 steps ahead; 0.9 learns far
#               more slowly, 1.0 works too
HIDDEN_UNITS = 64  # width of the one hidden layer; a task this small needs few
# Hence one update is a gradient step on about 16 x 20 steps at first, 16 x 500 at last.

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("cartpole_reinforce.pth")
CURVE_PATH = Path(__file__).with_name("cartpole_learning_curve.png")

# Given by the task
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 475: mean of the last 100 episodes
FULL_SCORE = gym.spec(ENV_ID).max_episode_steps  # 500: the pole never fell

# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


class PolicyNetwork(nn.Module):
    """The policy: observations (B, 4) float32 in, logits (B, 2), any real numbers, out.

    pi(a|s) = softmax(logits) = exp(logit of a) / sum of exp(logit) over all actions
    """

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden_units),  # position, speed, angle, angular speed
            nn.Tanh(),
            nn.Linear(hidden_units, 2),  # left, right
        )

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return self.layers(observations)


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------

# Why ln pi? We want to raise J, the expected return, by changing the network's weights;
# grad is the derivative with respect to them. Take one decision: in a state s action a
# brings the return G(a), so J = sum_a pi(a|s) G(a). As grad ln pi = grad pi / pi, its
# gradient, the *policy gradient*, is
#
#     grad J = sum_a grad pi(a|s) G(a) = sum_a pi(a|s) * [ G(a) grad ln pi(a|s) ].
#
# The last sum is the mean of the bracket over actions drawn from pi. There is no need
# to try every action, nor to know how the pole moves: play, and average the bracket.
# For a whole episode, put its probability in the place of pi: the chance of its start
# times the pi of each action. ln turns the product into a sum, one term for each step,
# and only the pi's depend on the weights (section 13.2 has another proof). An action
# gets only the rewards that followed it: it had no influence on earlier ones.
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

    `rewards` (T,) or (T, N) float32, one column an episode, zeros after its end. Gives
    the same shape.
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

    All returns in CartPole are positive: without the mean, every action taken would be
    made more likely, only some more than others. It is not exactly a baseline: it holds
    G_t, which depends on the action. The error falls as 1 / episodes in the batch.

    `returns` (B,) float32, all real steps of a batch, gives advantages (B,).
    By hand: [1, 2, 6]  ->  [-2, -1, 3].
    """
    return returns - returns.mean()


def reinforce_loss(log_probs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss whose gradient is REINFORCE's: minimise it to raise the return.

    loss = -mean_t( A_t * ln pi(a_t | s_t) )

    Sutton & Barto, eq. (13.11): theta <- theta + alpha (G_t - b) grad ln pi(a_t | s_t),
    theta the weights, alpha the learning rate. The minus: PyTorch goes downhill. A_t is
    a plain number, made of rewards, so no gradient flows through it.
    The box of section 13.4 has gamma^t A_t. We leave gamma^t out, or steps after the
    first few hundred would hardly count. The price, if gamma < 1: on average, updates
    are the gradient of no function, not even J (Nota & Thomas, arXiv 1906.07073).

    `log_probs` (B,) of the actions taken, with gradient; `advantages` (B,). A scalar.
    By hand: log_probs = [ln 0.5, ln 0.5], advantages = [1, 3]  ->  2 ln 2 = 1.3863.
    """
    return -(log_probs * advantages).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


@torch.no_grad()
def play_episodes(
    env: gym.vector.VectorEnv, policy: Callable, seed: int | None, greedy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Play one whole episode in each of N copies of the task, the *environment* `env`.

    `seed` seeds the starts (None: the generator goes on where it was); `greedy` takes
    the most likely action instead of drawing one. Gives observations (T, N, 4) float32,
    actions (T, N) int64, rewards (T, N) float32 and alive (T, N) bool: T is the length
    of the longest episode; after an episode's end alive is False and the reward 0.
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
        # A fall terminates, step 500 truncates. The copy restarts, `alive` stays False.
        alive = alive & ~(terminated | truncated)
        observations = next_observations
    columns = [torch.from_numpy(np.array(each)) for each in zip(*steps, strict=True)]
    observations, actions, rewards, alive = columns  # T rows each
    return observations, actions, rewards.float(), alive


def evaluate(
    policy: Callable, episodes: int, first_seed: int, greedy: bool
) -> torch.Tensor:
    """Scores (episodes,), the sums of rewards; number i has the seed first_seed + i."""
    env = gym.make_vec(ENV_ID, num_envs=episodes, vectorization_mode="sync")
    _, _, rewards, _ = play_episodes(env, policy, first_seed, greedy)
    return rewards.sum(0)


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def is_perfect(policy: Callable) -> bool:
    """Does no pole fall in CHECK_EPISODES episodes, played greedily?"""
    env = gym.make_vec(ENV_ID, num_envs=CHECK_EPISODES)
    _, _, rewards, _ = play_episodes(env, policy, CHECK_SEED, greedy=True)
    return bool((rewards.sum(0) == FULL_SCORE).all())


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until the policy is perfect, then measure it and save it."""
    check_settings()
    print(f"REINFORCE on {ENV_ID}, on the CPU: most seeds need about 4 seconds.")
    print(f"'last 100', the mean score, should rise to {SOLVED_SCORE:g}, entropy fall")
    print("slowly. Ignore the loss: each batch is measured against its own mean.\n")
    print("last 100  episodes  entropy (nats)      loss")
    torch.set_num_threads(1)  # the network is so small that more threads only wait

    # 1. A policy that knows nothing.
    torch.manual_seed(SEED)
    policy = PolicyNetwork(HIDDEN_UNITS)
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    env = gym.make_vec(ENV_ID, num_envs=EPISODES_PER_UPDATE)  # N copies at once
    scores, perfect = [], False

    try:
        while len(scores) < MAX_EPISODES and not perfect:
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
            episodes, last_100 = len(scores), np.mean(scores[-100:])
            if episodes // EPISODES_PER_UPDATE % REPORT_EVERY == 0:
                entropy = choice.entropy().mean()
                print(f"{last_100:8.1f}{episodes:10}{entropy:16.3f}{loss:10.4f}")
            solved = episodes >= 100 and last_100 >= SOLVED_SCORE
            perfect = solved and is_perfect(policy)
            if solved:
                print(f"-- {SOLVED_SCORE:g} after {episodes} episodes, {perfect = }")

        # 6. The final score, and the files.
        held_out = evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=True)
        greedy_score = held_out.mean().item()
        suffix = "" if perfect else "_unsolved"
        names = save_run(policy, scores, suffix, greedy_score=greedy_score)
        print(f"\nHeld-out episodes, played greedily: {greedy_score:.1f} on average")
    except BaseException as end:  # Ctrl-C or an error
        kept = save_run(policy, scores, "_interrupted")
        print(f"\nThis run is kept in {kept}; older weights are as they were.")
        if isinstance(end, KeyboardInterrupt):
            sys.exit("Stopped.")
        raise
    if not perfect:
        sys.exit(f"Not perfect after {len(scores)} episodes; kept in {names}.")
    print(f"Perfect after {len(scores)} episodes. Written: {names}.")
    print("Watch it: python cartpoleinference.py")


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    counts = MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY
    counts += EPISODES_PER_UPDATE, HIDDEN_UNITS
    paths = WEIGHTS_PATH, CURVE_PATH
    rules = {
        "SEED must be from 0 to 499,999": 0 <= SEED < CHECK_SEED,
        "MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY, "
        "EPISODES_PER_UPDATE and HIDDEN_UNITS must be 1 or more": min(counts) >= 1,
        "LEARNING_RATE must be above 0, at most 1": 0 < LEARNING_RATE <= 1,
        "GAMMA must be from 0 to 1": 0 <= GAMMA <= 1,
        "the folders of all paths must exist": all(p.parent.is_dir() for p in paths),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def save_run(policy: PolicyNetwork, scores: list, suffix: str, **facts: float) -> str:
    """Write weights and curve, with `suffix` added to both names; give the names."""
    path, curve = [p.with_stem(p.stem + suffix) for p in (WEIGHTS_PATH, CURVE_PATH)]
    checkpoint = {"weights": policy.state_dict(), "env_id": ENV_ID, "seed": SEED}
    checkpoint |= {"episodes": len(scores), **facts, "hidden_units": HIDDEN_UNITS}
    aside = path.with_name(f"{path.name}.tmp")
    torch.save(checkpoint, aside)
    os.replace(aside, path)  # all at once: a crash never leaves half a file
    draw_learning_curve(scores, curve)
    return f"{path.name} and {curve.name}"


def load_policy(path: Path | str = WEIGHTS_PATH) -> PolicyNetwork:
    """Read a policy back, or stop with one line if the file does not hold one."""
    try:
        checkpoint = torch.load(path, weights_only=True)  # never runs code from a file
        weights = checkpoint["weights"]
        policy = PolicyNetwork(len(weights["layers.0.bias"]))
        policy.load_state_dict(weights)
        finite = all(tensor.isfinite().all() for tensor in weights.values())
        if checkpoint["env_id"] != ENV_ID or not finite:
            raise ValueError("another task, or weights that are NaN or infinite")
    except Exception as problem:  # a damaged file can fail in any way at all
        why = f"no usable {ENV_ID} policy in {path} ({type(problem).__name__})"
        sys.exit(f"There is {why}. Make it with: python train_cartpole.py")
    return policy


def draw_learning_curve(scores: list[float], path: Path) -> None:
    """Write a picture of the scores, episode by episode, with their running mean."""
    last_100 = [np.mean(scores[max(0, i - 99) : i + 1]) for i in range(len(scores))]
    axes = Figure(figsize=(8, 4), dpi=120).subplots()
    axes.plot(scores, ".", color="0.7", label="one episode")
    axes.plot(last_100, label="mean of the last 100")
    axes.axhline(SOLVED_SCORE, color="green", ls="--", label=f"solved: {SOLVED_SCORE}")
    axes.set(title=f"REINFORCE on {ENV_ID}", xlabel="episode", ylabel="score")
    axes.legend()
    axes.figure.savefig(path)


if __name__ == "__main__":
    main()
