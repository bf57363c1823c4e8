"""Tests of lesson 3: lunarlander_ppo.py and lunar_eval.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pygame
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from PIL import Image

import lunar_eval
import lunarlander_ppo as lesson

ROOT = Path(lesson.__file__).parent
SCRIPTS = ("lunarlander_ppo.py", "lunar_eval.py")
SHIPPED = ROOT / "ppo_lunarlander_final.pt"


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    monkeypatch.setattr(lesson, "WEIGHTS_PATH", tmp_path / "w.pt")
    monkeypatch.setattr(lesson, "CURVE_PATH", tmp_path / "c.png")
    return tmp_path


def change(monkeypatch, **settings):
    """Give the lesson's Settings of these names other values for this test."""
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)


def run_copy(folder, script="lunarlander_ppo.py", *edits):
    """Run the script as a person would: in a folder of its own, Settings edited."""
    for name in SCRIPTS:
        (folder / name).write_text((ROOT / name).read_text())
    text = (folder / script).read_text()
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / script).write_text(text)
    return subprocess.run(
        [sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=60
    )


def assert_one_plain_line(done, *words):
    """The run ended with status 1 and one line on stderr that holds these words."""
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def gae_double_loop(rewards, values, next_values, terminated, ended, gamma, lam):
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, up to the end of the episode."""
    steps, copies = rewards.shape
    advantages = torch.zeros(steps, copies)
    for n in range(copies):
        for t in range(steps):
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, n] else gamma * next_values[k, n]
                delta = rewards[k, n] + bootstrap - values[k, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * delta
                if ended[k, n]:
                    break
    return advantages


def episodes_that_end_everywhere(steps=7):
    """Rewards, values, next values, terminated, ended: each way to end, at each t.

    Column n ends once, at step n // 2, by termination (n even) or truncation (n odd);
    then a column with no end and one with both kinds.
    """
    torch.manual_seed(0)
    copies = 2 * steps + 2
    terminated, ended = torch.zeros(2, steps, copies)
    for n in range(2 * steps):
        ended[n // 2, n] = 1
        terminated[n // 2, n] = 1 - n % 2
    ended[1, -1] = ended[4, -1] = terminated[4, -1] = 1
    rewards, values, next_values = torch.randn(3, steps, copies)
    return rewards, values, next_values, terminated, ended


def test_gae_equals_the_double_loop_with_every_end_at_every_position():
    data = episodes_that_end_everywhere()
    for gamma, lam in [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0)]:
        expected = gae_double_loop(*data, gamma, lam)
        assert torch.allclose(lesson.gae(*data, gamma, lam), expected, atol=1e-5)


def test_ended_in_both_places_of_gae_teaches_that_the_time_limit_is_worth_0():
    rewards, values, next_values, terminated, ended = episodes_that_end_everywhere()
    right = lesson.gae(rewards, values, next_values, terminated, ended, 0.9, 0.8)
    merged = lesson.gae(rewards, values, next_values, ended, ended, 0.9, 0.8)
    for n in range(14):  # only the truncated ones differ
        assert torch.equal(right[:, n], merged[:, n]) == (n % 2 == 0)
    t, n = torch.arange(7), torch.arange(1, 14, 2)  # each truncation
    missing = 0.9 * next_values[t, n]  # V of the final observation
    assert torch.allclose((right - merged)[t, n], missing, atol=1e-6)


def test_terminated_in_both_places_of_gae_leaks_the_next_episode_across_the_reset():
    rewards, values, next_values, terminated, ended = episodes_that_end_everywhere()
    right = lesson.gae(rewards, values, next_values, terminated, ended, 0.9, 0.8)
    merged = lesson.gae(rewards, values, next_values, terminated, terminated, 0.9, 0.8)
    for n in range(12):  # after step 6, the last, there is no next episode to leak
        assert torch.equal(right[:, n], merged[:, n]) == (n % 2 == 0)
    t, n = torch.arange(6), torch.arange(1, 12, 2)  # each truncation
    leak = 0.9 * 0.8 * right[t + 1, n]  # the next episode's first advantage
    assert torch.allclose((merged - right)[t, n], leak, atol=1e-6)


def test_gae_of_a_single_step_is_delta():
    one = torch.ones(1, 2)
    ends = torch.tensor([[0.0, 1.0]])
    advantages = lesson.gae(one, 2 * one, 3 * one, ends, ends, 0.5, 0.9)
    assert torch.allclose(advantages, torch.tensor([[1 + 1.5 - 2, 1 - 2]]))


@pytest.mark.parametrize("cut", ["rollout", "time limit"])
def test_gae_with_lambda_1_leaves_the_rewards_and_the_value_where_it_is_cut(cut):
    torch.manual_seed(0)
    rewards, values, next_values = torch.randn(3, 9, 1)
    next_values[:5] = values[1:6]  # consistent within the first six steps
    no, ended = torch.zeros(9, 1), torch.zeros(9, 1)
    ended[5] = cut == "time limit"
    rows = 6 if cut == "rollout" else 9
    data = [column[:rows] for column in (rewards, values, next_values, no, ended)]
    advantages = lesson.gae(*data, 0.9, 1.0)
    for t in range(6):
        expected = sum(0.9 ** (k - t) * rewards[k, 0] for k in range(t, 6))
        expected += 0.9 ** (6 - t) * next_values[5, 0] - values[t, 0]
        assert advantages[t, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_gae_with_lambda_1_plus_the_values_is_the_plain_discounted_return():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 6, 1)
    next_values = torch.cat([values[1:], torch.randn(1, 1)])
    end = torch.tensor([0.0, 0, 0, 0, 0, 1]).view(6, 1)
    advantages = lesson.gae(rewards, values, next_values, end, end, 0.9, 1.0)
    returns = [
        sum(0.9 ** (k - t) * rewards[k, 0] for k in range(t, 6)) for t in range(6)
    ]
    assert torch.allclose((advantages + values)[:, 0], torch.stack(returns), atol=1e-5)


def test_the_docstring_cases_worked_by_hand():
    rewards, values = torch.ones(2, 1), torch.full((2, 1), 0.5)
    next_values, last = torch.tensor([[0.5], [3.0]]), torch.tensor([[0.0], [1.0]])
    for terminated, expected in [(last, [1.25, 0.5]), (0 * last, [2.75, 3.5])]:
        given = rewards, values, next_values, terminated, last
        assert lesson.gae(*given, 1.0, 0.5).flatten().tolist() == expected
    normal = lesson.normalise(torch.tensor([1.0, 2.0, 3.0]))
    assert normal.tolist() == pytest.approx([-1.2246, 0, 1.2246], abs=1e-4)
    half = lesson.log_probs_and_entropy(torch.zeros(1, 2), torch.tensor([0]))
    assert [x.item() for x in half] == pytest.approx([-0.6931, 0.6931], abs=1e-4)
    loss = lesson.clipped_surrogate_loss(
        torch.tensor([1.5, 0.5]).log(), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2
    )
    assert loss.item() == pytest.approx(-0.2)


def test_log_probabilities_and_entropies_equal_those_of_torch():
    torch.manual_seed(0)
    logits, actions = 3 * torch.randn(50, 4), torch.randint(4, (50,))
    oracle = torch.distributions.Categorical(logits=logits)
    log_probs, entropies = lesson.log_probs_and_entropy(logits, actions)
    assert torch.allclose(log_probs, oracle.log_prob(actions), atol=1e-5)
    assert torch.allclose(entropies, oracle.entropy(), atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [  # the objective min(rho A, clip(rho) A) and its derivative by ln pi
        (1.0, 2.0, 2.0, 2.0),  # inside the range: plain policy gradient
        (1.0, -2.0, -2.0, -2.0),
        (1.5, 2.0, 2.4, 0.0),  # good and already likelier: enough
        (0.5, 2.0, 1.0, 1.0),  # good, yet rarer by accident: pull it back
        (0.5, -2.0, -1.6, 0.0),  # bad and already rarer: enough
        (1.5, -2.0, -3.0, -3.0),  # bad, yet likelier by accident: pull it back
    ],
)
def test_clipped_loss_has_the_right_value_and_gradient_in_each_region(
    ratio, advantage, value, slope
):
    old_log_probs = torch.tensor([-1.3])
    log_probs = (old_log_probs + np.log(ratio)).requires_grad_()
    loss = lesson.clipped_surrogate_loss(
        log_probs, old_log_probs, torch.tensor([advantage]), 0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(-value, abs=1e-5)
    assert log_probs.grad.item() == pytest.approx(-slope, abs=1e-5)


def test_one_step_makes_a_good_action_likelier_and_a_bad_one_rarer():
    for sign in (1.0, -1.0):
        logits = torch.zeros(4, requires_grad=True)
        log_prob = logits.log_softmax(0)[:1]
        lesson.clipped_surrogate_loss(
            log_prob, log_prob.detach(), torch.tensor([sign]), 0.2
        ).backward()
        after = (logits - 0.1 * logits.grad).softmax(0)[0]
        assert (after > 0.25) == (sign > 0)


def test_at_ratio_1_the_gradient_is_that_of_lesson_1():
    torch.manual_seed(0)
    logits, advantages = torch.randn(20, 4, requires_grad=True), torch.randn(20)
    log_probs, _ = lesson.log_probs_and_entropy(logits, torch.randint(4, (20,)))
    ppo = lesson.clipped_surrogate_loss(log_probs, log_probs.detach(), advantages, 0.2)
    reinforce = -(advantages * log_probs).mean()
    (one,) = torch.autograd.grad(ppo, logits, retain_graph=True)
    (other,) = torch.autograd.grad(reinforce, logits)
    assert torch.allclose(one, other, atol=1e-6)


def test_mean_of_ratio_times_advantage_judges_one_policy_by_the_actions_of_another():
    pi_old, pi = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    worth = torch.tensor([1.0, -2.0, 4.0])
    torch.manual_seed(0)
    actions = torch.multinomial(pi_old, 200_000, replacement=True)
    log_probs, old_log_probs = pi.log()[actions], pi_old.log()[actions]
    no_clip = 1e9
    loss = lesson.clipped_surrogate_loss(
        log_probs, old_log_probs, worth[actions], no_clip
    )
    assert -loss.item() == pytest.approx((pi * worth).sum().item(), abs=0.05)


@pytest.fixture
def flown(monkeypatch):
    """An agent, a random rollout of 5 steps in 3 copies, and its batch."""
    change(monkeypatch, ROLLOUT_STEPS=5, GAMMA=0.99, GAE_LAMBDA=0.95)
    change(monkeypatch, CLIP_EPS=0.2, VALUE_WEIGHT=0.5, ENTROPY_BONUS=0.01)
    change(monkeypatch, REWARD_SCALE=0.01)
    torch.manual_seed(0)
    agent, envs = lesson.ActorCritic(16), lesson.make_envs(3)
    rollout, _, _ = lesson.collect(envs, agent.actor, envs.reset(seed=0)[0])
    return agent, rollout, lesson.make_batch(agent, rollout)


def test_the_gradient_of_the_whole_loss_equals_a_plain_rewriting(flown, monkeypatch):
    agent, _, batch = flown
    batch["old_log_probs"] += torch.linspace(-0.5, 0.5, 15)  # reaches every region
    loss = lesson.ppo_loss(agent, batch)
    got = torch.autograd.grad(loss, list(agent.parameters()))

    terms = []
    for i in range(15):
        observation = batch["observations"][i]
        layers = list(agent.critic)[:-1]
        value = torch.nn.Sequential(*layers)(observation)[0]
        probs = torch.softmax(agent.actor(observation), 0)
        ratio = probs[batch["actions"][i]] / batch["old_log_probs"][i].exp()
        advantage = batch["advantages"][i]
        if (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8):
            ratio = ratio.detach()
        entropy = -(probs * probs.log()).sum()
        error = (value - batch["returns"][i]) ** 2
        terms.append(-ratio * advantage + 0.5 * error - 0.01 * entropy)
    plain = torch.autograd.grad(sum(terms) / 15, list(agent.parameters()))
    for one, other in zip(got, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_batch_holds_normalised_advantages_and_returns_that_are_not(flown):
    agent, rollout, batch = flown
    rewards = rollout["rewards"] * 0.01
    values = agent.critic(rollout["observations"].flatten(0, 1)).view(5, 3)
    next_values = agent.critic(rollout["next_observations"].flatten(0, 1)).view(5, 3)
    ends = rollout["terminated"], rollout["ended"]
    plain = lesson.gae(rewards, values, next_values, *ends, 0.99, 0.95).flatten()
    assert torch.allclose(batch["returns"], plain + values.flatten(), atol=1e-6)
    scaled = (plain - plain.mean()) / plain.std(correction=0)
    assert torch.allclose(batch["advantages"], scaled, rtol=0.02)


def test_each_epoch_takes_every_row_once_in_another_order(flown, monkeypatch):
    agent, _, batch = flown
    change(monkeypatch, EPOCHS=3, MINIBATCH_SIZE=5)
    batch["values"] = torch.arange(15.0)  # a number for each row
    rows, loss = [], lesson.ppo_loss
    monkeypatch.setattr(
        lesson, "ppo_loss", lambda a, b: rows.extend(b["values"].tolist()) or loss(a, b)
    )
    lesson.learn(agent, torch.optim.SGD(agent.parameters(), 0.0), batch)
    epochs = [rows[:15], rows[15:30], rows[30:]]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(15)]}) == 4


def test_a_long_gradient_is_shortened_to_the_limit(flown, monkeypatch):
    agent, _, batch = flown
    before = torch.cat([p.detach().flatten().clone() for p in agent.parameters()])
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    change(monkeypatch, MAX_GRAD_NORM=1e-3, EPOCHS=1, MINIBATCH_SIZE=15)
    lesson.learn(agent, optimizer, batch)
    after = torch.cat([p.detach().flatten() for p in agent.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_no_gradient_reaches_the_critic_through_the_policy_loss(flown, monkeypatch):
    agent, _, batch = flown
    change(monkeypatch, VALUE_WEIGHT=0.0)
    loss = lesson.ppo_loss(agent, batch)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.critic.parameters())
    assert not any(batch[name].requires_grad for name in batch)


def test_the_ratio_is_1_on_the_first_minibatch(flown, monkeypatch):
    agent, _, batch = flown
    batch["advantages"] = torch.ones(15)  # so that the loss is minus the mean ratio
    change(monkeypatch, CLIP_EPS=1e-5, VALUE_WEIGHT=0.0, ENTROPY_BONUS=0.0)
    assert lesson.ppo_loss(agent, batch).item() == pytest.approx(-1, abs=1e-6)
    kl, clipped, _, _ = lesson.diagnose(agent, batch)
    assert (kl, clipped) == (pytest.approx(0, abs=1e-6), 0)


def test_the_critic_gives_a_flat_vector_so_that_nothing_broadcasts(flown, monkeypatch):
    agent, _, batch = flown
    values = agent.critic(batch["observations"])
    assert values.shape == batch["returns"].shape == (15,)
    assert agent.critic(batch["observations"][:1]).shape == (1,)
    by_hand = sum((values - batch["returns"]).tolist()[i] ** 2 for i in range(15)) / 15
    batch["advantages"] = torch.zeros(15)  # leaves the critic's loss alone
    change(monkeypatch, VALUE_WEIGHT=1.0, ENTROPY_BONUS=0.0)
    assert lesson.ppo_loss(agent, batch).item() == pytest.approx(by_hand, rel=1e-4)


def test_the_critic_learns_scaled_rewards_and_the_rollout_keeps_the_real_ones(
    flown, monkeypatch
):
    agent, rollout, small = flown
    change(monkeypatch, REWARD_SCALE=1.0)
    large = lesson.make_batch(agent, rollout)
    zero, ends = torch.zeros(5, 3), (rollout["terminated"], rollout["ended"])
    rewards_alone = lesson.gae(rollout["rewards"], zero, zero, *ends, 0.99, 0.95)
    change_of_returns = large["returns"] - small["returns"]  # scale from 0.01 to 1
    expected = 0.99 * rewards_alone.flatten()
    assert torch.allclose(change_of_returns, expected, atol=1e-4)
    assert change_of_returns.abs().max() > 1


def test_the_four_printed_numbers_equal_a_plain_rewriting(flown, monkeypatch):
    agent, rollout, batch = flown
    agent.actor[-1].weight.data *= 200  # states differ in their entropy
    batch = lesson.make_batch(agent, rollout)
    batch["old_log_probs"] += torch.linspace(-0.5, 0.5, 15)
    probs = agent.actor(batch["observations"]).softmax(1).detach()
    ratio = probs[range(15), batch["actions"]] / batch["old_log_probs"].exp()
    left = [not 0.8 <= rho <= 1.2 for rho in ratio.tolist()]
    errors = batch["returns"] - batch["values"]
    kl, clipped, entropy, explained = lesson.diagnose(agent, batch)
    assert kl == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=1e-6)
    assert clipped == pytest.approx(sum(left) / 15) and 0 < sum(left) < 15
    expected = -(probs * probs.log()).sum(1).mean().item()
    assert entropy == pytest.approx(expected, abs=1e-5)
    parts = np.var(errors.tolist()), np.var(batch["returns"].tolist())
    assert explained == pytest.approx(1 - parts[0] / parts[1], rel=1e-3)


def test_explained_variance_is_1_if_perfect_0_for_a_constant_and_below_0_if_worse(
    flown,
):
    agent, _, batch = flown
    returns = batch["returns"]
    for values, expected in [(returns + 7, 1), (0 * returns, 0), (-returns, -3)]:
        batch["values"] = values
        _, _, _, explained = lesson.diagnose(agent, batch)
        assert explained == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("agent", "about"), [("fresh", 0.4), ("shipped", 0.1)])
def test_advantages_are_as_large_as_the_docstring_says(agent, about, monkeypatch):
    torch.manual_seed(0)
    agent = lesson.ActorCritic() if agent == "fresh" else lesson.load_agent(SHIPPED)
    seen = []
    change(monkeypatch, normalise=lambda advantages: seen.append(advantages))
    envs = lesson.make_envs(16)
    observations, _ = envs.reset(seed=0)
    for _ in range(2):
        rollout, observations, _ = lesson.collect(envs, agent.actor, observations)
        lesson.make_batch(agent, rollout)
    std = torch.cat(seen).std().item()
    assert about / 2 < std < about * 2


def test_equal_advantages_give_zero_and_not_noise():
    assert lesson.normalise(torch.full((8,), 0.3)).abs().max() < 0.01


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


class Clockwork(gym.Env):
    """Shows the time in every one of 8 numbers; reward 1 a step; ends when told to.

    Number 0 of the observation is the step within the episode, number 1 the episode.
    """

    observation_space = gym.spaces.Box(-1e9, 1e9, (8,))
    action_space = gym.spaces.Discrete(4)

    def __init__(self, terminates_at=None, truncates_at=None):
        self.ends, self.episode = (terminates_at, truncates_at), -1

    def observe(self):
        return np.array([self.time, self.episode, *[0] * 6], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def step(self, action):
        self.time += 1
        terminated, truncated = (self.time == end for end in self.ends)
        return self.observe(), 1.0, terminated, truncated, {}


def clockwork(**ends):
    return SyncVectorEnv(
        [lambda: RecordEpisodeStatistics(Clockwork(**ends))] * 2,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )


@pytest.mark.parametrize("kind", ["terminates_at", "truncates_at"])
def test_the_last_observation_of_an_episode_is_kept_and_the_next_row_is_a_new_one(
    kind, monkeypatch
):
    change(monkeypatch, ROLLOUT_STEPS=5)
    envs, agent = clockwork(**{kind: 3}), lesson.ActorCritic(8)
    rollout, now, finished = lesson.collect(envs, agent.actor, envs.reset()[0])
    times = rollout["observations"][:, 0, :2].tolist()
    assert times == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    after = rollout["next_observations"][:, 0, :2].tolist()
    assert after == [[1, 0], [2, 0], [3, 0], [1, 1], [2, 1]]
    assert rollout["ended"][:, 0].tolist() == [0, 0, 1, 0, 0]
    assert rollout["terminated"].equal(rollout["ended"]) == (kind == "terminates_at")
    assert rollout["terminated"].any() == (kind == "terminates_at")
    assert finished == [(3, 3), (3, 3)]
    change(monkeypatch, ROLLOUT_STEPS=1)  # an episode goes on from rollout to rollout
    _, _, finished = lesson.collect(envs, agent.actor, now)
    assert finished == [(3, 3), (3, 3)]


def fly_for_a_while(updates=80, **ends):
    """The critic's mean opinion after training on the Clockwork, its time hidden."""
    torch.manual_seed(0)
    envs, agent = clockwork(**ends), lesson.ActorCritic(8)
    optimizer = torch.optim.Adam(agent.parameters(), 0.03)
    observations, _ = envs.reset()
    for _ in range(updates):
        rollout, observations, _ = lesson.collect(envs, agent.actor, observations)
        for name in ("observations", "next_observations"):
            rollout[name] = torch.ones_like(rollout[name])
        lesson.learn(agent, optimizer, lesson.make_batch(agent, rollout))
    return agent.critic(torch.ones(1, 8)).item()


def test_a_time_limit_does_not_lower_the_value_but_a_real_end_does(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=16, EPOCHS=2, MINIBATCH_SIZE=32, GAMMA=0.8)
    change(monkeypatch, REWARD_SCALE=1.0, GAE_LAMBDA=0.95, MAX_GRAD_NORM=10.0)
    change(monkeypatch, CLIP_EPS=0.2, VALUE_WEIGHT=0.5, ENTROPY_BONUS=0.0)
    # 1 a step for ever, discounted by 0.8, is worth 1 / (1 - 0.8) = 5. Cut off by a
    # time limit of 4 steps it still is, as far as the agent can tell; ended for good
    # after 4, it is worth (1 + 1.8 + 2.44 + 2.952) / 4 = 2.05 on average.
    assert fly_for_a_while(truncates_at=4) == pytest.approx(5, rel=0.05)
    assert fly_for_a_while(terminates_at=4) == pytest.approx(2.05, rel=0.2)


def test_with_one_flag_for_both_ends_the_time_limit_does_lower_the_value(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=16, EPOCHS=2, MINIBATCH_SIZE=32, GAMMA=0.8)
    change(monkeypatch, REWARD_SCALE=1.0, GAE_LAMBDA=0.95, MAX_GRAD_NORM=10.0)
    change(monkeypatch, CLIP_EPS=0.2, VALUE_WEIGHT=0.5, ENTROPY_BONUS=0.0)
    gae = lesson.gae
    merged = lambda r, v, n, terminated, ended, *rest: gae(r, v, n, ended, ended, *rest)  # noqa: E731
    change(monkeypatch, gae=merged)
    assert fly_for_a_while(truncates_at=4) == pytest.approx(2.05, rel=0.2)


def test_observation_action_and_reward_of_one_index_belong_together(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=150)
    torch.manual_seed(0)
    agent, envs = lesson.ActorCritic(16), lesson.make_envs(2)
    rollout, _, _ = lesson.collect(envs, agent.actor, envs.reset(seed=0)[0])
    env = lesson.make_env()
    env.reset(seed=0)
    ends = rollout["ended"][:, 0].nonzero().flatten().tolist()
    for t in range(ends[0] + 1):
        following, reward, terminated, _, _ = env.step(rollout["actions"][t, 0].item())
        assert torch.equal(
            torch.from_numpy(following), rollout["next_observations"][t, 0]
        )
        assert rollout["rewards"][t, 0].item() == pytest.approx(reward, rel=1e-5)
        assert rollout["terminated"][t, 0].item() == terminated
        if t < ends[0]:
            same = rollout["next_observations"][t, 0], rollout["observations"][t + 1, 0]
            assert torch.equal(*same)


def test_the_return_and_the_length_of_an_episode_are_plain_sums_over_its_steps(
    monkeypatch,
):
    change(monkeypatch, ROLLOUT_STEPS=150)
    torch.manual_seed(0)
    agent, envs = lesson.ActorCritic(16), lesson.make_envs(2)
    rollout, _, finished = lesson.collect(envs, agent.actor, envs.reset(seed=0)[0])
    first_ends = [rollout["ended"][:, i].nonzero()[0].item() + 1 for i in range(2)]
    plain = [
        (rollout["rewards"][:end, i].sum(), end) for i, end in enumerate(first_ends)
    ]
    for total, length in plain:
        assert any(
            length == other and score == pytest.approx(total.item(), abs=1e-3)
            for score, other in finished
        )


def test_actions_are_drawn_with_the_probabilities_of_the_actor(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=10_000)
    torch.manual_seed(0)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    envs = clockwork(truncates_at=1000)
    rollout, _, _ = lesson.collect(
        envs,
        lambda observations: probabilities.log().expand(len(observations), 4),
        envs.reset()[0],
    )
    shares = rollout["actions"].flatten().bincount() / 20_000
    assert torch.allclose(shares, probabilities, atol=0.012)


def test_the_copies_reset_in_the_same_step_and_start_from_different_seeds():
    envs = lesson.make_envs(3)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    first, _ = envs.reset(seed=5)
    alone, _ = lesson.make_env().reset(seed=6)
    assert np.array_equal(first[1], alone) and not np.array_equal(first[0], first[1])


def test_neighbouring_seeds_share_no_first_observation(in_folder, monkeypatch):
    starts, collect = [], lesson.collect

    def collect_and_note(envs, actor, observations):
        starts.extend(row.tobytes() for row in observations)
        return collect(envs, actor, observations)

    change(monkeypatch, collect=collect_and_note, HELD_OUT_EPISODES=1)
    change(monkeypatch, TOTAL_STEPS=8, NUM_ENVS=8, ROLLOUT_STEPS=1)
    for seed in (0, 1):
        change(monkeypatch, SEED=seed)
        with contextlib.suppress(SystemExit):  # so few steps do not solve it
            lesson.main()
    assert len(set(starts)) == len(starts) == 16


def test_the_score_is_the_plain_sum_of_rewards_and_a_crash_is_counted():
    def no_engine(observations):
        return torch.tensor([[9.0, 0, 0, 0]]).repeat(len(observations), 1)

    scores, crashed = lesson.evaluate(no_engine, 3, 1_000, greedy=True)
    for i in range(3):
        env, score, ended = lesson.make_env(), 0.0, False
        env.reset(seed=1_000 + i)
        while not ended:
            _, reward, terminated, truncated, _ = env.step(0)
            score, ended = score + reward, terminated or truncated
        assert scores[i] == pytest.approx(score) and crashed[i] == (reward == -100)
    assert crashed.all()


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def test_a_short_run_raises_the_return_clearly_above_random(
    in_folder, monkeypatch, capsys
):
    monkeypatch.setattr(lesson, "TOTAL_STEPS", 150_000)
    monkeypatch.setattr(lesson, "HELD_OUT_EPISODES", 20)
    try:
        lesson.main()
    except SystemExit as stopped:  # so short a run may end below 200
        assert "Below 200" in stopped.code
    printed = capsys.readouterr().out
    assert "return  length" in printed and "Greedy on 20 held-out" in printed
    weights, curve = sorted(in_folder.iterdir(), key=lambda path: path.suffix)[::-1]
    assert Image.open(curve).size == (960, 480)
    agent = lunar_eval.load_agent(weights)
    trained, _ = lesson.evaluate(agent.actor, 30, 2_000_000, greedy=False)
    random, _ = lesson.evaluate(lunar_eval.random_policy, 30, 2_000_000, greedy=False)
    assert trained.mean() > random.mean() + 100


def test_the_same_seed_gives_the_same_weights_bit_for_bit(in_folder, monkeypatch):
    monkeypatch.setattr(lesson, "TOTAL_STEPS", 16_384)
    monkeypatch.setattr(lesson, "HELD_OUT_EPISODES", 2)
    weights = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(lesson, "SEED", seed)
        with pytest.raises(SystemExit):
            lesson.main()
        agent = lesson.load_agent(in_folder / "w_unsolved.pt")
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_rate_falls_in_a_straight_line_to_its_final_share(in_folder, monkeypatch):
    change(monkeypatch, TOTAL_STEPS=2_000, NUM_ENVS=5, ROLLOUT_STEPS=100)  # 4 updates
    change(monkeypatch, LEARNING_RATE=0.01, FINAL_RATE=0.2, HELD_OUT_EPISODES=1)
    rates, learn = [], lesson.learn

    def learn_and_note(agent, optimizer, batch):
        rates.append(optimizer.param_groups[0]["lr"])
        return learn(agent, optimizer, batch)

    change(monkeypatch, learn=learn_and_note)
    with contextlib.suppress(SystemExit):
        lesson.main()
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004])


def test_the_sizes_beside_the_settings_are_those_that_follow_from_them():
    source = (ROOT / "lunarlander_ppo.py").read_text()
    rows = lesson.NUM_ENVS * lesson.ROLLOUT_STEPS
    parts = -(-rows // lesson.MINIBATCH_SIZE)
    comment = re.search(r"# Hence (.*?)\n\n", source, re.DOTALL).group(1)
    numbers = [int(n) for n in re.findall(r"\d+", comment.replace(",", ""))]
    assert numbers == [
        *(lesson.NUM_ENVS, lesson.ROLLOUT_STEPS, rows),
        *(rows, lesson.MINIBATCH_SIZE, parts, lesson.EPOCHS, parts * lesson.EPOCHS),
        *(lesson.TOTAL_STEPS, rows, lesson.TOTAL_STEPS // rows),
    ]


def test_the_table_in_the_docstring_has_the_columns_that_are_printed(capsys):
    lesson.print_header()
    header = capsys.readouterr().out.splitlines()[-1]
    lines = lesson.__doc__.splitlines()
    start = lines.index(f"    {header}")
    line = lesson.report_line([(1, 9.0, 9.0)], 1, 1.0, (0.1,) * 4)
    assert len(header) == len(line)
    for sample in lines[start + 1 : start + 4]:
        assert len(sample) == len(header) + 4 and sample[4:].split()[3].count(",") == 1


@pytest.mark.parametrize("task", [("CartPole-v1", 4, 2), ("Acrobot-v1", 6, 3)])
def test_another_task_needs_only_the_lines_that_the_docstring_names(
    in_folder, monkeypatch, task
):
    env_id, size, actions = task
    change(monkeypatch, ENV_ID=env_id, OBSERVATION_SIZE=size, ACTIONS=actions)
    change(monkeypatch, TOTAL_STEPS=40_960, HELD_OUT_EPISODES=10)
    change(monkeypatch, SOLVED_SCORE=gym.spec(env_id).reward_threshold)
    with contextlib.suppress(SystemExit):  # so few steps need not solve it
        lesson.main()
    agent = lesson.load_agent(next(in_folder.glob("w*.pt")))
    trained, _ = lesson.evaluate(agent.actor, 10, 2_000_000, greedy=False)
    random, _ = lesson.evaluate(lunar_eval.random_policy, 10, 2_000_000, greedy=False)
    assert trained.mean() > random.mean() + 100


def test_the_shipped_weights_land_on_held_out_seeds():
    agent = lesson.load_agent(SHIPPED)
    scores, _ = lesson.evaluate(agent.actor, 100, lesson.HELD_OUT_SEED, greedy=True)
    assert scores.mean() >= 262
    assert (scores >= 200).mean() >= 0.97
    checkpoint = torch.load(SHIPPED, weights_only=True)
    assert scores.mean() == pytest.approx(checkpoint["greedy_score"], abs=5)
    assert checkpoint["seed"] == lesson.SEED


def test_actor_and_critic_take_a_batch_and_give_logits_and_values():
    agent = lesson.load_agent(SHIPPED)
    assert agent.actor(torch.zeros(5, 8)).shape == (5, 4)
    assert agent.critic(torch.zeros(5, 8)).shape == (5,)


def test_importing_trains_nothing_and_writes_nothing(tmp_path):
    for name in SCRIPTS:
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import lunarlander_ppo, lunar_eval"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------
# The evaluation script
# ------------------------------------------------------------------------------------


def test_without_a_display_the_eval_script_reports_and_writes_a_gif(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(lunar_eval, "GIF_PATH", tmp_path / "show.gif")
    monkeypatch.setattr(lesson, "HELD_OUT_EPISODES", 20)
    monkeypatch.setattr(lunar_eval, "LANDINGS", 1)
    lunar_eval.main()
    printed = capsys.readouterr().out
    greedy, sampled, random = (
        float(line.split()[1])
        for line in printed.splitlines()
        if line.split()[:1] in (["greedy"], ["sampled"], ["random"])
    )
    assert greedy >= 250 and sampled >= 200 and -300 < random < -100
    assert "show.gif" in printed
    assert Image.open(tmp_path / "show.gif").n_frames > 30
    assert (tmp_path / "show.gif").stat().st_size < 3_000_000


def test_the_close_button_of_the_window_ends_the_show(monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(lunar_eval, "has_display", lambda: True)
    monkeypatch.setattr(lunar_eval, "print_report", lambda agent: None)
    make_env, steps = lesson.make_env, []

    def make_window(render_mode):
        assert render_mode == "human"
        env = make_env(render_mode=render_mode)
        step = env.step

        def step_and_close(action):
            steps.append(action)
            if len(steps) == 5:
                pygame.event.post(pygame.event.Event(pygame.QUIT))
            return step(action)

        env.step = step_and_close
        return env

    monkeypatch.setattr(lesson, "make_env", make_window)
    lunar_eval.main()
    pygame.quit()
    assert len(steps) == 5 and "Stopped." in capsys.readouterr().out


# ------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    done = run_copy(tmp_path, "lunar_eval.py")
    assert_one_plain_line(done, "no usable", "python lunarlander_ppo.py")


class Bomb:
    """Unpickling this would create the file `boom`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "boom"),)


@pytest.mark.parametrize("kind", ["damaged", "other env", "code", "nan"])
def test_a_bad_weights_file_is_refused_in_one_line_and_nothing_runs(tmp_path, kind):
    path = tmp_path / "bad.pt"
    shipped = torch.load(SHIPPED, weights_only=True)
    weights = {name: tensor.clone() for name, tensor in shipped["weights"].items()}
    if kind == "damaged":
        path.write_bytes(SHIPPED.read_bytes()[:2000])
    elif kind == "other env":
        torch.save({**shipped, "env_id": "Acrobot-v1"}, path)
    elif kind == "nan":
        weights["critic.4.bias"][0] = float("nan")
        torch.save({**shipped, "weights": weights}, path)
    else:
        torch.save({**shipped, "weights": Bomb(tmp_path)}, path)
    with pytest.raises(SystemExit, match="no usable LunarLander-v3 agent in .*bad.pt"):
        lesson.load_agent(path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED", -1),
        ("SEED", 70_000),  # 16 copies of it reach the held-out seeds
        ("TOTAL_STEPS", 0),
        ("TOTAL_STEPS", 100),  # less than one rollout
        ("REPORT_EVERY", 0),
        ("NUM_ENVS", 0),
        ("ROLLOUT_STEPS", 0),
        ("EPOCHS", 0),
        ("MINIBATCH_SIZE", 0),
        ("LEARNING_RATE", -0.01),
        ("LEARNING_RATE", float("nan")),
        ("FINAL_RATE", 1.5),
        ("GAMMA", 1.1),
        ("GAE_LAMBDA", -0.1),
        ("CLIP_EPS", 0),
        ("ENTROPY_BONUS", -1),
        ("VALUE_WEIGHT", -1),
        ("MAX_GRAD_NORM", 0),
        ("REWARD_SCALE", 0),
        ("HIDDEN_UNITS", 0),
        ("HELD_OUT_EPISODES", 0),
        ("WEIGHTS_PATH", Path("nowhere/w.pt")),
        ("CURVE_PATH", Path("nowhere/c.png")),
    ],
)
def test_an_impossible_constant_is_refused_before_anything_runs(
    in_folder, monkeypatch, capsys, name, value
):
    monkeypatch.setattr(lesson, name, value)
    with pytest.raises(SystemExit) as stopped:
        lesson.main()
    assert name in stopped.value.code and "\n" not in stopped.value.code
    assert capsys.readouterr().out == "" and not list(in_folder.iterdir())


def test_a_folder_for_the_gif_that_is_missing_is_refused_before_anything_runs(
    monkeypatch, capsys
):
    monkeypatch.setattr(lunar_eval, "GIF_PATH", Path("nowhere/a.gif"))
    with pytest.raises(SystemExit, match="^GIF_PATH must be in a folder"):
        lunar_eval.main()
    assert capsys.readouterr().out == ""


def test_several_impossible_constants_are_named_together_without_a_traceback(tmp_path):
    done = run_copy(
        tmp_path,
        "lunarlander_ppo.py",
        (f"GAMMA = {lesson.GAMMA}", "GAMMA = 2"),
        ("CLIP_EPS = 0.2", "CLIP_EPS = -1"),
        (f"EPOCHS = {lesson.EPOCHS}", "EPOCHS = 0"),
    )
    assert_one_plain_line(done, "GAMMA", "CLIP_EPS", "EPOCHS")


def test_a_run_that_ends_below_200_says_so_and_keeps_the_good_weights(tmp_path):
    (tmp_path / SHIPPED.name).write_bytes(b"good")
    done = run_copy(
        tmp_path,
        "lunarlander_ppo.py",
        (f"TOTAL_STEPS = {lesson.TOTAL_STEPS:_}", "TOTAL_STEPS = 10_000"),
        ("HELD_OUT_EPISODES = 100", "HELD_OUT_EPISODES = 2"),
    )
    assert_one_plain_line(done, "Below 200 after 8,192 steps")
    assert (tmp_path / SHIPPED.name).read_bytes() == b"good"
    assert lesson.load_agent(tmp_path / "ppo_lunarlander_final_unsolved.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_kill_keeps_the_run_under_another_name(tmp_path, number):
    script = "lunarlander_ppo.py"
    text = (ROOT / script).read_text()
    text = re.sub(r"^REPORT_EVERY = \d+", "REPORT_EVERY = 1", text, flags=re.MULTILINE)
    (tmp_path / script).write_text(text)
    (tmp_path / SHIPPED.name).write_bytes(b"good")
    training = subprocess.Popen(
        [sys.executable, "-u", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in training.stdout:
        if line.startswith("return  length"):
            break
    training.stdout.readline()  # the first line of the table: now it trains
    training.send_signal(number)
    printed, errors = training.communicate(timeout=30)
    assert training.returncode == 1 and "This run is kept in" in printed
    assert re.fullmatch(r"Stopped after [\d,]+ steps\.", errors.strip())
    assert (tmp_path / SHIPPED.name).read_bytes() == b"good"
    assert lesson.load_agent(tmp_path / "ppo_lunarlander_final_interrupted.pt")


def interrupted_files(folder):
    """The names of all files, if they are those of a run that ended early."""
    assert lesson.load_agent(folder / "w_interrupted.pt")
    return sorted(path.name for path in folder.iterdir())


def test_a_ctrl_c_inside_box2d_stops_the_run_after_that_update(
    in_folder, monkeypatch, capsys
):
    collect, before = lesson.collect, signal.getsignal(signal.SIGINT)

    def collect_and_press(*arguments):
        signal.raise_signal(signal.SIGINT)  # no exception: Box2D would swallow it
        return collect(*arguments)

    change(monkeypatch, collect=collect_and_press)
    steps = lesson.NUM_ENVS * lesson.ROLLOUT_STEPS
    with pytest.raises(SystemExit, match=f"Stopped after {steps:,} steps."):
        lesson.main()
    assert "This run is kept in w_interrupted.pt" in capsys.readouterr().out
    assert interrupted_files(in_folder) == ["c_interrupted.png", "w_interrupted.pt"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("broken", ["learn", "evaluate"])
def test_an_error_in_training_or_in_the_last_evaluation_keeps_the_run_and_is_shown(
    in_folder, monkeypatch, capsys, broken
):
    def fail(*arguments, **options):
        raise MemoryError("no room")

    change(monkeypatch, TOTAL_STEPS=10_000, **{broken: fail})
    with pytest.raises(MemoryError, match="no room"):
        lesson.main()
    assert "This run is kept in w_interrupted.pt" in capsys.readouterr().out
    assert interrupted_files(in_folder) == ["c_interrupted.png", "w_interrupted.pt"]


def test_a_ctrl_c_in_the_last_evaluation_is_not_heard_since_the_run_is_complete(
    in_folder, monkeypatch, capsys
):
    def evaluate_and_press(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return np.array([300.0]), np.array([False])

    change(monkeypatch, TOTAL_STEPS=10_000, evaluate=evaluate_and_press)
    lesson.main()
    assert "Written: w.pt and c.png" in capsys.readouterr().out
    assert sorted(path.name for path in in_folder.iterdir()) == ["c.png", "w.pt"]


def test_a_full_disk_while_saving_leaves_the_old_weights_whole_and_nothing_else(
    in_folder, monkeypatch
):
    path = in_folder / "w.pt"
    path.write_bytes(b"good")

    def half_written(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        lesson.save_run(lesson.ActorCritic(), [])
    assert path.read_bytes() == b"good" and list(in_folder.iterdir()) == [path]
