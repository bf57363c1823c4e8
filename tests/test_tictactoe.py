"""Tests of lesson 2: tictactoe_env.py, tictactoe_actorcritic.py, tictactoe_eval.py."""

import copy
import io
import itertools
import os
import re
import sys
import time
import warnings
from functools import cache
from unittest import mock

import gymnasium as gym
import numpy as np
import pexpect
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lessons import ROOT, spy_on
from torch.nn.functional import one_hot

import tictactoe_actorcritic as lesson
import tictactoe_env as game
import tictactoe_eval as card

torch.set_num_threads(1)  # the networks are so small that more threads only wait

# ------------------------------------------------------------------------------------
# The rules once more, in plain Python and another way round: text boards, X and O
# ------------------------------------------------------------------------------------

WINS = ["012", "345", "678", "036", "147", "258", "048", "246"]


def winner(text):
    """The mark that has three in a row on a board such as "XO..X....", or None."""
    for a, b, c in (map(int, line) for line in WINS):
        if text[a] == text[b] == text[c] != ".":
            return text[a]
    return None


def seen_by(text, mark):
    """The observation that the player of `mark` should get."""
    return [0 if cell == "." else 1 if cell == mark else -1 for cell in text]


def put(text, cell, mark):
    return text[:cell] + mark + text[cell + 1 :]


def other(mark):
    return "O" if mark == "X" else "X"


def every_line(choose, agent, text=".........", mark="X", chance=1.0):
    """(result for the agent, chance) of each line of play, by plain recursion."""
    if winner(text) or "." not in text:
        yield {agent: 1, None: 0}.get(winner(text), -1), chance
        return
    cells = [cell for cell in range(9) if text[cell] == "."]
    if mark == agent:
        cells = [choose(seen_by(text, mark))]
    for cell in cells:
        after = put(text, cell, mark)
        yield from every_line(choose, agent, after, other(mark), chance / len(cells))


def count(results):
    results = list(results)
    return [results.count(outcome) for outcome in (1, 0, -1)]


# ------------------------------------------------------------------------------------
# The environment
# ------------------------------------------------------------------------------------


def test_gymnasiums_own_checker_has_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("TicTacToe-v0").unwrapped)
        envs = gym.make_vec("TicTacToe-v0", num_envs=3)
    assert envs.reset(seed=1)[0] in envs.observation_space


def test_each_move_in_every_position_does_what_the_rules_say():
    env, states = gym.make("TicTacToe-v0"), set()

    @cache
    def games_from(text, mark):
        states.add(text)
        games = 0
        for cell in range(9):
            if text[cell] != ".":
                continue
            env.reset()
            env.unwrapped.board = np.array(seen_by(text, mark), dtype=np.int8)
            seen, reward, ended, truncated, info = env.step(cell)
            after = put(text, cell, mark)
            assert seen.tolist() == seen_by(after, other(mark))
            assert reward == (1 if winner(after) else 0)  # of the mover
            assert ended == (winner(after) is not None or "." not in after)
            assert not truncated and not info["illegal_move"]
            free = [here == "." and not ended for here in after]
            assert info["action_mask"].tolist() == free
            if ended:
                states.add(after)
            games += 1 if ended else games_from(after, other(mark))
        return games

    assert games_from(".........", "X") == 255_168
    assert len(states) == 5_478


def test_one_board_and_many_agree_in_everything_on_thousands_of_games():
    rng = np.random.default_rng(0)
    many = gym.make_vec("TicTacToe-v0", num_envs=64)
    single = SyncVectorEnv([game.TicTacToeEnv] * 64, autoreset_mode="Disabled")
    assert data_equivalence(many.reset(), single.reset(), exact=True)
    boards, games, illegal = np.zeros((64, 9)), 0, 0
    for _ in range(130):
        # One move in 100 is any cell at all, taken or not; the others are legal.
        actions = (rng.random((64, 9)) * ((boards == 0) + 1e-9)).argmax(axis=1)
        actions = np.where(rng.random(64) < 0.01, rng.integers(9, size=64), actions)
        results = [envs.step(actions) for envs in (many, single)]
        assert data_equivalence(*results, exact=True)
        boards, rewards, ended, _, _ = results[0]
        games, illegal = games + ended.sum(), illegal + (rewards < 0).sum()
        if ended.any():
            options = {"reset_mask": ended}
            boards, other_boards = (e.reset(options=options)[0] for e in (many, single))
            assert np.array_equal(boards, other_boards)
    assert games > 900 and illegal > 10


def test_a_taken_cell_ends_the_game_as_a_loss_of_the_mover():
    env = gym.make("TicTacToe-v0")
    board, info = env.reset()
    assert not board.any() and info["action_mask"].all()
    env.step(4)[0][:] = 1  # who scribbles on it does not change the game
    board, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated) == (-1, True, False)
    assert info["illegal_move"] and not info["action_mask"].any()
    assert board.tolist() == [0, 0, 0, 0, -1, 0, 0, 0, 0]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(1)


@pytest.mark.parametrize("action", [9, -1, 4.0, "4", None, [[0], [1]], [0]])
def test_an_action_that_is_no_cell_is_a_clear_error_and_changes_nothing(action):
    env, envs = game.TicTacToeEnv(), game.TicTacToeVectorEnv(2)
    env.reset()
    envs.reset()
    with pytest.raises(gym.error.InvalidAction):
        env.step(action)
    with pytest.raises(gym.error.InvalidAction):
        envs.step(action if isinstance(action, list) else np.array([action] * 2))
    assert not env.board.any() and not envs.boards.any()


@pytest.mark.parametrize("kind", [game.TicTacToeEnv, game.TicTacToeVectorEnv])
def test_a_step_before_the_first_game_asks_for_reset(kind):
    env = kind()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())


def test_human_mode_draws_by_itself_and_ansi_gives_the_text(capsys):
    human, ansi = (game.TicTacToeEnv(render_mode=mode) for mode in ("human", "ansi"))
    for env, prints in ((ansi, False), (human, True)):
        env.reset()
        env.step(4)
        env.step(0)
        assert ("O | 1 | 2" in capsys.readouterr().out) == prints
    assert ansi.render().splitlines()[0].split(" | ") == [" O", "1", "2 "]
    with pytest.raises(ValueError, match="render_mode"):
        game.TicTacToeEnv(render_mode="rgb_array")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, "SameStep"])
def test_another_autoreset_mode_is_refused_and_gymnasium_offers_it(mode):
    with pytest.raises(ValueError, match="vectorization_mode"):
        gym.make_vec("TicTacToe-v0", num_envs=2, autoreset_mode=mode)
    assert gym.make_vec("TicTacToe-v0", vectorization_mode="sync").reset()


def test_an_ended_board_stays_as_it_is():
    envs = game.TicTacToeVectorEnv(2, autoreset_mode="Disabled")
    envs.reset()
    envs.step(np.array([0, 0]))
    envs.step(np.array([0, 1]))  # board 0 ends by an illegal move
    boards, rewards, terminated, _, infos = envs.step(np.array([5, 5]))
    assert boards[0].tolist() == [-1] + [0] * 8
    assert boards[1].tolist() == [-1, 1, 0, 0, 0, -1, 0, 0, 0]
    assert (rewards[0], terminated.tolist()) == (0, [True, False])
    assert not infos["action_mask"][0].any() and not infos["illegal_move"].any()
    boards[:] = 0
    envs.reset(options={"reset_mask": terminated})
    assert not envs.boards[0].any() and envs.boards[1].any()
    assert terminated[0]  # what was handed out does not change


def test_the_script_shows_a_game_whose_moves_lead_to_the_result_it_says(capsys):
    for _ in range(20):
        game.main()
        printed, text = capsys.readouterr().out, "........."
        for step, (mark, cell) in enumerate(re.findall(r"([XO]) plays (\d)", printed)):
            assert text[int(cell)] == "." and mark == "XO"[step % 2]
            text = put(text, int(cell), mark)
        result = f"{winner(text)} wins" if winner(text) else "draw"
        assert result in printed.splitlines()[-1]


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def test_the_example_that_goes_through_the_lesson():
    # The two games of the comments of step 2; the learner moves first in game 0.
    def moves(*cells):
        cells = iter(cells)

        def policy(boards):
            chosen = [next(cells) for _ in boards]
            return 100.0 * one_hot(torch.tensor(chosen, dtype=torch.int64), 9)

        return policy

    learner, opponent = moves(0, 0, 1, 2, 2, 3), moves(4, 3, 8, 4, 1, 7)
    boards, masks, actions, moved, results = play(learner, opponent, 2, 0)
    assert boards[5, 1].tolist() == [1, -1, 1, 0, -1, 0, 0, 0, -1]
    assert masks[5, 1].tolist() == [0, 0, 0, 1, 0, 1, 1, 1, 0]
    assert actions[moved].tolist() == [0, 0, 1, 2, 2, 3]
    returns = results.expand_as(moved)[moved]
    assert returns.tolist() == [1, -1, 1, -1, 1, -1]
    values = torch.tensor([0.25, -0.5, 0.5, -0.25, 1, 0])
    advantages = lesson.subtract_values(returns, values)
    assert advantages.tolist() == [0.75, -0.5, 0.5, -0.75, 0, -1]
    distribution = lesson.Categorical(logits=torch.zeros(6, 2))
    loss = lesson.actor_loss(distribution.log_prob(torch.zeros(6)), advantages)
    bonus = lesson.entropy_bonus(distribution.entropy(), 0.25)
    error = lesson.critic_loss(values, returns)
    parts = [part.item() for part in (loss, bonus, error, loss - bonus + error)]
    assert parts == pytest.approx([-0.1155, 0.1733, 0.4375, 0.1487], abs=1e-4)


def test_the_docstring_cases_worked_by_hand():
    boards = np.array([[1, 1, 0, -1, -1, 0, 0, 0, 0]], dtype=np.int8)
    after, rewards, terminated, illegal = game.play_moves(boards, np.array([2]))
    assert after.tolist() == [[-1, -1, -1, 1, 1, 0, 0, 0, 0]]
    assert (rewards[0], terminated[0], illegal[0]) == (1, True, False)
    masked = lesson.mask_illegal(torch.tensor([5.0, 1.0]), torch.tensor([0, 1]))
    assert masked.tolist() == [-torch.inf, 1] and masked.softmax(0).tolist() == [0, 1]


def test_a_constant_bonus_is_best_served_by_the_policy_of_its_docstring():
    logits = (torch.tensor([1, 0.9]) / 0.25).requires_grad_()
    policy = lesson.Categorical(logits=logits)
    assert policy.probs.tolist() == pytest.approx([0.6, 0.4], abs=0.005)
    bonus = lesson.entropy_bonus(policy.entropy()[None], beta=0.25)
    objective = (policy.probs * torch.tensor([1, 0.9])).sum() + bonus
    assert torch.autograd.grad(objective, logits)[0].abs().max() < 1e-6


@pytest.mark.parametrize("detach", [True, False])
def test_without_a_detach_values_come_to_rest_half_an_entropy_too_high(detach):
    probs, returns = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([1.0, -1, 0])
    too_high = 0 if detach else -(probs * probs.log()).sum() / 2
    value = ((probs * returns).sum() + too_high).clone().requires_grad_()
    values, weights = value.expand(3), 3 * probs  # the losses are means over the moves
    advantages = lesson.subtract_values(returns, values) if detach else returns - values
    loss = lesson.actor_loss(weights * probs.log(), advantages)
    loss = loss + (weights * (returns - values) ** 2).mean()
    assert torch.autograd.grad(loss, value)[0].abs() < 1e-6


@pytest.mark.parametrize("lie", [1e38, torch.inf, torch.nan])
def test_no_logits_however_adversarial_let_an_illegal_move_through(lie):
    boards = torch.tensor(card.open_positions(), dtype=torch.int8)
    masks = torch.from_numpy(game.legal_moves(boards.numpy()))
    torch.manual_seed(0)
    logits = torch.where(masks == 1, 100 * torch.randn(len(boards), 9), lie)
    masked = lesson.mask_illegal(logits, masks)
    assert (masked.softmax(1)[masks == 0] == 0).all()
    for choose in (masked.argmax(1), lesson.Categorical(logits=masked).sample()):
        assert masks.gather(1, choose[:, None]).all()
    moves = lesson.best_moves(lambda observations: logits, boards.numpy())
    assert masks.gather(1, torch.from_numpy(moves)[:, None]).all()


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_the_expected_gradient_is_that_of_the_expected_result_with_any_value(value):
    logits = torch.tensor([0.5, -1.0, 0.2], requires_grad=True)
    probs, results = logits.softmax(0), torch.tensor([1.0, -1, 0])
    (exact,) = torch.autograd.grad((probs * results).sum(), logits, retain_graph=True)
    advantages = lesson.subtract_values(results, torch.full((3,), value))
    weights = 3 * probs.detach()  # the loss is a mean over the three moves
    loss = lesson.actor_loss(weights * probs.log(), advantages)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(-gradient, exact, atol=1e-6) and exact.abs().max() > 0.1


def change(monkeypatch, **settings):
    """Give the lesson's Settings of these names other values for this test."""
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)


def start():
    """New networks, and the updates of them that train() is going to make."""
    torch.manual_seed(0)
    actor, critic = lesson.ActorNetwork(8), lesson.CriticNetwork(8)
    env = gym.make_vec(lesson.ENV_ID, num_envs=lesson.GAMES_PER_UPDATE)
    return actor, critic, lesson.train(actor, critic, env)


def three_parts(actor, critic, games, beta):
    """The parts of the loss, move by move, over the legal moves only."""
    boards, masks, actions, moved, results = games
    parts = []
    for t, n in moved.nonzero().tolist():
        logits, legal = actor(boards[t, n][None])[0], masks[t, n].nonzero()[:, 0]
        probs = dict(zip(legal.tolist(), logits[legal].softmax(0), strict=True))
        advantage = results[n] - critic(boards[t, n][None])[0]
        entropy = -sum(p * p.log() for p in probs.values())
        policy = -advantage.detach() * probs[actions[t, n].item()].log()
        parts.append(torch.stack([policy, -beta * entropy, advantage**2]))
    return torch.stack(parts).mean(0)


def test_each_update_is_that_of_three_parts_while_rate_and_bonus_shrink(monkeypatch):
    change(monkeypatch, LEARNING_RATE=0.03, ENTROPY_BONUS=0.3, LAST_SHARE=0.3)
    change(monkeypatch, GAMES_PER_UPDATE=8, NUM_UPDATES=2, MAX_UPDATES=4)
    # Its step is the gradient times the rate; that of Adam has a size of its own.
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    calls = spy_on(monkeypatch, lesson, "play_games")
    actor, critic, updates = start()
    assert critic(torch.zeros(5, 9)).shape == (5,)  # (5, 1) minus (5,) would be (5, 5)
    for number, share in enumerate((1, 0.5, 0.3, 0.3)):
        before = copy.deepcopy(torch.nn.ModuleList([actor, critic]))
        distribution, loss = next(updates)
        parts = three_parts(*before, calls[number]["return"], 0.3 * share)
        parts.sum().backward()
        after = [*actor.parameters(), *critic.parameters()]
        for old, new in zip(before.parameters(), after, strict=True):
            assert torch.allclose((old - new) / (0.03 * share), old.grad, atol=1e-4)
        policy, bonus, _ = parts.tolist()
        assert loss.item() == pytest.approx(policy, abs=1e-5)
        entropy = distribution.entropy().mean().item()
        assert -0.3 * share * entropy == pytest.approx(bonus)


def lowest_free_cell(observations):
    return torch.arange(9.0, 0, -1).repeat(len(observations), 1) * 1000


def highest_free_cell(observations):
    return torch.arange(9.0).repeat(len(observations), 1) * 1000


def play(learner, opponent, games, random_chance):
    env = gym.make_vec("TicTacToe-v0", num_envs=games)
    learner_first = torch.arange(games) % 2 == 0
    chances = torch.full((games,), float(random_chance))
    return lesson.play_games(env, learner, opponent, learner_first, chances)


def test_collected_games_replay_move_for_move_with_the_right_seat_and_result():
    torch.manual_seed(0)
    networks = lesson.ActorNetwork(8), lesson.ActorNetwork(8)
    observations, masks, actions, learner_moved, results = play(*networks, 300, 0.5)
    env = gym.make("TicTacToe-v0")
    for column in range(300):
        board, info = env.reset()
        ended, learner_turn = False, column % 2 == 0
        for step in range(len(learner_moved)):
            assert learner_moved[step, column] == (learner_turn and not ended)
            if ended:
                continue
            assert observations[step, column].tolist() == board.tolist()
            assert masks[step, column].tolist() == info["action_mask"].tolist()
            board, reward, ended, _, info = env.step(actions[step, column].item())
            assert not info["illegal_move"]
            result = reward if learner_turn else -reward
            learner_turn = not learner_turn
        assert results[column] == result
    assert {-1.0, 1.0} <= set(results.tolist()) <= {-1.0, 0.0, 1.0}


def test_the_opponent_plays_its_policy_and_moves_at_random_only_when_told_to():
    torch.manual_seed(0)
    _, _, actions, moved, _ = play(lowest_free_cell, highest_free_cell, 400, 0)
    assert (actions[0, ::2] == 0).all() and (actions[0, 1::2] == 8).all()
    _, _, actions, moved, _ = play(lowest_free_cell, highest_free_cell, 4000, 1)
    assert (actions[0, moved[0]] == 0).all()
    openings = torch.bincount(actions[0, ~moved[0]], minlength=9) / 2000
    assert (openings - 1 / 9).abs().max() < 0.03
    _, _, actions, moved, _ = play(lowest_free_cell, highest_free_cell, 4000, 0.5)
    assert (actions[0, ~moved[0]] == 8).float().mean() == pytest.approx(5 / 9, abs=0.04)


def test_the_opponent_is_a_frozen_copy_and_is_renewed_only_when_due(monkeypatch):
    seen, real = [], lesson.play_games

    def spy(env, learner, opponent, learner_first, random_chances):
        sums = [net.layers[0].weight.sum().item() for net in (learner, opponent)]
        seen.append((*sums, learner_first.float().mean().item(), random_chances))
        return real(env, learner, opponent, learner_first, random_chances)

    monkeypatch.setattr(lesson, "play_games", spy)
    change(monkeypatch, REFRESH_EVERY=3, GAMES_PER_UPDATE=64, MAX_RANDOM_CHANCE=0.5)
    change(monkeypatch, NUM_UPDATES=8, MAX_UPDATES=8)
    list(start()[2])
    learner, opponent, first, chances = zip(*seen, strict=True)
    assert len(set(learner)) == 8 and set(first) == {0.5}
    assert opponent == tuple(learner[update - update % 3] for update in range(8))
    chances = torch.stack(chances)
    assert 0 <= chances.min() < 0.1 and 0.4 < chances.max() <= 0.5


@pytest.mark.parametrize("agent", "XO")
def test_every_line_of_play_equals_a_plain_recursion(agent):
    expected = list(every_line(lambda view: view.index(0), agent))
    counts, probabilities = lesson.play_every_line(lowest_free_cell, agent == "X")
    assert counts == count(result for result, _ in expected) and counts[2] > 0
    for outcome, probability in zip((1, 0, -1), probabilities, strict=True):
        chances = [chance for result, chance in expected if result == outcome]
        assert probability == pytest.approx(sum(chances))


# ------------------------------------------------------------------------------------
# Learning, and the report card
# ------------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    for name, file in (("ACTOR", "a.pth"), ("CRITIC", "c.pth"), ("CURVE", "curve.png")):
        monkeypatch.setattr(lesson, f"{name}_PATH", tmp_path / file)
    return tmp_path


def test_training_from_scratch_learns_to_lose_no_line_of_play(
    in_folder, monkeypatch, capsys
):
    change(monkeypatch, SEED=1, NUM_UPDATES=300, MAX_UPDATES=400, HIDDEN_UNITS=64)
    change(monkeypatch, LEARNING_RATE=0.01, ENTROPY_BONUS=0.25, LAST_SHARE=0.05)
    change(monkeypatch, GAMES_PER_UPDATE=512, REFRESH_EVERY=20, MAX_RANDOM_CHANCE=0.5)
    (in_folder / "a.pth").write_bytes(b"older")
    lesson.main()
    printed = capsys.readouterr().out
    names = sorted(path.name for path in in_folder.iterdir())
    assert names == ["a.pth", "c.pth", "curve.png"]
    assert "Replaced" in printed and str(lesson.CRITIC_PATH) in printed
    actor = card.load_actor(lesson.ACTOR_PATH)
    for first, possible in ((True, 0.9948), (False, 0.9164)):
        assert card.play_every_line(actor, first)[0][2] == 0
        assert card.play_every_line(actor, first)[1][0] > possible - 0.03
    assert card.play_every_line(card.untrained()[0], False)[0][2] > 50
    critic = card.load_critic(lesson.CRITIC_PATH)
    boards = torch.tensor(card.open_positions())
    truth = torch.tensor([card.minimax(board) for board in card.open_positions()])
    won, lost = critic(boards[truth == 1]).mean(), critic(boards[truth == -1]).mean()
    assert won > 0.3 and lost < won - 0.5


def test_the_shipped_agent_loses_no_line_of_play_and_wins_nearly_all_it_can():
    actor, met = lesson.load_actor(), {}

    def move(view):
        met[tuple(view)] = met.get(tuple(view), card.best_move(actor, view))
        return met[tuple(view)]

    for agent in "XO":
        counts, (win, draw, loss) = card.play_every_line(actor, agent == "X")
        assert counts == count(result for result, _ in every_line(move, agent))
        assert (counts[2], loss) == (0, 0) and win + draw == pytest.approx(1)
        best = card.best_possible(agent == "X")
        assert best - 0.015 <= win <= best + 1e-9  # sums of floats, added in some order
    assert card.met_positions(actor) == sorted(met)
    assert card.count_perfect(actor, sorted(met)) == len(met)


def test_perfect_play_is_also_right_where_three_in_a_row_lose(monkeypatch):
    def misere(boards, actions):
        boards, rewards, *rest = game.play_moves(boards, actions)
        return boards, -rewards, *rest

    monkeypatch.setattr(card, "play_moves", misere)
    for name in ("moves_from", "minimax", "best_win_probability"):
        monkeypatch.setattr(card, name, cache(getattr(card, name).__wrapped__))
    assert card.minimax((0,) * 9) == 0  # a draw, as is known of this game
    only_move_loses = (1, 1, 0, 1, -1, -1, -1, 1, -1)
    assert card.minimax(only_move_loses) == -1
    assert card.best_win_probability(only_move_loses) == 0
    assert 0.5 < card.best_possible(False) < 1


def test_perfect_moves_and_the_best_win_chance_equal_a_search_on_text_boards():
    views = []

    def after(text, mark):
        return [put(text, cell, mark) for cell in range(9) if text[cell] == "."]

    @cache
    def value(text, mark):  # 1 if `mark`, to move, can force a win, and so on
        if winner(text) or "." not in text:
            return -1 if winner(text) else 0
        view = tuple(seen_by(text, mark))
        views.append(view)
        values = [-value(board, other(mark)) for board in after(text, mark)]
        best = [value == max(values) for value in values]
        free = [cell for cell in range(9) if text[cell] == "."]
        assert card.minimax(view) == max(values)
        assert card.perfect_moves(view) == list(itertools.compress(free, best))
        return max(values)

    @cache
    def wins(text, mark, agent):
        if winner(text) or "." not in text:
            return float(winner(text) == agent)
        boards = after(text, mark)
        if mark == agent:
            safe = [board for board in boards if value(board, other(mark)) <= 0]
            return max(wins(board, other(mark), agent) for board in safe)
        return sum(wins(board, other(mark), agent) for board in boards) / len(boards)

    assert value(".........", "X") == 0
    assert card.open_positions() == sorted(views)
    for agent, first in (("X", True), ("O", False)):
        expected = wins(".........", "X", agent)
        assert card.best_possible(first) == pytest.approx(expected)


def test_the_report_card_is_exact_and_more_of_it_is_there_when_asked_for(
    monkeypatch, capsys
):
    monkeypatch.setattr(card, "SHOW_GAME", False)
    printed = []
    for full in (False, True):
        monkeypatch.setattr(card, "FULL_REPORT", full)
        card.main()
        printed.append(capsys.readouterr().out)
    assert printed[1].startswith(printed[0]) and "of 4,520 positions" in printed[1]
    rows = [line.split() for line in printed[0].splitlines()]
    rows = [row for row in rows if row[:1] in (["trained"], ["untrained"])]
    actors = lesson.load_actor(), card.untrained()[0]
    cases = itertools.product(actors, (True, False))
    for row, (actor, first) in zip(rows, cases, strict=True):
        counts, (win, _, _) = card.play_every_line(actor, first)
        assert [int(cell) for cell in row[2:6]] == [sum(counts), *counts]
        shares = [round(100 * share, 2) for share in (win, card.best_possible(first))]
        assert [float(cell) for cell in row[6:]] == shares


# ------------------------------------------------------------------------------------
# The game against a human
# ------------------------------------------------------------------------------------


def typed(monkeypatch, *answers):
    """From now on, these are the answers to input(); an exception is raised."""
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=answers))


def networks():
    return lesson.load_actor(), lesson.load_critic()


def test_a_game_needs_no_terminal_and_marks_the_winning_three(monkeypatch, capsys):
    lowest = lambda actor, board: int(np.flatnonzero(board == 0)[0])  # noqa: E731
    monkeypatch.setattr(card, "best_move", lowest)
    monkeypatch.setattr(card, "SEED", 0)  # the human begins
    typed(monkeypatch, "6", "4", "2", "1", "", "maybe", "NO ")  # as in a notebook
    card.play_until_bored(*networks(), lesson.load_actor())
    printed = capsys.readouterr().out
    assert "You win!" in printed and "Bye. Score: you 1, agent 0, draws 0" in printed
    assert printed.count("[X]") == 3


@pytest.mark.parametrize("problem", [EOFError(), RuntimeError("lost sys.stdin")])
def test_a_game_without_input_says_why_and_ends(monkeypatch, capsys, problem):
    typed(monkeypatch, problem)
    card.play_until_bored(*networks(), lesson.load_actor())
    printed = capsys.readouterr().out
    assert "can be typed" in printed and str(problem) in printed and "Bye" in printed


def test_h_gives_the_move_of_the_trained_agent_and_asks_again(monkeypatch, capsys):
    board = np.array([1, 1, 0, -1, -1, 0, 0, 0, 0], dtype=np.int8)
    typed(monkeypatch, "h", "H ", "7")
    assert card.ask_move(board, lesson.load_actor()) == 7
    advice = capsys.readouterr().out.splitlines()
    assert len(advice) == 2 and all(line.endswith(" 2.") for line in advice)


def test_one_can_play_against_the_agent_with_which_training_begins(monkeypatch):
    seen, board = [], torch.zeros(1, 9)

    def no_game(actor, critic, adviser):
        seen.extend([actor(board), adviser(board)])

    monkeypatch.setattr(card, "play_until_bored", no_game)
    monkeypatch.setattr(card, "SHOW_REPORT", False)
    for setting in (True, False):
        monkeypatch.setattr(card, "PLAY_UNTRAINED", setting)
        card.main()
    torch.manual_seed(lesson.SEED)
    at_first, trained = lesson.ActorNetwork()(board), lesson.load_actor()(board)
    assert all(map(torch.equal, seen, [at_first, trained, trained, trained]))


def test_a_wrong_key_that_the_terminal_cannot_print_is_no_crash(monkeypatch):
    printed = io.BytesIO()
    typed(monkeypatch, "\u00e9", "4")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert card.ask_move(np.zeros(9, dtype=np.int8), None) == 4
    sys.stdout.flush()
    assert b"is not the number of a free cell" in printed.getvalue()


def test_probabilities_and_value_can_be_switched_off(monkeypatch, capsys):
    for shown in (True, False):
        monkeypatch.setattr(card, "SHOW_PROBABILITIES", shown)
        monkeypatch.setattr(card, "SHOW_VALUE", shown)
        typed(monkeypatch, "Q")
        with pytest.raises(card.Leave):
            card.play_game(*networks(), None, True)
        printed = capsys.readouterr().out
        assert "takes" in printed
        assert ("probability" in printed, "critic" in printed) == (shown, shown)


def test_what_is_shown_of_the_agent_is_what_the_networks_say():
    actor, critic = networks()
    board = np.array([0, 0, 0, 0, -1, 0, 0, 0, 0], dtype=np.int8)
    shares, value = card.thoughts(actor, critic, board)
    assert shares[4] == 0 and shares.sum() == pytest.approx(1)
    assert shares.argmax() == card.best_move(actor, board)
    assert value == pytest.approx(critic(torch.from_numpy(board)[None]).item())
    shown = card.probabilities_text(board, shares).split("\n")[2].split("|")
    assert shown[1].strip() == "." and float(shown[0]) == round(100 * shares[3])
    sure = lambda observations: torch.tensor([1.5])  # noqa: E731
    assert card.thoughts(actor, sure, board)[1] == 1  # no game ends better than that


def test_who_begins_is_sampled(monkeypatch):
    begun = []

    def no_game(actor, critic, adviser, agent_first):
        begun.append(agent_first)
        return "draws"

    monkeypatch.setattr(card, "play_game", no_game)
    typed(monkeypatch, *(["y"] * 199 + ["n"]) * 4)
    for seed in (None, None, 3, 3):
        monkeypatch.setattr(card, "SEED", seed)
        card.play_until_bored(None, None, None)
    assert 300 < sum(begun) < 500
    assert begun[:200] != begun[200:400] and begun[400:600] == begun[600:]


def test_a_session_in_a_terminal_outlives_wrong_input_and_ends_well_at_ctrl_c():
    script = "import tictactoe_eval as card; card.SEED = 1; card.main()"
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    terminal = pexpect.spawn(sys.executable, ["-c", script], 300, cwd=ROOT, env=env)
    terminal.delaybeforesend = None

    def answers(typed=b"", question=rb"leave\): "):
        terminal.send(typed)
        terminal.expect(question)
        return (terminal.before + terminal.after).decode(errors="replace")

    text, again = answers(), rb"Play again\? \(y or n\): "
    assert "untrained" in text and "The agent begins" in text
    taken = re.search(r"takes (\d)", text)[1]
    wrong = [b"corner", b"9", b"-1", b"", b"  ", "\u00b2".encode(), b"\xff"]
    for typed in [*wrong, taken.encode()]:
        said = answers(typed + b"\n")
        assert "is not the number of a free cell: " in said
        assert taken not in said.split("cell:")[1]
    for _ in range(2):
        while "Play again" not in text:
            moved = re.search(r"takes \d.*critic expected.*probability", text, re.S)
            assert moved or "You begin" in text
            board = re.findall(r"^ {4} ([XO\d] \| [XO\d] \| [XO\d])", text, re.M)[-3:]
            cell = re.findall(r"\d", " ".join(board))[0]
            text = answers(f" {cell} \n".encode(), rb"leave\): |" + again)
        assert re.search(r"(A draw|The agent wins)\.\r\nScore: you 0, agent", text)
        assert ("agent wins" in text) == bool(re.search(r"\[[XO]\]", text))
        for no_answer in (b"maybe", b"1", b""):
            answers(no_answer + b"\n", again)
        text = answers(b"y\n")
    time.sleep(0.5)  # the prompt is there a moment before the script reads
    score = answers(b"\x03", rb"Bye\. Score: you 0, agent \d, draws \d\r\n")
    assert sum(map(int, re.findall(r"\d", score.split("agent")[-1]))) == 2
    assert "Traceback" not in score and terminal.wait() == 0


def test_the_two_files_of_a_run_are_known_as_a_pair_and_those_of_two_runs_refused(
    in_folder, monkeypatch
):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        lesson.save_run(lesson.ActorNetwork(8), lesson.CriticNetwork(8), [], "")
        runs.append(lesson.load_actor(in_folder / "a.pth").run)
        assert lesson.load_critic(in_folder / "c.pth").run == runs[-1]
    assert runs[0] == runs[1] != runs[2]
    monkeypatch.setattr(card, "ACTOR_PATH", in_folder / "a.pth")
    with pytest.raises(SystemExit, match="a.pth and .*critic.pth .* different runs"):
        card.main()


def test_the_two_files_must_be_two_in_one_folder(in_folder, monkeypatch):
    for path in (in_folder / "a.pth", in_folder.parent / "c.pth"):
        monkeypatch.setattr(lesson, "CRITIC_PATH", path)
        with pytest.raises(SystemExit, match="ACTOR_PATH and CRITIC_PATH"):
            lesson.main()
