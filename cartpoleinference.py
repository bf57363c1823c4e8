"""Measure the CartPole agent that train_cartpole.py made, then watch it balance.

What you will learn
    How to judge a trained policy: on many episodes with seeds that training never saw,
    with the spread and the worst case beside the mean, and next to a random policy.

Run it
    python cartpoleinference.py

    It prints a table and shows one episode: in a window where there is a display,
    else as `cartpole.gif`. A few seconds in all, plus 10 for the window.

What you should see
    greedy    500.0 +- 0.0, minimum 500: taking the likeliest action, the pole never
              falls. 500 is the most, since CartPole-v1 ends an episode there.
    sampled   498.2 +- 9.6, minimum 438: drawing each action at random, as in training,
              it falls in 4 of 100 episodes. (train_cartpole.py prints 498.7: other
              draws.)
    random    22.4 +- 12.1: what the task gives to an agent that learned nothing.
"""

import os
import sys
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image

from train_cartpole import (
    ENV_ID,
    FULL_SCORE,
    HELD_OUT_EPISODES,
    HELD_OUT_SEED,
    WEIGHTS_PATH,
    PolicyNetwork,
    evaluate,
    load_policy,
)

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

ACTION_SEED = 0  # of the sampled and random actions; the starts have their own seeds
SHOW = True  # False: print the table and end
GIF_PATH = Path(__file__).with_name("cartpole.gif")
GIF_EVERY = 2  # keep one frame in so many; CartPole moves at 50 frames/s, a GIF at 25
GIF_SIZE = (300, 200)  # pixels, half of what the environment draws

# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: torch.Tensor) -> torch.Tensor:
    """Logits (B, 2) for any observations (B, 4), all equal: each push has p = 1/2."""
    return torch.zeros(len(observations), 2)


def print_report(policy: PolicyNetwork) -> None:
    """Print mean, std, minimum and full episodes: greedy, sampled and random."""
    print(f"{HELD_OUT_EPISODES} episodes of {ENV_ID}, seeds from {HELD_OUT_SEED:,}:\n")
    print("policy      mean +-   std   minimum   full episodes")
    for name, player, greedy in [
        ("greedy", policy, True),
        ("sampled", policy, False),
        ("random", random_policy, False),
    ]:
        scores = evaluate(player, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy)
        full, std = (scores == FULL_SCORE).sum(), scores.std(correction=0)
        print(
            f"{name:8}{scores.mean():8.1f} +-{std:6.1f}{scores.min():10g}"
            f"{full:10} of {HELD_OUT_EPISODES}"
        )


# ------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------


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


@torch.no_grad()
def play_one_episode(policy: PolicyNetwork, env: gym.Env) -> tuple[int, list]:
    """Play one greedy episode; give its score and, in mode "rgb_array", its frames."""
    frames, score, ended = [], 0, False
    observation, _ = env.reset(seed=HELD_OUT_SEED)
    while not ended:
        if env.render_mode == "rgb_array":  # mode "human" draws by itself
            frames.append(env.render())
        action = policy(torch.from_numpy(observation)[None]).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += int(reward)
        ended = terminated or truncated
    return score, frames


def show(policy: PolicyNetwork) -> None:
    """Show an episode in a window if there is a display, else write it as a GIF."""
    if has_display():
        print("\nA window shows one greedy episode. Ctrl-C here closes it.")
        env = gym.make(ENV_ID, render_mode="human")
        score, _ = play_one_episode(policy, env)
        env.close()
        print(f"It lasted {score} of {FULL_SCORE} steps.")
        return

    env = gym.make(ENV_ID, render_mode="rgb_array")
    score, frames = play_one_episode(policy, env)
    env.close()
    images = [Image.fromarray(frame).resize(GIF_SIZE) for frame in frames[::GIF_EVERY]]
    images[0].save(
        GIF_PATH,
        save_all=True,
        append_images=images[1:],
        duration=20 * GIF_EVERY,  # milliseconds a frame, so that it runs in real time
        loop=0,
    )
    print(f"\nNo display: {GIF_PATH.name} shows one greedy episode of {score} steps.")


def main() -> None:
    """Load the weights, print the report, show an episode."""
    policy = load_policy(WEIGHTS_PATH)
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
