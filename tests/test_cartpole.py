"""Tests of lesson 1: train_cartpole.py and cartpoleinference.py.

tests/test_contract.py tests what all lessons promise: refusals, whole files, stopping.
"""

import contextlib
import copy
import importlib
import itertools
import os
import re
import signal
import sys

import gymnasium as gym
import nbformat
import numpy as np
import pygame
import pytest
import torch
from lessons import LESSONS, ROOT, copy_lesson, quiet_environment, spy_on
from nbclient import NotebookClient
from PIL import Image, ImageSequence

import cartpoleinference
import train_cartpole as lesson

CARTPOLE = LESSONS["cartpole"]
SHIPPED = ROOT / lesson.WEIGHTS_PATH.name


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    monkeypatch.setattr(lesson, "WEIGHTS_PATH", tmp_path / "w.pth")
    monkeypatch.setattr(lesson, "CURVE_PATH", tmp_path / "c.png")
    show_in(monkeypatch, window=False, path=tmp_path / "show.gif")
    return tmp_path


def show_in(monkeypatch, window, path=None):
    """Let the eval script show its episode in a window that nobody sees, or a GIF."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(cartpoleinference, "has_display", lambda: window)
    monkeypatch.setattr(cartpoleinference, "GIF_PATH", path)


@pytest.fixture
def settings(monkeypatch):
    """A function that sets Settings of train_cartpole.py for one test."""

    def use(**values):
        for name, value in values.items():
            monkeypatch.setattr(lesson, name, value)

    return use


def environment(copies):
    """The environment that main() plays in."""
    return gym.make_vec(lesson.ENV_ID, num_envs=copies)


def misses_its_aim():
    """Run the lesson to its end, which is not a perfect policy; give its one line."""
    with pytest.raises(SystemExit) as end:
        lesson.main()
    return end.value.code


def to_the_right(observations):
    """A policy that prefers the push to the right."""
    return torch.tensor([[0.0, 0.5]]).repeat(len(observations), 1)


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


class ExampleEnv:
    """The example of the lesson: two episodes, of 2 and of 3 steps, then autoreset."""

    num_envs = 2

    def reset(self, seed=None):
        self.t = 0
        return np.zeros((2, 4), np.float32), {}

    def step(self, actions):
        assert self.t < 3, "both episodes have ended"
        self.t += 1
        terminated, truncated = np.diag([self.t == 2, self.t == 3])
        return np.zeros((2, 4), np.float32), np.ones(2), terminated, truncated, {}


def test_the_example_of_the_docstrings_goes_through_all_functions(settings):
    _, _, rewards, alive = lesson.play_episodes(ExampleEnv(), to_the_right, seed=0)
    assert rewards.tolist() == [[1, 1], [1, 1], [0, 1]]
    assert alive.tolist() == [[True, True], [True, True], [False, True]]
    assert rewards.dtype == torch.float32
    returns = lesson.returns_to_go(rewards, 0.5)
    assert returns.tolist() == [[1.5, 1.75], [1, 1.5], [0, 1]]
    assert returns[alive].tolist() == [1.5, 1.75, 1, 1.5, 1]
    assert returns[alive].mean().item() == pytest.approx(1.35)
    advantages = lesson.subtract_mean(returns[alive])
    assert advantages.tolist() == pytest.approx([0.15, 0.4, -0.35, 0.15, -0.35])
    log_probs = torch.tensor([0.5, 0.8, 0.5, 0.5, 0.5]).log().requires_grad_()
    loss = lesson.reinforce_loss(log_probs, advantages)
    assert loss.item() == pytest.approx(-0.0376, abs=5e-5)
    loss.backward()
    assert log_probs.grad.tolist() == pytest.approx((-advantages / 5).tolist())

    settings(GAMMA=0.5)
    policy = lesson.PolicyNetwork(8)
    for weight in policy.parameters():
        torch.nn.init.zeros_(weight)  # each action has the probability 1/2
    scores, distribution, loss = next(lesson.train(policy, ExampleEnv()))
    assert distribution.probs.tolist() == [[0.5, 0.5]] * 5
    assert scores.tolist() == [2, 3] and loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 30])
def test_returns_to_go_equals_the_double_loop(steps):
    torch.manual_seed(0)
    rewards, gamma = torch.randn(steps, 4), 0.9
    expected = torch.zeros_like(rewards)
    for t in range(steps):
        for later in range(t, steps):
            expected[t] += gamma ** (later - t) * rewards[later]
    assert torch.allclose(lesson.returns_to_go(rewards, gamma), expected, atol=1e-5)


def test_one_step_makes_a_good_action_more_likely_and_a_bad_one_less_likely():
    for sign in (1.0, -1.0):
        logits = torch.zeros(2, requires_grad=True)
        loss = lesson.reinforce_loss(logits.log_softmax(0)[:1], torch.tensor([sign]))
        loss.backward()
        after = (logits - 0.1 * logits.grad).softmax(0)[0]
        assert (after > 0.5) == (sign > 0)


# The policy in the three states of two_step_game, and every way to play it.
LOGITS = torch.tensor([[1.5, -0.3], [-2.2, 0.6], [-1.1, -1.4]], requires_grad=True)
GAMES = list(itertools.product((0, 1), repeat=2))


def two_step_game(actions):
    """A game of two steps: state 0, then state 1 + a_0. Log-probs and rewards (2,)."""
    first, second = actions
    log_probs = LOGITS.log_softmax(1)
    rewards = torch.tensor(
        [[1.0, -2.0][first], [[3.0, 0.0], [-1.0, 5.0]][first][second]]
    )
    return torch.stack([log_probs[0, first], log_probs[1 + first, second]]), rewards


def exact_gradient(gamma):
    """The gradient of the expected discounted return, over every way to play."""
    objective = 0
    for game in GAMES:
        log_probs, rewards = two_step_game(game)
        objective += log_probs.sum().exp() * (rewards[0] + gamma * rewards[1])
    return torch.autograd.grad(objective, LOGITS)[0]


def expected_gradient(gamma, advantages, episodes=1):
    """The mean of the lesson's sampled gradients, over every way to play a batch."""
    total = 0
    for batch in itertools.product(GAMES, repeat=episodes):
        played = [two_step_game(game) for game in batch]
        log_probs, rewards = (torch.stack(p, 1) for p in zip(*played, strict=True))
        returns = lesson.returns_to_go(rewards, gamma).flatten()
        loss = lesson.reinforce_loss(log_probs.flatten(), advantages(returns))
        probability = log_probs.sum().exp().detach()
        gradient = torch.autograd.grad(loss, LOGITS)[0]
        # The loss is a mean over 2 steps, and its minimum the objective's maximum.
        total += -2 * probability * gradient
    return total


@pytest.mark.parametrize(
    ("gamma", "advantages"),
    [
        (1.0, lambda returns: returns[:1].expand(2)),
        (1.0, lambda returns: returns),
        (1.0, lambda returns: returns - 3.0),
        (0.5, lambda returns: torch.tensor([1.0, 0.5]) * (returns - 0.7)),
    ],
    ids=["equation (1)", "equation (2)", "a baseline", "gamma, gamma^t, a baseline"],
)
def test_the_expected_gradient_is_exactly_that_of_the_return_with(gamma, advantages):
    exact = exact_gradient(gamma)
    assert exact.abs().max() > 0.1
    assert torch.allclose(expected_gradient(gamma, advantages), exact, atol=1e-5)


def test_the_error_of_the_batch_mean_as_a_baseline_falls_as_1_over_episodes():
    one, two, three = (
        expected_gradient(1.0, lesson.subtract_mean, episodes) - exact_gradient(1.0)
        for episodes in (1, 2, 3)
    )
    assert one.abs().max() > 0.1
    assert torch.allclose(two, one / 2, atol=1e-5)
    assert torch.allclose(three, one / 3, atol=1e-5)


# ------------------------------------------------------------------------------------
# The network, and playing
# ------------------------------------------------------------------------------------


def test_logits_of_either_sign_come_out_and_every_weight_gets_a_gradient():
    torch.manual_seed(0)
    policy, observations = lesson.PolicyNetwork(8), 10 * torch.randn(100, 4)
    logits = policy(observations)
    assert logits.min() < -0.5 and logits.max() > 0.5
    assert torch.allclose(policy(observations[:1]), logits[:1])  # each by itself
    logits[:, 0].sum().backward()
    first, _, last = policy.layers
    assert (first.weight.grad != 0).all() and (last.weight.grad[0] != 0).all()


def test_observation_and_action_of_one_index_belong_together():
    torch.manual_seed(0)
    policy = lesson.PolicyNetwork(16)
    batch = lesson.play_episodes(environment(4), policy, seed=3)
    observations, actions, _, alive = batch
    single = gym.make(lesson.ENV_ID).unwrapped
    for t, column in alive[1:].nonzero().tolist():
        single.reset()
        single.state = observations[t, column].double().numpy()
        following, *_ = single.step(actions[t, column].item())
        assert following == pytest.approx(observations[t + 1, column].numpy(), abs=1e-5)


def test_greedy_play_takes_the_most_likely_action_and_sampling_samples():
    batch = lesson.play_episodes(environment(4), to_the_right, greedy=True, seed=0)
    assert (batch[1] == 1).all()
    torch.manual_seed(0)
    batch = lesson.play_episodes(environment(500), to_the_right, seed=0)
    share = batch[1][batch[3]].float().mean().item()
    assert share == pytest.approx(1 / (1 + np.exp(-0.5)), abs=0.02)  # softmax


# ------------------------------------------------------------------------------------
# The algorithm, and a whole run
# ------------------------------------------------------------------------------------


def test_each_update_is_that_of_newly_sampled_episodes_and_of_their_own_returns(
    settings, monkeypatch
):
    settings(SEED=5, GAMMA=0.9, LEARNING_RATE=0.02)
    # Its step is the gradient times the rate; that of Adam has a size of its own.
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    torch.manual_seed(0)
    policy = lesson.PolicyNetwork(16)
    batches = spy_on(monkeypatch, lesson, "play_episodes")
    updates = lesson.train(policy, environment(4))
    for number in range(3):
        before = copy.deepcopy(policy)
        next(updates)
        observations, actions, _, alive = batches[number]["return"]
        returns, log_probs = [], []
        for n in range(4):
            length = int(alive[:, n].sum())
            for t in range(length):
                # Every step brings a reward of 1.
                returns.append(sum(0.9**k for k in range(length - t)))
                logits = before(observations[t, n][None])[0]
                log_probs.append(logits.log_softmax(0)[actions[t, n]])
        advantages = torch.tensor(returns) - sum(returns) / len(returns)
        (-(advantages * torch.stack(log_probs)).mean()).backward()
        for old, new in zip(before.parameters(), policy.parameters(), strict=True):
            assert torch.allclose((old - new) / 0.02, old.grad, atol=1e-4)
    assert [batch["seed"] for batch in batches] == [5, None, None]
    assert not any(batch["greedy"] for batch in batches)


def test_it_goes_on_until_every_greedy_episode_of_the_check_reaches_the_full_score(
    in_folder, settings, monkeypatch
):
    settings(SOLVED_SCORE=0, EPISODES_PER_UPDATE=50, MAX_EPISODES=1_000)
    settings(CHECK_EPISODES=3, HELD_OUT_EPISODES=2)
    scores = iter([[500.0, 499, 500], [500.0, 500, 500], [500.0, 400]])
    evaluate = lambda *_, **__: torch.tensor(next(scores))  # noqa: E731
    monkeypatch.setattr(lesson, "evaluate", evaluate)
    lesson.main()
    checkpoint = torch.load(in_folder / "w.pth", weights_only=True)
    assert checkpoint["episodes"] == 150  # the first check is after 100 episodes
    assert checkpoint["greedy_score"] == 450


def test_the_final_score_is_that_of_greedy_play_on_held_out_episodes(
    in_folder, settings, monkeypatch, capsys
):
    settings(SOLVED_SCORE=0, MAX_EPISODES=112, EPISODES_PER_UPDATE=56)
    settings(CHECK_EPISODES=20, HELD_OUT_EPISODES=30)
    calls = spy_on(monkeypatch, lesson, "evaluate")
    assert "112 episodes" in misses_its_aim()
    check, final = calls
    assert check["greedy"] and final["greedy"]
    assert (check["episodes"], final["episodes"]) == (20, 30)
    assert final["seed"] == lesson.HELD_OUT_SEED not in (check["seed"], lesson.SEED)
    printed = re.search(r"played greedily: ([\d.]+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(final["return"].mean().item(), abs=0.06)


def test_training_from_scratch_gives_a_perfect_policy_that_the_loader_reads(
    in_folder, settings, capsys
):
    settings(SEED=0, GAMMA=0.99, LEARNING_RATE=0.02, EPISODES_PER_UPDATE=16)
    settings(HIDDEN_UNITS=64, MAX_EPISODES=800, CHECK_EPISODES=200)
    lesson.WEIGHTS_PATH.write_bytes(b"older weights")
    lesson.main()
    printed = capsys.readouterr().out
    assert "Perfect after" in printed and "Replaced" in printed
    assert sorted(p.name for p in in_folder.iterdir()) == ["c.png", "w.pth"]
    assert Image.open(lesson.CURVE_PATH).size == (960, 480)
    scores = lesson.evaluate(lesson.load_policy(in_folder / "w.pth"), 100, 7, True)
    assert scores.mean() > 490


def test_the_shipped_policy_holds_the_pole_for_500_steps_of_which_none_is_lost():
    policy = lesson.load_policy(SHIPPED)
    batch = lesson.play_episodes(environment(100), policy, 1_000_000, greedy=True)
    assert batch[2].sum(0).mean() >= 490
    assert batch[3].shape == (500, 100) and batch[3].float().mean() >= 0.98


def test_the_edits_that_the_docstring_gives_for_another_task_are_enough(
    in_folder, monkeypatch, capsys
):
    task = {"ENV_ID": "Acrobot-v1", "FULL_SCORE": -500, "LEARNING_RATE": 0.005}
    short = CARTPOLE.short | {"MAX_EPISODES": 8, "GIF_EVERY": 20}
    copy_lesson(in_folder, CARTPOLE, **task, **short)
    for script, old, new in [
        ("train_cartpole.py", "nn.Linear(4, ", "nn.Linear(6, "),
        ("train_cartpole.py", "(hidden_units, 2)", "(hidden_units, 3)"),
        ("cartpoleinference.py", "(len(observations), 2)", "(len(observations), 3)"),
    ]:
        text = (in_folder / script).read_text()
        assert text.count(old) == 1
        (in_folder / script).write_text(text.replace(old, new))
    monkeypatch.syspath_prepend(in_folder)
    for name in ("train_cartpole", "cartpoleinference"):
        monkeypatch.delitem(sys.modules, name)
    trains = importlib.import_module("train_cartpole")
    shows = importlib.import_module("cartpoleinference")
    monkeypatch.setattr(shows, "has_display", lambda: False)
    with pytest.raises(SystemExit, match="Not perfect after"):
        trains.main()
    unsolved = in_folder / "cartpole_reinforce_unsolved.pth"
    unsolved.rename(in_folder / "cartpole_reinforce.pth")
    shows.main()
    assert "of Acrobot-v1" in capsys.readouterr().out
    assert (in_folder / "cartpole.gif").exists()


# ------------------------------------------------------------------------------------
# The evaluation script, and watching
# ------------------------------------------------------------------------------------


def seconds_of(path):
    """How long a GIF runs; equal frames in a row are stored as one."""
    frames = ImageSequence.Iterator(Image.open(path))
    return sum(frame.info["duration"] for frame in frames) / 1000


def test_without_a_display_the_eval_script_prints_its_table_and_writes_a_gif(
    in_folder, settings, monkeypatch, capsys
):
    settings(WEIGHTS_PATH=SHIPPED, HELD_OUT_EPISODES=30)
    monkeypatch.setattr(cartpoleinference, "GIF_EVERY", 10)
    cartpoleinference.main()
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    bounds = {"greedy": (490, 500), "sampled": (450, 500), "random": (15, 30)}
    for name, (low, high) in bounds.items():
        mean, std, error, minimum = [float(number) for number in rows[name][1:5]]
        assert low <= mean <= high and minimum <= mean
        assert error == pytest.approx(std / 30**0.5, abs=0.02)
    assert str(in_folder / "show.gif") in printed
    assert seconds_of(in_folder / "show.gif") == 10  # as long as 500 steps take


def test_the_window_shows_a_pole_that_leans_until_its_close_button_is_pressed(
    monkeypatch,
):
    show_in(monkeypatch, window=True)
    seen = []

    def closed_at_step_3(observations):
        seen.append(observations[0])
        if len(seen) == 3:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return to_the_right(observations)

    line = cartpoleinference.show(closed_at_step_3, "title", [], [])
    assert (line, len(seen)) == ("Stopped the episode.", 3)
    assert seen[0][2].item() == pytest.approx(cartpoleinference.LEAN)


def test_ctrl_c_is_heard_although_pygame_swallows_exceptions_at_its_start(
    in_folder, settings, monkeypatch, capsys
):
    settings(WEIGHTS_PATH=SHIPPED, HELD_OUT_EPISODES=2)
    show_in(monkeypatch, window=True, path=in_folder / "none.gif")
    open_window, handler = pygame.display.set_mode, signal.getsignal(signal.SIGINT)

    def swallowing(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return open_window(*arguments)

    monkeypatch.setattr(pygame.display, "set_mode", swallowing)
    cartpoleinference.main()
    assert capsys.readouterr().out.endswith("Stopped the episode.\n")
    assert signal.getsignal(signal.SIGINT) is handler


def test_watch_every_collects_episodes_in_one_gif_and_never_disturbs_the_training(
    in_folder, settings, monkeypatch
):
    settings(MAX_EPISODES=64, EPISODES_PER_UPDATE=16, HELD_OUT_EPISODES=2)
    weights, shown = [], spy_on(monkeypatch, cartpoleinference, "show")
    for watch_every, name in [(0, "none"), (2, "a.gif"), (2, "nowhere/a.gif")]:
        settings(WATCH_EVERY=watch_every)
        show_in(monkeypatch, window=False, path=in_folder / name)
        misses_its_aim()
        policy = lesson.load_policy(in_folder / "w_unsolved.pth")
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert len(shown) == 4 and "32" in shown[0]["title"] and "64" in shown[1]["title"]
    film = shown[0]["film"]
    assert film is shown[1]["film"]
    seconds = len(film) * cartpoleinference.GIF_EVERY / 50
    assert seconds_of(in_folder / "a.gif") == pytest.approx(seconds)


def test_the_scripts_run_in_a_notebook_which_shows_curve_and_gif(tmp_path, monkeypatch):
    for name, value in quiet_environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DISPLAY", raising=False)
    copy_lesson(tmp_path, CARTPOLE, **CARTPOLE.short, GIF_EVERY=20)
    (tmp_path / SHIPPED.name).write_bytes(SHIPPED.read_bytes())
    book = nbformat.v4.new_notebook()
    for script in CARTPOLE.scripts:
        book.cells.append(nbformat.v4.new_code_cell(f"%run {script}"))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=600, resources=resources).execute()
    end = str(CARTPOLE.short["MAX_EPISODES"])
    expected = [(end, "image/png"), ("greedy", "image/gif")]
    for cell, (line, picture) in zip(book.cells, expected, strict=True):
        text = "".join(output.get("text", "") for output in cell.outputs)
        assert line in text and "%tb" not in text, text
        assert [picture in o.get("data", {}) for o in cell.outputs].count(True) == 1
