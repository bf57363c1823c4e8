"""Measure the CartPole agent that train_cartpole.py made, then watch it balance.

What you will learn
    How to judge a trained policy: on many episodes with seeds that training never used,
    with the spread and the worst case beside the mean, and next to a random policy.

Run it, and what you should see
    python cartpoleinference.py     a few seconds, plus 10 for the window
    It prints a table and shows one episode: in a window where there is a display, else
    as `cartpole.gif`.
    greedy    500.0 +- 0.0, minimum 500, the most there is: the pole never falls.
    sampled   498.2 +- 9.6, minimum 438: drawing each action from the policy, as in
              training, it falls in 4 of 100 episodes.
    random    22.4 +- 12.1: the score of an agent that learned nothing.
"""

import os
import sys
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image

import train_cartpole as lesson
from train_cartpole import ENV_ID, PolicyNetwork, load_policy

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

ACTION_SEED = 0  # of the sampled and random actions; the starts have their own seeds
SHOW = True  # False: print the table and end
GIF_PATH = Path(__file__).with_name("cartpole.gif")
GIF_EVERY = 2  # keep one frame in so many; CartPole moves at 50 frames/s, a GIF at 25
GIF_SIZE = (300, 200)  # pixels; the environment draws 600 x 400

# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: torch.Tensor) -> torch.Tensor:
    """Observations (B, 4) -> logits (B, 2), all equal: each push has p = 1/2."""
    return torch.zeros(len(observations), 2)


def print_report(policy: PolicyNetwork) -> None:
    """Print mean, std, minimum and full episodes: greedy, sampled and random."""
    episodes, first_seed = lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED
    print(f"{episodes} episodes of {ENV_ID}, seeds from {first_seed:,}:\n")
    print("policy      mean +-   std   minimum   full episodes")
    for name, player, greedy in [
        ("greedy", policy, True),
        ("sampled", policy, False),
        ("random", random_policy, False),
    ]:
        scores = lesson.evaluate(player, episodes, first_seed, greedy)
        mean, std, low = scores.mean(), scores.std(correction=0), scores.min()
        full = (scores == lesson.FULL_SCORE).sum()
        print(f"{name:8}{mean:8.1f} +-{std:6.1f}{low:10g}{full:10} of {episodes}")


# ------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------


@torch.no_grad()
def play_one_episode(policy: PolicyNetwork, env: gym.Env) -> tuple[int, list]:
    """Play one greedy episode; give its score and its frames."""
    frames, score, ended, window = [], 0, False, env.render_mode == "human"
    observation, _ = env.reset(seed=lesson.HELD_OUT_SEED)
    while not ended:
        frames.append(env.render())  # None in a window, which draws by itself
        action = policy(torch.from_numpy(observation)[None]).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += int(reward)
        ended = terminated or truncated or window and pygame.event.peek(pygame.QUIT)
    return score, frames


def show(policy: PolicyNetwork) -> None:
    """Show an episode in a window if there is a display, else write it as a GIF."""
    window = has_display()
    if window:
        print("\nA window shows one greedy episode. Close it to end sooner.")
    env = gym.make(ENV_ID, render_mode="human" if window else "rgb_array")
    score, frames = play_one_episode(policy, env)
    env.close()
    if window:
        print(f"It lasted {score} of {lesson.FULL_SCORE} steps.")
        return
    first, *rest = (Image.fromarray(f).resize(GIF_SIZE) for f in frames[::GIF_EVERY])
    duration = 20 * GIF_EVERY  # milliseconds a frame, so that it runs in real time
    first.save(GIF_PATH, save_all=True, append_images=rest, duration=duration, loop=0)
    print(f"\nNo display: {GIF_PATH.name} shows one greedy episode of {score} steps.")


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


def main() -> None:
    """Load the weights, print the report, show an episode."""
    policy = load_policy()
    torch.manual_seed(ACTION_SEED)
    torch.set_num_threads(1)
    try:
        print_report(policy)
        if SHOW:
            show(policy)
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    main()
