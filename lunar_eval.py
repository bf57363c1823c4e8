"""Measure the LunarLander agent that lunarlander_ppo.py made, then watch it land.

What you will learn
    How to judge a trained policy: on many held-out episodes, with the spread, the worst
    case and the crashes beside the mean, and next to a random policy.

Run it, and what you should see
    python lunar_eval.py     about 20 seconds: a table, then three landings, in a window
                             where there is a display, else in `lunarlander.gif`

    policy      mean     std   standard error   minimum   200 or more   crashes
    greedy     280.7    19.1              1.9     238.7          100%         0
    sampled    277.1    47.5              4.8      24.9           97%         3
    random    -183.1   112.9             11.3    -522.1            0%       100

    greedy     It always takes the most likely action, and always lands.
    sampled    It samples each action, as in training, and crashes in 3 of 100 episodes.
    random     All actions are equally likely. This is what an agent scores that has
               learned nothing.

    The standard deviation (std) says how much single episodes differ. The mean of 100
    of them is known far better than that: its standard error, std / sqrt(100), says how
    far the mean of other 100 episodes would typically be from that of very many.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import os
import sys
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import lunarlander_ppo as lesson
from lunarlander_ppo import ActorCritic, end_with, evaluate, load_agent

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# Seed of the sampled and the random actions; the episodes have seeds of their own.
ACTION_SEED = 0
# Whether landings are shown after the table.
SHOW = True
# Episodes to show.
LANDINGS = 3
# Where the landings are written if there is no display.
GIF_PATH = Path(__file__).with_name("lunarlander.gif")
# One frame in so many is kept. The lander moves at 50 frames a second, the GIF at 25.
GIF_EVERY = 2
# Width and height in pixels, half of what the environment draws.
GIF_SIZE = (300, 200)
# Colours in a frame. The pictures have few, and a smaller palette makes a smaller file.
GIF_COLOURS = 32

# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: Tensor) -> Tensor:
    """Logits (B, K) for observations (B, D), all 0: every action is equally likely."""
    return torch.zeros(len(observations), lesson.NUM_ACTIONS)


def print_report(agent: ActorCritic) -> None:
    """Print a line each for the greedy, the sampled and a random policy."""
    episodes, first_seed = lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED
    enough = lesson.SOLVED_SCORE
    print(f"{episodes} episodes of {lesson.ENV_ID}, seeds from {first_seed:,}:\n")
    print("policy      mean     std   standard error   minimum", end="")
    print(f"   {enough:g} or more   crashes")
    policies = {"greedy": agent.actor, "sampled": agent.actor, "random": random_policy}
    for name, policy in policies.items():
        greedy = name == "greedy"
        scores, crashed = evaluate(policy, episodes, first_seed, greedy)
        standard_error = scores.std() / episodes**0.5
        print(
            f"{name:7}{scores.mean():9.1f}{scores.std():8.1f}{standard_error:17.1f}"
            f"{scores.min():10.1f}{(scores >= enough).mean():14.0%}{crashed.sum():10}"
        )


# ------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------


def has_display() -> bool:
    """True if a window can be seen. Without a screen, SDL draws where nobody looks."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # or SDL warns that it found no screen
    try:
        pygame.display.init()
        return pygame.display.get_driver() not in ("dummy", "offscreen")
    except pygame.error:
        return False
    finally:
        pygame.display.quit()


@torch.no_grad()
def play_one_episode(
    agent: ActorCritic, env: gym.Env, seed: int
) -> tuple[float | None, list]:
    """Fly one greedy episode; return its score and, in mode "rgb_array", its frames.

    The score is None if the window was closed before the end.
    """
    frames, score, ended = [], 0.0, False
    observation, _ = env.reset(seed=seed)
    while not ended:
        if env.render_mode == "rgb_array":  # mode "human" draws by itself
            frames.append(env.render())
        elif pygame.event.peek(pygame.QUIT):  # the window's close button
            return None, frames
        action = agent.actor(torch.from_numpy(observation)[None]).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += float(reward)
        ended = terminated or truncated
    return score, frames


def show(agent: ActorCritic, episodes: int, path: Path, pictures: list) -> bool:
    """Show greedy episodes in a window or, without a display, write them as a GIF.

    `pictures` are those of earlier calls, and the new ones are added to them: the GIF
    shows all. Returns whether everything was shown: False if the window was closed.
    (lunarlander_ppo.py calls this while it trains, see WATCH_EVERY there. That is why
    lines are printed with tqdm, which keeps them apart from a progress bar.)
    """
    in_window, score = has_display(), None
    env = lesson.make_env(render_mode="human" if in_window else "rgb_array")
    for i in range(episodes):
        score, frames = play_one_episode(agent, env, lesson.HELD_OUT_SEED + i)
        if score is None:
            break
        tqdm.write(f"Greedy episode {i + 1}: score {score:.0f}")
        for frame in frames[::GIF_EVERY]:
            small = Image.fromarray(frame).resize(GIF_SIZE)
            pictures.append(small.quantize(GIF_COLOURS))
    env.close()
    if not in_window:
        options = {"append_images": pictures[1:], "loop": 0}
        options["duration"] = 20 * GIF_EVERY  # milliseconds: as fast as it really moves
        pictures[0].save(path, save_all=True, **options)
        tqdm.write(f"{Path(path).absolute()}")
    return score is not None


def show_landings(agent: ActorCritic) -> None:
    """Show LANDINGS episodes, and say first where they can be seen."""
    if has_display():
        print(f"\nA window shows {LANDINGS} greedy episodes. Close it to stop.")
        if not show(agent, LANDINGS, GIF_PATH, pictures=[]):
            print("Stopped.")
        return
    print(f"\nThere is no display, so {LANDINGS} greedy episodes go into a GIF ...")
    show(agent, LANDINGS, GIF_PATH, pictures=[])
    if "ipykernel" in sys.modules:
        from IPython.display import Image as Picture
        from IPython.display import display

        display(Picture(str(GIF_PATH)))


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Load the weights, print the report, show some episodes."""
    try:
        check_settings()
        agent = load_agent(lesson.WEIGHTS_PATH)
        torch.manual_seed(ACTION_SEED)
        torch.set_num_threads(1)
        print_report(agent)
        if SHOW:
            show_landings(agent)
    except KeyboardInterrupt:
        print("\nStopped.")
    except SystemExit as end:
        end_with(str(end))


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    width, height = GIF_SIZE
    folder = Path(GIF_PATH).parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    rules = {
        "HELD_OUT_EPISODES must be at least 1": lesson.HELD_OUT_EPISODES >= 1,
        "ACTION_SEED must be at least 0": ACTION_SEED >= 0,
        "LANDINGS must be at least 1": LANDINGS >= 1,
        "GIF_EVERY must be at least 1": GIF_EVERY >= 1,
        "GIF_SIZE must be at least 1 by 1": min(width, height) >= 1,
        "GIF_COLOURS must be from 2 to 256": 2 <= GIF_COLOURS <= 256,
        "GIF_PATH must end in .gif": Path(GIF_PATH).suffix == ".gif",
        "GIF_PATH must be in a writable folder": writable,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


if __name__ == "__main__":
    main()
