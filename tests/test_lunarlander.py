"""Tests of lesson 3: lunarlander_ppo.py and lunar_eval.py."""

import contextlib
import copy
import types

import gymnasium as gym
import numpy as np
import pygame
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics
from lessons import spy_on
from PIL import Image

import lunar_eval
import lunarlander_ppo as lesson

SHIPPED = lesson.WEIGHTS_PATH  # of which some tests make another one


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    change(monkeypatch, WEIGHTS_PATH=tmp_path / "w.pt", CURVE_PATH=tmp_path / "c.png")
    return tmp_path


def change(monkeypatch, **settings):
    """Give the lesson's Settings of these names other values for this test."""
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)


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


def test_gae_equals_the_double_loop_with_every_end_at_every_position():
    # Column n ends once, at step n // 2, by termination (n even) or truncation (n odd);
    # then a column with no end and one with both kinds.
    torch.manual_seed(0)
    terminated, ended = torch.zeros(2, 7, 16)
    for n in range(14):
        ended[n // 2, n] = 1
        terminated[n // 2, n] = 1 - n % 2
    ended[1, -1] = ended[4, -1] = terminated[4, -1] = 1
    data = *torch.randn(3, 7, 16), terminated, ended
    for gamma, lam in [(0.9, 0.8), (1.0, 1.0), (0.99, 0.0)]:
        expected = gae_double_loop(*data, gamma, lam)
        assert torch.allclose(lesson.gae(*data, gamma, lam), expected, atol=1e-5)


def test_gae_with_lambda_1_leaves_the_rewards_and_the_value_where_it_is_cut():
    torch.manual_seed(0)
    rewards, values, next_values = torch.randn(3, 9, 1)
    next_values[:5] = values[1:6]  # consistent within the first six steps
    terminated, ended = torch.zeros(2, 9, 1)
    ended[5] = 1  # by the time limit
    advantages = lesson.gae(rewards, values, next_values, terminated, ended, 0.9, 1.0)
    for t in range(6):
        expected = sum(0.9 ** (k - t) * rewards[k, 0] for k in range(t, 6))
        expected += 0.9 ** (6 - t) * next_values[5, 0] - values[t, 0]
        assert advantages[t, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_docstring_cases_worked_by_hand(monkeypatch):
    # Three steps in two copies. An observation is the critic's value of it; all actions
    # are equally likely.
    change(monkeypatch, GAMMA=0.5, GAE_LAMBDA=0.5, REWARD_SCALE=1.0)
    change(monkeypatch, CLIP_EPS=0.2, VALUE_WEIGHT=0.5, ENTROPY_BONUS=0.003)
    agent = types.SimpleNamespace(
        actor=lambda observations: torch.zeros(len(observations), 2),
        critic=lambda observations: observations[:, 0],
    )
    rollout = {
        "observations": torch.tensor([[0.0, 1], [2, 0], [1, 1]])[..., None],
        "next_observations": torch.tensor([[2.0, 0], [6, 1], [2, 3]])[..., None],
        "actions": torch.tensor([[0, 1], [1, 1], [0, 0]]),
        "rewards": torch.tensor([[1.0, 1], [1, 2], [1, -1]]),
        "terminated": torch.tensor([[0, 0], [0, 0], [0, 1]]),
        "ended": torch.tensor([[0, 0], [1, 0], [0, 1]]),
    }
    values, next_values = rollout["observations"], rollout["next_observations"]
    given = [rollout["rewards"], values[..., 0], next_values[..., 0]]
    given += [rollout["terminated"].float(), rollout["ended"].float(), 0.5]
    assert lesson.gae(*given, 0.0).T.tolist() == [[2, 2, 1], [0, 2.5, -2]]  # deltas
    assert lesson.gae(*given, 0.5).T.tolist() == [[2.5, 2, 1], [0.5, 2, -2]]

    batch = lesson.make_batch(agent, rollout)
    columns = {name: batch[name].view(3, 2).T.tolist() for name in list(batch)[1:]}
    assert columns["values"] == [[0, 2, 1], [1, 0, 1]]
    assert columns["returns"] == [[2.5, 4, 2], [1.5, 2, -1]]
    normal = [[1, 2 / 3, 0], [-1 / 3, 2 / 3, -2]]
    assert np.allclose(columns["advantages"], normal, atol=1e-3)
    assert lesson.normalise(torch.full((8,), 0.3)).abs().max() < 0.01  # no noise
    assert lesson.normalise(torch.tensor([1e-5, -1e-5]))[0] > 0  # the sign stays
    assert np.allclose(columns["old_log_probs"], np.log(0.5))
    loss = lesson.ppo_loss(agent, batch)
    assert loss.item() == pytest.approx(0.5 * 3.25 - 0.003 * np.log(2), abs=1e-4)

    new = torch.tensor([0.75, 0.5, 0.5, 0.75, 0.25, 0.25]).log().requires_grad_()
    advantages = torch.tensor(normal).flatten()
    old = torch.full((6,), 0.5).log()
    loss = lesson.clipped_surrogate_loss(new, old, advantages, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 / 6, abs=1e-6)
    assert (new.grad != 0).tolist() == [False, True, False, True, True, False]


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


def test_the_ratio_turns_a_mean_over_the_old_policy_into_one_over_the_new():
    old, new = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    worth = torch.tensor([1.0, -2.0, 4.0])
    weighted = 3 * old * worth  # the loss takes the mean over the three actions
    loss = lesson.clipped_surrogate_loss(new.log(), old.log(), weighted, clip_eps=1e9)
    assert -loss.item() == pytest.approx((new * worth).sum().item())


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


def test_the_gradient_of_the_whole_loss_equals_a_plain_rewriting(flown):
    agent, _, batch = flown
    # So the policy's loss, in which the advantages are, teaches the critic nothing.
    assert not any(column.requires_grad for column in batch.values())
    # Values (15, 1) minus returns (15,) would be (15, 15).
    assert agent.critic(batch["observations"]).shape == batch["returns"].shape == (15,)
    batch["old_log_probs"] += torch.linspace(-0.5, 0.5, 15)  # reaches every region
    loss = lesson.ppo_loss(agent, batch)
    got = torch.autograd.grad(loss, list(agent.parameters()))

    terms = []
    for i in range(15):
        observation = batch["observations"][i]
        value = agent.critic[:-1](observation)[0]  # without Flatten
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


def test_the_batch_has_returns_of_scaled_rewards_and_normalised_advantages(flown):
    agent, rollout, batch = flown
    rewards = rollout["rewards"].float() * 0.01
    values = agent.critic(rollout["observations"].flatten(0, 1)).view(5, 3)
    next_values = agent.critic(rollout["next_observations"].flatten(0, 1)).view(5, 3)
    ends = rollout["terminated"].float(), rollout["ended"].float()
    plain = lesson.gae(rewards, values, next_values, *ends, 0.99, 0.95).flatten()
    assert torch.allclose(batch["returns"], plain + values.flatten(), atol=1e-6)
    scaled = (plain - plain.mean()) / plain.std(correction=0)
    assert torch.allclose(batch["advantages"], scaled, rtol=0.02)


def test_each_epoch_takes_every_row_once_in_another_order(flown, monkeypatch):
    agent, _, batch = flown
    change(monkeypatch, EPOCHS=3, MINIBATCH_SIZE=5)
    batch["values"] = torch.arange(15.0)  # a number for each row
    losses = spy_on(monkeypatch, lesson, "ppo_loss")
    lesson.learn(agent, torch.optim.SGD(agent.parameters(), 0.0), batch)
    rows = torch.cat([call["batch"]["values"] for call in losses]).tolist()
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


def test_the_ratio_is_1_on_the_first_minibatch(flown, monkeypatch):
    agent, _, batch = flown
    batch["advantages"] = torch.ones(15)  # so that the loss is minus the mean ratio
    change(monkeypatch, CLIP_EPS=1e-5, VALUE_WEIGHT=0.0, ENTROPY_BONUS=0.0)
    assert lesson.ppo_loss(agent, batch).item() == pytest.approx(-1, abs=1e-6)
    diagnosis = lesson.diagnose(agent, batch)
    assert diagnosis["KL"] == pytest.approx(0, abs=1e-6) and diagnosis["clipped"] == 0


def test_the_four_printed_numbers_equal_a_plain_rewriting(flown, monkeypatch):
    agent, rollout, batch = flown
    agent.actor[-1].weight.data *= 200  # states differ in their entropy
    batch = lesson.make_batch(agent, rollout)
    batch["old_log_probs"] += torch.linspace(-0.5, 0.4, 15)
    probs = agent.actor(batch["observations"]).softmax(1).detach()
    ratio = probs[range(15), batch["actions"]] / batch["old_log_probs"].exp()
    left = [not 0.8 <= rho <= 1.2 for rho in ratio.tolist()]
    errors = batch["returns"] - batch["values"]
    diagnosis = lesson.diagnose(agent, batch)
    expected = (ratio - 1 - ratio.log()).mean().item()
    assert diagnosis["KL"] == pytest.approx(expected, abs=1e-6)
    assert diagnosis["clipped"] == pytest.approx(sum(left) / 15) and 0 < sum(left) < 15
    expected = -(probs * probs.log()).sum(1).mean().item()
    assert diagnosis["entropy"] == pytest.approx(expected, abs=1e-5)
    parts = np.var(errors.tolist()), np.var(batch["returns"].tolist())
    assert diagnosis["explained"] == pytest.approx(1 - parts[0] / parts[1], rel=1e-3)


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


class Clockwork(gym.Env):
    """Shows the step of the episode and its number; reward 1 a step; ends when told."""

    observation_space, action_space = gym.spaces.Box(0, 9, (8,)), gym.spaces.Discrete(4)

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
    return side_by_side(2, lambda: Clockwork(**ends))


def side_by_side(copies, make):
    """Copies of an environment, as the lesson has its own."""
    makes = [lambda: RecordEpisodeStatistics(make())] * copies
    return SyncVectorEnv(makes, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("kind", ["terminates_at", "truncates_at"])
def test_the_last_observation_of_an_episode_is_kept_and_the_next_row_is_a_new_one(
    kind, monkeypatch
):
    change(monkeypatch, ROLLOUT_STEPS=5)
    envs, agent = clockwork(**{kind: 3}), lesson.ActorCritic(8)
    rollout, _, finished = lesson.collect(envs, agent.actor, envs.reset()[0])
    times = rollout["observations"][:, 0, :2].tolist()
    assert times == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    after = rollout["next_observations"][:, 0, :2].tolist()
    assert after == [[1, 0], [2, 0], [3, 0], [1, 1], [2, 1]]
    assert rollout["ended"][:, 0].tolist() == [0, 0, 1, 0, 0]
    terminated = [0, 0, kind == "terminates_at", 0, 0]
    assert rollout["terminated"][:, 0].tolist() == terminated
    assert finished == [(3, 3), (3, 3)]


def test_a_rollout_goes_on_where_the_last_one_stopped(monkeypatch):
    change(monkeypatch, TOTAL_STEPS=8, NUM_ENVS=2, ROLLOUT_STEPS=2)
    agent, envs = lesson.ActorCritic(8), clockwork(truncates_at=3)
    (_, first), (finished, second) = lesson.train(agent, envs)
    assert first["observations"][:, 0].tolist() == [0, 0, 1, 1]
    assert second["observations"][:, 0].tolist() == [2, 2, 0, 0]
    assert finished == [(3, 3), (3, 3)]


def opinion_of_the_critic(monkeypatch, **ends):
    """The critic's value after training on the Clockwork, its time hidden."""
    change(monkeypatch, ROLLOUT_STEPS=16, EPOCHS=2, MINIBATCH_SIZE=32, GAMMA=0.8)
    change(monkeypatch, REWARD_SCALE=1.0, GAE_LAMBDA=0.95, MAX_GRAD_NORM=10.0)
    change(monkeypatch, CLIP_EPS=0.2, VALUE_WEIGHT=0.5, ENTROPY_BONUS=0.0)
    torch.manual_seed(0)
    envs, agent = clockwork(**ends), lesson.ActorCritic(8)
    optimizer = torch.optim.Adam(agent.parameters(), 0.03)
    observations, _ = envs.reset()
    for _ in range(80):
        rollout, observations, _ = lesson.collect(envs, agent.actor, observations)
        for name in ("observations", "next_observations"):
            rollout[name] = torch.ones_like(rollout[name])
        lesson.learn(agent, optimizer, lesson.make_batch(agent, rollout))
    return agent.critic(torch.ones(1, 8)).item()


def test_a_time_limit_does_not_lower_the_value_but_a_real_end_does(monkeypatch):
    # 1 a step for ever, discounted by 0.8, is worth 1 / (1 - 0.8) = 5. Cut off by a
    # time limit of 4 steps it still is, as far as the agent can tell; ended for good
    # after 4, it is worth (1 + 1.8 + 2.44 + 2.952) / 4 = 2.05 on average.
    value = opinion_of_the_critic(monkeypatch, truncates_at=4)
    assert value == pytest.approx(5, rel=0.05)
    value = opinion_of_the_critic(monkeypatch, terminates_at=4)
    assert value == pytest.approx(2.05, rel=0.2)


def test_observation_action_and_reward_of_one_index_belong_together(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=150)
    torch.manual_seed(0)
    agent, envs, env = lesson.ActorCritic(16), lesson.make_envs(2), lesson.make_env()
    rollout, _, episodes = lesson.collect(envs, agent.actor, envs.reset(seed=0)[0])
    env.reset(seed=0)
    first = {name: column[:, 0] for name, column in rollout.items()}
    last = first["ended"].tolist().index(True)
    whole = first["rewards"][: last + 1].sum().item(), last + 1
    assert pytest.approx(whole, abs=1e-3) in episodes
    for t in range(last + 1):
        following, reward, terminated, _, _ = env.step(first["actions"][t].item())
        assert first["next_observations"][t].tolist() == following.tolist()
        assert first["rewards"][t].item() == pytest.approx(reward, rel=1e-5)
        assert first["terminated"][t].item() == terminated
        if t < last:
            assert first["observations"][t + 1].tolist() == following.tolist()


def test_actions_are_sampled_with_the_probabilities_of_the_actor(monkeypatch):
    change(monkeypatch, ROLLOUT_STEPS=1_000)
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    envs = side_by_side(20, lambda: Clockwork(truncates_at=1_000))
    rollout, _, _ = lesson.collect(
        envs, lambda observations: logits.expand(20, 4), envs.reset()[0]
    )
    shares = rollout["actions"].flatten().bincount() / 20_000
    assert torch.allclose(shares, logits.exp(), atol=0.012)


def test_neighbouring_seeds_share_no_first_observation(monkeypatch):
    change(monkeypatch, TOTAL_STEPS=8, NUM_ENVS=8, ROLLOUT_STEPS=1, MINIBATCH_SIZE=8)
    starts = []
    for seed in (0, 1):
        change(monkeypatch, SEED=seed)
        _, batch = next(lesson.train(lesson.ActorCritic(8), lesson.make_envs(8)))
        starts += [row.numpy().tobytes() for row in batch["observations"]]
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


def test_each_update_is_that_of_the_loss_while_the_rate_falls_in_a_line(monkeypatch):
    change(monkeypatch, TOTAL_STEPS=45, NUM_ENVS=2, ROLLOUT_STEPS=5)  # 4 updates
    change(monkeypatch, EPOCHS=1, MINIBATCH_SIZE=10, MAX_GRAD_NORM=1e9)
    change(monkeypatch, LEARNING_RATE=0.01, FINAL_RATE=0.2)
    # Its step is the gradient times the rate; that of Adam has a size of its own.
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    torch.manual_seed(0)
    agent = lesson.ActorCritic(8)
    updates = lesson.train(agent, lesson.make_envs(2))
    for rate in (0.01, 0.008, 0.006, 0.004):
        before = copy.deepcopy(agent)
        _, batch = next(updates)
        lesson.ppo_loss(before, batch).backward()
        for old, new in zip(before.parameters(), agent.parameters(), strict=True):
            assert torch.allclose((old - new) / rate, old.grad, atol=1e-4)
    assert next(updates, None) is None


def trained_and_random(in_folder):
    """The mean score of what main() leaves, and that of a random policy."""
    with contextlib.suppress(SystemExit):  # so short a run need not reach its aim
        lesson.main()
    agent = lesson.load_agent(next(in_folder.glob("w*.pt")))
    for policy in (agent.actor, lunar_eval.random_policy):
        yield lesson.evaluate(policy, 20, 2_000_000, greedy=False)[0].mean()


def test_a_short_run_raises_the_return_clearly_above_random(in_folder, monkeypatch):
    change(monkeypatch, TOTAL_STEPS=20_480, NUM_ENVS=16, ROLLOUT_STEPS=64, EPOCHS=4)
    change(monkeypatch, MINIBATCH_SIZE=128, LEARNING_RATE=2e-3, HELD_OUT_EPISODES=2)
    trained, random = trained_and_random(in_folder)
    assert trained > random + 80
    assert Image.open(next(in_folder.glob("c*.png"))).size == (960, 480)


def test_another_task_needs_only_the_lines_that_the_docstring_names(
    in_folder, monkeypatch
):
    change(monkeypatch, ENV_ID="CartPole-v1", OBSERVATION_SIZE=4, NUM_ACTIONS=2)
    change(monkeypatch, TOTAL_STEPS=20_480, HELD_OUT_EPISODES=2, SOLVED_SCORE=475)
    trained, random = trained_and_random(in_folder)
    assert trained > random + 50


def test_a_loss_that_is_not_finite_stops_the_run_before_it_ruins_the_weights(
    in_folder, monkeypatch
):
    change(monkeypatch, REWARD_SCALE=1e30, TOTAL_STEPS=256, ROLLOUT_STEPS=16)
    with pytest.raises(SystemExit, match="not finite.*REWARD_SCALE"):
        lesson.main()
    assert lesson.load_agent(in_folder / "w_interrupted.pt")


def test_while_it_trains_its_episodes_can_be_watched_in_one_gif(in_folder, monkeypatch):
    change(monkeypatch, TOTAL_STEPS=80, NUM_ENVS=2, ROLLOUT_STEPS=8, WATCH_EVERY=2)
    change(monkeypatch, HELD_OUT_EPISODES=1)
    monkeypatch.setattr(lunar_eval, "has_display", lambda: False)
    sizes, show = [], lunar_eval.show

    def show_and_count(agent, episodes, path, pictures):
        shown = show(agent, episodes, path, pictures)
        sizes.append(Image.open(path).n_frames)
        return shown

    monkeypatch.setattr(lunar_eval, "show", show_and_count)
    with contextlib.suppress(SystemExit):
        lesson.main()
    assert sizes[0] > 20 and sizes[1] > 1.5 * sizes[0]


def test_the_shipped_weights_land_on_held_out_seeds():
    agent, facts = lesson.load_agent(SHIPPED), torch.load(SHIPPED, weights_only=True)
    scores, _ = lesson.evaluate(agent.actor, 100, lesson.HELD_OUT_SEED, greedy=True)
    assert (scores >= lesson.SOLVED_SCORE).mean() >= 0.95
    assert scores.mean() == pytest.approx(facts["greedy_score"], abs=5)
    assert facts["seed"] == lesson.SEED


# ------------------------------------------------------------------------------------
# The evaluation script
# ------------------------------------------------------------------------------------


def test_without_a_display_the_eval_script_reports_and_writes_a_gif(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(lunar_eval, "GIF_PATH", tmp_path / "show.gif")
    monkeypatch.setattr(lunar_eval, "LANDINGS", 1)
    change(monkeypatch, HELD_OUT_EPISODES=25, WEIGHTS_PATH=SHIPPED)
    lunar_eval.main()
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    bounds = {"greedy": (250, 320), "sampled": (200, 320), "random": (-300, -100)}
    for name, (low, high) in bounds.items():
        mean, std, error, minimum = [float(number) for number in rows[name][1:5]]
        assert low <= mean <= high and minimum < mean
        assert error == pytest.approx(std / 25**0.5, abs=0.11)
    assert str(tmp_path / "show.gif") in printed
    assert Image.open(tmp_path / "show.gif").n_frames > 30


def test_the_close_button_of_the_window_ends_the_show(monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(lunar_eval, "has_display", lambda: True)
    seen = []

    def closed_at_step_5(observations):
        seen.append(observations)
        if len(seen) == 5:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return lunar_eval.random_policy(observations)

    lunar_eval.show_landings(types.SimpleNamespace(actor=closed_at_step_5))
    pygame.quit()
    assert len(seen) == 5 and "Stopped." in capsys.readouterr().out
