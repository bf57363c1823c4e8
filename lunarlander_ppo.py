"""Lesson 3: PPO (proximal policy optimization) on LunarLander-v3.

What you will learn
    How PPO takes many gradient steps from one batch of data, and how a critic lets it
    learn from episodes that have not ended yet.

    The task is to land between two flags within 1,000 steps. Moving towards the pad
    earns reward and moving away from it loses reward, firing an engine costs a little,
    coming to rest pays 100 and a crash costs 100. From 200 on an episode counts as
    solved.

From REINFORCE to PPO
    The *policy* is a network that gives each action a probability. The *return* of a
    step is the sum of its reward and all later ones, in which later rewards count a
    little less. REINFORCE (lesson 1, train_cartpole.py) plays a batch of whole
    episodes, and makes each action more likely or less likely depending on how much
    better or worse than average its return was. Then it throws the batch away after one
    gradient step. It has to: the gradient is an average over actions that are sampled
    from the present policy, and after one step the present policy is another one. But
    playing is the slow part. PPO changes two things.

    1. Many gradient steps from one batch. PPO stores the probability that each action
       had when it was taken. In the average, each action then counts with the *ratio*
       of its probability now to the stored one: an action that has become twice as
       likely counts twice. This corrects how often each action is taken, but not which
       states are visited, so it is right only while the policy has changed little. So
       PPO stops pushing an action as soon as its probability has moved by a fifth of
       itself, from 0.5 to 0.6 for example, in the direction of the push (the *clip*).
    2. Episodes may be cut. PPO does not wait for the end of an episode. It plays 256
       steps, and where that cuts an episode, a second network, the *critic*, predicts
       the rest of the return. The episode goes on in the next batch. The critic also
       replaces the baseline of lesson 1: each action is no longer compared with one
       average for all states, but with V(s_t), the return that the critic expected in
       the state where it was taken. Like any baseline that does not depend on the
       action, it adds no bias to the gradient: what it adds is on average V(s) times
       sum_a pi(a|s) grad ln pi(a|s) = grad sum_a pi(a|s) = grad 1 = 0.

The algorithm in 5 steps
    1. Make two networks that know nothing: the actor gives a probability for each
       action, and the critic predicts the return.
    2. Play T steps in N copies of the environment side by side (a *rollout*), sampling
       each action from the actor. A copy whose episode ends starts a new one.
    3. Compute the advantages: how much better did it go after each action than the
       critic had predicted?
    4. The loss has three parts. It makes actions with a positive advantage more likely
       and the others less likely, until the clip stops it. It moves the critic's
       predictions towards the returns. And it rewards entropy, a measure of how
       undecided the policy is, so that the agent keeps trying different actions.
    5. Go over the batch a few times (*epochs*) in random minibatches, with one gradient
       step on this loss for each. Then lower the learning rate and go back to 2, until
       all steps are spent.

Symbols (T steps, N copies, B = T * N rows when the two are merged, D = 8 numbers in an
observation, K = 4 actions)
    s_t      observations  (T, N, D): position, velocity, angle, spin, two leg contacts
    a_t      actions       (T, N): 0 nothing, 1 left engine, 2 main, 3 right engine
    r_t      rewards       (T, N): of the step from s_t to s_{t+1}
    pi(a|s)  actor         the policy: the probability of action a in state s
    V(s)     critic        the prediction of the return, that is, of the discounted sum
                           of the rewards from state s on
    delta_t  deltas        (T, N): the TD error, explained in `gae`
    A_t      advantages    (T, N): how much better it went after a_t than V(s_t) said
    G_t      returns       (T, N): V(s_t) + A_t, an estimate of the return, partly real
                           rewards and partly V: the target for the critic
    pi_old                 the policy that played the rollout
    rho_t    ratio         (B,): pi(a_t|s_t) over pi_old(a_t|s_t)
    eps, gamma, lam        CLIP_EPS, GAMMA, GAE_LAMBDA
    The *agent* is actor and critic together. For learning, T and N are merged into one
    batch of B = T * N rows; in a minibatch, B is smaller. The networks work on B rows:
    the actor gives logits (B, K), whose softmax is pi, and the critic values (B,).

On a first reading, go from here to the Settings, and come back after `train`.

Run it, and what you should see
    python lunarlander_ppo.py     about a minute on one core of a server CPU, no GPU
    return  length      steps  steps/s      KL  clipped  entropy  explained
     -32.2     126     40,960   15,816  0.0067       8%    1.134       0.75
     252.7     264    204,800   15,599  0.0038       6%    0.672       0.84
     278.2     181    847,872   14,369  0.0000       0%    0.493       0.99
    These are three rows of seed 0, whose weights are shipped. Return and length are
    means of the last 100 episodes. KL says how far the policy has moved in the update,
    clipped which share of the ratios is outside 0.8 to 1.2, and explained how much of
    the differences between returns the critic predicts (1: all, 0: nothing). `diagnose`
    has the formulas. Seeds 0-9, each on 100 held-out episodes played greedily (always
    the most likely action), score 279.0 on average and 276.3 in the worst case, and
    99.8 % of the episodes reach 200.

Try this (a run that ends above 200 replaces the shipped weights)
    edit                                             mean score on held-out episodes
    TOTAL_STEPS = 400_000                            263.1 over seeds 0-9, worst 248.3
    TOTAL_STEPS = 400_000, FINAL_RATE = 1.0          270.8 over seeds 0-9, worst 257.7
    TOTAL_STEPS = 160_000, EPOCHS = 20               263, 246 and 202 with seeds 0-2
    TOTAL_STEPS = 400_000, MINIBATCH_SIZE = 4_096    -49, 213 and 30 with seeds 0-2
    The third edit uses each step five times as often. The last one takes only four
    gradient steps in an update. Played greedily, its seed 0 hovers above the pad until
    the time is up.

When it goes wrong
    Healthy: KL between 0.001 and 0.02 and clipped between 5 and 20 %, both falling to 0
    together with the learning rate; entropy falling from 1.38 to 1 in 100,000 steps and
    to 0.5 at the end; explained rising to 0.7 within ten updates, then above 0.7 with
    dips. Typical departures from this:
    KL above 0.1, clipped above 25 %    The policy runs away from its data: lower
                                        LEARNING_RATE or EPOCHS.
    KL and clipped at 0 from the start  The policy does not learn: does a gradient reach
                                        the ratio? Is LEARNING_RATE too small?
    entropy near 0 early on             It tries nothing else any more: lower
                                        LEARNING_RATE or raise ENTROPY_BONUS.
    entropy still 1.3 after 100,000     No gradient arrives, or ENTROPY_BONUS is so
    steps                               large that the policy never settles.
    explained near 0 for long           The critic does not learn: check the shape of
                                        its output (`ActorCritic`) and REWARD_SCALE.
    "The loss is not finite"            LEARNING_RATE or REWARD_SCALE is far too large.
    tests/bugs/README.md shows what real mistakes in this file look like.

Another task
    For CartPole-v1, edit these lines. REWARD_SCALE should bring returns near 1.
    ENV_ID = "CartPole-v1"
    OBSERVATION_SIZE, NUM_ACTIONS = 4, 2
    TOTAL_STEPS = 100_000
    WEIGHTS_PATH = Path(__file__).with_name("ppo_cartpole.pt")
    CURVE_PATH = Path(__file__).with_name("ppo_cartpole_curve.png")
    Seed 0 then scores 500 of 500. (Here `explained` falls below 0 in the end: all
    returns are nearly equal, so there is nothing left to explain.)

Where this differs from the papers (PPO: arXiv 1707.06347, GAE: arXiv 1506.02438)
    The networks are those of PPO's section 6.1, but with ReLU instead of tanh. Rewards
    are scaled, advantages are normalised, gradients are clipped, and the weights start
    orthogonal. What the parts contribute, as the mean score of greedy held-out episodes
    after 400,000 steps, with seeds 0, 1 and 2 (each figure is rounded):
    all as it is                      261    (248, 262, 273)
    EPOCHS = 1                          0    (-22, -25, 46)
    ratio not clipped                 179    (153, 235, 148)
    tanh instead of ReLU              185    (267, 103, 184)
    GAE_LAMBDA = 1                    204    (210, 139, 264)
    rewards not scaled                218    (190, 268, 197)
    advantages not normalised         239    (243, 236, 237)
    actor and critic share layers     253    (247, 258, 255)
    gradient not clipped              254    (255, 257, 252)
    PyTorch's own initial weights     260    (257, 261, 262)
    With three seeds, differences of less than about 20 mean nothing. We do not know
    why ReLU does so much better than tanh here.

    Some things are left out although other programs have them. They stop the epochs
    when KL exceeds a limit; here the clip and the falling learning rate keep KL small.
    They limit the change of V with a clip as well; a large study on robot control
    (arXiv 2006.05990) found that this lowers the score. They normalise observations;
    those of the lander are of size 1 already. They let actor and critic share layers;
    that makes no clear difference here, and then VALUE_WEIGHT matters. Like lesson 1,
    this script leaves out gamma^t: the gradient of the return that is discounted from
    the start of the episode would weigh step t by it, and late steps would hardly be
    learnt. (The last exponent in PPO's equation (11), T-t+1, is a misprint for T-t-1.)
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import contextlib
import math
import os
import signal
import sys
import tempfile
import threading
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
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# The same seed, machine and versions give the same weights, bit for bit.
SEED = 0

# Budget and reports

# Steps of all copies together. With too few the task is not solved; more only cost
# time.
TOTAL_STEPS = 850_000

# Updates between two lines of the table. An update is one turn of the loop: a rollout,
# and all the gradient steps on it.
REPORT_EVERY = 10

# Updates between two greedy episodes that are shown while it trains, in a window or,
# without a display, in one growing GIF. 0: none are shown.
WATCH_EVERY = 0

# The rollout

# Copies of the environment that are played side by side. With few copies the networks
# work on small inputs, which is slow. With many, TOTAL_STEPS allows fewer updates.
NUM_ENVS = 16

# Steps that each copy takes before each update. With too few, most rollouts end before
# the reward of a landing is seen, and the advantages rest on what the critic predicts.
# With too many, TOTAL_STEPS allows fewer updates.
ROLLOUT_STEPS = 256

# Learning

# Passes over each batch. With few, little is learnt from each step of the environment.
# With many, learning takes longer, and the last passes use data that the policy has
# moved away from.
EPOCHS = 4

# Rows in one gradient step. Small minibatches make noisy gradients and take longer.
# With large ones there are too few gradient steps.
MINIBATCH_SIZE = 512

# Adam's learning rate at the start. If it is too large, the policy settles on a bad
# habit; if it is too small, TOTAL_STEPS is spent before the agent can land.
LEARNING_RATE = 2e-3

# Share of LEARNING_RATE that is left at the end. With 0 the last steps average out the
# noise of the minibatches. In short runs 1 does better: they need the large steps.
FINAL_RATE = 0.0

# Discount: a reward one step later counts 0.995 times as much, so the agent looks about
# 1 / (1 - 0.995) = 200 steps ahead, which is the length of a landing. With a larger
# value the agent gains little by landing soon. A smaller one makes the advantages less
# noisy, but with it the agent does not see the landing from far away.
GAMMA = 0.995

# How many real rewards go into an advantage before the critic's prediction takes over.
# 0: a single one; 1: all up to the end of the episode or of the rollout; a value in
# between mixes these. With a small value the errors of the critic mislead the actor;
# near 1 the luck of single episodes does. `gae` explains it.
GAE_LAMBDA = 0.98

# How far the ratio may move from 1 before an action is not pushed any further. If it is
# too small, the policy learns slowly; if too large, the policy outruns its data.
CLIP_EPS = 0.2

# Weight of the entropy. With too little, the policy settles before it has tried enough;
# with too much, it never settles.
ENTROPY_BONUS = 0.003

# Weight of the critic's loss. Actor and critic share no weights, and a constant factor
# means nothing to Adam, so it hardly changes how fast the critic learns. But with a
# large weight, it is the critic's errors that decide how far MAX_GRAD_NORM, the next
# setting, scales the gradient of both down. Then a minibatch in which the critic errs
# much counts little for the actor.
VALUE_WEIGHT = 0.5

# The gradient is scaled down when its norm, over both networks, exceeds this (gradient
# clipping, which is not the clip of the ratio). If it is too small, every gradient is
# scaled, so that a weak signal counts as much as a strong one; if it is too large, a
# single unusual minibatch can make a very long step.
MAX_GRAD_NORM = 0.5

# Rewards are multiplied by this, for learning only, so that returns are of size 1.
# `ppo_loss` explains what happens otherwise.
REWARD_SCALE = 0.01

# Width of both hidden layers. With few units the lander flies crudely; many units make
# everything slower.
HIDDEN_UNITS = 64

# NUM_ENVS * ROLLOUT_STEPS = 16 * 256 = 4,096: the rows of a batch. 4,096 / 512 = 8
# minibatches times 4 epochs make 32 gradient steps in an update, and there are
# 850,000 // 4,096 = 207 updates.

# The task
ENV_ID = "LunarLander-v3"
OBSERVATION_SIZE, NUM_ACTIONS = 8, 4
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 200
HELD_OUT_EPISODES = 100
HELD_OUT_SEED = 1_000_000  # seed of the first held-out episode, the next has one more

# Files, written beside this script
WEIGHTS_PATH = Path(__file__).with_name("ppo_lunarlander_final.pt")
CURVE_PATH = Path(__file__).with_name("lunarlander_learning_curve.png")

# ------------------------------------------------------------------------------------
# Step 1: the networks
# ------------------------------------------------------------------------------------


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with biases 0 and orthogonal weights times `gain`.

    A square orthogonal matrix does not change the length of a vector. So the signal,
    and the gradient on its way back, neither grows nor shrinks from layer to layer.
    """
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
    """The agent: `actor` gives logits (B, K) of the policy, `critic` values (B,)."""

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        # The small gain makes all logits nearly 0, so that at first all actions are
        # equally likely.
        self.actor = network(hidden_units, NUM_ACTIONS, 0.01)
        # Flatten turns (B, 1) into (B,). Without it, values (B, 1) minus returns (B,)
        # would be a (B, B) table of every value minus every return. That raises no
        # error, and the critic would learn the mean of all returns.
        self.critic = nn.Sequential(*network(hidden_units, 1, 1.0), nn.Flatten(0))


def log_probs_and_entropy(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the actions, and the entropy: how undecided the policy is.

    ln pi(a|s) = logit_a - ln sum_b exp(logit_b)
    S[pi](s)   = -sum_b pi(b|s) * ln pi(b|s)

    S is in nats: ln 4 = 1.386 if all 4 actions are equally likely, 0 if one is certain.
    `logits` (B, K), `actions` (B,) int64. Returns log-probabilities (B,) and entropies
    (B,). By hand: logits = [0, 0], action 0  ->  ln 0.5 = -0.6931 and 0.6931.
    """
    all_log_probs = torch.log_softmax(logits, dim=1)
    entropies = -(all_log_probs.exp() * all_log_probs).sum(1)
    log_probs = all_log_probs.gather(1, actions[:, None])[:, 0]  # those of the actions
    return log_probs, entropies


# ------------------------------------------------------------------------------------
# Step 2: play a rollout
# ------------------------------------------------------------------------------------

# The worked example of this lesson has T = 3 steps in N = 2 copies, with 2 actions to
# choose from. An episode can end in two ways: a landing or a crash *terminates* it, and
# the time limit *truncates* it.
#
#     copy 1   s_0 -> s_1 -> its last observation: the time limit truncates the episode
#              a new episode: s_2 -> the rollout ends here, the episode does not
#     copy 2   s_0 -> s_1 -> s_2 -> its last observation: a crash terminates the episode
#
# Its rewards are [1, 1, 1] in copy 1 and [1, 2, -1] in copy 2. Steps 3 and 4 go on
# with it.


def make_env(**options: str) -> gym.Env:
    """One environment. Gymnasium's checker, a help for writing new ones, is off."""
    return gym.make(ENV_ID, disable_env_checker=True, **options)


def make_envs(copies: int) -> SyncVectorEnv:
    """N copies of the environment; one call of `step` moves them all.

    Every copy resets itself when its episode ends (autoreset). In SAME_STEP mode this
    happens inside the same call of `step`, which then returns the first observation of
    the *next* episode; the last one of the old episode is in `info`. (In the default
    mode, the step after an end is a dummy that must not be trained on.)
    """
    # The wrapper notes the return and the length of each episode.
    make = [lambda: RecordEpisodeStatistics(make_env())] * copies
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)


@torch.no_grad()
def collect(envs: SyncVectorEnv, actor: nn.Module, observations: np.ndarray) -> tuple:
    """Play T steps in each of the N copies, which stand at `observations` (N, D).

    Returns the rollout, a dict of tensors: `observations` and `next_observations`
    (T, N, D), `actions`, `rewards`, `terminated` and `ended` (T, N); then the
    observations (N, D) where the copies stand now, from which the next rollout goes on;
    and the (return, length) of each episode that ended. The probabilities of the
    actions are not stored here: `make_batch` computes them, before any weight changes.

    An episode ends in one of two ways. It is *terminated* by a landing or a crash, and
    no reward can follow. Or it is *truncated* by the time limit of 1,000 steps, while
    it could have gone on. `ended` is true for both. In the worked example `ended` is
    [0, 1, 0] in copy 1 and [0, 0, 1] in copy 2, and `terminated` is [0, 0, 0] in copy 1
    and [0, 0, 1] in copy 2.
    """
    steps, episodes = [], []
    for _ in range(ROLLOUT_STEPS):
        distribution = Categorical(logits=actor(torch.from_numpy(observations)))
        actions = distribution.sample().numpy()
        now, rewards, terminated, truncated, info = envs.step(actions)
        ended = terminated | truncated

        # `now` is where the copies stand. Where an episode ended, that is the start of
        # the next one, and not what this step has led to.
        next_observations = now.copy()
        for i in np.flatnonzero(ended):
            next_observations[i] = info["final_obs"][i]
            episode = info["final_info"]["episode"]
            episodes.append((float(episode["r"][i]), float(episode["l"][i])))
        step = {"observations": observations, "actions": actions, "rewards": rewards}
        step |= {"next_observations": next_observations}
        step |= {"terminated": terminated, "ended": ended}
        steps.append(step)
        observations = now
    return stack(steps), observations, episodes


def stack(steps: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Join the T steps of a rollout: for each name, (N, ...) arrays -> (T, N, ...)."""
    arrays = {name: np.array([step[name] for step in steps]) for name in steps[0]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ------------------------------------------------------------------------------------
# Step 3: advantages and returns
# ------------------------------------------------------------------------------------


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalized advantage estimation: how much better than the critic predicted?

    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A_t     = delta_t + gamma * lam * (1 - ended_t) * A_{t+1}

    These are PPO's equations (12) and (11), computed backwards, with the ends of
    episodes added. Here s_{t+1} is always the observation that step t itself led to, in
    the code `next_observations`. It is that of row t+1 unless the episode ended at t:
    then row t+1 holds the start of the new episode, like s_2 of copy 1 in the example.

    Before the step, the critic predicted that the return would be V(s_t). After it, r_t
    + gamma * V(s_{t+1}) is a better prediction of the same return, because one of its
    rewards is real. Using V in place of the rewards still to come is called
    *bootstrapping*. The difference of the two predictions, delta_t, is the surprise of
    this step, or *TD error* (TD: temporal difference). It is positive if the step went
    better than the critic had predicted.

    delta_t contains the later consequences of the action only as far as the critic
    foresees them, in V(s_{t+1}). What it did not foresee shows in the surprises of the
    next steps. So A_t adds up the surprises from t on, discounted as rewards are. For
    lam = 1, two of them make

        delta_t + gamma delta_{t+1} = r_t + gamma r_{t+1} + gamma^2 V(s_{t+2}) - V(s_t):

    V(s_{t+1}) cancels, and the old prediction is compared with two real rewards instead
    of one. With lam below 1, later surprises count less. The whole sum is
    delta_t + (gamma*lam) delta_{t+1} + (gamma*lam)^2 delta_{t+2} + ... up to the end of
    the episode or of the rollout.

    `lam` trades bias for variance.
    * With lam = 0, A_t = delta_t. It has little noise, from the luck of a single step,
      but it is as wrong as the critic is (bias).
    * With lam = 1 consider an episode that is cut k steps after t, by the rollout or by
      the time limit. Every V in between appears once with plus and once with minus, and
      A_t = r_t + gamma r_{t+1} + ... + gamma^(k-1) r_{t+k-1} + gamma^k V(s_{t+k})
      - V(s_t). Only the last V can mislead, so there is little bias. (V(s_t) may be
      wrong as well, but it is a baseline, which adds none.) But the luck of all k steps
      is in A_t: variance. After a termination even that last V is missing, and A_t +
      V(s_t) is the return of REINFORCE.

    Why there are two flags:
    * `terminated` cuts the bootstrap, V(s_{t+1}), because no reward can follow.
    * `ended` cuts the sum, because row t+1 belongs to another episode.
    A truncated lander would have flown on, so its V(s_{t+1}) stays. With `ended` in
    both places, V would learn that nothing follows the time limit. With `terminated`
    in both, the advantages of the next episode would leak into this one.

    All tensors are (T, N), float32; `next_values` are the V(s_{t+1}). Returns the
    advantages (T, N). In the last row the sum has only delta_t: the rest of the return
    is in V(s_{t+1}) already.

    The worked example, with gamma = lam = 0.5. It is written copy by copy; in the
    tensors, time comes first.
               rewards    values    next_values  deltas        advantages
      copy 1   1, 1,  1   0, 2, 1   2, 6, 2      2, 2,    1    2.5, 2,  1
      copy 2   1, 2, -1   1, 0, 1   0, 1, 3      0, 2.5, -2    0.5, 2, -2
    Within an episode, next_values[t] equals values[t+1]. Three of the next_values
    belong to observations that are no row of the rollout: the 6 is V of the last
    observation before the truncation (the 1 in values is already the new episode), the
    last 2 is V where the rollout was cut, and the 3 is V of the crash, which the factor
    1 - terminated removes. For instance, the truncated step of copy 1 has delta = 1 +
    0.5 * 6 - 2 = 2, and the step before it A = 2 + 0.25 * 2 = 2.5. The crash has delta
    = -1 - 1 = -2.
    """
    deltas = rewards + gamma * next_values * (1 - terminated) - values
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_advantage = deltas[t] + gamma * lam * (1 - ended[t]) * next_advantage
        advantages[t] = next_advantage
    return advantages


def normalise(advantages: Tensor) -> Tensor:
    """Advantages minus their mean, in units of their standard deviation, (B,) -> (B,).

    (A - mean(A)) / (std(A) + 1e-4), where 1e-4 is there so that nothing is divided by 0

    Subtracting the mean acts like the constant baseline of lesson 1: on average over
    many batches it hardly changes the gradient, and it removes noise. Where the critic
    predicts too little everywhere, for instance, all advantages are positive. Without
    the subtraction every action taken would be made more likely, whatever it was.

    The division keeps the policy's gradient equally large throughout the training. The
    standard deviation falls from about 0.4 (a fresh agent) to 0.1 (the shipped one).
    Without the division the gradient of the policy would shrink with it, and the
    entropy bonus, whose gradient does not, would weigh four times as much as at the
    start.

    In the worked example the mean is 1 and the standard deviation 1.5:
    [2.5, 2, 1, 0.5, 2, -2]  ->  [1, 0.67, 0, -0.33, 0.67, -2]. The 0.5 becomes
    negative: better than predicted, but less so than the batch on average.
    """
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)


@torch.no_grad()
def make_batch(agent: ActorCritic, rollout: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a rollout into a batch to learn from, T and N merged into B = T * N rows.

    Returns `observations` (B, D) and, (B,) each, `actions`, `old_log_probs`, `values`,
    `returns`, and `advantages`, normalised over the batch.

    The returns V(s_t) + A_t are what the critic is trained to predict. A_t says how far
    the return was from V(s_t), so the sum is an estimate of the return in which real
    rewards have replaced a part of the prediction. Its name is the *TD(lambda) return*.

    In the worked example it is [2.5, 4, 2] in copy 1. Why 2.5? V is 2 in s_1 and 6
    where the episode was truncated, so there are two estimates of the first return.
    With one real reward it is r_0 + gamma V = 1 + 0.5 * 2 = 2. With two it is 1 + 0.5 *
    1 + 0.25 * 6 = 3. The TD(lambda) return is the mean of the estimates with the
    weights 1 - lam, (1 - lam) lam, (1 - lam) lam^2, ..., where the last one gets all
    that is left: here 0.5 and 0.5, which makes 2.5. In copy 2 it is [1.5, 2, -1]:
    nothing follows the crash, so the last return is its reward.

    The target contains the critic's own predictions. It is computed once for each
    rollout and then stays fixed, and no gradient flows into it.

    The values and log-probabilities could also be stored while playing. Computing them
    here gives the same numbers, since the weights have not changed since then.
    """
    observations = rollout["observations"].flatten(0, 1)  # (B, D)
    next_observations = rollout["next_observations"].flatten(0, 1)
    actions = rollout["actions"].flatten()
    old_log_probs, _ = log_probs_and_entropy(agent.actor(observations), actions)
    rewards = rollout["rewards"].float() * REWARD_SCALE
    values = agent.critic(observations).view_as(rewards)  # (T, N)
    next_values = agent.critic(next_observations).view_as(rewards)
    terminated, ended = rollout["terminated"].float(), rollout["ended"].float()
    advantages = gae(rewards, values, next_values, terminated, ended, GAMMA, GAE_LAMBDA)
    return {
        "observations": observations,
        "actions": actions,
        "old_log_probs": old_log_probs,
        "values": values.flatten(),
        "returns": (values + advantages).flatten(),
        "advantages": normalise(advantages.flatten()),
    }


# ------------------------------------------------------------------------------------
# Step 4: the loss
# ------------------------------------------------------------------------------------


def clipped_surrogate_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_eps: float
) -> Tensor:
    r"""PPO's policy loss: good actions more likely, bad ones less, but only so far.

    rho_t = pi(a_t|s_t) / pi_old(a_t|s_t) = exp(ln pi(a_t|s_t) - ln pi_old(a_t|s_t))
    loss  = -mean_t( min(rho_t * A_t, clip(rho_t, 1 - eps, 1 + eps) * A_t) )

    This is PPO's equation (7), with a minus because optimizers minimise.

    *Why the ratio.* The actions in the batch were sampled from pi_old, but we want to
    know how good pi is, which the gradient steps have made of it since. An action that
    pi takes twice as often as pi_old should count twice. That is what the factor rho_t
    does (importance sampling):

        sum_a pi_old(a|s) * rho * A  =  sum_a pi(a|s) * A

    The mean of rho_t * A_t over the batch estimates the left side. The right side says
    how much better than pi_old the policy pi chooses in the state s. Added up over the
    states that pi visits in an episode, this would be its gain in return.

    The gradient of rho_t is rho_t * grad ln pi(a_t|s_t), since grad x = x grad ln x. In
    the first gradient step of an update, pi = pi_old and rho_t = 1, so the gradient of
    the loss is that of REINFORCE, -mean_t( A_t * grad ln pi(a_t|s_t) ). Only later do
    the two differ.

    *Why the clip.* What the ratio cannot correct is that pi would also visit other
    *states* than those in the batch. So the mean is only a *surrogate* for that gain,
    and can be trusted only while pi is close to pi_old. The objective of one row, as a
    function of rho:

      A > 0                               A < 0
      |              _______  1.2 A       |           0.8  1
      |            / :                    +-----------+----+----- rho
      |         /    :                    |           :
      |      /       :                    |___________:           0.8 A
      |   /          :                    |             \
      |/             :                    |               \
      +-----------+--+------- rho         |                 \
                  1  1.2

    Where it is flat, the row has no gradient. The min takes the smaller one of rho * A
    and clip(rho) * A. For A > 0 and rho = 1.5 that is the clipped 1.2 A, a constant: no
    gradient. For A > 0 and rho = 0.5 it is the unclipped 0.5 A, as 0.8 A is larger: the
    gradient stays. For A < 0 it is the other way round:

             rho < 0.8   0.8 to 1.2   rho > 1.2
      A > 0  gradient    gradient     none
      A < 0  none        gradient     gradient

    "None" stands where the action has already moved far enough in the direction of its
    advantage. How can it have moved against it, as in the other two outer fields? All
    rows share the network's weights, so a gradient step on one row changes the
    probabilities in all. Such an action should come back; the clip alone, without the
    min, would have no gradient there either. For the same reason the clip does not
    guarantee that the ratio stays inside: it only stops a row from pushing, and others
    can still carry its ratio past 1.2. After ten updates about 8 % are outside.

    `log_probs` (B,) carry the gradient; `old_log_probs` and `advantages` (B,) do not.
    In the worked example all six actions had probability 0.5 when they were taken. Some
    gradient steps later let these be the six rows:
      advantage     1     0.67   0     -0.33   0.67   -2
      pi            0.75  0.5    0.5    0.75   0.25    0.25
      rho           1.5   1      1      1.5    0.5     0.5
      min(...)      1.2   0.67   0     -0.5    0.33   -1.6
      gradient      none  yes    none   yes    yes     none
    (The third has none because its advantage is 0.) The mean of the six is 0.1 / 6 =
    0.0167, and the loss -0.0167.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def ppo_loss(agent: ActorCritic, batch: dict[str, Tensor]) -> Tensor:
    """The whole loss: PPO's equation (9), with a minus because optimizers minimise.

    loss = clipped_surrogate_loss + VALUE_WEIGHT * mean_t( (V(s_t) - G_t)^2 )
                                  - ENTROPY_BONUS * mean_t( S[pi](s_t) )

    `batch` is what `make_batch` returns, or some of its rows. Its advantages carry no
    gradient, so the critic learns from the second term alone.

    *Why rewards are scaled.* Unscaled returns reach +-200, but a fresh critic predicts
    values of size 1. Adam moves each weight by about LEARNING_RATE a step, however
    large the error is. So the critic lags behind returns that change as the policy
    improves. Without the scaling it explains mostly 20 to 80 % of the differences
    between returns (the column `explained`), and a large part of the advantages is the
    critic's error.

    In the worked example, take the first gradient step, with all six rows. The ratios
    are 1 and the normalised advantages 0 on average, so the first term is 0. Before the
    first gradient step, V is still the one in G = V + A, so V - G = -A, with the A of
    `gae`, whose squares have the mean (2.5^2 + 2^2 + 1^2 + 0.5^2 + 2^2 + 2^2) / 6 =
    3.25. The entropy is ln 2. So the loss is 0 + 0.5 * 3.25 - 0.003 * 0.6931 = 1.6229.
    That the policy's part is 0 says nothing, since its gradient is not 0.
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    policy_loss = clipped_surrogate_loss(
        log_probs, batch["old_log_probs"], batch["advantages"], CLIP_EPS
    )
    values = agent.critic(batch["observations"])
    value_loss = ((values - batch["returns"]) ** 2).mean()
    return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_BONUS * entropies.mean()


# ------------------------------------------------------------------------------------
# Step 5: learn
# ------------------------------------------------------------------------------------


def learn(agent: ActorCritic, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """Go over the batch EPOCHS times, with a gradient step for each random minibatch.

    Neighbouring rows of a batch are moments of the same flight and look alike. So the
    rows are shuffled: then every minibatch is a fair sample of the whole batch.
    """
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(batch["actions"])).split(MINIBATCH_SIZE):
            minibatch = {name: column[rows] for name, column in batch.items()}
            loss = ppo_loss(agent, minibatch)
            if not loss.isfinite():
                sys.exit("The loss is not finite: lower LEARNING_RATE or REWARD_SCALE.")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
            optimizer.step()


# ------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------


def train(agent: ActorCritic, envs: SyncVectorEnv) -> Iterator[tuple[list, dict]]:
    """The algorithm. Each turn of the loop is one update.

    It yields the (return, length) of each episode that ended, and the batch, which
    run() reports.
    """
    # 1. `agent` holds the two networks. One optimizer changes both of them (fused: Adam
    # in one call for all weights, where there would be one call for each).
    optimizer = torch.optim.Adam(agent.parameters(), LEARNING_RATE, fused=True)
    updates = TOTAL_STEPS // (NUM_ENVS * ROLLOUT_STEPS)
    # Copy i starts from seed SEED * NUM_ENVS + i, so seeds 0 and 1 share no terrain.
    observations, _ = envs.reset(seed=SEED * NUM_ENVS)
    for update in range(updates):
        # 2. Play a rollout, from where the last one stopped.
        rollout, observations, episodes = collect(envs, agent.actor, observations)

        # 3. Advantages and returns, from the critic's predictions.
        batch = make_batch(agent, rollout)

        # 4 and 5. Several epochs of gradient steps on the loss.
        learn(agent, optimizer, batch)

        # Lower the learning rate. Large steps get to a first landing quickly, but later
        # they follow the noise of every minibatch, which small steps average out.
        left = 1 - (update + 1) / updates
        rate = LEARNING_RATE * (FINAL_RATE + (1 - FINAL_RATE) * left)
        optimizer.param_groups[0]["lr"] = rate

        yield episodes, batch


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train, score and save an agent. A run that misses its aim ends with one line."""
    try:
        run()
    except SystemExit as end:
        end_with(str(end))


def run() -> None:
    """Report while `train` runs, then score the agent on held-out episodes and save."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the networks are so small that more threads only wait
    torch.manual_seed(SEED)
    agent, envs = ActorCritic(HIDDEN_UNITS), make_envs(NUM_ENVS)
    updates = TOTAL_STEPS // (NUM_ENVS * ROLLOUT_STEPS)
    history, pictures, steps, start = [], [], 0, time.perf_counter()

    with keep_unfinished_run(
        lambda: save_run(agent, history, "_interrupted", steps=steps)
    ) as stopped:
        hidden = False if "ipykernel" in sys.modules else None  # None: if no terminal
        bar = tqdm(train(agent, envs), "", updates, leave=False, disable=hidden)
        for update, (episodes, batch) in enumerate(bar, start=1):
            steps = update * NUM_ENVS * ROLLOUT_STEPS
            history += [(steps, *episode) for episode in episodes]
            if update % REPORT_EVERY == 0 or update == updates:
                speed = steps / (time.perf_counter() - start)
                tqdm.write(report_line(history, steps, speed, diagnose(agent, batch)))
            if WATCH_EVERY and update % WATCH_EVERY == 0:
                watch(agent, pictures)
            if stopped:
                sys.exit(f"Stopped after {steps:,} steps.")

        scores, _ = evaluate(agent.actor, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=True)
        score = scores.mean().item()
        suffix = "" if score >= SOLVED_SCORE else "_unsolved"
        files = save_run(agent, history, suffix, steps=steps, greedy_score=score)
    print(f"\nGreedy on {len(scores)} held-out episodes: mean {score:.1f}, ", end="")
    print(f"std {scores.std():.1f}, minimum {scores.min():.1f}. Written:\n{files}")
    if suffix:
        older = "Older weights are as they were."
        sys.exit(f"Not solved: below {SOLVED_SCORE:g} after {steps:,} steps. {older}")
    print(f"Solved: a mean of {SOLVED_SCORE:g} is enough.")
    print("Watch it land: python lunar_eval.py")


@torch.no_grad()
def diagnose(agent: ActorCritic, batch: dict[str, Tensor]) -> dict[str, float]:
    """How far the policy moved in this update, and how good the critic was before it.

    The healthy values are in this file's docstring, under *When it goes wrong*.

    KL         mean_t( rho_t - 1 - ln rho_t ), an estimate of KL(pi_old || pi), the
               Kullback-Leibler divergence, which is mean(-ln rho): how different the
               two policies are, 0 if they are equal. (rho - 1 is 0 on average. Adding
               it makes every term at least 0, so there is less noise.)
    clipped    The share of actions whose ratio is outside [1 - CLIP_EPS, 1 + CLIP_EPS].
    entropy    The mean of S[pi], in nats.
    explained  The share of the variance of the returns that the critic predicted,
               1 - var(G - V) / var(G): 1 is perfect, 0 is no better than a constant.
    """
    logits = agent.actor(batch["observations"])
    log_probs, entropies = log_probs_and_entropy(logits, batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]
    ratio = log_ratio.exp()
    returns, errors = batch["returns"], batch["returns"] - batch["values"]
    return {
        "KL": (ratio - 1 - log_ratio).mean().item(),
        "clipped": ((ratio - 1).abs() > CLIP_EPS).float().mean().item(),
        "entropy": entropies.mean().item(),
        "explained": 1 - (errors.var() / returns.var()).item(),
    }


@torch.no_grad()
def evaluate(policy: Callable, episodes: int, first_seed: int, greedy: bool) -> tuple:
    """Play episodes side by side; episode i starts from seed first_seed + i.

    `policy` turns observations (B, D) into logits (B, K). `greedy` takes the most
    likely action instead of sampling one. Returns the scores (episodes,), which are
    sums of unscaled rewards, and an array (episodes,) that is True where the lander
    crashed or left the picture (its last reward is then -100).
    """
    envs = [make_env() for _ in range(episodes)]
    starts = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(envs)]
    observations, scores = np.array(starts), np.zeros(episodes)
    crashed, ended = np.zeros((2, episodes), dtype=bool)
    while not ended.all():
        playing = np.flatnonzero(~ended)
        logits = policy(torch.from_numpy(observations[playing]))
        actions = logits.argmax(1) if greedy else Categorical(logits=logits).sample()
        for i, action in zip(playing, actions.tolist(), strict=True):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            scores[i] += reward
            crashed[i] = terminated and reward <= -100
            ended[i] = terminated or truncated
    return scores, crashed


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    counts = TOTAL_STEPS, REPORT_EVERY, NUM_ENVS, ROLLOUT_STEPS, EPOCHS
    counts += MINIBATCH_SIZE, HIDDEN_UNITS, HELD_OUT_EPISODES
    sizes = LEARNING_RATE, CLIP_EPS, MAX_GRAD_NORM, REWARD_SCALE
    shares = FINAL_RATE, GAMMA, GAE_LAMBDA
    weights = ENTROPY_BONUS, VALUE_WEIGHT
    batch, seeds = NUM_ENVS * ROLLOUT_STEPS, (SEED + 1) * NUM_ENVS
    rules = {
        "SEED must be from 0 to HELD_OUT_SEED / NUM_ENVS - 1": (
            SEED >= 0 and seeds <= HELD_OUT_SEED
        ),
        "TOTAL_STEPS, REPORT_EVERY, NUM_ENVS, ROLLOUT_STEPS, EPOCHS, MINIBATCH_SIZE, "
        "HIDDEN_UNITS and HELD_OUT_EPISODES must be 1 or more": min(counts) >= 1,
        "TOTAL_STEPS must be NUM_ENVS * ROLLOUT_STEPS or more": batch <= TOTAL_STEPS,
        "LEARNING_RATE, CLIP_EPS, MAX_GRAD_NORM and REWARD_SCALE must be above 0": (
            all(0 < size < math.inf for size in sizes)
        ),
        "FINAL_RATE, GAMMA and GAE_LAMBDA must be from 0 to 1": (
            all(0 <= share <= 1 for share in shares)
        ),
        "ENTROPY_BONUS and VALUE_WEIGHT must be 0 or more": min(weights) >= 0,
        "WATCH_EVERY must be 0 or more": WATCH_EVERY >= 0,
        "the folders of WEIGHTS_PATH and CURVE_PATH must exist and be writable": (
            can_write(WEIGHTS_PATH) and can_write(CURVE_PATH)
        ),
        "CURVE_PATH must end in .png": CURVE_PATH.suffix == ".png",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def can_write(path: Path) -> bool:
    """True if a file of this name can be written: its folder is there and is ours."""
    return path.parent.is_dir() and os.access(path.parent, os.W_OK)


def print_header() -> None:
    """Say what runs, for how long, and how to read the table that follows."""
    seconds = TOTAL_STEPS / 14_000
    print(f"""\
PPO on {ENV_ID}, seed {SEED}, on the CPU (it needs no GPU): {TOTAL_STEPS:,} steps in
about {seconds:.0f} seconds. 'return' is the mean of the last 100 episodes and should
rise past {SOLVED_SCORE:g}, 'explained' towards 1. Healthy: KL below 0.02, clipped below
20 %, entropy falling slowly from 1.4.

return  length      steps  steps/s      KL  clipped  entropy  explained""")


def report_line(history: list, steps: int, speed: float, diagnosis: dict) -> str:
    """One line of the table; return and length are means of the last 100 episodes."""
    _, mean_return, length = np.mean(history[-100:] or [[math.nan] * 3], axis=0)
    return (
        f"{mean_return:6.1f}{length:8.0f}{steps:11,}{speed:9,.0f}"
        f"{diagnosis['KL']:8.4f}{diagnosis['clipped']:9.0%}"
        f"{diagnosis['entropy']:9.3f}{diagnosis['explained']:11.2f}"
    )


def watch(agent: ActorCritic, pictures: list) -> None:
    """Show one greedy episode, in a window or at the end of a GIF of `pictures`."""
    from lunar_eval import show  # it imports this file in turn, so not at the top

    path = CURVE_PATH.with_name("lunarlander_learning.gif")
    show(agent, episodes=1, path=path, pictures=pictures)


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C, `kill` and a closed terminal only leave a mark in the list that this yields,
    and run() looks at it once per update: so no signal can disturb the writing of a
    file. (Nor would an exception do: Python ignores it if it is raised in a `__del__`,
    and Box2D has many.)
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


def save_run(agent: ActorCritic, history: list, suffix: str, **facts: float) -> str:
    """Write weights and curve, with `suffix` in both names; return their paths."""
    path, curve = [p.with_stem(p.stem + suffix) for p in (WEIGHTS_PATH, CURVE_PATH)]
    replaced = ["Replaced: the older files of these names."] if path.exists() else []
    checkpoint = {"weights": agent.state_dict(), "env_id": ENV_ID, "seed": SEED}
    checkpoint |= {**facts, "hidden_units": HIDDEN_UNITS}
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
        torch.save(checkpoint, Path(folder, path.name))
        os.replace(Path(folder, path.name), path)  # at once, so never half a file
    try:
        draw_learning_curve(history, curve)
        show_in_notebook(curve)
    except Exception as problem:  # a picture is not worth a run
        curve = f"The learning curve could not be drawn: {problem}"
    return "\n".join(map(str, [path, curve, *replaced]))


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


def draw_learning_curve(history: list, path: Path) -> None:
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


def show_in_notebook(picture: Path) -> None:
    """Display a picture where the script runs in a notebook."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=picture))


if __name__ == "__main__":
    main()
