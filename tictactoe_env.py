"""Lesson 2, the game: tic-tac-toe as a Gymnasium environment, one board or N at once.

What you will learn
    How to turn the rules of a game into an environment that any learning code can
    use, and which decisions you have to take on the way.

The environment in 6 decisions (each is marked in the code with its number)
    1. Observation: what the player sees. Nine cells, as the side to move sees them: +1
       a stone of the side to move, -1 a stone of the other side, 0 empty. So one
       network can play both sides and never has to be told which side it is. An array
       (9,) int8; N boards side by side are an array (N, 9).
    2. Action: what the player does. A whole number from 0 to 8, the cell to take; for N
       boards an array (N,).
    3. Mask: what the player may do. `info["action_mask"]`: 1 where a move is possible.
    4. Reward: what the player wants. It goes to the side that has just moved: +1 for
       three in a row, 0 for a draw or while the game goes on, -1 for an illegal move.
       `step` gives the mover's reward only; the other side's is minus that.
    5. End: `terminated` is True when the game is over by its own rules. `truncated`
       would mean that a time limit cut it short: always False, nine cells fill up.
    6. Randomness: the game has none, but `reset` must take a `seed` all the same. Moves
       drawn from `action_space` are seeded apart, with `action_space.seed(...)`.

Cells are numbered row by row:   0 1 2      X always moves first, so X is to move when
                                 3 4 5      an even number of stones lies on the board.
                                 6 7 8

Run it, or use it
    python tictactoe_env.py     checks the environment and shows one random game

    import gymnasium as gym, tictactoe_env     # this import registers TicTacToe-v0
    env = gym.make("TicTacToe-v0", render_mode="human")
    envs = gym.make_vec("TicTacToe-v0", num_envs=1024)

    Another game: edit the rules (`WINS` to `starting_board`); a larger board: also each
    9 and 8. In tictactoe_actorcritic.py: ENV_ID, the import of the game, PLIES, each 9.
"""

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

# ------------------------------------------------------------------------------------
# The rules: pure functions on boards, written once and used by everything
# ------------------------------------------------------------------------------------

# The eight ways to have three in a row: three rows, three columns, two diagonals.
WINS = np.array(
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
    """Has the side with the +1 stones three in a row? boards (..., 9) -> (...) bool."""
    return (boards[..., WINS].sum(axis=-1) == 3).any(axis=-1)


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
    # Turn the board round for the next player; an illegal move does not pass the turn.
    next_boards = np.where(illegal[:, None], boards, -boards)
    return next_boards, rewards, terminated, illegal


def board_text(board: np.ndarray) -> str:
    """A board (9,) as text: X and O, and the number of each empty cell."""
    marks = [str(number) for number in range(9)]
    x_value = 1 if board.sum() == 0 else -1  # X to move: sum 0, O to move: sum -1
    for cell in np.flatnonzero(board):
        marks[cell] = "X" if board[cell] == x_value else "O"
    rows = [f" {' | '.join(marks[start : start + 3])} " for start in (0, 3, 6)]
    return "\n---+---+---\n".join(rows)


def starting_board(options: dict | None) -> np.ndarray:
    """The board that `reset` begins with: empty, or `options["board"]` (9,), a game
    under way as the side to move sees it. ValueError if no move can be made in it."""
    board = np.asarray((options or {}).get("board", [0] * 9))
    is_board = board.shape == (9,) and np.isin(board, (-1, 0, 1)).all()
    if not is_board or -board.sum() not in (0, 1):  # the sides move in turn
        raise ValueError(f"not a board as the side to move sees it: {board.tolist()}")
    if has_won(board) or has_won(-board) or board.all():
        raise ValueError(f"this game is over already: {board.tolist()}")
    return board.astype(np.int8)


# ------------------------------------------------------------------------------------
# One board
# ------------------------------------------------------------------------------------


class TicTacToeEnv(gym.Env):
    """One board. Both players act through the same `step`, in turn.

    An environment is a class with two spaces, which say what observations and actions
    look like, and two methods: `reset` begins a game, `step` plays one move.
    """

    # The ways of drawing, and how many frames a second a film should show.
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is 'ansi', 'human' or None: {render_mode!r}")
        self.render_mode = render_mode
        # (1) Nine whole numbers from -1 to 1. (2) One of 0, 1, ..., 8.
        self.observation_space = gym.spaces.Box(-1, 1, shape=(9,), dtype=np.int8)
        self.action_space = gym.spaces.Discrete(9)
        self.board = np.zeros(9, dtype=np.int8)
        self.over = True  # no game yet: `reset` begins one

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin a game; gives (observation, info). For `options` see starting_board."""
        super().reset(seed=seed)  # (6) seeds self.np_random, never used here
        self.board, self.over = starting_board(options), False
        return self._observe(illegal_move=False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Take cell `action` for the side to move; the observation is the other side's.

        Returns (observation, reward, terminated, truncated, info). A number that is no
        cell at all is a bug in the caller, not a bad move: InvalidAction.
        """
        # As an array: in Gymnasium 1.2.3 a number beyond 64 bits breaks `contains`.
        if not self.action_space.contains(np.asarray(action)):
            raise gym.error.InvalidAction(f"not a whole number from 0 to 8: {action!r}")
        if self.over:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        # The rules are written for N boards: play them with N = 1 and take row 0.
        results = play_moves(self.board[None], np.array([action]))
        self.board, reward, terminated, illegal = (array[0] for array in results)
        self.over = bool(terminated)
        observation, info = self._observe(illegal_move=bool(illegal))
        return observation, float(reward), self.over, False, info  # (5) False

    def _observe(self, illegal_move: bool) -> tuple[np.ndarray, dict]:
        """The board, as a copy that the next move leaves alone, and the info."""
        if self.render_mode == "human":
            print(board_text(self.board), end="\n\n", flush=True)
        # (3) After the end no cell may be taken any more.
        mask = np.zeros(9, dtype=np.int8) if self.over else legal_moves(self.board)
        return self.board.copy(), {"action_mask": mask, "illegal_move": illegal_move}

    def render(self) -> str | None:
        """In "ansi" mode the board as text. "human" mode has drawn it already."""
        return board_text(self.board) if self.render_mode == "ansi" else None


# ------------------------------------------------------------------------------------
# N boards at once
# ------------------------------------------------------------------------------------

DISABLED = AutoresetMode.DISABLED


class TicTacToeVectorEnv(gym.vector.VectorEnv):
    """N boards that move together: the same game, N results for one call of `step`.

    One NumPy call moves all N boards, much faster than N calls of Python. A board whose
    game has ended waits for `reset` (Gymnasium's AutoresetMode.DISABLED). Here, moves
    on it are ignored, its reward is 0 and `terminated` stays True: so nine steps play N
    whole games.
    """

    metadata = {"render_modes": [], "autoreset_mode": DISABLED}

    def __init__(self, num_envs: int = 1, autoreset_mode: AutoresetMode = DISABLED):
        if AutoresetMode(autoreset_mode) != DISABLED:
            raise ValueError("for this mode use make_vec(vectorization_mode='sync')")
        self.num_envs = num_envs
        one = TicTacToeEnv()
        self.single_observation_space = one.observation_space
        self.single_action_space = one.action_space
        self.observation_space = batch_space(one.observation_space, num_envs)
        self.action_space = batch_space(one.action_space, num_envs)
        self.boards = np.zeros((num_envs, 9), dtype=np.int8)
        self.over = np.ones(num_envs, dtype=bool)  # (N,) no game is going on yet
        self.was_reset = False

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begin N games, or only those where `options["reset_mask"]` (N,) is True."""
        super().reset(seed=seed)  # (6)
        which = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        self.boards[which] = starting_board(options)
        self.over[which] = False
        self.was_reset = True
        return self._observe(illegal=np.zeros(self.num_envs, dtype=bool))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, ...]:
        """Play one move on every board; each return value is that of N single steps.

        actions (N,) int -> observations (N, 9) int8, rewards (N,) float64,
        terminated (N,) bool, truncated (N,) bool, infos.
        """
        if not self.action_space.contains(actions):
            raise gym.error.InvalidAction(f"not {self.num_envs} whole numbers, 0 to 8")
        if not self.was_reset:
            raise gym.error.ResetNeeded("no game is going on: call reset() first")
        over = self.over  # (N,) games that had ended before this step: nothing changes
        actions = np.asarray(actions)
        boards, rewards, terminated, illegal = play_moves(self.boards, actions)
        boards[over], rewards[over] = self.boards[over], 0.0
        terminated[over], illegal[over] = True, False
        self.boards, self.over = boards, terminated.copy()
        observations, infos = self._observe(illegal)
        truncated = np.zeros(self.num_envs, dtype=bool)  # (5)
        return observations, rewards, terminated, truncated, infos

    def _observe(self, illegal: np.ndarray) -> tuple[np.ndarray, dict]:
        """Copies of the boards, and the infos as Gymnasium wants them."""
        masks = legal_moves(self.boards)  # (3)
        masks[self.over] = 0
        infos = {"action_mask": masks, "illegal_move": illegal}
        # For each key one more, `_key`, says which boards have it: here all.
        infos |= {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in infos}
        return self.boards.copy(), infos


# From here on `gym.make("TicTacToe-v0")` and `gym.make_vec` know the game. The `if` is
# there because running this file reads it twice, once by itself, once for Gymnasium.
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
    check_env(gym.make("TicTacToe-v0").unwrapped, skip_render_check=True)
    print("gymnasium's check_env: passed\n\nOne game, both sides at random:\n")
    env = gym.make("TicTacToe-v0", render_mode="human")
    _, info = env.reset()
    terminated = False
    while not terminated:
        action = env.action_space.sample(mask=info["action_mask"])
        _, reward, terminated, _, info = env.step(action)
    print("reward of the side that moved last:", reward)


if __name__ == "__main__":
    main()
