"""Tests of lesson 3: lunarlander_ppo.py and lunar_eval.py."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
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


def test_gae_tells_terminated_from_truncated():
    rewards, values, next_values, terminated, ended = episodes_that_end_everywhere()
    right = lesson.gae(rewards, values, next_values, terminated, ended, 0.9, 0.8)
    merged = lesson.gae(rewards, values, next_values, ended, ended, 0.9, 0.8)
    only_truncated = slice(1, 14, 2)
    for n in range(14):
        assert torch.equal(right[:, n], merged[:, n]) == (n % 2 == 0)
    t, n = torch.arange(7), torch.arange(14)[only_truncated]
    missing = 0.9 * next_values[t, n]  # V(final observation), one truncation each
    assert torch.allclose((right - merged)[t, n], missing, atol=1e-6)


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
    column = torch.tensor([[1.0], [1.0]])
    zero, end = torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])
    advantages = lesson.gae(column, zero, zero, end, end, 1.0, 1.0)
    assert advantages.flatten().tolist() == [2, 1]
    normal = lesson.normalise(torch.tensor([1.0, 2.0, 3.0]))
    assert normal.tolist() == pytest.approx([-1.2247, 0, 1.2247], abs=1e-3)
    half = lesson.log_probs_and_entropy(torch.zeros(1, 2), torch.tensor([0]))
    assert [x.item() for x in half] == pytest.approx([-0.6931, 0.6931], abs=1e-4)
    loss = lesson.clipped_surrogate_loss(
        torch.tensor([1.5, 0.5]).log(), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2
    )
    assert loss.item() == pytest.approx(-0.2)
    loss = lesson.critic_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert loss.item() == 2
    explained = lesson.explained_variance(torch.zeros(2), torch.tensor([1.0, -1.0]))
    assert explained == pytest.approx(0, abs=1e-6)


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


def make_batch(copies=3, steps=5):
    """An agent and a batch as training makes it, of a random rollout."""
    torch.manual_seed(0)
    agent = lesson.ActorCritic(16)
    envs = lesson.make_envs(copies)
    observations, _ = envs.reset(seed=0)
    rollout, _, _ = lesson.collect(
        envs, agent.actor, observations, np.zeros((2, copies)), steps
    )
    return agent, rollout, lesson.make_batch(agent, rollout, 0.01, 0.99, 0.95)


def test_the_gradient_of_the_whole_loss_equals_a_plain_rewriting():
    agent, _, batch = make_batch()
    batch["old_log_probs"] += torch.linspace(-0.5, 0.5, 15)  # reaches every region
    loss, _, _ = lesson.ppo_loss(agent, batch, 0.2, 0.5, 0.01)
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


def test_a_long_gradient_is_shortened_to_the_limit():
    agent, _, batch = make_batch()
    before = torch.cat([p.detach().flatten().clone() for p in agent.parameters()])
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    settings = dict(clip_eps=0.2, value_weight=0.5, entropy_bonus=0.01)
    lesson.learn(agent, optimizer, batch, 1, len(batch["actions"]), 1e-3, **settings)
    after = torch.cat([p.detach().flatten() for p in agent.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_no_gradient_reaches_the_critic_through_the_policy_loss():
    agent, _, batch = make_batch()
    loss, _, _ = lesson.ppo_loss(agent, batch, 0.2, 0.0, 0.01)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.critic.parameters())
    assert not any(batch[name].requires_grad for name in batch)


def test_the_ratio_is_1_on_the_first_minibatch():
    agent, _, batch = make_batch()
    batch["advantages"] = torch.ones(15)  # so that the loss is minus the mean ratio
    _, policy_loss, _ = lesson.ppo_loss(agent, batch, 0.2, 0.5, 0.01)
    assert policy_loss.item() == pytest.approx(-1, abs=1e-6)
    kl, clipped, _, _ = lesson.diagnose(agent, batch, 1e-5)
    assert (kl, clipped) == (pytest.approx(0, abs=1e-6), 0)


def test_the_critic_gives_a_flat_vector_so_that_nothing_broadcasts():
    agent, _, batch = make_batch()
    values = agent.critic(batch["observations"])
    assert values.shape == batch["returns"].shape == (15,)
    assert agent.critic(batch["observations"][:1]).shape == (1,)
    by_hand = sum((values - batch["returns"]).tolist()[i] ** 2 for i in range(15)) / 15
    loss = lesson.critic_loss(values, batch["returns"])
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_the_critic_learns_scaled_rewards_and_the_rollout_keeps_the_real_ones():
    agent, rollout, small = make_batch()
    large = lesson.make_batch(agent, rollout, 1.0, 0.99, 0.95)
    zero, ends = torch.zeros(5, 3), (rollout["terminated"], rollout["ended"])
    rewards_alone = lesson.gae(rollout["rewards"], zero, zero, *ends, 0.99, 0.95)
    change = large["returns"] - small["returns"]  # of the scale, from 0.01 to 1
    assert torch.allclose(change, 0.99 * rewards_alone.flatten(), atol=1e-4)
    assert change.abs().max() > 1


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
        [lambda: Clockwork(**ends)] * 2, autoreset_mode=AutoresetMode.SAME_STEP
    )


@pytest.mark.parametrize("kind", ["terminates_at", "truncates_at"])
def test_the_last_observation_of_an_episode_is_kept_and_the_next_row_is_a_new_one(kind):
    envs, agent = clockwork(**{kind: 3}), lesson.ActorCritic(8)
    observations, running = envs.reset()[0], np.zeros((2, 2))
    rollout, now, finished = lesson.collect(envs, agent.actor, observations, running, 5)
    times = rollout["observations"][:, 0, :2].tolist()
    assert times == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    after = rollout["next_observations"][:, 0, :2].tolist()
    assert after == [[1, 0], [2, 0], [3, 0], [1, 1], [2, 1]]
    assert rollout["ended"][:, 0].tolist() == [0, 0, 1, 0, 0]
    assert rollout["terminated"].equal(rollout["ended"]) == (kind == "terminates_at")
    assert rollout["terminated"].any() == (kind == "terminates_at")
    assert finished == [(3, 3), (3, 3)] and running.tolist() == [[2, 2], [2, 2]]
    _, _, finished = lesson.collect(envs, agent.actor, now, running, 1)
    assert finished == [(3, 3), (3, 3)]


def fly_for_a_while(updates=80, **ends):
    """The critic's mean opinion after training on the Clockwork, its time hidden."""
    torch.manual_seed(0)
    envs, agent = clockwork(**ends), lesson.ActorCritic(8)
    optimizer = torch.optim.Adam(agent.parameters(), 0.03)
    observations, running = envs.reset()[0], np.zeros((2, 2))
    for _ in range(updates):
        rollout, observations, _ = lesson.collect(
            envs, agent.actor, observations, running, 16
        )
        for name in ("observations", "next_observations"):
            rollout[name] = torch.ones_like(rollout[name])
        batch = lesson.make_batch(agent, rollout, 1.0, 0.8, 0.95)
        loss_settings = dict(clip_eps=0.2, value_weight=0.5, entropy_bonus=0.0)
        lesson.learn(agent, optimizer, batch, 2, 32, 10.0, **loss_settings)
    return agent.critic(torch.ones(1, 8)).item()


def test_a_time_limit_does_not_lower_the_value_but_a_real_end_does():
    # 1 a step for ever, discounted by 0.8, is worth 1 / (1 - 0.8) = 5. Cut off by a
    # time limit of 4 steps it still is, as far as the agent can tell; ended for good
    # after 4, it is worth (1 + 1.8 + 2.44 + 2.952) / 4 = 2.05 on average.
    assert fly_for_a_while(truncates_at=4) == pytest.approx(5, rel=0.05)
    assert fly_for_a_while(terminates_at=4) == pytest.approx(2.05, rel=0.2)


def test_observation_action_and_reward_of_one_index_belong_together():
    _, rollout, _ = make_batch(copies=2, steps=150)
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


def test_actions_are_drawn_with_the_probabilities_of_the_actor():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    envs = clockwork(truncates_at=1000)
    rollout, _, _ = lesson.collect(
        envs,
        lambda observations: probabilities.log().expand(len(observations), 4),
        envs.reset()[0],
        np.zeros((2, 2)),
        10_000,
    )
    shares = rollout["actions"].flatten().bincount() / 20_000
    assert torch.allclose(shares, probabilities, atol=0.012)


def test_the_copies_reset_in_the_same_step_and_start_from_different_seeds():
    envs = lesson.make_envs(3)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    first, _ = envs.reset(seed=5)
    alone, _ = lesson.make_env().reset(seed=6)
    assert np.array_equal(first[1], alone) and not np.array_equal(first[0], first[1])


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
    assert "return  length" in printed and "greedy" in printed
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
    monkeypatch.setattr(lunar_eval, "HELD_OUT_EPISODES", 20)
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


# ------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    done = run_copy(tmp_path, "lunar_eval.py")
    assert_one_plain_line(done, "missing", "python lunarlander_ppo.py")


class Bomb:
    """Unpickling this would create the file `boom`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "boom"),)


@pytest.mark.parametrize("kind", ["damaged", "empty", "foreign", "other env", "code"])
def test_a_bad_weights_file_is_refused_in_one_line_and_nothing_runs(tmp_path, kind):
    path = tmp_path / "bad.pt"
    shipped = torch.load(SHIPPED, weights_only=True)
    if kind == "damaged":
        path.write_bytes(SHIPPED.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save(torch.nn.Linear(8, 4).state_dict(), path)
    elif kind == "other env":
        torch.save({**shipped, "env_id": "Acrobot-v1"}, path)
    else:
        torch.save({**shipped, "weights": Bomb(tmp_path)}, path)
    with pytest.raises(SystemExit) as stopped:
        lesson.load_agent(path)
    assert "bad.pt does not hold a LunarLander agent" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED", -1),
        ("SEED", 500_000),
        ("TOTAL_STEPS", 0),
        ("TOTAL_STEPS", 100),  # less than one rollout
        ("REPORT_EVERY", 0),
        ("NUM_ENVS", 0),
        ("ROLLOUT_STEPS", 2.5),
        ("EPOCHS", 0),
        ("MINIBATCH_SIZE", 0),
        ("LEARNING_RATE", -0.01),
        ("LEARNING_RATE", "fast"),
        ("LEARNING_RATE", float("nan")),
        ("GAMMA", 1.1),
        ("GAE_LAMBDA", -0.1),
        ("CLIP_EPS", 0),
        ("ENTROPY_BONUS", -1),
        ("VALUE_WEIGHT", None),
        ("MAX_GRAD_NORM", 0),
        ("REWARD_SCALE", 0),
        ("HIDDEN_UNITS", True),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("LANDINGS", 0), ("GIF_EVERY", 0), ("GIF_COLOURS", 300), ("ACTION_SEED", -1)],
)
def test_an_impossible_constant_of_the_eval_script_is_refused_too(
    monkeypatch, capsys, name, value
):
    monkeypatch.setattr(lunar_eval, name, value)
    with pytest.raises(SystemExit, match=f"^Settings: {name} = {value} must be .*[.]$"):
        lunar_eval.main()
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_not_there_is_refused_before_the_run_and_not_after_it(
    in_folder, monkeypatch
):
    monkeypatch.setattr(lesson, "WEIGHTS_PATH", in_folder / "nowhere" / "w.pt")
    with pytest.raises(SystemExit, match="WEIGHTS_PATH must lie in a folder"):
        lesson.main()


def test_several_impossible_constants_are_named_together_without_a_traceback(tmp_path):
    done = run_copy(
        tmp_path,
        "lunarlander_ppo.py",
        (f"GAMMA = {lesson.GAMMA}", "GAMMA = 'x'"),
        ("CLIP_EPS = 0.2", "CLIP_EPS = -1"),
        (f"EPOCHS = {lesson.EPOCHS}", "EPOCHS = 0"),
    )
    assert_one_plain_line(done, "GAMMA", "CLIP_EPS", "EPOCHS")


def test_a_run_that_ends_below_200_says_so_and_keeps_the_good_weights(tmp_path):
    (tmp_path / SHIPPED.name).write_bytes(b"good")
    done = run_copy(
        tmp_path,
        "lunarlander_ppo.py",
        ("TOTAL_STEPS = 850_000", "TOTAL_STEPS = 10_000"),
        ("HELD_OUT_EPISODES = 100", "HELD_OUT_EPISODES = 2"),
    )
    assert_one_plain_line(done, "Below 200 after 8,192 steps")
    assert (tmp_path / SHIPPED.name).read_bytes() == b"good"
    assert lesson.load_agent(tmp_path / "ppo_lunarlander_final_unsolved.pt")


def test_ctrl_c_keeps_the_run_under_another_name_and_the_good_weights(tmp_path):
    script = "lunarlander_ppo.py"
    (tmp_path / script).write_text((ROOT / script).read_text())
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
    time.sleep(2)
    training.send_signal(signal.SIGINT)
    printed, errors = training.communicate(timeout=30)
    assert (training.returncode, errors) == (0, "")
    assert "Stopped after" in printed
    assert (tmp_path / SHIPPED.name).read_bytes() == b"good"
    assert lesson.load_agent(tmp_path / "ppo_lunarlander_final_interrupted.pt")


def test_a_ctrl_c_that_is_lost_inside_box2d_still_stops_the_run(
    in_folder, monkeypatch, capsys
):
    collect = lesson.collect

    def collect_and_lose_ctrl_c(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return collect(*arguments)

    monkeypatch.setattr(lesson, "collect", collect_and_lose_ctrl_c)
    before = signal.getsignal(signal.SIGINT)
    lesson.main()
    signal.signal(signal.SIGINT, before)
    steps = lesson.NUM_ENVS * lesson.ROLLOUT_STEPS
    assert f"Stopped after {steps:,} steps" in capsys.readouterr().out


def test_a_ctrl_c_that_is_lost_in_the_last_evaluation_leaves_the_good_weights(
    in_folder, monkeypatch, capsys
):
    def evaluate_and_lose_ctrl_c(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return 300.0

    monkeypatch.setattr(lesson, "TOTAL_STEPS", 10_000)
    monkeypatch.setattr(lesson, "print_held_out_scores", evaluate_and_lose_ctrl_c)
    before = signal.getsignal(signal.SIGINT)
    lesson.main()
    signal.signal(signal.SIGINT, before)
    assert "Stopped after 8,192 steps" in capsys.readouterr().out
    names = sorted(path.name for path in in_folder.iterdir())
    assert names == ["c_interrupted.png", "w_interrupted.pt"]


def test_without_box2d_one_line_names_the_command_that_installs_it(tmp_path):
    (tmp_path / "Box2D.py").write_text("raise ImportError('not installed')")
    done = run_copy(tmp_path)
    assert_one_plain_line(done, "Box2D", 'pip install "gymnasium[box2d]')


def test_a_crash_while_saving_leaves_the_old_weights_whole(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    path.write_bytes(b"good")

    def half_written(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        lesson.save_agent(lesson.ActorCritic(), path)
    assert path.read_bytes() == b"good"
