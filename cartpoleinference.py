"""Measure the CartPole agent that train_cartpole.py made, then watch it balance.

What you will learn
    How to judge a trained policy: on many episodes whose starts were never used in
    training, with the spread and the worst case beside the mean, and beside a policy
    that pushes at random.

Run it, and what you should see
    python cartpoleinference.py     a few seconds, and 10 for the window
    It prints this table, and then shows one episode: in a window where there is a
    display, otherwise as cartpole.gif.

        policy       mean     std   std. error   minimum   full episodes
        greedy      500.0     0.0         0.00       500      100 of 100
        sampled     498.5     8.4         0.84       436       96 of 100
        random       22.6    11.8         1.18        10        0 of 100

    greedy: the policy always takes the most likely action. The pole never falls.
    sampled: each action is sampled from the policy, as in training. Now and then it
        makes a bad push, and the pole falls in 4 of 100 episodes.
    random: each push has the probability 1/2. An agent that has learned nothing scores
        about as much.
    The standard deviation (std) says how far a single score typically is from the mean.
    The standard error (std / sqrt(number of episodes)) says how far the mean typically
    is from the mean over all possible episodes.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Gymnasium ...", flush=True)  # importing takes seconds

import math
import os
import signal
import sys
import threading
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import train_cartpole as lesson
from train_cartpole import ENV_ID, PolicyNetwork, load_policy

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# How many episodes are measured, and the seed of their starts, are Settings of
# train_cartpole.py: HELD_OUT_EPISODES and HELD_OUT_SEED.

# The seed of the sampled and of the random actions.
ACTION_SEED = 0

# False: print the table, and show nothing.
SHOW = True

# Where the episode that is shown begins: cart position, cart velocity, pole angle and
# angular velocity all have this value. 0.1 is a lean of 6 degrees, and the pole is
# falling. In training the four start between -0.05 and 0.05; from there a good policy
# hardly has to move, and there is little to see. At 0.21 an episode is over.
LEAN = 0.1

# The GIF that is written where there is no display.
GIF_PATH = Path(__file__).with_name("cartpole.gif")

# One frame in so many is kept. CartPole has 50 steps a second; 2 gives 25 frames a
# second. With a larger number the file is smaller and the motion less smooth.
GIF_EVERY = 2

# Width and height of the GIF in pixels; the environment draws 600 x 400.
GIF_SIZE = (300, 200)

# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: Tensor) -> Tensor:
    """Map observations (B, 4) to equal logits (B, 2): each push has probability 1/2."""
    return torch.zeros(len(observations), 2)


def print_report(policy: PolicyNetwork) -> None:
    """Print one row of the table for each way of playing."""
    episodes, seed = lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED
    print(f"{episodes} held-out episodes of {ENV_ID}:\n")
    print("policy       mean     std   std. error   minimum   full episodes")
    for name, player, greedy in [
        ("greedy", policy, True),
        ("sampled", policy, False),
        ("random", random_policy, False),
    ]:
        scores = lesson.evaluate(player, episodes, seed, greedy)
        mean, std, low = scores.mean(), scores.std(correction=0), scores.min()
        full = (scores >= lesson.FULL_SCORE).sum()
        print(
            f"{name:8}{mean:9.1f}{std:8.1f}{std / math.sqrt(episodes):13.2f}{low:10.0f}"
            f"{full:9} of {episodes}"
        )


# ------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------


def show(policy: PolicyNetwork, title: str, film: list, stop: list) -> str:
    """Show one greedy episode in a window, or in a GIF; return a line on how it went.

    Without a display, its frames are added to those in `film`, and the GIF shows them
    all: so WATCH_EVERY in train_cartpole.py makes one GIF of many episodes. A mark in
    `stop` ends the episode, and so does the close button of the window.
    """
    window = has_display()
    env = gym.make(ENV_ID, render_mode="human" if window else "rgb_array")
    steps, frames = play_one_episode(policy, env, title, stop)
    env.close()
    if steps is None:
        return "Stopped the episode."
    for frame in frames[::GIF_EVERY]:
        picture = Image.fromarray(frame).resize(GIF_SIZE)
        ImageDraw.Draw(picture).text((6, 4), title, fill="black")
        film.append(picture.quantize(32))
    line = f"The episode lasted {steps} of {env.spec.max_episode_steps} steps."
    if film:
        try:
            save_gif(film)
            line += f" It is in {GIF_PATH.name}."
        except OSError as problem:  # a GIF is not worth a training run
            line += f" No GIF: {problem}."
    return line


@torch.no_grad()
def play_one_episode(
    policy: PolicyNetwork, env: gym.Env, title: str, stop: list
) -> tuple[int | None, list]:
    """Play one greedy episode; return its steps (None if it was stopped) and frames."""
    window = env.render_mode == "human"  # it draws by itself, one frame at each step
    frames, steps, ended = [], 0, False
    start = {"low": LEAN, "high": LEAN}  # bounds of the four numbers at the start
    observation, _ = env.reset(seed=lesson.HELD_OUT_SEED, options=start)
    if window:
        pygame.display.set_caption(title)
    while not ended:
        if stop or window and pygame.event.peek(pygame.QUIT):
            return None, []
        if not window:
            frames.append(env.render())
        action = policy(torch.from_numpy(observation)[None]).argmax().item()
        observation, _, terminated, truncated, _ = env.step(action)
        steps, ended = steps + 1, terminated or truncated
    return steps, frames


def save_gif(film: list) -> None:
    """Write the frames so that they are shown as fast as CartPole runs."""
    first, *rest = film
    duration = 20 * GIF_EVERY  # milliseconds for each frame
    first.save(GIF_PATH, save_all=True, append_images=rest, duration=duration, loop=0)


def has_display() -> bool:
    """True if a window can be seen: without a screen, SDL draws into the void."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    if sys.platform == "linux" and not any(map(os.environ.get, screens)):
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # or SDL warns that it found no screen
        return False
    try:
        pygame.display.init()
        return pygame.display.get_driver() not in ("dummy", "offscreen")
    except pygame.error:
        return False
    finally:
        pygame.display.quit()


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Load the weights, print the table, show an episode."""
    check_settings()
    policy = load_policy()
    torch.manual_seed(ACTION_SEED)
    torch.set_num_threads(1)
    # Ctrl-C only leaves a mark, because pygame swallows exceptions while it starts.
    stop, film, before = [], [], signal.getsignal(signal.SIGINT)
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:  # the only one that may handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        print_report(policy)
        if SHOW and not stop:
            lean = math.degrees(LEAN)
            print(
                f"\nOne greedy episode. At first the pole leans by {lean:.0f} degrees,"
            )
            print("more than ever in training, so that there is something to see.")
            closing = "Close the window to end it sooner."
            print(closing if has_display() else "It is made into a GIF ...")
            print(show(policy, "CartPole, trained, played greedily", film, stop))
        elif stop:
            print("Stopped.")
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
    if film:
        print(f"There is no display. Open this file to see the episode:\n{GIF_PATH}")
        lesson.show_in_notebook(GIF_PATH)


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    rules = {
        "HELD_OUT_EPISODES (train_cartpole.py) must be 1 or more": (
            lesson.HELD_OUT_EPISODES >= 1
        ),
        "GIF_EVERY must be 1 or more": GIF_EVERY >= 1,
        "GIF_SIZE must be two numbers of 1 or more": min(GIF_SIZE) >= 1,
        "LEAN must be from -0.2 to 0.2": abs(LEAN) <= 0.2,
        "the folder of GIF_PATH must exist and be writable": lesson.can_write(GIF_PATH),
        "GIF_PATH must end in .gif": GIF_PATH.suffix == ".gif",
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


if __name__ == "__main__":
    main()
