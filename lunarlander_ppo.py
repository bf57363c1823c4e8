"""Lesson 3: PPO (proximal policy optimization) on LunarLander-v3.

What you will learn
    How PPO takes many gradient steps from one batch without ruining the policy, and how
    a critic stands in for rewards not yet seen. The task: land between two flags within
    1,000 steps. A crash pays -100, coming to rest +100, nearing some; fuel costs some.

The algorithm in 6 steps
    1. Make an actor (a probability for each action) and a critic (predicts the return).
    2. Fly T steps in N copies side by side (a rollout), drawing actions from the actor.
    3. Compute advantages: how much better each action was than the critic predicted.
    4. Go over the batch a few times (epochs) in random minibatches: make actions with a
       positive advantage likelier and the others rarer, each pushed no further once its
       probability has moved 20 % that way (clip); keep some entropy; fit V to returns.
    5. Lower the learning rate and go back to 2, until the steps are spent.
    6. Score the agent, greedy (always the likeliest action), on held-out episodes.

Symbols (T steps, N copies, D = 8 inputs, A = 4 actions; B = T*N rows, or a minibatch)
    pi(a|s)  actor         probability of action a in state s: softmax of logits (B, A)
    V(s)     critic        (B,): predicted return: discounted rewards from state s on
    s_t      observations  (T, N, D): position, velocity, angle, spin, two leg contacts
    a_t      actions       (T, N): 0 nothing, 1 left, 2 main, 3 right engine
    r_t      rewards       (T, N): of the step from s_t to s_{t+1}; scaled in make_batch
    A_t      advantages    (T, N): how much better a_t was than V(s_t) predicted
    G_t      returns       (T, N): V(s_t) + A_t (before `normalise`): what V should say
    rho_t    ratio         (B,): pi(a_t|s_t) now over pi(a_t|s_t) when it was taken

Where this differs from the papers, and why (PPO: arXiv 1707.06347, `gae`: 1506.02438)
    * The network is that of PPO's section 6.1, but with ReLU instead of tanh.
    * Rewards are divided by 100, advantages normalised. 400,000 steps score 261 (seeds
      0-2); 218 without the first, 239 without the second, 179 without PPO's clip. Long
      gradients are shortened, weights start orthogonal: 255 and 260 without.

Run it, and what you should see (columns: see `diagnose`; what goes wrong: tests/bugs/)
    python lunarlander_ppo.py     55 seconds on one core of a server CPU, no GPU
    return  length      steps  steps/s      KL  clipped  entropy  explained
     -32.2     126     40,960   15,816  0.0067       8%    1.134       0.75
     252.7     264    204,800   15,599  0.0038       6%    0.672       0.84
     278.2     181    847,872   14,369  0.0000       0%    0.493       0.99
    This was seed 0, which is shipped. Seeds 0-9, 100 held-out greedy episodes each:
    278.9 on average (known to about 2), 276.3 for the worst; 99.5 % reach 200 or more.

Try this (a run that ends above 200 replaces the shipped weights)
    * TOTAL_STEPS = 400_000, FINAL_RATE = 1.0: half the wait; seeds 0-9 score 270.8, the
      worst one 257.7. (With FINAL_RATE = 0.0: 263.1 and 248.3.)
    * EPOCHS = 20, TOTAL_STEPS = 160_000: each step is used five times as often; seeds
      0-2 score 263, 246 and 202.
    * MINIBATCH_SIZE = 4_096, TOTAL_STEPS = 400_000: one gradient step an epoch; -49,
      213 and 30. Seed 0 lands, but then fires its engines until the time is up.
    * Another task: edit ENV_ID, OBSERVATION_SIZE, ACTIONS (CartPole-v1: 4 and 2), both
      paths, and REWARD_SCALE so that returns are near 1.
"""

import contextlib
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
SEED = 0  # same seed, machine and versions: same weights, bit for bit

# Budget
TOTAL_STEPS = 850_000  # of all copies together; too few: not solved; more: only time
REPORT_EVERY = 10  # updates between two lines of the table

# Collecting
NUM_ENVS = 16  # copies flown side by side; few: slower; many: fewer updates
ROLLOUT_STEPS = 256  # in an update; few: the landing is out of sight; many: few updates

# Learning
EPOCHS = 4  # over each batch; few: little is learnt from it; many: slower, and the last
#             ones use data that the policy has moved away from
MINIBATCH_SIZE = 512  # rows in a gradient step; small: slow, noisy; big: too few steps
LEARNING_RATE = 2e-3  # of Adam, at the start; too big: it settles on a bad habit; too
#                       small: TOTAL_STEPS is over before it lands
FINAL_RATE = 0.0  # share of LEARNING_RATE left at the end; 1: better for short runs
GAMMA = 0.995  # discount of a reward one step later: looks about 1 / (1 - 0.995) = 200
#                steps ahead, a landing's length; high: it dawdles; low: short-sighted
GAE_LAMBDA = 0.98  # low: the critic's errors mislead; high: noise does; see `gae`
CLIP_EPS = 0.2  # how far the ratio may move from 1 before the push stops; small: it
#                 learns slowly; big: the policy outruns its data
ENTROPY_BONUS = 0.003  # what staying undecided is worth; too little: it may settle too
#                        soon (400,000 steps do not show it); much: it never settles
VALUE_WEIGHT = 0.5  # of the critic's loss. Adam ignores the scale of a loss, so this
#                     only sets the critic's share of MAX_GRAD_NORM; big: nearly all
MAX_GRAD_NORM = 0.5  # a longer gradient (both networks as one) is shortened to this;
#                      small: faint ones count like clear ones; big: outliers act fully
REWARD_SCALE = 0.01  # rewards reach +-100; the critic learns fastest on returns near 1
HIDDEN_UNITS = 64  # width of both hidden layers; few: it flies crudely; many: slower

# Hence 16 * 256 = 4,096 rows in a batch; 4,096 / 512 = 8 minibatches * 4 epochs = 32
# gradient steps in an update; 850,000 // 4,096 = 207 updates.

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("ppo_lunarlander_final.pt")
CURVE_PATH = Path(__file__).with_name("lunarlander_learning_curve.png")

# The task
ENV_ID, OBSERVATION_SIZE, ACTIONS = "LunarLander-v3", 8, 4
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 200
HELD_OUT_EPISODES = 100
HELD_OUT_SEED = 1_000_000  # of the first held-out episode, the next has one more

# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer: biases 0, weights orthogonal (they keep lengths) times `gain`."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def network(hidden_units: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers: observations (B, D) -> (B, outputs)."""
    gain = math.sqrt(2)  # makes up for ReLU, which turns about half of the numbers to 0
    return nn.Sequential(
        linear(OBSERVATION_SIZE, hidden_units, gain),
        nn.ReLU(),
        linear(hidden_units, hidden_units, gain),
        nn.ReLU(),
        linear(hidden_units, outputs, last_gain),
    )


class ActorCritic(nn.Module):
    """Two networks: the policy pi(a|s) as logits (B, A), and the value V(s) (B,)."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        # Logits near 0: at first all actions are equally likely.
        self.actor = network(hidden_units, ACTIONS, 0.01)
        # Flatten: (B, 1) -> (B,). Without it, values (B, 1) minus returns (B,) would be
        # (B, B), without an error, and the critic would learn the mean of all returns.
        self.critic = nn.Sequential(*network(hidden_units, 1, 1.0), nn.Flatten(0))


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def gae(rewards, values, next_values, terminated, ended, gamma, lam) -> Tensor:
    """Generalized advantage estimation: how much better than the critic predicted?

    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lam * (1 - ended_t) * A_{t+1}

    PPO's eq. (12) and (11), computed backwards, with the ends of episodes added. (The
    last exponent of (11), T-t+1, is a misprint for T-t-1.) Written out, A_t is
    delta_t + (gamma*lam) delta_{t+1} + (gamma*lam)^2 delta_{t+2} + ... up to an end.

    `lam` trades bias for variance. At 0, A_t = delta_t: one reward, then the critic's
    word; little noise, but as wrong as the critic is (bias). At 1 the values in between
    cancel: A_t = r_t + gamma r_{t+1} + ... + gamma^k V(s_{t+k}) - V(s_t), where the sum
    is cut after k steps by rollout or time limit (after a real end no V follows). Only
    the last V can mislead then, but the luck of all k steps is in A_t (variance).

    `terminated` (landed or crashed) cuts the value: no reward can follow.
    `ended` (terminated, or truncated by the time limit) cuts the sum: row t+1 belongs
    to another episode. A truncated lander would have flown on, so V(s_{t+1}) stays.
    With `ended` in both places V would learn that nothing follows the time limit; with
    `terminated` in both, the next episode's advantages would leak into this one.

    All arguments (T, N) float32, flags 0 or 1; `next_values` holds V(s_{t+1}) of what
    the step really led to, also where the copy was then reset. Gives advantages (T, N).
    By hand: rewards = [1, 1], values = [0.5, 0.5], next_values = [0.5, 3], gamma = 1,
    lam = 0.5  ->  [1.25, 0.5] if the last step terminated, [2.75, 3.5] if truncated.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])  # after the last row, V is believed
    for t in reversed(range(len(rewards))):
        next_advantage = deltas[t] + gamma * lam * (1 - ended[t]) * next_advantage
        advantages[t] = next_advantage
    return advantages


def normalise(advantages: Tensor) -> Tensor:
    """Advantages minus their mean, in units of their standard deviation, (B,) -> (B,).

    (A - mean(A)) / (std(A) + 1e-4), where 1e-4 is there so that nothing is divided by 0

    That std falls from about 0.4 (fresh agent) to 0.1 (shipped); without the division,
    so would the weight of the policy's gradient beside the entropy's and the critic's.
    By hand: [1, 2, 3]  ->  [-1.2246, 0, 1.2246].
    """
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)


def log_probs_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """How likely the actions are, and the entropy: how undecided the policy is.

    ln pi(a|s) = logit_a - ln sum_b exp(logit_b)
    S[pi](s)   = -sum_b pi(b|s) * ln pi(b|s)

    S is in nats: ln 4 = 1.386 if all 4 actions are equally likely, 0 if one is certain.
    `logits` (B, A), `actions` (B,) int64. Gives log-probabilities (B,), entropies (B,).
    By hand: logits = [0, 0], action 0  ->  ln 0.5 = -0.6931 and 0.6931.
    """
    all_log_probs = torch.log_softmax(logits, dim=1)
    entropies = -(all_log_probs.exp() * all_log_probs).sum(1)
    return all_log_probs.gather(1, actions[:, None])[:, 0], entropies


def clipped_surrogate_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_eps: float
) -> Tensor:
    """PPO's policy loss: make good actions likelier, bad ones rarer, but only so far.

    rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) = exp(ln pi(a_t|s_t) - ln pi_old(a_t|s_t))
    loss  = -mean_t( min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) )

    PPO's eq. (7), with a minus since optimizers go downhill.

    pi_old took the actions; pi is what the gradient steps have made of it since. The
    ratio turns a mean over pi_old's actions into one over pi's (importance sampling):
    sum_a pi_old(a|s) * rho A = sum_a pi(a|s) * A. The gradient of rho_t A_t is
    rho_t A_t grad ln pi(a_t|s_t): lesson 1's while rho_t = 1, as in the first gradient
    step of an update. But pi would also come to other states than pi_old: the mean is
    only a *surrogate* of the return, good near pi_old. Which actions get a gradient:

             rho < 1 - eps             in between   rho > 1 + eps
    A > 0    yes: it should come back  yes          no: likelier by enough
    A < 0    no: rarer by enough       yes          yes: it should come back

    An action that should come back was moved the wrong way by the pushes on other rows.

    `log_probs` (B,) with gradient, `old_log_probs` (B,), `advantages` (B,), normalised.
    By hand: rho = [1.5, 0.5], A = [1, -1], eps = 0.2  ->  -(1.2 - 0.8) / 2 = -0.2.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def make_env(**options: str) -> gym.Env:
    """One lander, without Gymnasium's checker, which looks for mistakes in new ones."""
    return gym.make(ENV_ID, disable_env_checker=True, **options)


def make_envs(copies: int) -> SyncVectorEnv:
    """N landers side by side, moved one after another by one call of `step`.

    SAME_STEP: a copy whose episode ends is reset in that same call. (In NEXT_STEP mode,
    the default, the step after an end is a dummy that must not be trained on.)
    """
    make = [lambda: RecordEpisodeStatistics(make_env())]  # notes return and length
    return SyncVectorEnv(make * copies, autoreset_mode=AutoresetMode.SAME_STEP)


@torch.no_grad()
def collect(envs: SyncVectorEnv, actor: nn.Module, observations: np.ndarray) -> tuple:
    """Fly T steps in each of the N copies, which stand at `observations` (N, D).

    Gives the rollout: `observations` and `next_observations` (T, N, D), `actions`
    (T, N), `rewards`, not scaled, `terminated` and `ended` (T, N) float32; then where
    the copies stand now, and (return, length) of each episode that ended.
    """
    # Faster than Categorical(...).sample(), same probabilities (the Gumbel-max trick):
    # an exponential draw divided by pi(a) is smallest at a with probability pi(a), so
    # argmax(logits - ln(exponential draws)) is a draw from softmax(logits).
    shape = (ROLLOUT_STEPS, envs.num_envs, ACTIONS)
    noise = -torch.empty(shape).exponential_().log().numpy()
    rows, finished = [], []
    for t in range(ROLLOUT_STEPS):
        logits = actor(torch.from_numpy(observations)).numpy()
        actions = (logits + noise[t]).argmax(1)
        now, rewards, terminated, truncated, info = envs.step(actions)

        # `now` is where the copies stand: after an end, at the start of the next
        # episode. What the step itself led to is then in `info`.
        ended, led_to = terminated | truncated, now.copy()
        for i in np.flatnonzero(ended):
            led_to[i] = info["final_obs"][i]
            episode = info["final_info"]["episode"]
            finished.append((float(episode["r"][i]), float(episode["l"][i])))
        numbers = [column.astype(np.float32) for column in (rewards, terminated, ended)]
        rows.append((observations, actions, led_to, *numbers))
        observations = now
    names = ["observations", "actions", "next_observations"]
    names += ["rewards", "terminated", "ended"]
    columns = [torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=True)), observations, finished


@torch.no_grad()
def make_batch(agent: ActorCritic, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a rollout into a batch to learn from, T and N merged into B = T*N rows.

    Values and log-probabilities can wait until here: the weights are still the same.

    Gives `observations` (B, D) and (B,) each: `actions`, `old_log_probs`, `values`,
    `advantages`, normalised over the batch, and `returns`: V(s_t) corrected by A_t.
    """
    observations = rollout["observations"].flatten(0, 1)
    actions = rollout["actions"].flatten()
    old_log_probs, _ = log_probs_and_entropy(agent.actor(observations), actions)
    rewards = rollout["rewards"] * REWARD_SCALE
    values = agent.critic(observations).view_as(rewards)
    next_values = agent.critic(rollout["next_observations"].flatten(0, 1))
    next_values = next_values.view_as(values)
    ends = rollout["terminated"], rollout["ended"]
    advantages = gae(rewards, values, next_values, *ends, GAMMA, GAE_LAMBDA)
    return {
        "observations": observations,
        "actions": actions,
        "old_log_probs": old_log_probs,
        "values": values.flatten(),
        "returns": (advantages + values).flatten(),
        "advantages": normalise(advantages.flatten()),
    }


@torch.no_grad()
def evaluate(policy: Callable, episodes: int, first_seed: int, greedy: bool) -> tuple:
    """Fly episodes side by side, number i from seed first_seed + i.

    `policy` turns observations (B, D) into logits (B, A); `greedy` takes the likeliest
    action instead of drawing one. Gives, (episodes,) each, the scores (sums of unscaled
    rewards) and True where the lander crashed or left the picture (-100 at once).
    """
    envs = [make_env() for _ in range(episodes)]
    starts = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    observations, scores = np.array(starts), np.zeros(episodes)
    crashed, ended = np.zeros((2, episodes), dtype=bool)
    while not ended.all():
        flying = np.flatnonzero(~ended)
        logits = policy(torch.from_numpy(observations[flying]))
        actions = logits.argmax(1) if greedy else Categorical(logits=logits).sample()
        for i, action in zip(flying, actions.tolist(), strict=True):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            scores[i] += reward
            crashed[i] = terminated and reward <= -100
            ended[i] = terminated or truncated
    return scores, crashed


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def ppo_loss(agent: ActorCritic, batch: dict[str, Tensor]) -> Tensor:
    """All that is minimised: PPO's eq. (9) with its sign turned round.

    loss = L_policy + VALUE_WEIGHT * mean_t( (V(s_t) - G_t)^2 )
                    - ENTROPY_BONUS * mean_t( S[pi](s_t) )

    `batch` as `make_batch` gives it, or some of its rows. Its advantages are plain
    numbers: the critic learns from the second term alone.
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    policy_loss = clipped_surrogate_loss(
        log_probs, batch["old_log_probs"], batch["advantages"], CLIP_EPS
    )
    values = agent.critic(batch["observations"])
    value_loss = ((values - batch["returns"]) ** 2).mean()
    return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_BONUS * entropies.mean()


def learn(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """Go over the batch EPOCHS times, a gradient step for each random minibatch."""
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(batch["actions"])).split(MINIBATCH_SIZE):
            minibatch = {name: column[rows] for name, column in batch.items()}
            optimizer.zero_grad()
            ppo_loss(agent, minibatch).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
            optimizer.step()


@torch.no_grad()
def diagnose(agent: ActorCritic, batch: dict[str, Tensor]) -> tuple[float, ...]:
    """Four columns, over the whole batch: the policy after the update, V before it.

    KL         mean_t( rho_t - 1 - ln rho_t ), an estimate of the Kullback-Leibler
               divergence KL(pi_old || pi) = mean(-ln rho): how far the policy moved.
               (rho - 1 is 0 on average and makes every term >= 0: less noise.) 0.001
               to 0.02, then 0 with the rate; above 0.1 the policy outruns its data.
    clipped    Share of actions whose ratio left 1 +- CLIP_EPS on any side (lesson 4: as
               A asks for). 5 to 20 %, then 0 with the rate. Above 25 % for long:
               LEARNING_RATE or EPOCHS too big; 0 from the start: too small.
    entropy    From 1.38 down to 1 in 100,000 steps and 0.5 at the end. 0 early on: it
               tries nothing else any more; still 1.3: ENTROPY_BONUS too big.
    explained  1 - var(G - V) / var(G): 1 if the critic predicts perfectly, 0 or less if
               no better than a constant. 0 to 0.7 in the first ten updates, then above
               0.7 with dips; near 0 for longer: it does not learn (see `ActorCritic`).
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]
    ratio = log_ratio.exp()
    returns, errors = batch["returns"], batch["returns"] - batch["values"]
    return (
        (ratio - 1 - log_ratio).mean().item(),
        ((ratio - 1).abs() > CLIP_EPS).float().mean().item(),
        entropies.mean().item(),
        1 - (errors.var() / returns.var()).item(),
    )


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until the steps are spent, then score and save the agent."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the networks are so small that more threads only wait

    # 1. An actor and a critic that know nothing.
    torch.manual_seed(SEED)
    agent = ActorCritic(HIDDEN_UNITS)
    # fused: the same Adam in one call for all weights instead of one for each.
    optimizer = torch.optim.Adam(agent.parameters(), LEARNING_RATE, fused=True)
    envs = make_envs(NUM_ENVS)
    # Copy i starts from seed SEED * NUM_ENVS + i: SEED 0 and SEED 1 share no terrain.
    observations, _ = envs.reset(seed=SEED * NUM_ENVS)
    updates = TOTAL_STEPS // (NUM_ENVS * ROLLOUT_STEPS)
    history, steps, start = [], 0, time.perf_counter()

    with keep_unfinished_run(
        lambda: save_run(agent, history, "_interrupted", steps=steps)
    ) as stopped:
        for update in tqdm(range(updates), unit="update", leave=False, disable=None):
            if stopped:
                sys.exit(f"Stopped after {steps:,} steps.")

            # 2. Fly.
            rollout, observations, finished = collect(envs, agent.actor, observations)
            steps += rollout["rewards"].numel()
            history += [(steps, *episode) for episode in finished]

            # 3. Advantages, from the critic as it was during the flight.
            batch = make_batch(agent, rollout)

            # 4. Several epochs of clipped gradient steps over the batch.
            learn(agent, optimizer, batch)

            # 5. A lower rate. Big steps learn to land soon, but then follow the noise
            # of every minibatch; small ones average it out.
            rest = 1 - (update + 1) / updates
            rate = LEARNING_RATE * (FINAL_RATE + (1 - FINAL_RATE) * rest)
            optimizer.param_groups[0]["lr"] = rate

            if (update + 1) % REPORT_EVERY == 0 or update + 1 == updates:
                speed = steps / (time.perf_counter() - start)
                tqdm.write(report_line(history, steps, speed, diagnose(agent, batch)))

        # 6. The score on held-out episodes, and the files.
        scores, _ = evaluate(agent.actor, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=True)
        score = scores.mean().item()
        suffix = "" if score >= SOLVED_SCORE else "_unsolved"
        names = save_run(agent, history, suffix, steps=steps, greedy_score=score)
    spread = f"std {scores.std():.1f}, minimum {scores.min():.1f}"
    print(f"\nGreedy on {len(scores)} held-out episodes: mean {score:.1f}, {spread}.")
    if suffix:
        sys.exit(f"Below {SOLVED_SCORE:g} after {steps:,} steps; kept in {names}.")
    print(f"{SOLVED_SCORE:g} is enough. Written: {names}.")
    print("Watch it land: python lunar_eval.py")


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    counts = TOTAL_STEPS, REPORT_EVERY, NUM_ENVS, ROLLOUT_STEPS, EPOCHS, MINIBATCH_SIZE
    counts += HIDDEN_UNITS, HELD_OUT_EPISODES
    shares, sizes = (FINAL_RATE, GAMMA, GAE_LAMBDA), (CLIP_EPS, MAX_GRAD_NORM)
    last_seed, rows = (SEED + 1) * NUM_ENVS, NUM_ENVS * ROLLOUT_STEPS
    files = all(os.access(p.parent, os.W_OK) for p in (WEIGHTS_PATH, CURVE_PATH))
    rules = {
        "SEED: from 0": SEED >= 0,
        "(SEED + 1) * NUM_ENVS: at most HELD_OUT_SEED": last_seed <= HELD_OUT_SEED,
        "TOTAL_STEPS, REPORT_EVERY, NUM_ENVS, ROLLOUT_STEPS, EPOCHS, MINIBATCH_SIZE, "
        "HIDDEN_UNITS, HELD_OUT_EPISODES: from 1": min(counts) >= 1,
        "TOTAL_STEPS: at least NUM_ENVS * ROLLOUT_STEPS": rows <= TOTAL_STEPS,
        "LEARNING_RATE: above 0, at most 1": 0 < LEARNING_RATE <= 1,
        "FINAL_RATE, GAMMA, GAE_LAMBDA: from 0 to 1": all(0 <= x <= 1 for x in shares),
        "CLIP_EPS, MAX_GRAD_NORM: above 0": all(x > 0 for x in sizes),
        "REWARD_SCALE: above 0": REWARD_SCALE > 0,
        "ENTROPY_BONUS, VALUE_WEIGHT: from 0": ENTROPY_BONUS >= 0 and VALUE_WEIGHT >= 0,
        "WEIGHTS_PATH, CURVE_PATH: in folders that can be written to": files,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def print_header() -> None:
    """Say what runs, for how long, and how to read the table that follows."""
    print(f"""\
PPO on {ENV_ID}, seed {SEED}, on the CPU (it needs no GPU); {TOTAL_STEPS:,} steps,
about a minute for each million. 'return', a mean of 100 episodes, should rise past
{SOLVED_SCORE:g}, 'explained' towards 1; healthy values of the others: see `diagnose`.

return  length      steps  steps/s      KL  clipped  entropy  explained""")


def report_line(history: list, steps: int, speed: float, numbers: tuple) -> str:
    """One line of the table; return and length are means of the last 100 episodes."""
    _, mean_return, length = np.mean(history[-100:] or [[math.nan] * 3], axis=0)
    kl, clipped, entropy, explained = numbers
    return (
        f"{mean_return:6.1f}{length:8.0f}{steps:11,}{speed:9,.0f}"
        f"{kl:8.4f}{clipped:9.0%}{entropy:9.3f}{explained:11.2f}"
    )


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C or `kill` only leaves a mark in the list that this gives; main() looks at it
    once an update. An exception can be lost in Box2D: raised in a `__del__` there,
    Python ignores it.
    """
    stopped, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda *_: stopped.append(True)) for n in numbers]
    try:
        yield stopped
    except BaseException:
        print(f"\nThis run is kept in {save()}; older weights are as they were.")
        raise
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def save_run(agent: ActorCritic, history: list, suffix: str = "", **facts) -> str:
    """Write weights and curve, with `suffix` added to both names; give the names.

    The weights are written aside and then renamed: the file is whole or not there.
    """
    path, curve = (p.with_stem(p.stem + suffix) for p in (WEIGHTS_PATH, CURVE_PATH))
    facts |= {"env_id": ENV_ID, "seed": SEED, "hidden_units": HIDDEN_UNITS}
    with tempfile.TemporaryDirectory(".tmp", path.name, path.parent) as folder:
        temporary = Path(folder, path.name)
        torch.save({"weights": agent.state_dict(), **facts}, temporary)
        os.replace(temporary, path)
    draw_learning_curve(history, curve)
    return f"{path.name} and {curve.name}"


def load_agent(path: Path | str = WEIGHTS_PATH) -> ActorCritic:
    """Read an agent back (`.actor`, `.critic`), or stop with one line if that fails."""
    try:
        checkpoint = torch.load(path, weights_only=True)  # never runs code from a file
        weights = checkpoint["weights"]
        agent = ActorCritic(len(weights["actor.0.bias"]))
        agent.load_state_dict(weights)
        finite = all(tensor.isfinite().all() for tensor in weights.values())
        if checkpoint["env_id"] != ENV_ID or not finite:
            raise ValueError("another task, or weights that are NaN or infinite")
    except Exception as problem:  # a damaged file can fail in any way at all
        why = f"no usable {ENV_ID} agent in {path} ({type(problem).__name__})"
        sys.exit(f"There is {why}. Make it with: python lunarlander_ppo.py")
    return agent


def draw_learning_curve(history: list, path: Path | str) -> None:
    """Write a picture of (steps so far, return, length) of the episodes, in order."""
    steps, returns, _ = np.array(history).reshape(-1, 3).T
    last_100 = [np.mean(returns[max(0, i - 99) : i + 1]) for i in range(len(returns))]
    axes = Figure(figsize=(8, 4), dpi=120, layout="constrained").subplots()
    axes.plot(steps, returns, ".", color="0.7", markersize=3, label="one episode")
    axes.plot(steps, last_100, label="mean of the last 100")
    axes.axhline(SOLVED_SCORE, color="green", linestyle="--", label="solved")
    axes.set(title=f"PPO on {ENV_ID}", xlabel="steps", ylabel="return")
    axes.legend(loc="lower right")
    axes.figure.savefig(path)


if __name__ == "__main__":
    main()
