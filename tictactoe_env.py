"""Tic-tac-toe written from scratch as a Gymnasium environment: one board, or N at once.

What you will learn
    How to turn the rules of a game into an environment that any learning code can
    use, and which decisions you have to take on the way.

The environment in 6 decisions (each is marked in the code with its number)
    1. Observation: what the player sees. Nine cells, from the view of the side that
       is to move: +1 my stone, -1 the other's, 0 empty. So one network plays both
       sides and never has to be told which side it is.
    2. Action: what the player does. A whole number from 0 to 8, the cell to take.
    3. Mask: what the player may do. `info["action_mask"]` holds 1 for an empty cell.
    4. Reward: what the player wants. It goes to the one who has just moved: +1 for
       three in a row, 0 for a draw or while the game goes on, -1 for an illegal move.
       What one side gets the other side loses, so the loser's reward is minus this.
    5. End: `terminated` is True when the game is over by its own rules. `truncated`
       would mean that somebody stopped the clock; nine cells always fill up, so it
       is always False here.
    6. Randomness: there is none, but `reset(seed=...)` must be obeyed all the same,
       because Gymnasium seeds everything through it.

Symbols
    N    boards played at once                    num_envs
    s    the board from the side to move          observation       (9,) or (N, 9) int8
    a    the cell taken                           action            int, or (N,)
    r    reward of the side that has just moved   reward            float, or (N,)

Cells are numbered like the lines of a page:   0 1 2
                                               3 4 5
                                               6 7 8
X always moves first, so X is to move when an even number of stones lies on the board.

Run it
    python tictactoe_env.py     checks the environment and shows one random game

Use it
    import gymnasium as gym, tictactoe_env     # this import registers TicTacToe-v0
    env = gym.make("TicTacToe-v0", render_mode="human")
    envs = gym.make_vec("TicTacToe-v0", num_envs=1024)
"""

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

# ------------------------------------------------------------------------------------
# The rules: pure functions on boards, written once and used by everything
# ------------------------------------------------------------------------------------

# The eight lines that win: three rows, three columns, two diagonals.
LINES = np.array(
    [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    + [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    + [[0, 4, 8], [2, 4, 6]]
)


def legal_moves(boards: np.ndarray) -> np.ndarray:
    """Which cells may be taken: 1 where a cell is empty, else 0.

    boards (..., 9) -> mask (..., 9) int8, the type that `action_space.sample` wants.
    """
    return (boards == 0).astype(np.int8)


def has_won(boards: np.ndarray) -> np.ndarray:
    """Has the side to move three in a row? boards (..., 9) -> (...) bool."""
    return (boards[..., LINES].sum(axis=-1) == 3).any(axis=-1)


def x_to_move(boards: np.ndarray) -> np.ndarray:
    """Is it the turn of X, who moves first? boards (..., 9) -> (...) bool."""
    return np.count_nonzero(boards, axis=-1) % 2 == 0


def play_moves(boards: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Play one move on each of N boards. This is the whole game.

    boards (N, 9) int8, each from the view of the side to move; actions (N,) int.
    Returns
        next_boards  (N, 9) int8     from the view of the *next* side: all signs flipped
        rewards      (N,)   float64  of the side that has just moved
        terminated   (N,)   bool     won, full, or ended by an illegal move
        illegal      (N,)   bool     the cell was taken: nothing changes on that board
    By hand: X has cells 0 and 1, O has 3 and 4, X plays 2:
        [1,1,0,-1,-1,0,0,0,0], 2  ->  [-1,-1,-1,1,1,0,0,0,0], 1.0, True, False
    """
    rows = np.arange(len(boards))
    illegal = boards[rows, actions] != 0
    boards = boards.copy()
    boards[rows[~illegal], actions[~illegal]] = 1
    won = has_won(boards)
    full = (boards != 0).all(axis=-1)
    rewards = won.astype(np.float64) - illegal  # (4) +1, 0 or -1 for the mover
    terminated = won | full | illegal  # (5)
    # Turn the board round for the next player. An illegal move was no move, so the
    # turn does not pass and the board stays as it was.
    next_boards = np.where(illegal[:, None], boards, -boards)
    return next_boards, rewards, terminated, illegal


def board_text(board: np.ndarray) -> str:
    """A board as text: X and O, and the number of each empty cell.

    board (9,) from the side to move; returns three lines joined by rules.
    """
    own, other = ("X", "O") if x_to_move(board) else ("O", "X")
    marks = [
        own if cell == 1 else other if cell == -1 else str(number)
        for number, cell in enumerate(board)
    ]
    rows = [f" {' | '.join(marks[start : start + 3])} " for start in (0, 3, 6)]
    return "\n---+---+---\n".join(rows)


def starting_board(options: dict[str, Any] | None) -> np.ndarray:
    """The board that `reset` begins with: empty, or the one asked for in `options`.

    `options={"board": nine numbers}` starts from a position in the middle of a game,
    from the view of the side to move. Errors: ValueError for a position that cannot
    be played on.
    """
    if options is None or options.get("board") is None:
        return np.zeros(9, dtype=np.int8)
    board = np.asarray(options["board"])
    if board.shape != (9,) or not np.isin(board, (-1, 0, 1)).all():
        raise ValueError(f"a board is nine numbers out of -1, 0, 1; got {board!r}")
    own, other = np.count_nonzero(board == 1), np.count_nonzero(board == -1)
    if other - own not in (0, 1):
        raise ValueError(
            f"the sides move in turn, but {own} own against {other} stones"
        )
    if has_won(board) or has_won(-board) or own + other == 9:
        raise ValueError(f"this game is over already: {board.tolist()}")
    return board.astype(np.int8)


# ------------------------------------------------------------------------------------
# One board
# ------------------------------------------------------------------------------------


class TicTacToeEnv(gym.Env):
    """One board. Both players act through the same `step`, in turn.

    An environment is a class with two spaces and two methods: `reset` begins a game,
    `step` plays one move. All the rest is courtesy to whoever uses it.
    """

    # Which ways of drawing there are, and how many frames a second a film should show.
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None):
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode is 'ansi', 'human' or None: {render_mode!r}")
        self.render_mode = render_mode
        # (1) Nine whole numbers from -1 to 1. (2) One of 0, 1, ..., 8.
        self.observation_space = gym.spaces.Box(-1, 1, shape=(9,), dtype=np.int8)
        self.action_space = gym.spaces.Discrete(9)
        self.board = np.zeros(9, dtype=np.int8)
        self.over = True  # no game yet: `reset` begins one

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game; returns (observation, info). `options`: see starting_board."""
        super().reset(seed=seed)  # (6) seeds self.np_random, never used here
        self.board = starting_board(options)
        self.over = False
        if self.render_mode == "human":
            self._show()
        return self.board.copy(), self._info(illegal_move=False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take cell `action` for the side to move; the observation is the other side's.

        Returns (observation, reward, terminated, truncated, info). A taken cell ends
        the game as a loss of the mover. A number that is no cell at all is a bug in the
        caller, not a bad move: InvalidAction.
        """
        # In Gymnasium 1.2.3 `contains` cannot read whole numbers beyond 64 bits.
        too_far = isinstance(action, int) and not 0 <= action < 9
        if too_far or not self.action_space.contains(action):
            raise gym.error.InvalidAction(
                f"an action is a whole number from 0 to 8, got {action!r}"
            )
        if self.over:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        # The rules are written for N boards: play them with N = 1 and take row 0.
        boards, rewards, terminated, illegal = play_moves(
            self.board[None], np.array([action])
        )
        self.board, self.over = boards[0], bool(terminated[0])
        if self.render_mode == "human":
            self._show()
        info = self._info(illegal_move=bool(illegal[0]))
        # The copy keeps what was handed out from changing when the game goes on. False:
        # (5) never truncated.
        return self.board.copy(), float(rewards[0]), self.over, False, info

    def _info(self, illegal_move: bool) -> dict[str, Any]:
        """(3) What the player may do; after the end nothing any more."""
        mask = np.zeros(9, dtype=np.int8) if self.over else legal_moves(self.board)
        return {"action_mask": mask, "illegal_move": illegal_move}

    def render(self) -> str | None:
        """In "ansi" mode the board as text. "human" mode has drawn it already."""
        return board_text(self.board) if self.render_mode == "ansi" else None

    def _show(self) -> None:
        print(board_text(self.board), end="\n\n", flush=True)


# ------------------------------------------------------------------------------------
# N boards at once
# ------------------------------------------------------------------------------------


class TicTacToeVectorEnv(gym.vector.VectorEnv):
    """N boards that move together: the same game, N results for one call of `step`.

    Python is slow and NumPy is not, so a thousand boards cost little more than one.

    `autoreset_mode` says what happens to a board whose game has ended while the
    others play on:
        NEXT_STEP  the step after the end begins a new game. That step's action is not
                   played and its reward is 0: never train on it.
        SAME_STEP  the new game begins at once; the last board of the old game is in
                   `info["final_obs"]` and its info in `info["final_info"]`.
        DISABLED   the board stays as it is: whatever is played there is ignored, the
                   reward is 0 and terminated stays True, until `reset`. So nine
                   steps play N whole games and not one move more.
    """

    metadata = {
        "render_modes": ["ansi"],
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ):
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode is 'ansi' or None: {render_mode!r}")
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        one = TicTacToeEnv()
        self.single_observation_space = one.observation_space
        self.single_action_space = one.action_space
        self.observation_space = batch_space(one.observation_space, num_envs)
        self.action_space = batch_space(one.action_space, num_envs)
        self.boards = np.zeros((num_envs, 9), dtype=np.int8)
        self.over = np.ones(num_envs, dtype=bool)  # (N,) no game is going on yet
        self.was_reset = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin N games, or only those where `options["reset_mask"]` (N,) is True."""
        super().reset(seed=seed)
        which = np.ones(self.num_envs, dtype=bool)
        if options is not None and "reset_mask" in options:
            which = np.asarray(options["reset_mask"])
            if which.shape != (self.num_envs,) or which.dtype != bool:
                raise ValueError(f"reset_mask is {self.num_envs} booleans: {which!r}")
        self.boards[which] = starting_board(options)
        self.over[which] = False
        self.was_reset = True
        nothing_illegal = np.zeros(self.num_envs, dtype=bool)
        return self.boards.copy(), self._infos(nothing_illegal)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Play one move on every board; each return value is that of N single steps.

        actions (N,) int -> observations (N, 9) int8, rewards (N,) float64,
        terminated (N,) bool, truncated (N,) bool, infos.
        """
        if not self.action_space.contains(actions):
            raise gym.error.InvalidAction(
                f"needs {self.num_envs} whole numbers from 0 to 8, got {actions!r}"
            )
        if not self.was_reset:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        over = self.over  # (N,) games that had ended before this step
        boards, rewards, terminated, illegal = play_moves(
            self.boards, np.asarray(actions)
        )
        rewards[over], illegal[over] = 0.0, False
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            boards[over], terminated[over] = 0, False
        else:  # DISABLED; in SAME_STEP mode no game is over when a step begins
            boards[over], terminated[over] = self.boards[over], True
        self.boards, self.over = boards, terminated.copy()
        infos = self._infos(illegal)
        if self.autoreset_mode == AutoresetMode.SAME_STEP and terminated.any():
            infos = self._begin_again(infos)
        truncated = np.zeros(self.num_envs, dtype=bool)
        return self.boards.copy(), rewards, terminated, truncated, infos

    def _begin_again(self, old_infos: dict[str, Any]) -> dict[str, Any]:
        """SAME_STEP: keep the last boards and infos aside, then clear these boards."""
        ended = self.over
        final_obs = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            final_obs[row] = self.boards[row].copy()
        final_info = {name: value.copy() for name, value in old_infos.items()}
        for value in final_info.values():
            value[~ended] = 0
        self.boards[ended] = 0
        self.over = np.zeros(self.num_envs, dtype=bool)
        infos = self._infos(old_infos["illegal_move"] & ~ended)
        infos |= {"final_obs": final_obs, "_final_obs": ended.copy()}
        return infos | {"final_info": final_info, "_final_info": ended.copy()}

    def _infos(self, illegal: np.ndarray) -> dict[str, Any]:
        """Gymnasium's form: an array for each key; `_key` says which boards have it."""
        masks = legal_moves(self.boards)
        masks[self.over] = 0
        everywhere = np.ones(self.num_envs, dtype=bool)
        return {
            "action_mask": masks,
            "_action_mask": everywhere,
            "illegal_move": illegal,
            "_illegal_move": everywhere.copy(),
        }

    def render(self) -> tuple[str, ...] | None:
        """In "ansi" mode the N boards as texts."""
        if self.render_mode != "ansi":
            return None
        return tuple(board_text(board) for board in self.boards)


# From here on `gym.make("TicTacToe-v0")` and `gym.make_vec` know the game. No
# `max_episode_steps` is needed: it always ends by itself. The `if` is there because
# running this file reads it twice, once by itself and once for Gymnasium.
if "TicTacToe-v0" not in gym.registry:
    gym.register(
        id="TicTacToe-v0",
        entry_point="tictactoe_env:TicTacToeEnv",
        vector_entry_point="tictactoe_env:TicTacToeVectorEnv",
    )


# ------------------------------------------------------------------------------------
# A look at it
# ------------------------------------------------------------------------------------


def main() -> None:
    """Check the environment, show one random game, measure how fast N boards are."""
    check_env(gym.make("TicTacToe-v0").unwrapped, skip_render_check=True)
    print("gymnasium's check_env: passed\n\nOne game, both sides at random:\n")
    env = gym.make("TicTacToe-v0", render_mode="human")
    _, info = env.reset()
    terminated = False
    while not terminated:
        action = env.action_space.sample(mask=info["action_mask"])
        _, reward, terminated, _, info = env.step(action)
    print("reward of the side that moved last:", reward)

    envs = gym.make_vec("TicTacToe-v0", num_envs=1024)
    envs.reset(seed=0)
    started, steps = time.perf_counter(), 200
    for _ in range(steps):
        envs.step(envs.action_space.sample())
    speed = steps * envs.num_envs / (time.perf_counter() - started)
    print(f"1024 boards at once: {speed:,.0f} moves a second")


if __name__ == "__main__":
    main()
