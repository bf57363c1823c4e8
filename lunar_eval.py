"""Measure the LunarLander agent that lunarlander_ppo.py made, then watch it land.

What you will learn
    How to judge a trained policy: on many episodes with seeds that training never saw,
    with the spread, the worst case and the crashes beside the mean, and next to a
    random policy.

Run it
    python lunar_eval.py

    It prints a table and shows three landings: in a window where there is a display,
    else as `lunarlander.gif`. About 20 seconds.

What you should see
    greedy    280.7 +- 19.1, minimum 238.7: taking the likeliest action it lands every
              time.
    sampled   277.1 +- 47.5, minimum 24.9: drawing each action at random, as in
              training, it crashes in 3 of 100 episodes. (lunarlander_ppo.py prints
              278.9: other draws.)
    random    -183.1 +- 112.9, and 100 crashes: what the task gives to an agent that
              learned nothing.
"""

import os
import sys
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image

from lunarlander_ppo import (
    ENV_ID,
    HELD_OUT_EPISODES,
    HELD_OUT_SEED,
    SOLVED_SCORE,
    WEIGHTS_PATH,
    ActorCritic,
    evaluate,
    load_agent,
    make_env,
)

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

ACTION_SEED = 0  # of the sampled and random actions; the starts have their own seeds
SHOW = True  # False: print the table and end
LANDINGS = 3  # episodes to show
GIF_PATH = Path(__file__).with_name("lunarlander.gif")
GIF_EVERY = 2  # keep one frame in so many; the lander moves at 50 frames/s
GIF_SIZE = (300, 200)  # pixels, half of what the environment draws
GIF_COLOURS = 32  # the picture has few; a smaller palette makes a smaller file


def check_settings() -> None:
    """Stop with one plain line if a setting is impossible, before anything runs."""
    limits = {  # name: (lowest, highest)
        "ACTION_SEED": (0, 2**63),
        "LANDINGS": (1, 1_000),
        "GIF_EVERY": (1, 100),
        "GIF_COLOURS": (2, 256),
    }
    problems = []
    for name, (low, high) in limits.items():
        value = globals()[name]
        if type(value) is not int or not low <= value <= high:
            limit = f"from {low} to {high:,}" if high < 2**63 else f"from {low} up"
            problems.append(f"{name} = {value!r} must be a whole number {limit}")
    if SHOW not in (True, False):
        problems.append(f"SHOW = {SHOW!r} must be True or False")
    if not os.access(Path(GIF_PATH).parent, os.W_OK):
        problems.append("GIF_PATH must lie in a folder that can be written to")
    if problems:
        sys.exit(f"Settings: {'; '.join(problems)}.")


# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: torch.Tensor) -> torch.Tensor:
    """Logits (B, 4) for any observations (B, 8), all equal: each action has p = 1/4."""
    return torch.zeros(len(observations), 4)


def print_report(agent: ActorCritic) -> None:
    """Print mean, std, minimum, landings and crashes: greedy, sampled and random."""
    print(f"{HELD_OUT_EPISODES} episodes of {ENV_ID}, seeds from {HELD_OUT_SEED:,}:\n")
    print(f"policy      mean +-   std   minimum   {SOLVED_SCORE:g} or more   crashes")
    for name, policy, greedy in [
        ("greedy", agent.actor, True),
        ("sampled", agent.actor, False),
        ("random", random_policy, False),
    ]:
        scores, crashed = evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy)
        share = (scores >= SOLVED_SCORE).mean()
        print(
            f"{name:8}{scores.mean():8.1f} +-{scores.std():6.1f}{scores.min():10.1f}"
            f"{share:14.0%}{crashed.sum():10}"
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
def play_one_episode(agent: ActorCritic, env: gym.Env, seed: int) -> tuple[float, list]:
    """Fly one greedy episode; give its score and, in mode "rgb_array", its frames."""
    frames, score, ended = [], 0.0, False
    observation, _ = env.reset(seed=seed)
    while not ended:
        if env.render_mode == "rgb_array":  # mode "human" draws by itself
            frames.append(env.render())
        action = agent.actor(torch.from_numpy(observation)[None]).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += float(reward)
        ended = terminated or truncated
    return score, frames


def show(agent: ActorCritic) -> None:
    """Show landings in a window if there is a display, else write them as a GIF."""
    in_window = has_display()
    if in_window:
        print(f"\nA window shows {LANDINGS} greedy episodes. Ctrl-C here closes it.")
    env = make_env(render_mode="human" if in_window else "rgb_array")
    scores, images = [], []
    for i in range(LANDINGS):
        score, frames = play_one_episode(agent, env, HELD_OUT_SEED + i)
        scores.append(f"{score:.0f}")
        images += [Image.fromarray(f).resize(GIF_SIZE) for f in frames[::GIF_EVERY]]
    env.close()
    if in_window:
        print(f"Scores: {', '.join(scores)}.")
        return
    images = [image.quantize(GIF_COLOURS) for image in images]
    images[0].save(
        GIF_PATH,
        save_all=True,
        append_images=images[1:],
        duration=20 * GIF_EVERY,  # milliseconds a frame, so that it runs in real time
        loop=0,
    )
    print(f"\nNo display: {GIF_PATH.name} shows landings, scores {', '.join(scores)}.")


def main() -> None:
    """Load the weights, print the report, show some episodes."""
    check_settings()
    agent = load_agent(WEIGHTS_PATH)
    torch.manual_seed(ACTION_SEED)
    torch.set_num_threads(1)
    try:
        print_report(agent)
        if SHOW:
            show(agent)
    except KeyboardInterrupt:
        print("\nStopped.")


if __name__ == "__main__":
    main()
