"""PPO on LunarLander-v3: actor, critic, clipped steps, generalised advantages.

What you will learn
    How PPO takes many gradient steps from one batch of experience without ruining the
    policy, and how a critic's guesses make each action's credit far less noisy.

The task
    Land between two flags. Each step pays for coming nearer, slower and straighter and
    costs fuel; a crash or leaving the picture pays -100, coming to rest +100, and 200
    in all counts as solved. After 1,000 steps the time is up.

The algorithm in 6 steps
    1. Start from an actor (the policy: a probability for each action) and a critic
       (a guess of the return: the rewards to come, later ones counting less).
    2. Fly T steps in N environments side by side, drawing actions from the actor.
    3. Ask the critic what it expected, and compute each action's advantage: how much
       better things went than that (generalised advantage estimation, GAE).
    4. Go over this batch several times in small random parts. On each: make actions
       with a positive advantage likelier and the others rarer, but stop pushing one
       once its probability has changed by 20 %; pull the critic towards the return:
       the rewards that came, then its own guess of the rest.
    5. Lower the learning rate a little and go back to 2, until the steps are spent.
    6. Measure the score on held-out episodes, which played no part so far.

Symbols (T steps, N environments, B = T*N rows or a part of them, D = 8, A = 4)
    pi(a|s)   actor         probability of action a in state s, from logits (B, A)
    S[pi](s)  entropy       (B,): how undecided pi is in s, in nats; ln 4 at most
    V(s)      critic        (B,): r_t + gamma r_{t+1} + ... as it expects them from s_t
    s_t       observations  (T, N, D): position, velocity, angle, spin, two leg contacts
    a_t       actions       (T, N): A of them: nothing, left, main, right engine
    r_t       rewards       (T, N): of the step from s_t to s_{t+1}, times REWARD_SCALE
    A_t       advantages    (T, N): how much better a_t was than V(s_t) expected
    G_t       returns       (T, N): A_t + V(s_t), the critic's target; not the printed
                            'return', an episode's plain sum of unscaled rewards
    rho_t     ratio         (B,): pi(a_t|s_t) now over pi(a_t|s_t) when it was taken

Where this differs from the papers, and why
    Schulman et al. 2017 (PPO, arXiv 1707.06347) and 2015 (GAE, arXiv 1506.02438):
    * Actor and critic share no layers, as in PPO's own experiments on robots (section
      6.1; for Atari games they share), so that neither loss moves the other's weights.
    * ReLU where theirs is tanh: with nn.Tanh() in its place, seeds 2 and 3 end at 264.9
      and 276.8 instead of 278.8 and 279.1.
    * Rewards are divided by 100, advantages normalised, gradients clipped, the weights
      start orthogonal. Runs cut to 400,000 steps score 260 on average with all that,
      194 without the first and 244 without the second (lunarlander_ablations.py in
      tests/benchmarks/); for the other two, two seeds show no difference.
    * An episode that ran out of time is not a landing or a crash: see `gae`.

Run it
    python lunarlander_ppo.py     51 seconds on one core of a server CPU, no GPU

What you should see (seeds 0-9, tests/benchmarks/lunarlander.py)
    'return' passes 200 after 130,000 to 240,000 steps. At the end, over 100 held-out
    greedy episodes: 278.5 on average, 275.9 for the worst seed, and 99.5 % of all
    episodes above 200. The shipped weights are seed 0: 280.7 +- 19.1, none below 238.

If it does not learn
    * 'return' stays near 130 and 'length' near 900: it has landed, but goes on firing
      its side engines on the ground, so that it never comes to rest and never gets the
      +100. ENTROPY_BONUS is too big, or MINIBATCH_SIZE (too few gradient steps).
    * 'return' stays near -130, 'length' near 70, and the entropy is 0 from the first
      line on: the loss has the wrong sign. The critic still learns.

Try this (seed 0; a run that ends above 200 replaces the shipped weights)
    * EPOCHS = 20 and TOTAL_STEPS = 160_000: each step is used five times as often; it
      scores 262.7 after 22 seconds.
    * MINIBATCH_SIZE = 4_096 and TOTAL_STEPS = 400_000, one gradient step for each pass:
      'return' creeps up to 119, 'length' to 942. Taking the likeliest action it never
      comes to rest: -48.5.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Categorical
from tqdm import tqdm

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
SEED = 0  # below 500,000, far from HELD_OUT_SEED; same seed, machine and versions: same
#           weights, bit for bit

# Budget
TOTAL_STEPS = 850_000  # of all copies together, rounded down to whole updates; too few:
#                        not solved yet; more: only time
REPORT_EVERY = 10  # updates (a rollout and the passes over it) between two lines

# Collecting
NUM_ENVS = 16  # copies flown side by side, by one pass of the actor; few: slower, and a
#                batch of few episodes; many: fewer updates for the same TOTAL_STEPS
ROLLOUT_STEPS = 256  # steps of each copy between two updates; with few the landing is
#                      out of sight, with many the policy is updated too rarely

# Algorithm
EPOCHS = 4  # passes over each batch; few: little is learnt from it; many: slower, and
#             the later ones use data that the policy has moved away from
MINIBATCH_SIZE = 512  # rows of the batch in one gradient step; small: noisy, and slow;
#                       big: too few gradient steps. The last of a pass may be smaller.
LEARNING_RATE = 2e-3  # Adam's step at the start; falls in a straight line to 0. Too
#                       big: it settles on a bad habit; too small: time runs out
GAMMA = 0.995  # discount of a reward one step later: 0.995 looks about 200 steps ahead,
#                the length of a landing; nearer 1 it takes its time, lower it crashes
GAE_LAMBDA = 0.98  # 0 trusts the critic after one step, 1 only what really happened;
#                    near 0 the critic's errors mislead, near 1 chance does: see `gae`
CLIP_EPS = 0.2  # how far the ratio may move from 1 before the push stops; too small: it
#                 learns slowly; too big: the policy outruns its data
ENTROPY_BONUS = 0.003  # how much staying undecided is worth; too little: it settles on
#                         the first thing that works; too much: it never settles
VALUE_WEIGHT = 0.5  # of the critic's loss. Adam makes up for it, but for MAX_GRAD_NORM:
#                     too big and the critic's gradient crowds out the actor's
MAX_GRAD_NORM = 0.5  # a longer gradient, of both networks taken as one, is shortened to
#                      this; too small: all batches count alike, clear or unclear; too
#                      big: one odd batch can jerk
REWARD_SCALE = 0.01  # rewards reach +-100; the critic learns best on numbers near 1,
#                      much bigger or much smaller ones take it too many steps to reach
HIDDEN_UNITS = 64  # width of the two hidden layers, of the actor and of the critic; too
#                    small: it flies crudely; too big: slower

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("ppo_lunarlander_final.pt")
CURVE_PATH = Path(__file__).with_name("lunarlander_learning_curve.png")

# What the task itself fixes: change these only together with the network
ENV_ID = "LunarLander-v3"
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 200
OBSERVATION_SIZE, ACTIONS = 8, 4

# Two seeds, so that no purpose replays the episodes of another: copy i of the training
# starts from SEED + i; the held-out episodes have a seed each, HELD_OUT_SEED and up.
HELD_OUT_SEED = 1_000_000
HELD_OUT_EPISODES = 100


def check_settings() -> None:
    """Stop with one plain line if a setting is impossible, before anything runs."""
    limits = {  # name: (type, lowest, highest)
        "SEED": (int, 0, 499_999),
        "TOTAL_STEPS": (int, 1, math.inf),
        "REPORT_EVERY": (int, 1, math.inf),
        "NUM_ENVS": (int, 1, math.inf),
        "ROLLOUT_STEPS": (int, 1, math.inf),
        "EPOCHS": (int, 1, math.inf),
        "MINIBATCH_SIZE": (int, 1, math.inf),
        "LEARNING_RATE": (float, 1e-9, 1),
        "GAMMA": (float, 0, 1),
        "GAE_LAMBDA": (float, 0, 1),
        "CLIP_EPS": (float, 1e-9, math.inf),
        "ENTROPY_BONUS": (float, 0, 1_000),
        "VALUE_WEIGHT": (float, 0, 1_000),
        "MAX_GRAD_NORM": (float, 1e-9, math.inf),
        "REWARD_SCALE": (float, 1e-9, 1_000),
        "HIDDEN_UNITS": (int, 1, math.inf),
    }
    problems = []
    for name, (kind, low, high) in limits.items():
        value = globals()[name]
        if type(value) not in (int, kind) or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            limit = f"from {low:g} to {high:g}" if high < math.inf else f"from {low} up"
            problems.append(f"{name} = {value!r} must be {noun} {limit}")
    if not problems and TOTAL_STEPS < NUM_ENVS * ROLLOUT_STEPS:
        problems.append("TOTAL_STEPS must be at least NUM_ENVS * ROLLOUT_STEPS")
    for name in ("WEIGHTS_PATH", "CURVE_PATH"):
        if not os.access(Path(globals()[name]).parent, os.W_OK):
            problems.append(f"{name} must lie in a folder that can be written to")
    if problems:
        sys.exit(f"Settings: {'; '.join(problems)}.")


# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer that starts with orthogonal weights times `gain`, biases 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """Two networks of the same shape: the policy pi(a|s) and the value V(s)."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        # ReLU turns about half of the numbers to 0; a gain of sqrt(2) makes up for it,
        # so that signals neither grow nor fade. The actor's last layer starts near 0:
        # at first all actions are equally likely.
        self.actor = nn.Sequential(  # observations (B, 8) -> logits (B, 4)
            linear(OBSERVATION_SIZE, hidden_units, math.sqrt(2)),
            nn.ReLU(),
            linear(hidden_units, hidden_units, math.sqrt(2)),
            nn.ReLU(),
            linear(hidden_units, ACTIONS, 0.01),
        )
        self.critic = nn.Sequential(  # observations (B, 8) -> values (B,)
            linear(OBSERVATION_SIZE, hidden_units, math.sqrt(2)),
            nn.ReLU(),
            linear(hidden_units, hidden_units, math.sqrt(2)),
            nn.ReLU(),
            linear(hidden_units, 1, 1.0),
            # (B, 1) -> (B,). Left out, values (B, 1) minus returns (B,) would be (B, B)
            # without an error, and the critic would learn the mean of all returns.
            nn.Flatten(start_dim=0),
        )


def save_agent(agent: ActorCritic, path: Path | str, **facts: float | str) -> None:
    """Write the weights and a few plain facts about them to `path`.

    The file is written under a temporary name and then renamed, so that a crash in the
    middle leaves the old weights whole instead of the new ones half-written.
    """
    checkpoint = {"weights": agent.state_dict(), "env_id": ENV_ID, **facts}
    checkpoint["hidden_units"] = agent.actor[0].out_features
    temporary = Path(f"{path}.tmp")
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)


def load_agent(path: Path | str = WEIGHTS_PATH) -> ActorCritic:
    """Read an agent back: its `.actor` gives logits (B, 4), its `.critic` values (B,).

    Errors: a file that is missing, damaged, of another network, or that holds anything
    but tensors and plain values ends the program with one line and status 1.
    """
    path = Path(path)
    if not path.is_file():
        sys.exit(f"{path.name} is missing. Make it with: python lunarlander_ppo.py")
    try:
        # weights_only: a .pt file can hold code, and this refuses to run any.
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["env_id"] != ENV_ID:
            raise ValueError(f"made for {checkpoint['env_id']}")
        agent = ActorCritic(checkpoint["hidden_units"])
        agent.load_state_dict(checkpoint["weights"])
    except Exception as problem:  # a damaged file can fail in any way at all
        sys.exit(
            f"{path.name} does not hold a LunarLander agent ({type(problem).__name__})."
            " Make it anew with: python lunarlander_ppo.py"
        )
    return agent


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    next_values: torch.Tensor,
    terminated: torch.Tensor,
    ended: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """Advantages: how much better each action was than the critic expected.

    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lam * (1 - ended_t) * A_{t+1}

    PPO's eq. (12) and (11), written backwards, with the ends of episodes added. (The
    last exponent of (11), T-t+1, is a misprint for T-t-1.) Written out, A_t is
    delta_t + (gamma*lam) delta_{t+1} + (gamma*lam)^2 delta_{t+2} + ...: at lam = 0 one
    reward and then the critic's guess; at lam = 1 the guesses between cancel, and what
    is left are the rewards that came, minus V(s_t).

    All arguments (T, N) float32, flags 0 or 1; index t is the step from s_t to s_{t+1}.
    Gives advantages (T, N).
    `next_values` holds V(s_{t+1}) of the observation that the step really led to, also
    where the copy was then reset. Beyond the last row nothing is known: its A_t is
    delta_t alone.
    `terminated` cuts the value: landed or crashed, so no reward can follow.
    `ended` (terminated, or truncated by the time limit) only cuts the sum: row t+1 is
    another episode. A truncated lander would have flown on, so V(s_{t+1}) stays.
    By hand: rewards = [1, 1], values = next_values = 0, last step terminated,
    gamma = lam = 1  ->  advantages = [2, 1].
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_advantage = deltas[t] + gamma * lam * (1 - ended[t]) * next_advantage
        advantages[t] = next_advantage
    return advantages


def normalise(advantages: torch.Tensor) -> torch.Tensor:
    """Advantages measured from their mean, in units of their standard deviation.

    (A - mean(A)) / (std(A) + 1e-4)

    `advantages` (B,) float32 gives (B,). They are near 1 while crashes come as a
    surprise and near 0.01 once they are rare; normalised, ENTROPY_BONUS weighs the same
    against both. The 1e-4 is there so that nothing is divided by 0.
    By hand: [1, 2, 3]  ->  [-1.2246, 0, 1.2246].
    """
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)


def log_probs_and_entropy(
    logits: torch.Tensor, actions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How likely the actions are, and how undecided the policy is.

    ln pi(a|s) = logit_a - ln sum_b exp(logit_b)
    S[pi](s)   = -sum_b pi(b|s) * ln pi(b|s),   in nats, ln 4 = 1.386 at most

    `logits` (B, A), `actions` (B,) int64. Gives log-probabilities (B,), entropies (B,).
    torch.distributions.Categorical does the same, with checks that this spares.
    By hand: logits = [0, 0], action 0  ->  ln 0.5 = -0.6931 and 0.6931.
    """
    all_log_probs = torch.log_softmax(logits, dim=1)
    entropies = -(all_log_probs.exp() * all_log_probs).sum(1)
    return all_log_probs.gather(1, actions[:, None])[:, 0], entropies


def clipped_surrogate_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    clip_eps: float,
) -> torch.Tensor:
    """PPO's policy loss: raise good actions' probability, but only so far.

    rho_t = exp(ln pi(a_t|s_t) - ln pi_old(a_t|s_t))
    loss  = -mean_t( min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) )

    Schulman et al. 2017 (PPO), eq. (7), with a minus since optimizers go downhill.

    rho_t counts each action as often as the policy of now would take it, so that
    mean(rho_t * A_t) estimates how much better than the old policy it does. That holds
    only near the old policy, from whose flights A_t comes: hence the clip. At the first
    gradient step of an update all rho are 1 and nothing is clipped.
    Where rho > 1 + eps and A > 0, or rho < 1 - eps and A < 0, the clipped term is the
    smaller one and it is flat: the action was pushed far enough and gets no gradient.
    Outside the range on the *other* side (moved there by the push on other steps) the
    minimum keeps the unclipped term, so that the action can come back.

    `log_probs` (B,) with gradient, `old_log_probs` (B,) of the policy that acted,
    `advantages` (B,), normalised. Gives a scalar.
    By hand: rho = [1.5, 0.5], A = [1, -1], eps = 0.2  ->  -(1.2 - 0.8) / 2 = -0.2.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def critic_loss(values: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the critic: mean_t( (V(s_t) - G_t)^2 ).

    `values` (B,) with gradient, `returns` (B,). Gives a scalar. PPO's eq. (9), L^VF.
    By hand: values = [1, 2], returns = [1, 4]  ->  2.
    """
    return ((values - returns) ** 2).mean()


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """How well the critic predicts: 1 - var(G - V) / var(G).

    1 is perfect, 0 no better than a constant, below 0 worse than one. Both (B,).
    By hand: values = [0, 0], returns = [1, -1]  ->  0.
    """
    errors = (returns - values).var(correction=0)
    return 1 - (errors / (returns.var(correction=0) + 1e-8)).item()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


Policy = Callable[[torch.Tensor], torch.Tensor]  # observations (B, 8) -> logits (B, 4)


def make_env(**options: str) -> gym.Env:
    """One lander.

    Errors: without Box2D the program ends with the command that installs it.
    """
    try:
        # The checker that is left out here looks for mistakes in new environments.
        return gym.make(ENV_ID, disable_env_checker=True, **options)
    except gym.error.DependencyNotInstalled:
        sys.exit(f'{ENV_ID} needs Box2D: pip install "gymnasium[box2d]>=1.2.3"')


def make_envs(copies: int) -> SyncVectorEnv:
    """N landers side by side, moved one after another by one call of `step`.

    SAME_STEP: a copy whose episode ends is reset in that same call. The observation
    that comes back is the first of its new episode, and the last of the old one is in
    info["final_obs"]. (In the default mode, NEXT_STEP, the step after an end is a dummy
    that must not be trained on.)

    One process is enough. AsyncVectorEnv, a process for each copy, got 7,300 steps/s
    out of two busy cores where this got 23,300: a step takes less time than the message
    that asks for it.
    """
    return SyncVectorEnv([make_env] * copies, autoreset_mode=AutoresetMode.SAME_STEP)


@torch.no_grad()
def collect(
    envs: SyncVectorEnv,
    actor: nn.Module,
    observations: np.ndarray,
    running: np.ndarray,
    steps: int,
) -> tuple[dict[str, torch.Tensor], np.ndarray, list[tuple[float, float]]]:
    """Fly T steps in each of the N copies, drawing actions from the actor.

    `observations` (N, D) is where the copies stand; `running` (2, N), return and length
    so far of the episodes in flight, is kept up to date in place.

    Gives the rollout: `observations` and `next_observations` (T, N, D), `actions`
    (T, N) int64, `rewards` (not yet scaled), `terminated` and `ended` (T, N) float32;
    then where the copies stand now, and (return, length) of each episode that ended.
    """
    # -log of an exponential draw is Gumbel noise, and argmax(logits + Gumbel noise) is
    # a draw from softmax(logits). The noise of all steps is made in one call.
    noise = -torch.empty(steps, envs.num_envs, ACTIONS).exponential_().log().numpy()
    rows, finished = [], []
    for t in range(steps):
        logits = actor(torch.from_numpy(observations)).numpy()
        actions = (logits + noise[t]).argmax(1)
        now, rewards, terminated, truncated, info = envs.step(actions)
        running[0] += rewards
        running[1] += 1

        # `now` is where the copies stand: after an end, at the start of the next
        # episode. What the step itself led to is then in `info`.
        ended = terminated | truncated
        next_observations = now
        if ended.any():
            next_observations = now.copy()
            for i in np.flatnonzero(ended):
                next_observations[i] = info["final_obs"][i]
                finished.append(tuple(running[:, i].tolist()))
                running[:, i] = 0
        rows.append(
            (observations, actions, rewards, next_observations, terminated, ended)
        )
        observations = now
    columns = [torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True)]
    rollout = {
        "observations": columns[0],
        "actions": columns[1],
        "rewards": columns[2].float(),
        "next_observations": columns[3],
        "terminated": columns[4].float(),
        "ended": columns[5].float(),
    }
    return rollout, observations, finished


@torch.no_grad()
def make_batch(
    agent: ActorCritic,
    rollout: dict[str, torch.Tensor],
    reward_scale: float,
    gamma: float,
    lam: float,
) -> dict[str, torch.Tensor]:
    """Turn a rollout into a batch to learn from, T and N merged into B = T*N.

    The critic and the log-probabilities are computed here, in one pass over the whole
    rollout, rather than step by step: the weights have not changed since it flew.

    Gives `observations` (B, D) and (B,) each: `actions`, `old_log_probs`, `values`,
    `returns` and `advantages`, normalised over the batch.
    """
    observations = rollout["observations"].flatten(0, 1)
    actions = rollout["actions"].flatten()
    old_log_probs, _ = log_probs_and_entropy(agent.actor(observations), actions)
    values = agent.critic(observations)
    next_values = agent.critic(rollout["next_observations"].flatten(0, 1))
    shape = rollout["rewards"].shape
    advantages = gae(
        rollout["rewards"] * reward_scale,
        values.view(shape),
        next_values.view(shape),
        rollout["terminated"],
        rollout["ended"],
        gamma,
        lam,
    ).flatten()
    return {
        "observations": observations,
        "actions": actions,
        "old_log_probs": old_log_probs,
        "values": values,
        "returns": advantages + values,
        "advantages": normalise(advantages),
    }


@torch.no_grad()
def evaluate(
    policy: Policy, episodes: int, first_seed: int, greedy: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Fly fresh episodes, number i from seed first_seed + i, all side by side.

    `greedy` takes the likeliest action instead of drawing one. Gives, (episodes,) each,
    the scores (sums of unscaled rewards) and True where the lander crashed or left the
    picture, which pays -100 at once (coming to rest pays +100).
    """
    envs = [make_env() for _ in range(episodes)]
    starts = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    observations = np.array(starts)
    scores, crashed = np.zeros(episodes), np.zeros(episodes, dtype=bool)
    flying = list(range(episodes))
    while flying:
        logits = policy(torch.from_numpy(observations[flying]))
        actions = logits.argmax(1) if greedy else Categorical(logits=logits).sample()
        still_flying = []
        for i, action in zip(flying, actions.tolist(), strict=True):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            scores[i] += reward
            crashed[i] = terminated and reward <= -100
            if not (terminated or truncated):
                still_flying.append(i)
        flying = still_flying
    for env in envs:
        env.close()
    return scores, crashed


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def ppo_loss(
    agent: ActorCritic,
    batch: dict[str, torch.Tensor],
    clip_eps: float,
    value_weight: float,
    entropy_bonus: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All that is minimised: PPO's eq. (9) with its sign turned round.

    loss = L_policy + value_weight * L_value - entropy_bonus * mean_t( S[pi](s_t) )

    `batch` as `make_batch` gives it, or a part of its rows. The advantages in it are
    plain numbers: the critic learns from L_value alone. Gives three scalars: loss,
    L_policy, L_value.
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    policy_loss = clipped_surrogate_loss(
        log_probs, batch["old_log_probs"], batch["advantages"], clip_eps
    )
    value_loss = critic_loss(agent.critic(batch["observations"]), batch["returns"])
    loss = policy_loss + value_weight * value_loss - entropy_bonus * entropies.mean()
    return loss, policy_loss.detach(), value_loss.detach()


def learn(
    agent: ActorCritic,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    epochs: int,
    minibatch_size: int,
    max_grad_norm: float,
    **loss_settings: float,
) -> tuple[float, float]:
    """Go over the batch `epochs` times, a gradient step for each random minibatch.

    `loss_settings` go to `ppo_loss`. Gives the mean policy loss and value loss.
    """
    losses = []
    for _ in range(epochs):
        for rows in torch.randperm(len(batch["actions"])).split(minibatch_size):
            minibatch = {name: column[rows] for name, column in batch.items()}
            loss, policy_loss, value_loss = ppo_loss(agent, minibatch, **loss_settings)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
            optimizer.step()
            losses.append(torch.stack([policy_loss, value_loss]))
    return tuple(torch.stack(losses).mean(0).tolist())


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Make the optimizer's further steps this long."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def diagnose(
    agent: ActorCritic, batch: dict[str, torch.Tensor], clip_eps: float
) -> tuple[float, float, float, float]:
    """What the update did to the policy, over the whole batch: four numbers.

    1. mean_t( rho_t - 1 - ln rho_t ), an estimate of KL(pi_old || pi) in nats.
    2. The share of steps whose ratio left the range 1 +- clip_eps, on either side.
    3. The entropy of the policy now, in nats: 1.386 is random, 0 is certain.
    4. The explained variance of the critic before the update.
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]
    ratio = log_ratio.exp()
    return (
        (ratio - 1 - log_ratio).mean().item(),
        ((ratio - 1).abs() > clip_eps).float().mean().item(),
        entropies.mean().item(),
        explained_variance(batch["values"], batch["returns"]),
    )


def print_held_out_scores(policy: Policy) -> float:
    """Print the scores on held-out episodes; give the mean of the greedy ones."""
    print(f"\n{HELD_OUT_EPISODES} held-out episodes: mean +- std (minimum), crashes")
    means = []
    for name, greedy in [("greedy", True), ("sampled", False)]:
        scores, crashed = evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy)
        spread = f"{scores.mean():6.1f} +- {scores.std():5.1f} ({scores.min():.1f})"
        print(f"  {name:8}{spread}, {crashed.sum()}")
        means.append(scores.mean().item())
    return means[0]


def draw_learning_curve(
    history: list[tuple[int, float, float]], path: Path | str
) -> None:
    """Write a picture of (steps so far, return, length) of the episodes, in order."""
    steps, returns, _ = np.array(history).reshape(-1, 3).T
    last_100 = [np.mean(returns[max(0, i - 99) : i + 1]) for i in range(len(returns))]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", color="0.7", markersize=3, label="one episode")
    axes.plot(steps, last_100, label="mean of the last 100")
    axes.axhline(SOLVED_SCORE, color="green", linestyle="--", label="solved: 200")
    axes.set(
        title=f"PPO on {ENV_ID}", xlabel="steps", ylabel="return", ylim=(-500, 350)
    )
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def save_run(
    agent: ActorCritic, history: list, suffix: str = "", **facts: float
) -> str:
    """Write weights and curve, with `suffix` added to both names; give the names."""
    weights_path, curve_path = Path(WEIGHTS_PATH), Path(CURVE_PATH)
    weights_path = weights_path.with_stem(weights_path.stem + suffix)
    curve_path = curve_path.with_stem(curve_path.stem + suffix)
    save_agent(agent, weights_path, seed=SEED, **facts)
    draw_learning_curve(history, curve_path)
    return f"{weights_path.name} and {curve_path.name}"


def print_header() -> None:
    """Say what runs, for how long, and how to read the table that follows."""
    print(f"PPO on {ENV_ID}, seed {SEED}, on the CPU (a GPU is slower here).")
    print(f"{TOTAL_STEPS:,} steps; a million take about a minute. 'return', a mean of")
    print(f"100 episodes, should rise past {SOLVED_SCORE:g}, and 'explained', how much")
    print("the critic foresees of the returns, towards 1. KL: how far an update moved")
    print("the policy, in nats; 'clipped': how many actions left the range. The losses")
    print("show no progress: each update has new data.\n")
    print(
        "return  length      steps  steps/s      KL  clipped  entropy  explained"
        "   policy, value loss"
    )


def report_line(history: list, steps: int, seconds: float, *numbers: float) -> str:
    """One line of the table; return and length are means of the last 100 episodes."""
    recent = history[-100:] or [(steps, math.nan, math.nan)]
    _, mean_return, length = np.mean(recent, axis=0)
    speed = steps / seconds
    kl, clipped, entropy, explained, policy_loss, value_loss = numbers
    return (
        f"{mean_return:6.1f}{length:8.0f}{steps:11,}{speed:9,.0f}"
        f"{kl:8.4f}{clipped:9.0%}"
        f"{entropy:9.3f}{explained:11.2f}{policy_loss:11.4f}{value_loss:10.4f}"
    )


def remember_ctrl_c() -> list[bool]:
    """Let Ctrl-C leave a mark in the list that this gives, besides what it always does.

    The KeyboardInterrupt that it raises can be lost: Box2D is written in C++, calls
    Python for every contact, and drops what is raised there.
    """
    pressed = []

    def note(*_) -> None:
        pressed.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    return pressed


def main() -> None:
    """Train until the steps are spent, then measure, draw and save."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the networks are so small that more threads only wait

    # 1. An actor and a critic that know nothing.
    torch.manual_seed(SEED)
    agent = ActorCritic(HIDDEN_UNITS)
    updates = TOTAL_STEPS // (NUM_ENVS * ROLLOUT_STEPS)
    running, history, steps = np.zeros((2, NUM_ENVS)), [], 0
    start = time.perf_counter()
    pressed = remember_ctrl_c()
    bar = tqdm(total=updates, unit="update", leave=False, disable=None)
    try:
        # fused: the same Adam in one call for all weights instead of one for each.
        optimizer = torch.optim.Adam(agent.parameters(), LEARNING_RATE, fused=True)
        envs = make_envs(NUM_ENVS)
        observations, _ = envs.reset(seed=SEED)
        for update in range(updates):
            if pressed:
                raise KeyboardInterrupt
            # 2. Fly.
            rollout, observations, finished = collect(
                envs, agent.actor, observations, running, ROLLOUT_STEPS
            )
            steps += rollout["rewards"].numel()
            history += [(steps, *episode) for episode in finished]

            # 3. Advantages, from the critic as it was when the landers flew.
            batch = make_batch(agent, rollout, REWARD_SCALE, GAMMA, GAE_LAMBDA)

            # 4 and 5. Several clipped passes over the batch, with ever smaller steps.
            set_learning_rate(optimizer, LEARNING_RATE * (1 - update / updates))
            losses = learn(
                agent,
                optimizer,
                batch,
                EPOCHS,
                MINIBATCH_SIZE,
                MAX_GRAD_NORM,
                clip_eps=CLIP_EPS,
                value_weight=VALUE_WEIGHT,
                entropy_bonus=ENTROPY_BONUS,
            )

            bar.update()
            seconds = time.perf_counter() - start
            if (update + 1) % REPORT_EVERY == 0 or update + 1 == updates:
                diagnostics = diagnose(agent, batch, CLIP_EPS)
                bar.write(report_line(history, steps, seconds, *diagnostics, *losses))
        bar.close()

        # 6. The final score, and the files.
        greedy_score = print_held_out_scores(agent.actor)
        if pressed:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        bar.close()
        names = save_run(agent, history, "_interrupted", steps=steps)
        print(f"\nStopped after {steps:,} steps. This run is kept in {names};")
        print("older weights are as they were.")
        return
    facts = {"steps": steps, "greedy_score": greedy_score}
    if greedy_score < SOLVED_SCORE:
        names = save_run(agent, history, "_unsolved", **facts)
        sys.exit(f"Below {SOLVED_SCORE:g} after {steps:,} steps; kept in {names}.")
    names = save_run(agent, history, **facts)
    print(f"{greedy_score:.1f}, where {SOLVED_SCORE:g} is enough, in {seconds:.0f} s.")
    print(f"Written: {names}.")
    print("Watch it land: python lunar_eval.py")


if __name__ == "__main__":
    main()
