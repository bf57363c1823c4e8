"""Lesson 2, the game: tic-tac-toe as a Gymnasium environment, one board or N at once.

What you will learn
    How to turn the rules of a game into an environment that any learning code can use,
    and which decisions you have to take on the way.

The environment in 6 decisions (the code marks each one with its number)
    1. Observation: what does a player see? Nine cells, as the side to move sees them:
       +1 is a mark of the side to move, -1 a mark of the other side, 0 an empty cell.
       So one network can play both sides, and never has to be told which side it is.
       An observation is an array (9,) int8; N boards side by side give (N, 9).
    2. Action: what does a player do? An action is a whole number from 0 to 8, the cell
       to take; N boards need an array (N,).
    3. Mask: what may a player do? `info["action_mask"]` is 1 where a move is possible.
    4. Reward: what does a player want? The reward is that of the side that has just
       moved: +1 for three in a row, 0 for a draw or while the game goes on, -1 for an
       illegal move. The other side's reward is minus that, and `step` does not return
       it.
    5. End: when is a game over? `terminated` is True after three in a row, on a full
       board, and after an illegal move, which ends the game as a loss. `truncated`
       would mean that a time limit cut the game short. There is none: always False.
    6. Randomness: the game has none, but Gymnasium wants `reset` to take a `seed`.
       `action_space.sample()`, which picks random moves, has a random generator of its
       own; `action_space.seed(...)` seeds it.

Cells are numbered row by row:   0 1 2
                                 3 4 5
                                 6 7 8
X always moves first, so X is to move when an even number of marks is on the board.

Run it, or use it
    python tictactoe_env.py     checks the environment and shows one random game

    import gymnasium as gym, tictactoe_env     # this import registers TicTacToe-v0
    env = gym.make("TicTacToe-v0", render_mode="human")
    envs = gym.make_vec("TicTacToe-v0", num_envs=1024)

Another game
    In *misere* tic-tac-toe, the player who gets three in a row loses. For this game,
    change one line of `play_moves` to
        rewards = -won.astype(np.float64) - illegal
    The other scripts of the lesson then train and measure an agent for it as they are.
    For a board of another size, change CELLS, WINS and `board_text` (and in
    tictactoe_eval.py `probabilities_text` and `picture`); for other rules, everything
    in the first section below. Only a small game can be played in *every* possible way,
    as tictactoe_actorcritic.py does to decide when to stop: 4 x 4 cells are too many.
"""

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

# ------------------------------------------------------------------------------------
# The rules, written for N boards at once. One board is N = 1.
# ------------------------------------------------------------------------------------

CELLS = 9

# The eight ways to have three in a row: three rows, three columns, two diagonals.
WINS = np.array(
    [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    + [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    + [[0, 4, 8], [2, 4, 6]]
)


def legal_moves(boards: np.ndarray) -> np.ndarray:
    """Which cells may be taken: 1 where a cell is empty, 0 elsewhere.

    Maps boards (..., 9) to masks (..., 9) int8, the type `action_space.sample` wants.
    """
    return (boards == 0).astype(np.int8)


def has_won(boards: np.ndarray) -> np.ndarray:
    """True where the side with the +1 marks has three in a row.

    Maps boards (..., 9) to (...) bool.
    """
    # boards[..., WINS] looks up the three cells of each of the eight ways: (..., 8, 3).
    # Three cells add up to 3 only if each of them is +1.
    return (boards[..., WINS].sum(axis=-1) == WINS.shape[1]).any(axis=-1)


def play_moves(boards: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Play one move on each of N boards. This is the whole game.

    `boards` is (N, 9) int8, each as the side to move sees it; `actions` is (N,) int.
    Returns
        next_boards  (N, 9) int8     as the *next* side sees them: all signs are flipped
        rewards      (N,)   float64  of the side that has just moved
        terminated   (N,)   bool     three in a row, a full board or an illegal move
        illegal      (N,)   bool     the cell was taken: nothing changes on that board
    By hand: X has the cells 0 and 1, O has 3 and 4, and X plays 2:
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
    # The next player sees all signs flipped. An illegal move does not pass the turn.
    next_boards = np.where(illegal[:, None], boards, -boards)
    return next_boards, rewards, terminated, illegal


def board_text(board: np.ndarray) -> str:
    """A board (9,) as text: X and O, and the number of each empty cell."""
    marks = [str(number) for number in range(CELLS)]
    # If X is to move, both sides have as many marks, and the sum is 0. If O is to move,
    # X has one more, and its marks count as -1.
    x_value = 1 if board.sum() == 0 else -1
    for cell in np.flatnonzero(board):
        marks[cell] = "X" if board[cell] == x_value else "O"
    rows = [f" {' | '.join(marks[start : start + 3])} " for start in (0, 3, 6)]
    return "\n---+---+---\n".join(rows)


# ------------------------------------------------------------------------------------
# One board
# ------------------------------------------------------------------------------------


class TicTacToeEnv(gym.Env):
    """One board. Both players act through the same `step`, in turn.

    An environment is a class with two spaces, which say what observations and actions
    look like, and two methods: `reset` begins a game, `step` plays one move.
    """

    # The render modes that exist, and how many frames a second a recording should show.
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is 'ansi', 'human' or None: {render_mode!r}")
        self.render_mode = render_mode
        # (1) Nine whole numbers from -1 to 1. (2) One of 0, 1, ..., 8.
        self.observation_space = gym.spaces.Box(-1, 1, shape=(CELLS,), dtype=np.int8)
        self.action_space = gym.spaces.Discrete(CELLS)
        self.board = np.zeros(CELLS, dtype=np.int8)
        self.over = True  # no game yet: `reset` begins one

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin a game with an empty board. Returns (observation, info)."""
        super().reset(seed=seed)  # (6) seeds self.np_random, which is never used here
        self.board, self.over = np.zeros(CELLS, dtype=np.int8), False
        return self._observe(illegal_move=False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take cell `action` for the side to move; the observation is the other side's.

        Returns (observation, reward, terminated, truncated, info). A number that is no
        cell at all is a bug in the caller, not a bad move: it raises InvalidAction.
        """
        if not self.action_space.contains(action):
            raise gym.error.InvalidAction(f"not a whole number from 0 to 8: {action!r}")
        if self.over:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        # The rules are written for N boards: play them with N = 1 and take row 0.
        results = play_moves(self.board[None], np.array([action]))
        self.board, reward, terminated, illegal = (array[0] for array in results)
        self.over = bool(terminated)
        observation, info = self._observe(illegal_move=bool(illegal))
        return observation, float(reward), self.over, False, info  # (5) not truncated

    def _observe(self, illegal_move: bool) -> tuple[np.ndarray, dict]:
        """The board, as a copy that the next move leaves alone, and the info."""
        if self.render_mode == "human":
            print(board_text(self.board), end="\n\n", flush=True)
        # (3) After the end no cell may be taken any more.
        mask = legal_moves(self.board) * (not self.over)
        return self.board.copy(), {"action_mask": mask, "illegal_move": illegal_move}

    def render(self) -> str | None:
        """Return the board as text in "ansi" mode; "human" mode has printed it already.

        (Gymnasium calls a text that is returned "ansi".)
        """
        return board_text(self.board) if self.render_mode == "ansi" else None


# ------------------------------------------------------------------------------------
# N boards at once
# ------------------------------------------------------------------------------------

DISABLED = AutoresetMode.DISABLED


class TicTacToeVectorEnv(gym.vector.VectorEnv):
    """N boards that move together: the same game, N results for one call of `step`.

    One call of NumPy moves all N boards, which is much faster than N calls of Python.

    By default, a vector environment of Gymnasium starts a new game by itself on a board
    whose game has ended. This is called *autoreset*, and here it is switched off
    (AutoresetMode.DISABLED): a board whose game has ended waits for `reset`. Moves on
    it change nothing, its reward is 0, and `terminated` stays True. As no game has more
    than nine moves, nine calls of `step` play N whole games.
    """

    metadata = {"render_modes": [], "autoreset_mode": DISABLED}

    def __init__(self, num_envs: int = 1, autoreset_mode: AutoresetMode = DISABLED):
        if AutoresetMode(autoreset_mode) != DISABLED:
            # Gymnasium's own vector environment, a loop over N boards, has autoreset.
            raise ValueError("for autoreset, use make_vec(vectorization_mode='sync')")
        self.num_envs = num_envs
        one = TicTacToeEnv()
        self.single_observation_space = one.observation_space
        self.single_action_space = one.action_space
        # The spaces of N observations and of N actions: arrays (N, 9) and (N,).
        self.observation_space = batch_space(one.observation_space, num_envs)
        self.action_space = batch_space(one.action_space, num_envs)
        self.boards = np.zeros((num_envs, CELLS), dtype=np.int8)
        self.over = np.ones(num_envs, dtype=bool)  # (N,) no game is going on yet
        self.was_reset = False  # `over` is also True everywhere when all games ended

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin N games. Returns (observations, infos).

        With `options={"reset_mask": which}`, only the boards begin anew where `which`
        (N,) bool is True. This is Gymnasium's convention without autoreset.
        """
        super().reset(seed=seed)  # (6)
        which = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        self.boards[which] = 0
        self.over[which] = False
        self.was_reset = True
        return self._observe(illegal=np.zeros(self.num_envs, dtype=bool))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Play one move on every board. Row i is what one board would return.

        `actions` is (N,) int. Returns observations (N, 9) int8, rewards (N,) float64,
        terminated (N,) bool, truncated (N,) bool, and infos.
        """
        if not self.action_space.contains(actions):
            raise gym.error.InvalidAction(f"not {self.num_envs} whole numbers, 0 to 8")
        if not self.was_reset:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        actions, over = np.asarray(actions), self.over
        boards, rewards, terminated, illegal = play_moves(self.boards, actions)
        # On boards whose game had ended before this step, the move is taken back.
        boards[over], rewards[over] = self.boards[over], 0.0
        terminated[over], illegal[over] = True, False  # (5); `truncated` is all False
        self.boards, self.over = boards, terminated.copy()
        observations, infos = self._observe(illegal)
        return observations, rewards, terminated, np.zeros_like(terminated), infos

    def _observe(self, illegal: np.ndarray) -> tuple[np.ndarray, dict]:
        """Copies of the boards, and the infos as Gymnasium wants them."""
        masks = legal_moves(self.boards) * ~self.over[:, None]  # (3)
        infos = {"action_mask": masks, "illegal_move": illegal}
        # Gymnasium's convention: beside every key `k`, an array `_k` (N,) bool says for
        # which boards `k` is present. Here it is present for all of them.
        infos |= {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in infos}
        return self.boards.copy(), infos


# From here on, `gym.make("TicTacToe-v0")` and `gym.make_vec` know the game. Gymnasium
# imports this file by its name. When the file runs as a script, that is the second time
# that Python reads it, and the `if` keeps the game from being registered twice.
if "TicTacToe-v0" not in gym.registry:
    gym.register(
        id="TicTacToe-v0",
        entry_point="tictactoe_env:TicTacToeEnv",
        vector_entry_point="tictactoe_env:TicTacToeVectorEnv",
    )


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Check the environment with Gymnasium's own checker and show one random game."""
    # The checker wants the class itself, without the wrappers that `make` adds, and is
    # told not to try the render modes, one of which prints.
    check_env(gym.make("TicTacToe-v0").unwrapped, skip_render_check=True)
    print("Gymnasium's check_env found nothing wrong. Now one game of random moves.")
    env = gym.make("TicTacToe-v0", render_mode="ansi")
    _, info = env.reset()
    mover, terminated = "O", False
    while not terminated:
        mover = "O" if mover == "X" else "X"
        action = env.action_space.sample(mask=info["action_mask"])
        _, reward, terminated, _, info = env.step(action)
        print(f"\n{mover} plays {action}.\n{env.render()}")
    print(f"\n{mover} wins." if reward > 0 else "\nIt is a draw.")


if __name__ == "__main__":
    main()
