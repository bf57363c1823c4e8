"""Lesson 1: REINFORCE on CartPole-v1, the simplest policy gradient method.

What you will learn
    How an agent improves from rewards alone. The task: a pole stands on a cart, and at
    each step the agent pushes the cart to the left or to the right so that the pole
    stays up. Each step brings a *reward* of 1. One attempt, from the start to the end,
    is an *episode*. It ends when the pole leans by more than 12 degrees, when the cart
    is more than 2.4 m from the middle, or after 500 steps. Nobody tells the agent which
    push was right. It tries pushes at random. Those after which things went better than
    average become more likely, and the others less likely.

The algorithm in 5 steps
    1. Start from a *policy*: a network that looks at the cart and the pole, and gives
       each action a probability.
    2. Play a batch of whole episodes. Each action is sampled with its probability.
    3. Compute for each step its *return*: the reward of this step, plus 0.99 times the
       next reward, plus 0.99^2 times the one after that, and so on to the end of the
       episode. Then compute its *advantage*: the return minus the mean of all returns
       of the batch.
    4. Take one gradient step that makes the actions with a positive advantage more
       likely, and those with a negative advantage less likely.
    5. Repeat from step 2 with the new policy.
    The function `train` is these five steps and nothing else. After its end there is
    only housekeeping.

    When does it stop? The task counts as *solved* when the last 100 training episodes
    lasted 475 steps on average. But in training actions are sampled, and even a good
    policy then makes a bad push now and then. Therefore we go on until the policy is
    also *perfect*: playing *greedily*, that is, always taking the most likely action,
    it keeps the pole up for the full 500 steps in 1,000 episodes out of 1,000. At the
    end the policy is measured once more, on *held-out* episodes: 100 episodes whose
    random starts were used neither in training nor to decide when to stop.

Symbols
    N = EPISODES_PER_UPDATE episodes are played side by side, and the longest of them
    has T steps. Shorter episodes are padded to T steps; B is the number of real steps
    in all N together.
    s_t         observations  (T, N, 4)  cart position (m), cart velocity (m/s), pole
                                         angle (rad), angular velocity (rad/s)
    a_t         actions       (T, N)     0 pushes the cart to the left, 1 to the right
    -           alive         (T, N)     True for the B real steps, False in the padding
    r_t         rewards       (T, N)     1 for each step, 0 in the padding
    gamma       GAMMA                    the *discount*, 0.99
    G_t         returns       (T, N)     r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
    A_t         advantages    (B,)       G_t minus the mean of the B returns: one
                                         number per real step, in one long list
    pi(a|s)     policy                   the network: softmax of its outputs gives the
                                         probability of each action a in state s
    ln pi(a|s)  log_probs     (B,)       log-probability of the action that was taken
    s is called the *state* in books. Here the agent observes all of it, so that state
    and observation are the same.

On a first reading, go from here to the Settings, and come back after `train`.

Run it, and what you should see
    python train_cartpole.py     3 seconds on one core of a server CPU, without a GPU
    It prints a table. "last 100" is the mean score of the last 100 training episodes; a
    score is the sum of the rewards of an episode. For SEED = 0 the table begins so:
        last 100  episodes  entropy (nats)      loss
            29.8        48           0.645   -0.3435
            43.6        96           0.587    0.0845
    and the run ends after 320 episodes with a perfect policy. Seeds 0 to 19 all end so,
    after 432 episodes in the median and 624 at most. Entropy says how undecided the
    policy is: ln 2 = 0.69 nats (the unit that belongs to ln) when it tosses a coin, 0
    when it is certain.

Try this (three seeds each, with MAX_EPISODES = 1_500)
    | Change                    | What happens                                         |
    |---------------------------|------------------------------------------------------|
    | GAMMA = 0.9               | All three are solved, but only two become perfect,   |
    |                           | after 736 and 1,152 episodes.                        |
    | LEARNING_RATE = 0.2       | None is solved. The best mean of 100 episodes is 83, |
    |                           | 138 and 158.                                         |
    | EPISODES_PER_UPDATE = 1,  | All become perfect, after 376 episodes in the        |
    | LEARNING_RATE = 0.01      | median. That takes 34 seconds, because an update     |
    |                           | with 1 episode takes about as long as one with 16    |
    |                           | side by side, and it takes 376 of them.              |

When it goes wrong
    * The loss jumps around 0, and does not fall. This is normal: see `reinforce_loss`.
    * The entropy is near 0 after a few updates: the policy became certain before it
      knew anything. The learning rate is too large.
    * "last 100" stays near 10: the policy always pushes to the same side. Most often
      the sign of the loss is wrong, or of the advantages.
    * tests/bugs/README.md shows many more mistakes, and by what each can be recognised.

Another task
    The task must have a few actions to choose from, and observations that are a list of
    numbers. "Acrobot-v1" is such a task: swing up a double pendulum, where each step
    costs 1 (reward -1), an observation has 6 numbers, and there are 3 actions. Change
    * ENV_ID = "Acrobot-v1"
    * in PolicyNetwork, the 4 to 6 and the 2 to 3
    * FULL_SCORE = -500, the lowest score there is: every policy then counts as perfect,
      and the run ends as soon as the task is solved (-100 on average)
    * LEARNING_RATE = 0.005, SEED = 1
    and it is solved after 800 episodes. It takes some luck: with SEED = 0, none of the
    first 1,200 episodes reaches the goal, so that all scores are -500, and there is
    nothing to learn from. To show the agent, change the 2 in `random_policy` of
    cartpoleinference.py to 3.

Where this differs from the book (Sutton & Barto, *Reinforcement Learning*, 2nd edition,
chapter 13, free at incompleteideas.net), and why
    * The book takes, after each episode, one gradient step for each of its time steps.
      We take a single one (with Adam) for 16 episodes, whose mean is less noisy.
    * The mean of the batch is subtracted from the returns. Section 13.4 subtracts what
      a second network, the *value function*, predicts; that is lesson 2.
    * The factor gamma^t is left out: see `reinforce_loss`.
    * Reaching step 500 counts as an end like a fall: see `returns_to_go`. Lesson 3
      tells the two apart.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import contextlib
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

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

ENV_ID = "CartPole-v1"

# Episodes that are played before each gradient step. The gradient is a mean over them.
# With four times as many, the noise in it is halved, but a run of a given number of
# episodes has only a quarter as many updates. If there are too few, most of the
# gradient is noise, and a smaller LEARNING_RATE is needed.
EPISODES_PER_UPDATE = 16

# Step size of Adam. If it is too small, learning is slow. If it is too large, the
# policy soon becomes certain of bad actions, and then hardly ever tries the others.
LEARNING_RATE = 0.02

# The discount: a reward that comes k steps later counts gamma^k. An action mostly
# causes what follows soon; what comes hundreds of steps later also depends on all the
# actions in between, and adds more noise than knowledge to the return of this one. The
# sum 1 + gamma + gamma^2 + ... is 1 / (1 - gamma) = 100, as if just the next 100
# rewards counted in full: a return looks about 2 seconds ahead (a step is 0.02 s). With
# 0.9 it looks 10 steps ahead, and the policy learns far more slowly. With 1.0 all later
# rewards count in full, which works here too.
GAMMA = 0.99

# Width of the hidden layer. A task this small needs few units. With very few it learns
# more slowly; more units than needed cost time in each update.
HIDDEN_UNITS = 64

# The seed of all random numbers in training. On the same machine and with the same
# versions, the same seed gives the same weights, bit for bit.
SEED = 0

# Training episodes after which the run gives up if the policy is not perfect by then.
MAX_EPISODES = 4_000

# Greedy episodes that must all reach FULL_SCORE for a policy to count as perfect. With
# 100, a policy that falls once in 200 episodes would mostly pass; more take longer.
CHECK_EPISODES = 1_000

# Held-out episodes, and the seed of their random starts (the CHECK_EPISODES have
# another seed, HELD_OUT_SEED - 1). With few episodes the final score is less exact.
HELD_OUT_EPISODES = 100
HELD_OUT_SEED = 1_000_000

# Updates (turns of the loop in `train`) from one printed row to the next.
REPORT_EVERY = 3

# Updates from one episode that is shown to the next: in a window, or in cartpole.gif
# where there is no display. 5 lets you watch it learn; 0 shows none.
WATCH_EVERY = 0

# The files that are written, beside this script.
WEIGHTS_PATH = Path(__file__).with_name("cartpole_reinforce.pth")
CURVE_PATH = Path(__file__).with_name("cartpole_learning_curve.png")

# Given by the task: the mean score that counts as solved, and the highest score.
SOLVED_SCORE = gym.spec(ENV_ID).reward_threshold  # 475
FULL_SCORE = gym.spec(ENV_ID).max_episode_steps  # 500

# ------------------------------------------------------------------------------------
# Step 1: the network
# ------------------------------------------------------------------------------------


class PolicyNetwork(nn.Module):
    """The policy pi(a|s). It maps observations (B, 4) float32 to logits (B, 2).

    A logit is any real number; softmax turns the logits into probabilities:

    pi(a|s) = exp(logit of a) / sum of exp(logit) over all actions
    """

    def __init__(self, hidden_units: int = HIDDEN_UNITS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, hidden_units),  # position, velocity, angle, angular velocity
            nn.Tanh(),
            nn.Linear(hidden_units, 2),  # left, right
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


# ------------------------------------------------------------------------------------
# Step 2: play a batch of episodes
# ------------------------------------------------------------------------------------

# The example that goes through this lesson: N = 2 episodes, the first of 2 steps, the
# second of 3. One column is one episode, one row is one step of both.
#
#     rewards = 1 1      alive = yes yes      The first episode is padded with a reward
#               1 1              yes yes      of 0 and alive = no, so that both columns
#               0 1              no  yes      have T = 3 rows. B = 5 steps are real.


@torch.no_grad()
def play_episodes(
    env: gym.vector.VectorEnv, policy: Callable, seed: int | None, greedy: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Play one whole episode in each of the N copies of the task that `env` holds.

    `policy` maps observations (N, 4) to logits (N, 2). `seed` seeds the random starts;
    with None, the random numbers continue where they stopped. With `greedy` the most
    likely action is taken instead of a sampled one.

    Returns observations (T, N, 4) float32, actions (T, N) int64, rewards (T, N) float32
    and alive (T, N) bool: whether the episode was still running at this step.
    """
    steps = []
    observations, _ = env.reset(seed=seed)
    alive = np.ones(env.num_envs, dtype=bool)
    while alive.any():
        logits = policy(torch.from_numpy(observations))
        # Categorical is the distribution over actions that these logits stand for.
        actions = logits.argmax(1) if greedy else Categorical(logits=logits).sample()
        actions = actions.numpy()
        next_observations, rewards, terminated, truncated, _ = env.step(actions)
        steps.append((observations, actions, rewards * alive, alive))
        # A fall (or leaving the track) *terminates* an episode, the limit of 500 steps
        # *truncates* it. After either, Gymnasium starts a new episode in this copy by
        # itself (*autoreset*). We play it too, until the longest episode of the batch
        # has ended, but these steps are only padding: `alive` stays False, and the
        # reward is set to 0.
        alive = alive & ~(terminated | truncated)
        observations = next_observations
    # `steps` has T tuples of four arrays with N entries each. They are stacked over
    # time, to four tensors whose first axis is the step.
    columns = [torch.from_numpy(np.array(rows)) for rows in zip(*steps, strict=True)]
    observations, actions, rewards, alive = columns
    return observations, actions, rewards.float(), alive


# ------------------------------------------------------------------------------------
# Why steps 3 and 4 work: the policy gradient
# ------------------------------------------------------------------------------------

# Let R be the sum of all rewards of an episode, and J the mean of R over all episodes
# that can happen when this policy plays, weighted with their probabilities. We want to
# raise J by changing the weights of the network, so we need its gradient with respect
# to the weights, the *policy gradient*, which we write `grad J`. Here gamma is 1: all
# rewards count in full.
#
# ONE DECISION. Suppose that an episode has a single step. In the state s, the policy
# takes the action a with probability pi(a|s), and this brings the return G(a). Then
#
#     J = sum_a pi(a|s) G(a).
#
# Only pi depends on the weights. By the chain rule, grad ln pi = grad pi / pi, so that
# grad pi = pi grad ln pi, and therefore
#
#     grad J = sum_a grad pi(a|s) G(a) = sum_a pi(a|s) [ G(a) grad ln pi(a|s) ].
#
# The last sum is the mean of the bracket over actions that are sampled from pi. So we
# can estimate grad J without trying every action: play, compute the bracket for the
# action that was taken, and take the mean over many plays.
#
# In words: grad ln pi(a|s) is the direction, in the space of the weights, in which a
# becomes more likely. Each action that was taken pushes the weights in its own
# direction with the force G(a); where that is negative, it pushes the other way.
#
# A WHOLE EPISODE is a chain of such decisions: s_0, a_0, s_1, a_1, and so on. Its
# probability is a product,
#
#     P(episode) = p(s_0) pi(a_0|s_0) p(s_1|s_0,a_0) pi(a_1|s_1) p(s_2|s_1,a_1) ...
#
# where p(s_0) is the probability of the start, and p(s_{t+1}|s_t,a_t) the probability
# that the environment (the cart and the pole) answers the action a_t with the state
# s_{t+1}. The logarithm turns the product into a sum. The terms ln p do not depend on
# the weights, so their gradients are 0, and what is left is
#
#     grad ln P(episode) = sum_t grad ln pi(a_t|s_t).
#
# The environment has dropped out. This is why we need not know how a pole moves: it is
# enough to play. Now the episode takes the place of the action above, P the place of
# pi, and R the place of G(a): J = sum P R over all episodes, and as above
# grad J = sum P [ R grad ln P ]. A sum with the weights P is the mean over the episodes
# that the policy plays; E[ ] stands for it. With the last equation,
#
#     grad J = E[ R sum_t grad ln pi(a_t|s_t) ] = E[ sum_t R grad ln pi(a_t|s_t) ]   (1)
#
# A batch of N episodes gives an estimate of this mean.
#
# A BASELINE is a number b that is subtracted from R in term t of (1). It may differ
# from step to step, but it must not depend on a_t: it may be known before a_t is
# sampled, or come from other episodes, on which a_t has no influence. Then it does not
# change grad J. To see this, hold b and everything that happened before a_t fixed. In
# the mean over the actions, what is subtracted is
#
#     sum_a pi(a|s_t) [ b grad ln pi(a|s_t) ] = b sum_a grad pi(a|s_t) = b grad 1 = 0,
#
# because b is the same number whichever action is sampled, so that it can be moved in
# front of the sum, and because the probabilities of all actions add up to 1, whatever
# the weights are. As this holds for every past and every such b, it holds in the mean
# over all episodes. We use it twice.
#
# First, the rewards from before step t are such a number: they have been received when
# a_t is sampled. If we subtract them from R, the return G_t from step t on is left:
#
#     grad J = E[ sum_t G_t grad ln pi(a_t|s_t) ]                                    (2)
#
# Secondly, we subtract the mean of all returns of the batch. A small part of it, the
# returns of the same episode, depends on a_t, so it is not quite a baseline;
# `subtract_mean` says why the error is small. It makes the estimate much less noisy.
# Suppose that all returns are near 100. Then without a baseline, every action that was
# taken is pushed up with a force of about 100, whether it was good or bad, and only in
# the mean over many episodes do these pushes cancel. With b = 100, the good actions are
# pushed up a little, and the bad ones down.
#
# In the code, G_t is discounted. That is no longer exactly (2), but it is less noisy:
# see GAMMA and `reinforce_loss`.

# ------------------------------------------------------------------------------------
# Step 3: returns and advantages
# ------------------------------------------------------------------------------------


def returns_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """Returns: how much reward followed each step, with later rewards counting less.

    G_t = r_t + gamma * G_{t+1},   with G = 0 after the last step

    Sutton & Barto, eq. (3.9); their R_{t+1} is our r_t.

    How can a reward that is always 1 teach anything? By when it stops. In CartPole, G_t
    says only how long the pole stayed up after step t. A single return proves little:
    an early step of a long episode has a large one even if its push was bad. But over
    many episodes, in similar states, the better push is followed by larger returns than
    the worse one. What the returns after the better and after the worse push have in
    common acts like a baseline and cancels; the difference is what is learned.

    The limit of 500 steps distorts the returns: the pole would have stayed up, but no
    reward is counted any more, so that the last 100 steps or so of a perfect episode
    look as bad as the steps before a fall. But there the return depends on the number
    of the step alone, and not on the action. So it acts like a baseline: both actions
    are pushed down alike, which cancels in the mean and leaves almost only noise.
    Lesson 3 adds an estimate of the rewards that the limit has cut off.

    `rewards` is (T,) or (T, N) float32, with one column per episode, padded with zeros.
    Returns a tensor of the same shape.
    The example, with gamma = 0.5:    1 1              1.5  1.75
                                      1 1      ->      1    1.5
                                      0 1              0    1
    """
    returns = torch.zeros_like(rewards)
    next_return = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_return = rewards[t] + gamma * next_return
        returns[t] = next_return
    return returns


def subtract_mean(returns: Tensor) -> Tensor:
    """Advantages: how much better than the average step of the batch things went.

    A_t = G_t - mean(G)

    The mean is the baseline b. With it, a step after which the pole stayed up for long
    has a positive advantage, and the last steps before a fall have negative ones.

    The returns of the other episodes in the batch are a proper baseline. But the mean
    also contains G_t itself and the other returns of the same episode, which depend on
    a_t as well. They are about one Nth of all the numbers that are averaged. So about
    one Nth of what is subtracted is no baseline but moves with the return, which takes
    about one part in N away from the gradient that we get on average. With N = 1 that
    is much: an episode is then compared with itself only. It still learns, because the
    steps before a fall are compared with the earlier ones of the same episode.

    `returns` is (B,) float32: the real steps of a batch, without padding. Returns (B,).
    The example: without the padding and row by row, the returns are 1.5, 1.75, 1, 1.5,
    1. Their mean is 1.35, so that the advantages are 0.15, 0.4, -0.35, 0.15, -0.35. The
    last step of each episode has the lowest.
    """
    return returns - returns.mean()


# ------------------------------------------------------------------------------------
# Step 4: the loss
# ------------------------------------------------------------------------------------


def reinforce_loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
    """The loss whose gradient is minus our estimate of grad J, up to a factor.

    loss = -mean_t( A_t * ln pi(a_t|s_t) ),   mean_t over the B steps of the batch

    We estimate grad J = E[ sum_t G_t grad ln pi(a_t|s_t) ], equation (2), with A_t in
    the place of G_t: discounted, and minus the mean of the batch. The minus in front is
    there because PyTorch's optimizers go downhill, and we want to go uphill. A_t was
    computed from rewards, so it is a plain number, through which no gradient flows.
    Sutton & Barto have this step, for gamma = 1, as eq. (13.11):
        theta <- theta + alpha (G_t - b) grad ln pi(a_t|s_t)
    where theta are the weights and alpha is the learning rate.

    Equation (2) has a sum over the steps of an episode, and a mean over episodes. The
    loss has the mean over all steps of the batch, which is the same but for a factor,
    the mean length of the episodes. It hardly matters, because the size of Adam's step
    does not depend on the scale of the gradient.

    The value of this loss says nothing about how well the policy plays. The advantages
    have the mean 0 and are hardly related to ln pi, so the mean of their products jumps
    around 0. Only its gradient counts.

    The book's pseudocode in section 13.4 has a factor gamma^t before A_t. It is right
    if what we want to raise is the mean *discounted* return of an episode: seen from
    its start, whatever happens at step t counts only gamma^t. Like nearly all code, we
    leave the factor out: with it, the action at step 300 would count 0.99^300 = 5 % of
    the first one, although a pole falls as easily then. The price is that for gamma < 1
    the updates follow the gradient neither of the discounted nor of the undiscounted
    return, nor of any other function (Nota & Thomas, 2020, arXiv 1906.07073), so that
    nothing guarantees that a step improves any one quantity. In practice it works.

    `log_probs` is (B,), those of the actions that were taken, with gradient;
    `advantages` is (B,). Returns a scalar.
    The example: as long as each of the five actions has the probability 1/2, the loss
    is 0, because the advantages add up to 0 (its gradient is not 0). If the second
    action, with the advantage 0.4, has the probability 0.8 instead, then, since the
    advantages of the other four add up to -0.4, the loss is
    -(0.4 ln 0.8 + (-0.4) ln 0.5) / 5 = -0.0376. So within one batch, a lower loss is
    better; only losses of different batches cannot be compared.
    """
    return -(log_probs * advantages).mean()


# ------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------


def train(
    policy: PolicyNetwork, env: gym.vector.VectorEnv
) -> Iterator[tuple[Tensor, Categorical, Tensor]]:
    """The whole algorithm. Each turn of the loop is one update.

    main() prints what is yielded (the N scores of the batch, the distributions over
    actions at its B steps, and the loss) and decides when to stop.
    """
    # 1. The policy starts with random weights. Adam will change them.
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE)
    seed = SEED
    while True:
        # 2. Play whole episodes. Only the first ones are seeded: with the same seed
        #    again, every batch would have the same starts.
        observations, actions, rewards, alive = play_episodes(env, policy, seed)
        seed = None

        # 3. Compute the return of each step, and its advantage. [alive] picks the real
        #    steps, and leaves the padding out.
        returns = returns_to_go(rewards, GAMMA)  # (T, N)
        advantages = subtract_mean(returns[alive])  # (B,)

        # 4. Take one gradient step. The log-probabilities are computed once more, for
        #    all steps together and now with gradients; they are the same as when the
        #    actions were sampled, because the policy has not changed since.
        distribution = Categorical(logits=policy(observations[alive]))
        loss = reinforce_loss(distribution.log_prob(actions[alive]), advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # 5. Repeat, with new episodes. The old ones were played by the policy as it was
        #    before this step, but E[ ] in (2) is a mean over episodes that the present
        #    policy plays. So each batch serves for a single gradient step. (Lesson 3
        #    takes several.)
        yield rewards.sum(0), distribution, loss


# ------------------------------------------------------------------------------------
# Housekeeping: nothing below this line is about reinforcement learning
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train until the policy is perfect, then measure it on held-out episodes."""
    check_settings()
    print_header()
    torch.set_num_threads(1)  # the network is so small that more threads only wait
    torch.manual_seed(SEED)
    policy = PolicyNetwork(HIDDEN_UNITS)
    env = gym.make_vec(ENV_ID, num_envs=EPISODES_PER_UPDATE)  # N copies, side by side
    scores, perfect, film = [], False, []
    with keep_unfinished_run(lambda: save_run(policy, scores, "_interrupted")) as stop:
        for update, (batch, distribution, loss) in enumerate(train(policy, env), 1):
            scores += batch.tolist()
            last_100 = np.mean(scores[-100:])
            if update % REPORT_EVERY == 0:
                entropy = distribution.entropy().mean()
                print(f"{last_100:8.1f}{len(scores):10}{entropy:16.3f}{loss:10.4f}")
            if WATCH_EVERY and update % WATCH_EVERY == 0:
                # The import stands here because that file imports this one.
                from cartpoleinference import show

                title = f"After {len(scores)} episodes"
                print(f"-- {show(policy, title, film, stop)}")
            if len(scores) >= 100 and last_100 >= SOLVED_SCORE:
                check = evaluate(policy, CHECK_EPISODES, HELD_OUT_SEED - 1, greedy=True)
                full = int((check >= FULL_SCORE).sum())
                perfect = full == CHECK_EPISODES
                print(f"-- {SOLVED_SCORE:g} after {len(scores)} episodes; of", end=" ")
                print(f"{CHECK_EPISODES} greedy episodes, {full} reach {FULL_SCORE}")
            if stop or perfect or len(scores) >= MAX_EPISODES:
                break
        held_out = evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=True)
        suffix = "" if perfect else "_interrupted" if stop else "_unsolved"
        files = save_run(policy, scores, suffix, greedy_score=held_out.mean().item())
    print(f"\nHeld-out episodes, played greedily: {held_out.mean():.1f} on average.")
    if perfect:
        print(f"Perfect after {len(scores)} episodes. Written:\n{files}")
        print("Watch it: python cartpoleinference.py")
    else:
        print(f"This run is kept in\n{files}\nOlder weights are as they were.")
        ending = "Stopped" if stop else "Not perfect"
        end_with(f"{ending} after {len(scores)} episodes.")


def print_header() -> None:
    """Say what runs, for how long, and what the columns of the table mean."""
    print(f"REINFORCE on {ENV_ID}, on the CPU. Most seeds need about 3 seconds.")
    print(f"'last 100', the mean score, should rise to {SOLVED_SCORE:g}, and the")
    print("entropy fall slowly. The loss jumps around 0: in a healthy run, too.\n")
    print("last 100  episodes  entropy (nats)      loss")


def evaluate(policy: Callable, episodes: int, seed: int, greedy: bool) -> Tensor:
    """Play so many episodes with random starts from `seed`; return their scores."""
    env = gym.make_vec(ENV_ID, num_envs=episodes)
    _, _, rewards, _ = play_episodes(env, policy, seed, greedy)
    return rewards.sum(0)  # (episodes,)


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    counts = MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY
    counts += EPISODES_PER_UPDATE, HIDDEN_UNITS
    rules = {
        "SEED must be from 0 to HELD_OUT_SEED - 2": 0 <= SEED < HELD_OUT_SEED - 1,
        "MAX_EPISODES, CHECK_EPISODES, HELD_OUT_EPISODES, REPORT_EVERY, "
        "EPISODES_PER_UPDATE and HIDDEN_UNITS must be 1 or more": min(counts) >= 1,
        "WATCH_EVERY must be 0 or more": WATCH_EVERY >= 0,
        "LEARNING_RATE must be above 0, at most 1": 0 < LEARNING_RATE <= 1,
        "GAMMA must be from 0 to 1": 0 <= GAMMA <= 1,
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


def save_run(policy: PolicyNetwork, scores: list, suffix: str, **facts: float) -> str:
    """Write weights and curve, with `suffix` in both names; return their paths."""
    path, curve = [p.with_stem(p.stem + suffix) for p in (WEIGHTS_PATH, CURVE_PATH)]
    replaced = ["Replaced: the older files of these names."] if path.exists() else []
    checkpoint = {"weights": policy.state_dict(), "env_id": ENV_ID, "seed": SEED}
    checkpoint |= {"episodes": len(scores), **facts, "hidden_units": HIDDEN_UNITS}
    with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
        torch.save(checkpoint, Path(folder, path.name))
        os.replace(Path(folder, path.name), path)  # at once, so never half a file
    try:
        draw_learning_curve(scores, curve)
        show_in_notebook(curve)
    except Exception as problem:  # a picture is not worth a run
        curve = f"The learning curve could not be drawn: {problem}"
    return "\n".join(map(str, [path, curve, *replaced]))


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


def show_in_notebook(picture: Path) -> None:
    """Display a picture where the script runs in a notebook."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        display(Image(filename=picture))


if __name__ == "__main__":
    main()
