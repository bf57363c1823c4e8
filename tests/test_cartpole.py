"""Tests of lesson 1: train_cartpole.py and cartpoleinference.py."""

import copy
import itertools
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
from PIL import Image, ImageSequence

import cartpoleinference
import train_cartpole as lesson

ROOT = Path(lesson.__file__).parent


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    monkeypatch.setattr(lesson, "WEIGHTS_PATH", tmp_path / "w.pth")
    monkeypatch.setattr(lesson, "CURVE_PATH", tmp_path / "c.png")
    return tmp_path


def fast_env(copies):
    """The environment that main() plays in: Gymnasium's own CartPole in NumPy."""
    return gym.make_vec(lesson.ENV_ID, num_envs=copies)


def run_copy(folder, script="train_cartpole.py", *edits):
    """Run the script as a person would: in a folder of its own, Settings edited."""
    for name in ("train_cartpole.py", "cartpoleinference.py"):
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


def test_returns_to_go_equals_the_double_loop():
    torch.manual_seed(0)
    rewards, gamma = torch.randn(30, 4), 0.9
    expected = torch.zeros_like(rewards)
    for t in range(30):
        for later in range(t, 30):
            expected[t] += gamma ** (later - t) * rewards[later]
    assert torch.allclose(lesson.returns_to_go(rewards, gamma), expected, atol=1e-5)


def test_the_docstring_cases_worked_by_hand():
    returns = lesson.returns_to_go(torch.ones(3), 0.5)
    assert returns.tolist() == [1.75, 1.5, 1.0]
    assert lesson.subtract_mean(torch.tensor([1.0, 2, 6])).tolist() == [-2, -1, 3]
    loss = lesson.reinforce_loss(
        torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 3.0])
    )
    assert loss.item() == pytest.approx(1.3863, abs=1e-4)


def test_the_return_of_a_single_step_is_its_reward():
    assert lesson.returns_to_go(torch.tensor([2.0]), 0.5).tolist() == [2]
    assert lesson.returns_to_go(torch.tensor([[2.0, 3.0]]), 0.5).tolist() == [[2, 3]]


def test_padding_after_the_end_adds_nothing_to_the_returns():
    rewards = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    returns = lesson.returns_to_go(rewards, 1.0)
    assert returns[:, 0].tolist() == [2, 1, 0]
    assert returns[:, 1].tolist() == [3, 2, 1]


def test_equal_returns_give_zero_and_not_noise():
    assert lesson.subtract_mean(torch.full((8,), 0.3)).abs().max() < 1e-6


def test_one_step_makes_a_good_action_likelier_and_a_bad_one_rarer():
    for sign in (1.0, -1.0):
        logits = torch.zeros(2, requires_grad=True)
        loss = lesson.reinforce_loss(logits.log_softmax(0)[:1], torch.tensor([sign]))
        loss.backward()
        after = (logits - 0.1 * logits.grad).softmax(0)[0]
        assert (after > 0.5) == (sign > 0)


GAMES = list(itertools.product((0, 1), repeat=2))  # every way to play two_step_game


def two_step_game(logits, actions):
    """A game of two steps: state 0, then state 1 + a_0. Log-probs and rewards (2,)."""
    first, second = actions
    log_probs = logits.log_softmax(1)
    rewards = torch.tensor(
        [[1.0, -2.0][first], [[3.0, 0.0], [-1.0, 5.0]][first][second]]
    )
    return torch.stack([log_probs[0, first], log_probs[1 + first, second]]), rewards


def some_logits():
    """Logits (3, 2), one row a state of two_step_game."""
    logits = [[1.5410, -0.2934], [-2.1788, 0.5684], [-1.0845, -1.3986]]
    return torch.tensor(logits, requires_grad=True)


def exact_gradient(logits, gamma):
    """The gradient of the expected discounted return, over every way to play."""
    objective = 0
    for game in GAMES:
        log_probs, rewards = two_step_game(logits, game)
        objective += log_probs.sum().exp() * (rewards[0] + gamma * rewards[1])
    return torch.autograd.grad(objective, logits)[0]


def expected_gradient(logits, gamma, advantages, episodes=1):
    """The mean of the lesson's sampled gradients, over every way to play a batch."""
    total = torch.zeros_like(logits)
    for batch in itertools.product(GAMES, repeat=episodes):
        played = [two_step_game(logits, game) for game in batch]
        log_probs, rewards = (torch.stack(p, 1) for p in zip(*played, strict=True))
        returns = lesson.returns_to_go(rewards, gamma).flatten()
        loss = lesson.reinforce_loss(log_probs.flatten(), advantages(returns))
        probability = log_probs.sum().exp().detach()
        gradient = torch.autograd.grad(loss, logits)[0]
        # The loss is a mean over 2 steps, and its minimum the objective's maximum.
        total += -2 * probability * gradient
    return total


def test_sampled_gradients_average_to_the_exact_policy_gradient():
    logits = some_logits()
    exact = exact_gradient(logits, 1.0)
    probabilities = [
        two_step_game(logits, game)[0].sum().exp().item() for game in GAMES
    ]
    draws = np.random.default_rng(0).multinomial(2_000_000, probabilities)
    sampled = torch.zeros_like(exact)
    for game, count in zip(GAMES, draws, strict=True):
        log_probs, rewards = two_step_game(logits, game)
        loss = lesson.reinforce_loss(log_probs, lesson.returns_to_go(rewards, 1.0))
        gradient = torch.autograd.grad(loss, logits)[0]
        sampled += -2 * gradient * count / 2_000_000
    assert torch.allclose(sampled, exact, atol=0.01)
    assert exact.abs().max() > 0.1


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_with_gamma_to_the_t_and_any_baseline_it_is_the_gradient_of_the_return(
    gamma, baseline
):
    logits, factor = some_logits(), torch.tensor([1.0, gamma])  # gamma^t
    expected = expected_gradient(
        logits, gamma, lambda returns: factor * (returns - baseline)
    )
    assert torch.allclose(expected, exact_gradient(logits, gamma), atol=1e-5)


def test_without_gamma_to_the_t_it_is_the_gradient_of_neither_return():
    logits = some_logits()
    expected = expected_gradient(logits, 0.5, lambda returns: returns - 0.7)
    for gamma in (0.5, 1.0):  # the discounted return, and the plain sum of rewards
        assert (expected - exact_gradient(logits, gamma)).abs().max() > 0.05


def test_the_batch_mean_is_a_baseline_only_nearly_with_an_error_of_1_over_episodes():
    logits = some_logits()
    exact = exact_gradient(logits, 1.0)
    expected = {
        n: expected_gradient(logits, 1.0, lesson.subtract_mean, n) for n in (1, 2, 3)
    }
    error = expected[1] - exact
    assert error.abs().max() > 0.1
    for n in (2, 3):
        assert torch.allclose(expected[n] - exact, error / n, atol=1e-5)
    for n, cosine in [(1, 0.62), (2, 0.95)]:
        measured = torch.cosine_similarity(expected[n].flatten(), exact.flatten(), 0)
        assert measured.item() == pytest.approx(cosine, abs=0.005)


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def to_the_right(observations):
    return torch.tensor([[0.0, 0.5]]).repeat(len(observations), 1)


def test_every_step_of_an_episode_is_kept_and_none_after_its_end():
    torch.manual_seed(0)
    env = fast_env(8)
    policy = lesson.PolicyNetwork(16)
    observations, actions, rewards, alive = lesson.play_episodes(env, policy, seed=3)
    assert (
        observations.shape == (*actions.shape, 4)
        and observations.dtype == torch.float32
    )
    lengths = rewards.sum(0)
    assert alive.sum(0).tolist() == lengths.tolist()
    assert lengths.max() == len(rewards) and lengths.min() < lengths.max()
    for column, length in enumerate(lengths.int()):
        assert alive[:length, column].all() and not alive[length:, column].any()


def test_observation_and_action_of_one_index_belong_together():
    torch.manual_seed(0)
    env = fast_env(4)
    policy = lesson.PolicyNetwork(16)
    observations, actions, _, alive = lesson.play_episodes(env, policy, seed=3)
    single = gym.make(lesson.ENV_ID).unwrapped
    for t, column in alive[1:].nonzero().tolist():
        single.reset()
        single.state = observations[t, column].double().numpy()
        following, *_ = single.step(actions[t, column].item())
        assert following == pytest.approx(observations[t + 1, column].numpy(), abs=1e-5)


def test_an_episode_truncated_at_500_loses_nothing():
    policy = lesson.load_policy(ROOT / "cartpole_reinforce.pth")
    env = fast_env(2)
    _, _, rewards, alive = lesson.play_episodes(env, policy, greedy=True, seed=0)
    assert rewards.sum(0).tolist() == [500, 500]
    assert alive.shape == (500, 2) and alive.all()


def test_greedy_play_takes_the_likeliest_action_and_sampling_draws():
    env = fast_env(4)
    _, actions, _, _ = lesson.play_episodes(env, to_the_right, greedy=True, seed=0)
    assert (actions == 1).all()
    torch.manual_seed(0)
    _, actions, _, alive = lesson.play_episodes(
        env, cartpoleinference.random_policy, seed=0
    )
    assert 0.2 < actions[alive].float().mean() < 0.8


def test_fast_and_plain_environment_give_the_same_scores():
    fast = fast_env(200)
    _, _, rewards, _ = lesson.play_episodes(fast, to_the_right, greedy=True, seed=0)
    plain = lesson.evaluate(to_the_right, 200, 0, greedy=True)
    assert rewards.sum(0).mean().item() == pytest.approx(plain.mean().item(), abs=0.3)


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def test_perfect_means_that_every_single_greedy_episode_lasts_500_steps(monkeypatch):
    policy = lesson.load_policy(ROOT / "cartpole_reinforce.pth")
    assert lesson.is_perfect(policy)
    monkeypatch.setattr(lesson, "CHECK_EPISODES", 20)

    def falls_once(observations):  # number 7 is pushed to the right until it falls
        logits = policy(observations)
        logits[7] = torch.tensor([0.0, 9.0])
        return logits

    assert not lesson.is_perfect(falls_once)


def test_solved_but_not_perfect_goes_on_to_the_end_of_the_budget(
    in_folder, monkeypatch, capsys
):
    monkeypatch.setattr(lesson, "SOLVED_SCORE", 20)
    monkeypatch.setattr(lesson, "MAX_EPISODES", 128)
    with pytest.raises(SystemExit, match="Not perfect after 128 episodes"):
        lesson.main()
    printed = capsys.readouterr().out
    for episodes in (112, 128):
        assert f"-- 20 after {episodes} episodes, perfect = False" in printed
    assert printed.count("-- 20 after") == 2
    assert not lesson.WEIGHTS_PATH.exists()


def test_training_from_scratch_solves_cartpole_and_the_eval_script_loads_it(
    in_folder, monkeypatch, capsys
):
    monkeypatch.setattr(lesson, "SEED", 1)
    lesson.main()
    printed = capsys.readouterr().out
    assert "perfect = False" in printed and "perfect = True" in printed
    assert "-- 475 after" in printed and "Perfect after" in printed
    assert f"Written: {lesson.WEIGHTS_PATH.name}" in printed
    assert Image.open(lesson.CURVE_PATH).size == (960, 480)
    assert sorted(p.name for p in in_folder.iterdir()) == ["c.png", "w.pth"]

    policy = cartpoleinference.load_policy(lesson.WEIGHTS_PATH)
    held_out = lesson.evaluate(policy, 100, 2_000_000, greedy=True)
    assert held_out.mean() >= 490
    before = lesson.evaluate(lesson.PolicyNetwork(), 100, 2_000_000, greedy=True)
    assert before.mean() < 100


def test_logits_of_either_sign_come_out_and_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    policy = lesson.PolicyNetwork(8)
    logits = policy(10 * torch.randn(100, 4))
    assert logits.min() < -0.5 and logits.max() > 0.5
    logits[:, 0].sum().backward()
    first, _, last = policy.layers
    assert (first.weight.grad != 0).all() and (last.weight.grad[0] != 0).all()


def test_an_observation_s_logits_do_not_depend_on_the_others_in_the_batch():
    torch.manual_seed(0)
    policy, observations = lesson.PolicyNetwork(8), torch.randn(5, 4)
    together = policy(observations).softmax(1)
    alone = [policy(observation[None]).softmax(1)[0] for observation in observations]
    assert torch.allclose(together, torch.stack(alone))


@pytest.fixture
def three_updates(in_folder, monkeypatch):
    """What three updates of main() played, from which seeds, and their gradients."""
    seen = {"played": [], "seeds": [], "gradients": []}
    play, step = lesson.play_episodes, torch.optim.Adam.step

    def spy_play(env, policy, seed, greedy=False):
        played = play(env, policy, seed, greedy)
        if env.num_envs == 4:  # not an evaluation
            seen["played"].append((copy.deepcopy(policy), *played))
            seen["seeds"].append(seed)
        return played

    def spy_step(optimizer):
        weights = optimizer.param_groups[0]["params"]
        seen["gradients"].append([weight.grad.clone() for weight in weights])
        return step(optimizer)

    monkeypatch.setattr(lesson, "play_episodes", spy_play)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    for name, value in [("EPISODES_PER_UPDATE", 4), ("MAX_EPISODES", 12)]:
        monkeypatch.setattr(lesson, name, value)
    with pytest.raises(SystemExit):
        lesson.main()
    return seen


def test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns(
    three_updates,
):
    assert len(three_updates["gradients"]) == 3
    for played, got in zip(
        three_updates["played"], three_updates["gradients"], strict=True
    ):
        policy, observations, actions, _, alive = played
        returns, log_probs = [], []
        for n in range(4):
            length = int(alive[:, n].sum())
            for t in range(length):
                # Every step brings a reward of 1.
                returns.append(sum(lesson.GAMMA**k for k in range(length - t)))
                logits = policy(observations[t, n][None])[0]
                log_probs.append(logits.log_softmax(0)[actions[t, n]])
        advantages = torch.tensor(returns) - sum(returns) / len(returns)
        loss = -(advantages * torch.stack(log_probs)).mean()
        plain = torch.autograd.grad(loss, list(policy.parameters()))
        for one, other in zip(got, plain, strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_only_the_first_episodes_start_from_the_seed(three_updates):
    assert three_updates["seeds"] == [lesson.SEED, None, None]


def test_the_final_score_is_that_of_greedy_play(in_folder, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "MAX_EPISODES", 160)
    with pytest.raises(SystemExit):
        lesson.main()
    printed = re.search(r"played greedily: ([\d.]+)", capsys.readouterr().out)[1]
    policy = lesson.load_policy(in_folder / "w_unsolved.pth")
    for greedy in (True, False):
        score = lesson.evaluate(policy, 100, lesson.HELD_OUT_SEED, greedy).mean()
        assert (abs(score - float(printed)) < 0.06) == greedy


def test_the_same_seed_gives_the_same_weights_bit_for_bit(in_folder, monkeypatch):
    monkeypatch.setattr(lesson, "MAX_EPISODES", 96)
    monkeypatch.setattr(lesson, "HELD_OUT_EPISODES", 2)
    weights = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(lesson, "SEED", seed)
        with pytest.raises(SystemExit):
            lesson.main()
        policy = lesson.load_policy(in_folder / "w_unsolved.pth")
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_with_one_episode_an_update_it_learns_too(in_folder, monkeypatch):
    monkeypatch.setattr(lesson, "EPISODES_PER_UPDATE", 1)
    monkeypatch.setattr(lesson, "LEARNING_RATE", 0.01)
    monkeypatch.setattr(lesson, "MAX_EPISODES", 150)
    with pytest.raises(SystemExit):
        lesson.main()
    policy = lesson.load_policy(in_folder / "w_unsolved.pth")
    assert lesson.evaluate(policy, 50, 2_000_000, greedy=True).mean() > 150


def test_the_shipped_weights_balance_on_held_out_seeds():
    policy = lesson.load_policy(ROOT / "cartpole_reinforce.pth")
    scores = lesson.evaluate(policy, 100, lesson.HELD_OUT_SEED, greedy=True)
    assert scores.mean() >= 490


def test_importing_trains_nothing_and_writes_nothing(tmp_path):
    for name in ("train_cartpole.py", "cartpoleinference.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import train_cartpole, cartpoleinference"],
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
    monkeypatch.setattr(cartpoleinference, "GIF_PATH", tmp_path / "show.gif")
    cartpoleinference.main()
    printed = capsys.readouterr().out
    greedy, sampled, random = (
        float(line.split()[1])
        for line in printed.splitlines()
        if line.split()[:1] in (["greedy"], ["sampled"], ["random"])
    )
    assert greedy >= 490 and sampled >= 450 and 15 < random < 30
    assert "show.gif" in printed
    gif = Image.open(tmp_path / "show.gif")  # equal frames in a row are stored as one
    frames = ImageSequence.Iterator(gif)
    assert sum(frame.info["duration"] for frame in frames) == 500 * 20


def test_the_close_button_of_the_window_ends_the_episode(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = gym.make(lesson.ENV_ID, render_mode="human")
    steps = []

    def closed_at_step_5(observations):
        steps.append(observations)
        if len(steps) == 5:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return to_the_right(observations)

    score, frames = cartpoleinference.play_one_episode(closed_at_step_5, env)
    env.close()
    assert (score, frames) == (5, [None] * 5)


# ------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    done = run_copy(tmp_path, "cartpoleinference.py")
    assert_one_plain_line(done, "FileNotFoundError", "python train_cartpole.py")


class Bomb:
    """Unpickling this would create the file `boom`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "boom"),)


BAD_FILES = ["damaged", "empty", "foreign", "other env", "NaN", "infinite", "code"]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_weights_file_is_refused_in_one_line_and_nothing_runs(tmp_path, kind):
    path = tmp_path / "bad.pth"
    shipped = torch.load(ROOT / "cartpole_reinforce.pth", weights_only=True)
    if kind == "damaged":
        path.write_bytes((ROOT / "cartpole_reinforce.pth").read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save(torch.nn.Linear(4, 2).state_dict(), path)
    elif kind == "other env":
        torch.save({**shipped, "env_id": "Acrobot-v1"}, path)
    elif kind in ("NaN", "infinite"):
        shipped["weights"]["layers.2.bias"][0] = float(kind[:3])
        torch.save(shipped, path)
    else:
        torch.save({**shipped, "weights": Bomb(tmp_path)}, path)
    with pytest.raises(SystemExit) as stopped:
        lesson.load_policy(path)
    assert "no usable CartPole-v1 policy" in stopped.value.code
    assert "bad.pth" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "boom").exists()


def test_a_small_file_that_claims_a_huge_network_builds_only_what_it_holds(tmp_path):
    shipped = torch.load(ROOT / "cartpole_reinforce.pth", weights_only=True)
    torch.save({**shipped, "hidden_units": 10**12}, tmp_path / "big.pth")
    assert lesson.load_policy(tmp_path / "big.pth").layers[0].out_features == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEARNING_RATE", -0.01),
        ("LEARNING_RATE", 0),
        ("LEARNING_RATE", float("nan")),
        ("MAX_EPISODES", 0),
        ("EPISODES_PER_UPDATE", 0),
        ("CHECK_EPISODES", 0),
        ("HELD_OUT_EPISODES", 0),
        ("REPORT_EVERY", 0),
        ("GAMMA", 1.1),
        ("HIDDEN_UNITS", 0),
        ("SEED", -1),
        ("SEED", 500_000),
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


@pytest.mark.parametrize("name", ["WEIGHTS_PATH", "CURVE_PATH"])
def test_a_folder_that_is_not_there_is_refused_before_the_run_and_not_after_it(
    in_folder, monkeypatch, capsys, name
):
    monkeypatch.setattr(lesson, name, in_folder / "nowhere" / "file")
    with pytest.raises(SystemExit, match="folders"):
        lesson.main()
    assert capsys.readouterr().out == ""


def test_several_impossible_constants_are_named_together_without_a_traceback(tmp_path):
    done = run_copy(
        tmp_path,
        "train_cartpole.py",
        ("GAMMA = 0.99", "GAMMA = 2"),
        ("LEARNING_RATE = 0.02", "LEARNING_RATE = -1"),
        ("MAX_EPISODES = 4_000", "MAX_EPISODES = 0"),
    )
    assert_one_plain_line(done, "GAMMA", "LEARNING_RATE", "MAX_EPISODES")


def test_a_spent_budget_is_said_ends_with_status_1_and_keeps_the_good_weights(tmp_path):
    (tmp_path / "cartpole_reinforce.pth").write_bytes(b"good")
    done = run_copy(
        tmp_path, "train_cartpole.py", ("MAX_EPISODES = 4_000", "MAX_EPISODES = 32")
    )
    assert_one_plain_line(done, "Not perfect after 32 episodes")
    assert (tmp_path / "cartpole_reinforce.pth").read_bytes() == b"good"
    assert lesson.load_policy(tmp_path / "cartpole_reinforce_unsolved.pth")


def test_ctrl_c_keeps_the_run_under_another_name(tmp_path):
    (tmp_path / "train_cartpole.py").write_text(
        (ROOT / "train_cartpole.py").read_text()
    )
    (tmp_path / "cartpole_reinforce.pth").write_bytes(b"good")
    training = subprocess.Popen(
        [sys.executable, "-u", "train_cartpole.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in training.stdout:
        if line.split()[1:2] == ["48"]:  # episodes: the first line of the table
            break
    training.send_signal(signal.SIGINT)
    printed, errors = training.communicate(timeout=60)
    assert (training.returncode, errors) == (1, "Stopped.\n")
    assert "kept in cartpole_reinforce_interrupted.pth" in printed
    assert (tmp_path / "cartpole_reinforce.pth").read_bytes() == b"good"
    assert lesson.load_policy(tmp_path / "cartpole_reinforce_interrupted.pth")


@pytest.mark.parametrize("place", ["reinforce_loss", "evaluate"])
def test_an_error_in_the_loop_or_at_the_end_keeps_the_run_and_is_shown(
    in_folder, monkeypatch, place
):
    def fails(*arguments, **named):
        raise MemoryError("too big")

    monkeypatch.setattr(lesson, "MAX_EPISODES", 16)
    monkeypatch.setattr(lesson, place, fails)
    with pytest.raises(MemoryError, match="too big"):
        lesson.main()
    names = sorted(path.name for path in in_folder.iterdir())
    assert names == ["c_interrupted.png", "w_interrupted.pth"]
    assert lesson.load_policy(in_folder / "w_interrupted.pth")


def test_a_crash_while_saving_leaves_the_old_weights_whole(in_folder, monkeypatch):
    lesson.WEIGHTS_PATH.write_bytes(b"good")

    def half_written(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        lesson.save_run(lesson.PolicyNetwork(), [10.0], "")
    assert lesson.WEIGHTS_PATH.read_bytes() == b"good"


def test_a_saved_file_does_not_depend_on_where_it_was_written_first(in_folder):
    policy = lesson.PolicyNetwork()
    contents = []
    for _ in range(2):
        lesson.save_run(policy, [10.0], "")
        contents.append(lesson.WEIGHTS_PATH.read_bytes())
    assert contents[0] == contents[1]
