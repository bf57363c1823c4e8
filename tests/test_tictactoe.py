"""Tests of lesson 2: tictactoe_env.py, tictactoe_actorcritic.py, tictactoe_eval.py."""

import copy
import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image

import tictactoe_actorcritic as lesson
import tictactoe_env as game
import tictactoe_eval as card

ROOT = Path(lesson.__file__).parent
SCRIPTS = ("tictactoe_env.py", "tictactoe_actorcritic.py", "tictactoe_eval.py")
WEIGHTS = ("tictactoe_actor.pth", "tictactoe_critic.pth")

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


def every_line(choose, agent, text=".........", mark="X", chance=1.0):
    """(result for the agent, chance) of each line of play, by plain recursion."""
    if winner(text) or "." not in text:
        yield {agent: 1, None: 0}.get(winner(text), -1), chance
        return
    free = [cell for cell in range(9) if text[cell] == "."]
    other = "O" if mark == "X" else "X"
    if mark == agent:
        cell = choose(seen_by(text, mark))
        yield from every_line(choose, agent, put(text, cell, mark), other, chance)
    else:
        for cell in free:
            next_chance = chance / len(free)
            yield from every_line(
                choose, agent, put(text, cell, mark), other, next_chance
            )


def count(results):
    return [list(results).count(outcome) for outcome in (1, 0, -1)]


# ------------------------------------------------------------------------------------
# The environment
# ------------------------------------------------------------------------------------


def test_gymnasiums_own_checker_has_nothing_to_say():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("TicTacToe-v0").unwrapped)
        envs = gym.make_vec("TicTacToe-v0", num_envs=3)
    assert isinstance(envs, game.TicTacToeVectorEnv)
    observations, _ = envs.reset(seed=1)
    assert observations in envs.observation_space and observations.shape == (3, 9)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED


def test_playing_the_environment_meets_5478_states_and_255168_games():
    env = gym.make("TicTacToe-v0")
    states = set()

    @cache
    def games_from(board):
        states.add(board)
        complete = 0
        for cell in np.flatnonzero(np.array(board) == 0):
            env.reset(options={"board": board})
            after, _, ended, truncated, info = env.step(cell)
            assert not truncated and not info["illegal_move"]
            if ended:
                states.add(tuple(after.tolist()))
            complete += 1 if ended else games_from(tuple(after.tolist()))
        return complete

    assert games_from((0,) * 9) == 255_168
    assert len(states) == 5_478


def test_all_362880_orders_of_the_cells_give_the_known_wins_and_draws():
    # A game that ends with `left` cells free is played by left! of the orders.
    orders = np.array(list(itertools.permutations(range(9))))
    envs = game.TicTacToeVectorEnv(len(orders))
    envs.reset()
    over = np.zeros(len(orders), dtype=bool)
    games = {"X": 0.0, "O": 0.0, "draw": 0.0}
    for ply in range(9):
        _, rewards, terminated, _, _ = envs.step(orders[:, ply])
        share = 1 / np.prod(np.arange(1, 9 - ply))
        assert not rewards[over].any()
        games["XO"[ply % 2]] += share * (rewards == 1).sum()
        games["draw"] += share * (terminated & ~over & (rewards == 0)).sum()
        over = terminated
    assert {name: round(number) for name, number in games.items()} == {
        "X": 131_184,
        "O": 77_904,
        "draw": 46_080,
    }


def test_one_board_and_many_agree_in_everything_on_thousands_of_games():
    rng = np.random.default_rng(0)
    disabled = AutoresetMode.DISABLED
    many = gym.make_vec("TicTacToe-v0", num_envs=64, autoreset_mode=disabled)
    single = SyncVectorEnv([game.TicTacToeEnv] * 64, autoreset_mode=disabled)
    same(many.reset(), single.reset())
    boards, games, illegal = np.zeros((64, 9)), 0, 0
    for _ in range(130):
        # One move in 100 is any cell at all, taken or not; the others are legal.
        actions = (rng.random((64, 9)) * ((boards == 0) + 1e-9)).argmax(axis=1)
        actions = np.where(rng.random(64) < 0.01, rng.integers(9, size=64), actions)
        results = [envs.step(actions) for envs in (many, single)]
        same(*results)
        boards, rewards, ended, _, _ = results[0]
        games, illegal = games + ended.sum(), illegal + (rewards < 0).sum()
        if ended.any():
            boards, _ = many.reset(options={"reset_mask": ended})
            other_boards, _ = single.reset(options={"reset_mask": ended})
            assert np.array_equal(boards, other_boards)
    assert games > 900 and illegal > 10


def same(one, other):
    """Two results of reset or step are equal, dtypes and nested infos included."""
    for a, b in zip(one, other, strict=True):
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            same(list(a.values()), [b[key] for key in a])
        else:
            assert a.dtype == b.dtype
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_side_sees_its_own_stones_as_plus_one_and_the_mover_gets_the_reward():
    rng = np.random.default_rng(0)
    env, last_rewards = gym.make("TicTacToe-v0"), []
    for _ in range(300):
        text, mark, ended = ".........", "X", False
        observation, info = env.reset()
        while not ended:
            assert observation.tolist() == seen_by(text, mark)
            assert info["action_mask"].tolist() == [cell == "." for cell in text]
            cell = rng.choice(np.flatnonzero(info["action_mask"]))
            text = put(text, cell, mark)
            observation, reward, ended, _, info = env.step(cell)
            assert reward == (1 if winner(text) == mark else 0)
            assert ended == (winner(text) is not None or "." not in text)
            mark = "O" if mark == "X" else "X"
        assert observation.tolist() == seen_by(text, mark)
        last_rewards.append((winner(text), reward))
    assert set(last_rewards) == {("X", 1), ("O", 1), (None, 0)}


def test_a_taken_cell_ends_the_game_as_a_loss_of_the_mover():
    env = gym.make("TicTacToe-v0")
    env.reset()
    env.step(4)
    board, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated) == (-1, True, False)
    assert info["illegal_move"] and not info["action_mask"].any()
    assert board.tolist() == [0, 0, 0, 0, -1, 0, 0, 0, 0]


def test_a_full_board_won_with_the_last_stone_is_a_win_and_no_draw():
    env = gym.make("TicTacToe-v0")
    env.reset(options={"board": [1, 1, 0, -1, -1, 1, 1, -1, -1]})
    _, reward, terminated, _, info = env.step(2)
    assert (reward, terminated, info["illegal_move"]) == (1, True, False)


@pytest.mark.parametrize("action", [9, -1, 4.0, "4", None, 2**70])
def test_an_action_that_is_no_cell_is_a_clear_error_and_changes_nothing(action):
    env, envs = game.TicTacToeEnv(), game.TicTacToeVectorEnv(2)
    env.reset()
    envs.reset()
    with pytest.raises(gym.error.InvalidAction, match="whole number"):
        env.step(action)
    actions = np.empty(2, dtype=object) if action is None else np.full(2, action)
    with pytest.raises(gym.error.InvalidAction, match="2 whole numbers"):
        envs.step(actions)
    assert not env.board.any() and not envs.boards.any()


@pytest.mark.parametrize(
    "actions", [[0], [0, 1, 2], np.array([0.0, 1.0]), [[0], [1]], None]
)
def test_actions_of_another_shape_or_type_are_refused(actions):
    envs = game.TicTacToeVectorEnv(2)
    envs.reset()
    with pytest.raises(gym.error.InvalidAction, match="2 whole numbers"):
        envs.step(actions)


def test_a_step_without_a_game_asks_for_reset():
    env, envs = game.TicTacToeEnv(), game.TicTacToeVectorEnv(2)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.array([0, 0]))
    env.reset()
    env.step(0)
    env.step(0)  # taken: the game is over
    with pytest.raises(gym.error.ResetNeeded):
        env.step(1)


@pytest.mark.parametrize(
    "board",
    [
        [0] * 8,
        [2] + [0] * 8,
        [1, 1] + [0] * 7,
        [1] + [0] * 8,
        [1, 1, 1, -1, -1, -1, 0, 0, 0],
        [1, -1, 1, -1, -1, 1, -1, 1, -1],
    ],
)
def test_a_position_that_cannot_be_played_on_is_refused(board):
    with pytest.raises(ValueError, match=r"board|turn|over"):
        game.TicTacToeEnv().reset(options={"board": board})


def test_the_mask_is_what_action_space_sample_wants():
    env = gym.make("TicTacToe-v0")
    env.action_space.seed(0)
    for _ in range(200):
        _, info = env.reset()
        terminated = False
        while not terminated:
            action = env.action_space.sample(mask=info["action_mask"])
            _, _, terminated, _, info = env.step(action)
            assert not info["illegal_move"]


def test_human_mode_draws_by_itself_and_ansi_gives_the_text(capsys):
    human = gym.make("TicTacToe-v0", render_mode="human")
    human.reset()
    human.step(4)
    assert "3 | X | 5" in capsys.readouterr().out
    ansi = gym.make("TicTacToe-v0", render_mode="ansi")
    ansi.reset()
    ansi.step(4)
    ansi.step(0)
    assert ansi.render().splitlines()[0].split(" | ") == [" O", "1", "2 "]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="render_mode"):
        game.TicTacToeEnv(render_mode="rgb_array")


def test_who_scribbles_on_an_observation_does_not_change_the_game():
    for env in (game.TicTacToeEnv(), game.TicTacToeVectorEnv(1)):
        observation, info = env.reset()
        mask = info["action_mask"]
        for ply in range(3):
            observation[...] = 1
            observation, _, terminated, _, info = env.step(
                ply if isinstance(env, game.TicTacToeEnv) else [ply]
            )
            assert np.count_nonzero(observation) == ply + 1 and not terminated
            assert not info["illegal_move"] and mask.all()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, "SameStep"])
def test_another_autoreset_mode_is_refused_and_gymnasium_offers_it(mode):
    with pytest.raises(ValueError, match="vectorization_mode='sync'"):
        gym.make_vec("TicTacToe-v0", num_envs=2, autoreset_mode=mode)
    envs = gym.make_vec(
        "TicTacToe-v0",
        num_envs=2,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
    )
    envs.reset()
    for cell in (0, 0, 4):  # the second 0 is illegal and ends both games
        boards, *_ = envs.step(np.array([cell, cell]))
    assert np.count_nonzero(boards) == 2 * (mode == "SameStep")


def test_the_seed_of_reset_does_not_seed_the_spaces():
    envs = [gym.make("TicTacToe-v0") for _ in range(2)]
    moves = []
    for env in envs:
        env.reset(seed=0)
        moves.append([env.action_space.sample() for _ in range(50)])
    assert moves[0] != moves[1]
    for env in envs:
        env.action_space.seed(0)
        moves.append([env.action_space.sample() for _ in range(50)])
    assert moves[2] == moves[3]


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
    envs.reset(options={"reset_mask": terminated})
    assert not envs.boards[0].any() and envs.boards[1].any()
    assert terminated[0]  # what was handed out does not change


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def test_the_docstring_cases_worked_by_hand():
    boards = np.array([[1, 1, 0, -1, -1, 0, 0, 0, 0]], dtype=np.int8)
    after, rewards, terminated, illegal = game.play_moves(boards, np.array([2]))
    assert after.tolist() == [[-1, -1, -1, 1, 1, 0, 0, 0, 0]]
    assert (rewards[0], terminated[0], illegal[0]) == (1, True, False)
    masked = lesson.mask_illegal(torch.tensor([5.0, 1.0]), torch.tensor([0, 1]))
    assert masked.tolist() == [-torch.inf, 1] and masked.softmax(0).tolist() == [0, 1]
    returns = torch.tensor([1.0, -1.0])
    advantages = lesson.subtract_values(returns, torch.tensor([0.75, 0.5]))
    assert advantages.tolist() == [0.25, -1.5]
    loss = lesson.actor_loss(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, -3.0]))
    assert loss.item() == pytest.approx(-0.6931, abs=1e-4)
    assert lesson.critic_loss(torch.tensor([0.5, 0.0]), returns).item() == 0.625
    two_then_one = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    entropies = lesson.Categorical(logits=two_then_one).entropy()
    assert entropies.tolist() == pytest.approx([np.log(2), 0])
    assert lesson.entropy_bonus(entropies, 0.5).item() == pytest.approx(
        0.1733, abs=1e-4
    )
    assert (lesson.NUM_UPDATES, lesson.share_left(200)) == (800, 0.75)
    assert card.minimax((1, 1, 0, -1, -1, 0, 0, 0, 0)) == 1


@pytest.mark.parametrize("lie", [1e38, torch.inf, torch.nan])
def test_no_logits_however_adversarial_let_an_illegal_move_through(lie):
    boards = torch.tensor(card.open_positions(), dtype=torch.int8)
    masks = torch.from_numpy(game.legal_moves(boards.numpy()))
    torch.manual_seed(0)
    legal_logits = 100 * torch.randn(len(boards), 9)
    logits = torch.where(masks == 1, legal_logits, lie)
    masked = lesson.mask_illegal(logits, masks)
    assert (masked.softmax(1)[masks == 0] == 0).all()
    for choose in (masked.argmax(1), lesson.Categorical(logits=masked).sample()):
        assert masks.gather(1, choose[:, None]).all()
    moves = lesson.best_moves(lambda observations: logits, boards.numpy())
    assert masks.gather(1, torch.from_numpy(moves)[:, None]).all()


def games_from(board, learner, opponent, own=True, chance=1.0, moves=()):
    """Every game from a board: (chance, moves of the learner, result for it)."""
    policy = learner if own else opponent
    mask = torch.from_numpy(game.legal_moves(board))
    log_probs = lesson.mask_illegal(policy(torch.from_numpy(board)[None])[0], mask)
    log_probs = log_probs.log_softmax(0)
    for cell in np.flatnonzero(mask):
        after, rewards, ended, _ = game.play_moves(board[None], np.array([cell]))
        next_chance = chance * log_probs[cell].exp()
        line = (*moves, (board, log_probs[cell])) if own else moves
        if ended[0]:
            yield next_chance, line, rewards[0] if own else -rewards[0]
        else:
            yield from games_from(
                after[0], learner, opponent, not own, next_chance, line
            )


def test_the_expected_gradient_is_that_of_the_expected_result_whatever_the_critic():
    # 5 free cells: all 100 or so games can be enumerated, with their chances.
    torch.manual_seed(0)
    learner, opponent = lesson.ActorNetwork(8), lesson.ActorNetwork(8)
    board = np.array([1, -1, 0, 0, 1, 0, 0, 0, -1], dtype=np.int8)
    games = list(games_from(board, learner, opponent))
    assert sum(chance for chance, _, _ in games).item() == pytest.approx(1)
    weights = list(learner.parameters())
    expected_result = sum(chance * result for chance, _, result in games)
    exact = torch.autograd.grad(expected_result, weights, retain_graph=True)
    for critic in (lesson.CriticNetwork(8), lambda observations: torch.zeros(1)):
        objective = 0
        for chance, line, result in games:
            returns = torch.full((len(line),), float(result))
            boards = torch.from_numpy(np.array([seen for seen, _ in line]))
            advantages = lesson.subtract_values(returns, critic(boards))
            log_probs = torch.stack([log_prob for _, log_prob in line])
            loss = lesson.actor_loss(log_probs, advantages)  # a mean over the moves
            objective = objective - chance.detach() * len(line) * loss
        gradient = torch.autograd.grad(objective, weights, retain_graph=True)
        for ours, true in zip(gradient, exact, strict=True):
            assert torch.allclose(ours, true, atol=1e-6)
    assert max(true.abs().max() for true in exact) > 0.01


def test_the_actors_loss_teaches_the_critic_nothing():
    torch.manual_seed(0)
    critic, boards = lesson.CriticNetwork(8), torch.randn(6, 9)
    log_probs = torch.randn(6, requires_grad=True)
    advantages = lesson.subtract_values(torch.ones(6), critic(boards))
    lesson.actor_loss(log_probs, advantages).backward()
    assert log_probs.grad is not None
    assert all(weight.grad is None for weight in critic.parameters())


def test_values_have_the_shape_of_the_returns():
    assert lesson.CriticNetwork(8)(torch.zeros(5, 9)).shape == (5,)
    assert lesson.ActorNetwork(8)(torch.zeros(5, 9)).shape == (5, 9)


def test_one_step_makes_a_good_move_likelier_and_a_bad_one_rarer():
    for sign in (1.0, -1.0):
        logits = torch.zeros(9, requires_grad=True)
        lesson.actor_loss(logits.log_softmax(0)[4:5], torch.tensor([sign])).backward()
        after = (logits - 0.1 * logits.grad).softmax(0)[4]
        assert (after > 1 / 9) == (sign > 0)


def test_the_entropy_of_the_docstring_is_what_torch_gives_and_its_bonus_raises_it():
    torch.manual_seed(0)
    logits = torch.randn(5, 9, requires_grad=True)
    entropies = lesson.Categorical(logits=logits).entropy()
    probabilities = logits.softmax(1)
    by_hand = -(probabilities * probabilities.log()).sum(1)
    assert torch.allclose(entropies, by_hand)
    (-lesson.entropy_bonus(entropies, 0.25)).backward()  # as main() subtracts it
    after = lesson.Categorical(logits=logits - 0.1 * logits.grad).entropy().mean()
    assert after > entropies.mean()


def test_rate_and_bonus_shrink_evenly_to_their_last_share_and_stay_there(monkeypatch):
    shorten(monkeypatch, NUM_UPDATES=10, LAST_SHARE=0.3)
    shares = [lesson.share_left(updates) for updates in range(13)]
    expected = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert shares == pytest.approx(expected)


def test_both_shares_reach_adam_and_the_loss(in_folder, monkeypatch):
    seen, step = [], torch.optim.Adam.step
    bonus = lesson.entropy_bonus

    def spy_bonus(entropies, beta):
        seen.append(beta)
        return bonus(entropies, beta)

    def spy_step(optimizer):
        seen.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(lesson, "entropy_bonus", spy_bonus)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    shorten(monkeypatch, NUM_UPDATES=4, MAX_UPDATES=4)
    with pytest.raises(SystemExit):
        lesson.main()
    expected = [x * share for share in (1, 0.75, 0.5, 0.25) for x in (0.25, 0.01)]
    assert seen == pytest.approx(expected)


def test_the_update_uses_masked_probabilities_and_each_part_of_the_loss(
    in_folder, monkeypatch
):
    made, games, gradients = [], [], []
    play, make = lesson.play_games, lesson.CriticNetwork
    monkeypatch.setattr(
        lesson,
        "CriticNetwork",
        lambda *units: made.append(make(*units)) or copy.deepcopy(made[0]),
    )

    def spy_play(env, learner, *others):
        games.append((copy.deepcopy(learner), *play(env, learner, *others)))
        return games[-1][1:]

    def spy_step(optimizer):
        gradients.extend(weight.grad for weight in optimizer.param_groups[0]["params"])

    monkeypatch.setattr(lesson, "play_games", spy_play)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    shorten(monkeypatch, NUM_UPDATES=1, MAX_UPDATES=1, GAMES_PER_UPDATE=8)
    with pytest.raises(SystemExit):
        lesson.main()
    actor, boards, masks, actions, moved, results = games[0]
    critic, terms = made[0], []
    for t, n in moved.nonzero().tolist():
        logits, legal = actor(boards[t, n][None])[0], masks[t, n].nonzero()[:, 0]
        probs = dict(zip(legal.tolist(), logits[legal].softmax(0), strict=True))
        advantage = results[n] - critic(boards[t, n][None])[0]
        entropy = -sum(p * p.log() for p in probs.values())
        policy = -advantage.detach() * probs[actions[t, n].item()].log()
        terms.append(policy - lesson.ENTROPY_BONUS * entropy + advantage**2)
    weights = [*actor.parameters(), *critic.parameters()]
    plain = torch.autograd.grad(sum(terms) / len(terms), weights)
    for one, other in zip(gradients, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def lowest_free_cell(observations):
    return torch.arange(9.0, 0, -1).repeat(len(observations), 1) * 1000


def highest_free_cell(observations):
    return torch.arange(9.0).repeat(len(observations), 1) * 1000


def play(learner, opponent, games, random_chance):
    env = gym.make_vec(
        "TicTacToe-v0", num_envs=games, autoreset_mode=AutoresetMode.DISABLED
    )
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
        ended, learner_moves = False, column % 2 == 0
        for ply in range(len(learner_moved)):
            assert learner_moved[ply, column] == (learner_moves and not ended)
            if ended:
                continue
            assert observations[ply, column].tolist() == board.tolist()
            assert masks[ply, column].tolist() == info["action_mask"].tolist()
            board, reward, ended, _, info = env.step(actions[ply, column].item())
            assert not info["illegal_move"]
            result = reward if learner_moves else -reward
            learner_moves = not learner_moves
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


def test_the_opponent_is_a_frozen_copy_and_is_renewed_only_when_due(
    in_folder, monkeypatch
):
    seen, original = [], lesson.play_games

    def spy(env, learner, opponent, learner_first, random_chances):
        numbers = [net.layers[0].weight.sum().item() for net in (learner, opponent)]
        seen.append((*numbers, learner_first.float().mean().item(), random_chances))
        return original(env, learner, opponent, learner_first, random_chances)

    monkeypatch.setattr(lesson, "play_games", spy)
    shorten(monkeypatch, NUM_UPDATES=8, MAX_UPDATES=8, REFRESH_EVERY=3)
    with pytest.raises(SystemExit):
        lesson.main()
    learner, opponent, first, chances = zip(*seen, strict=True)
    assert len(set(learner)) == 8 and set(first) == {0.5}
    assert opponent == tuple(learner[update - update % 3] for update in range(8))
    chances = torch.stack(chances)
    assert 0 <= chances.min() < 0.1 and 0.4 < chances.max() <= 0.5


# ------------------------------------------------------------------------------------
# Every line of play
# ------------------------------------------------------------------------------------


def first_free(view):
    return view.index(0)


def win_or_block(view):
    """Wins if it can, blocks if it must, else the middle, a corner, anything."""
    for stone in (1, -1):
        for line in WINS:
            cells = [int(cell) for cell in line]
            stones = [view[cell] for cell in cells]
            if sorted(stones) == sorted([stone, stone, 0]):
                return cells[stones.index(0)]
    return next(cell for cell in (4, 0, 2, 6, 8, 1, 3, 5, 7) if view[cell] == 0)


def minimax_move(view):
    return card.perfect_moves(tuple(view))[0]


@pytest.mark.parametrize("agent", "XO")
@pytest.mark.parametrize(
    ("choose", "loses"),
    [(first_free, True), (win_or_block, None), (minimax_move, False)],
)
def test_every_line_of_play_equals_a_plain_recursion(choose, loses, agent):
    def policy(observations):
        cells = [choose(view) for view in observations.int().tolist()]
        return torch.nn.functional.one_hot(torch.tensor(cells), 9).float()

    expected = list(every_line(choose, agent))
    results, chances = zip(*expected, strict=True)
    wins_draws_losses, probabilities = lesson.play_every_line(policy, agent == "X")
    assert wins_draws_losses == count(results)
    assert loses is None or (wins_draws_losses[2] > 0) == loses
    assert sum(chances) == pytest.approx(1)
    for outcome, chance in zip((1, 0, -1), probabilities, strict=True):
        lines = [c for result, c in expected if result == outcome]
        assert chance == pytest.approx(sum(lines))


def test_a_board_may_be_a_list_a_tuple_an_array_or_a_tensor():
    actor, board = lesson.load_actor(), [0, 0, 1, 0, -1, 0, 0, 0, 0]
    for kind in (list, tuple, np.array, torch.tensor):
        assert card.best_move(actor, kind(board)) == card.best_move(actor, board)
    assert type(card.best_move(actor, board)) is int


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Let the lesson write into an empty folder instead of over the shipped weights."""
    monkeypatch.setattr(lesson, "ACTOR_PATH", tmp_path / "a.pth")
    monkeypatch.setattr(lesson, "CRITIC_PATH", tmp_path / "c.pth")
    monkeypatch.setattr(lesson, "CURVE_PATH", tmp_path / "curve.png")
    return tmp_path


def shorten(monkeypatch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)


def test_training_from_scratch_learns_to_lose_no_line_of_play(
    in_folder, monkeypatch, capsys
):
    shorten(monkeypatch, SEED=1, NUM_UPDATES=300, MAX_UPDATES=1500)
    lesson.main()
    printed = capsys.readouterr().out
    assert (
        "No line of play is lost" in printed and "python tictactoe_eval.py" in printed
    )
    assert max(map(len, printed.splitlines())) <= 88
    assert Image.open(lesson.CURVE_PATH).size == (960, 600)
    names = sorted(path.name for path in in_folder.iterdir())
    assert names == ["a.pth", "c.pth", "curve.png"]
    actor = card.load_actor(lesson.ACTOR_PATH)
    for first, possible in ((True, 0.9948), (False, 0.9164)):
        assert card.play_every_line(actor, first)[0][2] == 0
        assert card.play_every_line(actor, first)[1][0] > possible - 0.03
    beginner = lesson.ActorNetwork()
    assert card.play_every_line(beginner, False)[0][2] > 50
    critic = card.load_critic(lesson.CRITIC_PATH)
    boards = torch.tensor(card.open_positions())
    truth = torch.tensor([card.minimax(board) for board in card.open_positions()])
    won, lost = critic(boards[truth == 1]).mean(), critic(boards[truth == -1]).mean()
    assert won > 0.3 and lost < won - 0.5


def test_the_same_seed_gives_the_same_weights_bit_for_bit(in_folder, monkeypatch):
    shorten(monkeypatch, NUM_UPDATES=4, MAX_UPDATES=4, REFRESH_EVERY=2)
    weights = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(lesson, "SEED", seed)
        with pytest.raises(SystemExit):
            lesson.main()
        actor = lesson.load_actor(in_folder / "a_unsolved.pth")
        critic = lesson.load_critic(in_folder / "c_unsolved.pth")
        weights.append(
            torch.cat([p.flatten() for n in (actor, critic) for p in n.parameters()])
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_shipped_agent_loses_no_line_of_play_from_either_seat():
    actor = lesson.load_actor(ROOT / "tictactoe_actor.pth")
    for agent in "XO":
        choose = lambda view: card.best_move(actor, view)  # noqa: E731
        results = [result for result, _ in every_line(cache_moves(choose), agent)]
        assert -1 not in results
        assert count(results) == card.play_every_line(actor, agent == "X")[0]


def cache_moves(choose):
    known = cache(lambda view: choose(list(view)))
    return lambda view: known(tuple(view))


def test_the_shipped_agent_wins_nearly_as_often_as_any_player_who_never_loses():
    actor = lesson.load_actor(ROOT / "tictactoe_actor.pth")
    for first in (True, False):
        win, draw, loss = card.play_every_line(actor, first)[1]
        best = card.best_possible(first)
        assert best - 0.015 <= win <= best + 1e-9  # sums of floats, added in some order
        assert loss == 0 and win + draw == pytest.approx(1)


def test_importing_trains_nothing_and_writes_nothing(tmp_path):
    copy_scripts(tmp_path)
    done = subprocess.run(
        [sys.executable, "-B", "-c", "import tictactoe_eval, tictactoe_env"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(tmp_path.iterdir())) == len(SCRIPTS)


# ------------------------------------------------------------------------------------
# The report card
# ------------------------------------------------------------------------------------


def test_minimax_knows_the_game():
    assert card.minimax((0,) * 9) == 0
    assert len(card.open_positions()) == 4_520
    assert card.perfect_moves((0,) * 9) == list(range(9))
    assert card.perfect_moves((-1, 0, 0, 0, 0, 0, 0, 0, 0)) == [4]
    assert card.perfect_moves((1, 1, 0, -1, -1, 0, 0, 0, 0)) == [2]
    assert card.perfect_moves((1, 0, 0, -1, -1, 0, 0, 0, 1)) == [5]


def test_the_best_win_chance_equals_a_search_through_all_safe_players():
    # Backwards once more, on text boards: what X, then O, can have at most.
    @cache
    def value(text, mark, agent):  # 1 if `mark`, to move, can force a win, and so on
        other = "O" if mark == "X" else "X"
        if winner(text) or "." not in text:
            return -1 if winner(text) else 0
        free = [cell for cell in range(9) if text[cell] == "."]
        return max(-value(put(text, cell, mark), other, agent) for cell in free)

    @cache
    def wins(text, mark, agent):
        if winner(text) or "." not in text:
            return float(winner(text) == agent)
        other = "O" if mark == "X" else "X"
        after = [put(text, cell, mark) for cell in range(9) if text[cell] == "."]
        if mark != agent:
            return sum(wins(board, other, agent) for board in after) / len(after)
        safe = [board for board in after if value(board, other, agent) <= 0]
        return max(wins(board, other, agent) for board in safe)

    for agent, first in (("X", True), ("O", False)):
        expected = wins(".........", "X", agent)
        assert card.best_possible(first) == pytest.approx(expected)
    assert 0.99 < card.best_possible(True) < 1 and card.best_possible(False) > 0.91


def test_the_positions_that_the_agent_meets_are_those_of_its_every_line_of_play():
    actor = lesson.load_actor(ROOT / "tictactoe_actor.pth")
    met = set()

    def choose(view):
        met.add(tuple(view))
        return card.best_move(actor, view)

    for agent in "XO":
        list(every_line(choose, agent))
    assert card.met_positions(actor) == sorted(met)
    assert card.count_perfect(actor, sorted(met)) == len(met)


def test_against_perfect_play_only_perfect_replies_are_tried():
    actor = lesson.load_actor(ROOT / "tictactoe_actor.pth")
    for first in (True, False):
        wins, draws, losses = card.play_every_line(actor, first, card.perfect_masks)[0]
        assert (wins, losses) == (0, 0) and 0 < draws < 100
    loser = highest_free_cell
    assert card.play_every_line(loser, False, card.perfect_masks)[0][2] > 0


def test_without_a_terminal_the_report_card_is_printed_and_that_is_all():
    done = subprocess.run(
        [sys.executable, "tictactoe_eval.py"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    rows = [row for row in rows if row and row[0] in ("first", "second")]
    actor = lesson.load_actor(ROOT / "tictactoe_actor.pth")
    for row, first in zip(rows[:2], (True, False), strict=True):
        outcome, _ = card.play_every_line(actor, first)
        assert [int(cell) for cell in row[1:]] == [sum(outcome), *outcome]
    assert [row[4] for row in rows[2:4]] == ["99.48", "91.64"]
    assert "of 4,520 positions" in done.stdout and "Score" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 88


# ------------------------------------------------------------------------------------
# The game against a human, through a pseudo-terminal
# ------------------------------------------------------------------------------------


class Terminal:
    """The eval script in a terminal of its own; `expect` waits for what it prints."""

    def __init__(self, folder=ROOT, edits=()):
        self.printed, self.read_up_to = "", 0
        command = [sys.executable, "-c", RUN_WITH_EDITS, *edits]
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
            preexec_fn=make_controlling,
        )
        os.close(theirs)
        self.handle = ours

    def expect(self, pattern, seconds=30):
        """Wait for the pattern; give the text from the last match up to its end."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            match = re.compile(pattern).search(self.printed, self.read_up_to)
            if match:
                text = self.printed[self.read_up_to : match.end()]
                self.read_up_to = match.end()
                return text
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    self.printed += os.read(self.handle, 9999).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        raise AssertionError(f"no {pattern!r} in {self.printed[self.read_up_to :]!r}")

    def say(self, text):
        os.write(self.handle, text.encode())

    def status(self):
        status = self.process.wait(timeout=30)
        os.close(self.handle)
        return status


RUN_WITH_EDITS = """
import sys, tictactoe_eval
tictactoe_eval.SHOW_REPORT = False
for edit in sys.argv[1:]:
    exec("tictactoe_eval." + edit)
tictactoe_eval.main()
"""


def make_controlling():
    """Ctrl-C typed into this terminal reaches the script, as in a real one."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


BEGINS = {"human": "SEED = 0", "agent": "SEED = 1"}  # seed 0 draws 0.84, seed 1 0.13


def free_cells(text):
    """The free cells of the last board in what was printed."""
    board = re.findall(r"^ {4} ([XO\d] \| [XO\d] \| [XO\d])", text, re.MULTILINE)[-3:]
    return re.findall(r"\d", " ".join(board))


def test_a_whole_game_in_the_terminal_and_then_another():
    terminal = Terminal(edits=[BEGINS["agent"]])
    for _ in range(2):
        ended = False
        while not ended:
            text = terminal.expect(r"leave\): |Play again\? \(y or n\): ")
            ended = "Play again" in text
            if "takes" in text:
                assert re.search(r"The agent takes \d", text)
                assert "Its critic expected" in text and "probability" in text
            if not ended:
                terminal.say(free_cells(text)[0] + "\n")
        assert re.search(r"(A draw|The agent wins)\.\r\nScore: you 0, agent", text)
        assert "You win" not in text
        terminal.say("y\n")
    terminal.expect("leave")
    terminal.say("q\n")
    score = terminal.expect(r"Bye\. Score: you 0, agent (\d), draws (\d)\r\n")
    assert sum(map(int, re.findall(r"\d", score.split("agent")[-1]))) == 2
    assert terminal.status() == 0


def test_every_kind_of_wrong_input_is_said_plainly_and_asked_again():
    terminal = Terminal(edits=[BEGINS["human"]])
    terminal.expect(r"You begin\. You are X, the agent is O\.")
    terminal.expect("leave.: ")
    for wrong, answer in [
        ("corner\n", "'corner' is not the number of a free cell: 0, 1"),
        ("9\n", "'9' is not the number of a free cell"),
        ("-1\n", "'-1' is not the number of a free cell"),
        ("\n", "'' is not the number of a free cell: 0, 1"),
        ("  \n", "'' is not the number of a free cell"),
        ("\u00b2\n", "is not the number of a free cell"),
    ]:
        terminal.say(wrong)
        terminal.expect(re.escape(answer))
        terminal.expect("leave.: ")
    os.write(terminal.handle, b"\xff\n")  # no text in any encoding
    terminal.expect("is not the number of a free cell")
    terminal.expect("leave.: ")
    terminal.say(" 4 \n")
    terminal.expect("leave.: ")
    terminal.say("4\n")
    free = terminal.expect(r"'4' is not the number of a free cell: .*\.\r\n")
    assert "4" not in free.split("cell:")[1]
    terminal.expect("leave.: ")
    terminal.say("Q\n")
    terminal.expect(r"Bye\. Score: you 0, agent 0, draws 0")
    assert terminal.status() == 0


def test_a_wrong_key_that_the_terminal_cannot_print_is_no_crash(monkeypatch):
    printed, keys = io.BytesIO(), iter(["\u00e9", "4"])
    monkeypatch.setattr("builtins.input", lambda question: next(keys))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert card.ask_move(np.zeros(9, dtype=np.int8)) == 4
    sys.stdout.flush()
    assert b"is not the number of a free cell" in printed.getvalue()


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_and_end_of_input_leave_cleanly_with_the_score(key):
    terminal = Terminal()
    terminal.expect("leave.: ")
    time.sleep(0.5)  # the prompt is there a moment before the script reads
    terminal.say(key)
    assert "Traceback" not in terminal.expect(r"Bye\. Score: you 0, agent 0, draws 0")
    assert terminal.status() == 0


def test_probabilities_and_value_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda question: "q")
    for shown in (True, False):
        monkeypatch.setattr(card, "SHOW_PROBABILITIES", shown)
        monkeypatch.setattr(card, "SHOW_VALUE", shown)
        with pytest.raises(card.Leave):
            card.play_game(lesson.load_actor(), lesson.load_critic(), True)
        printed = capsys.readouterr().out
        assert "takes" in printed
        assert ("probability" in printed, "critic" in printed) == (shown, shown)


def test_what_is_shown_of_the_agent_is_what_the_networks_say():
    actor, critic = lesson.load_actor(), lesson.load_critic()
    board = np.array([0, 0, 0, 0, -1, 0, 0, 0, 0], dtype=np.int8)
    shares, value = card.thoughts(actor, critic, board)
    assert shares[4] == 0 and shares.sum() == pytest.approx(1)
    assert shares.argmax() == card.best_move(actor, board)
    assert value == pytest.approx(critic(torch.from_numpy(board)[None]).item())
    shown = card.probabilities_text(board, shares).split("\n")[2].split("|")
    assert shown[1].strip() == "." and float(shown[0]) == round(100 * shares[3])


def test_who_begins_is_drawn_at_random(monkeypatch, capsys):
    begun = []

    def no_game(actor, critic, agent_first):
        begun.append(agent_first)
        if len(begun) % 200 == 0:
            raise card.Leave
        return "draws"

    monkeypatch.setattr(card, "play_game", no_game)
    monkeypatch.setattr(card, "ask", lambda question: "y")
    card.play_until_bored(None, None)
    card.play_until_bored(None, None)
    assert 140 < sum(begun) < 260 and begun[:200] != begun[200:]
    assert "draws 199" in capsys.readouterr().out


# ------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------


def copy_scripts(folder, *edits):
    """The lesson's scripts in a folder of their own, Settings of training edited."""
    for name in SCRIPTS:
        (folder / name).write_text((ROOT / name).read_text())
    text = (folder / SCRIPTS[1]).read_text()
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / SCRIPTS[1]).write_text(text)


def run_copy(folder, script, *edits):
    """Run a script as a person would: in a folder of its own, Settings edited."""
    copy_scripts(folder, *edits)
    return subprocess.run(
        [sys.executable, script],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_one_plain_line(done, *words):
    """The run ended with status 1 and one line on stderr that holds these words."""
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_missing_weights_name_the_command_that_makes_them(tmp_path):
    done = run_copy(tmp_path, "tictactoe_eval.py")
    assert_one_plain_line(done, "FileNotFound", "python tictactoe_actorcritic.py")


class Bomb:
    """Unpickling this would create the folder `boom`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "boom"),)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "kind",
    [
        "damaged",
        "empty",
        "foreign",
        "swapped",
        "other game",
        "code",
        "nan",
        "inf",
    ],
)
def test_a_bad_weights_file_is_refused_in_one_line_and_nothing_runs(
    tmp_path, kind, name
):
    path, shipped = tmp_path / "bad.pth", torch.load(ROOT / name, weights_only=True)
    if kind == "damaged":
        path.write_bytes((ROOT / name).read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save(torch.nn.Linear(9, 9).state_dict(), path)
    elif kind == "other game":
        torch.save({**shipped, "env_id": "Connect4-v0"}, path)
    elif kind in ("nan", "inf"):
        shipped["weights"]["layers.2.weight"][3, 4] = float(kind)
        torch.save(shipped, path)
    elif kind == "swapped":
        path.write_bytes((ROOT / WEIGHTS[name == WEIGHTS[0]]).read_bytes())
    else:
        torch.save({**shipped, "weights": Bomb(tmp_path)}, path)
    load = lesson.load_actor if name == WEIGHTS[0] else lesson.load_critic
    with pytest.raises(SystemExit) as stopped:
        load(path)
    assert re.search(r"no usable \w+Network in .*bad\.pth", stopped.value.code)
    assert kind not in ("nan", "inf") or "ValueError" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not (tmp_path / "boom").exists()


def test_a_small_file_that_claims_a_huge_network_builds_only_what_it_holds(tmp_path):
    shipped = torch.load(ROOT / WEIGHTS[0], weights_only=True)
    torch.save({**shipped, "hidden_units": 10**12}, tmp_path / "big.pth")
    actor = lesson.load_actor(tmp_path / "big.pth")
    assert actor.layers[0].out_features == 64


def test_networks_of_two_runs_are_refused_as_a_pair_in_one_line(tmp_path):
    copy_scripts(tmp_path)
    for name in WEIGHTS:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    run = [sys.executable, "tictactoe_eval.py"]
    options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "capture_output": True}
    assert subprocess.run(run, text=True, **options).returncode == 0
    critic = torch.load(ROOT / WEIGHTS[1], weights_only=True)
    torch.save({**critic, "run": "0123456789abcdef"}, tmp_path / WEIGHTS[1])
    done = subprocess.run(run, text=True, **options)
    assert_one_plain_line(done, *WEIGHTS, "different runs", "tictactoe_actorcritic.py")
    assert done.stdout == ""


def test_the_two_files_of_a_run_carry_one_fingerprint_and_other_weights_another(
    in_folder,
):
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        lesson.save_run(lesson.ActorNetwork(8), lesson.CriticNetwork(8), [], "")
        files = [path.read_bytes() for path in sorted(in_folder.glob("*.pth"))]
        actor, critic = (
            lesson.load_actor(in_folder / "a.pth"),
            lesson.load_critic(in_folder / "c.pth"),
        )
        assert actor.run == critic.run
        runs.append((actor.run, files))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEARNING_RATE", -0.01),
        ("LEARNING_RATE", float("nan")),
        ("NUM_UPDATES", 0),
        ("MAX_UPDATES", 799),
        ("GAMES_PER_UPDATE", 1),
        ("REFRESH_EVERY", 0),
        ("REPORT_EVERY", 0),
        ("MAX_RANDOM_CHANCE", 1.1),
        ("ENTROPY_BONUS", -0.1),
        ("LAST_SHARE", 0),
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


@pytest.mark.parametrize("name", ["ACTOR_PATH", "CRITIC_PATH", "CURVE_PATH"])
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
        "tictactoe_actorcritic.py",
        ("LEARNING_RATE = 0.01", "LEARNING_RATE = -1"),
        ("NUM_UPDATES = 800", "NUM_UPDATES = 0"),
    )
    assert_one_plain_line(done, "LEARNING_RATE", "NUM_UPDATES")


def test_a_spent_budget_is_said_ends_with_status_1_and_keeps_the_good_weights(tmp_path):
    (tmp_path / WEIGHTS[0]).write_bytes(b"good")
    done = run_copy(
        tmp_path,
        "tictactoe_actorcritic.py",
        ("NUM_UPDATES = 800", "NUM_UPDATES = 2"),
        ("MAX_UPDATES = 1_600", "MAX_UPDATES = 3"),
    )
    assert_one_plain_line(done, "lines of play lost", "tictactoe_actor_unsolved.pth")
    assert (tmp_path / WEIGHTS[0]).read_bytes() == b"good"
    assert lesson.load_actor(tmp_path / "tictactoe_actor_unsolved.pth")
    assert not list(tmp_path.glob("*_interrupted*"))


def test_ctrl_c_keeps_the_run_under_another_name_and_the_good_weights(tmp_path):
    copy_scripts(tmp_path, ("REPORT_EVERY = 50", "REPORT_EVERY = 5"))
    (tmp_path / WEIGHTS[0]).write_bytes(b"good")
    training = subprocess.Popen(
        [sys.executable, "-u", "tictactoe_actorcritic.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in training.stdout:
        if line.split()[4:5] == ["5"]:  # the first report
            break
    training.send_signal(signal.SIGINT)
    printed, errors = training.communicate(timeout=30)
    assert (training.returncode, errors) == (1, "Stopped.\n")
    assert_interrupted_run_is_kept(tmp_path, printed)


def assert_interrupted_run_is_kept(folder, printed):
    """A pair of networks beside the good weights, named in what was printed."""
    names = [name.replace(".pth", "_interrupted.pth") for name in WEIGHTS]
    assert f"This run is kept in {', '.join(names)}" in printed
    actor, critic = (
        lesson.load_actor(folder / names[0]),
        lesson.load_critic(folder / names[1]),
    )
    assert actor.run == critic.run
    assert (folder / WEIGHTS[0]).read_bytes() == b"good"
    assert not (folder / WEIGHTS[1]).exists()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "moment", ["opponent.load_state_dict(actor", "names = save_run(actor, critic, h"]
)
def test_an_error_anywhere_in_the_run_keeps_it_and_is_shown_whole(tmp_path, moment):
    (tmp_path / WEIGHTS[0]).write_bytes(b"good")
    done = run_copy(
        tmp_path,
        "tictactoe_actorcritic.py",
        (moment, f"raise OSError('no room'); {moment}"),
        ("REFRESH_EVERY = 20", "REFRESH_EVERY = 2"),
        ("NUM_UPDATES = 800", "NUM_UPDATES = 3"),
        ("MAX_UPDATES = 1_600", "MAX_UPDATES = 3"),
    )
    assert done.returncode == 1 and "OSError: no room" in done.stderr
    assert "Traceback" in done.stderr
    assert_interrupted_run_is_kept(tmp_path, done.stdout)


def test_a_crash_while_saving_leaves_the_old_weights_whole(in_folder, monkeypatch):
    lesson.ACTOR_PATH.write_bytes(b"good")

    def half_written(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        lesson.save_run(lesson.ActorNetwork(), lesson.CriticNetwork(), [], "")
    assert lesson.ACTOR_PATH.read_bytes() == b"good"
