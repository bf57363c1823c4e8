"""Measure the LunarLander agent that lunarlander_ppo.py made, then watch it land.

What you will learn
    How to judge a trained policy: on many held-out episodes, with the spread, the worst
    case and the crashes beside the mean, and next to a random policy.

Run it, and what you should see
    python lunar_eval.py     about 20 seconds: a table, then three landings, in a window
                             where there is a display, else in `lunarlander.gif`

    greedy    280.7 +- 19.1, minimum 238.7: taking the likeliest action it always lands.
    sampled   277.1 +- 47.5, minimum 24.9: drawing each action, as in training, it
              crashes in 3 of 100 episodes.
    random    -183.1 +- 112.9, and 100 crashes: what an agent gets that learned nothing.

    The std says how much single episodes differ. The mean of 100 of them is known far
    better, to about std / sqrt(100), its standard error: 280.7 +- 1.9.
"""

import os
import sys
from pathlib import Path

import gymnasium as gym
import pygame
import torch
from PIL import Image

import lunarlander_ppo as lesson
from lunarlander_ppo import ActorCritic, evaluate, load_agent

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

# ------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------


def random_policy(observations: torch.Tensor) -> torch.Tensor:
    """Logits (B, A) for observations (B, D), all 0: every action is as likely."""
    return torch.zeros(len(observations), lesson.ACTIONS)


def print_report(agent: ActorCritic) -> None:
    """Print mean, std, minimum, landings and crashes: greedy, sampled and random."""
    episodes, first_seed = lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED
    enough = lesson.SOLVED_SCORE
    print(f"{episodes} episodes of {lesson.ENV_ID}, seeds from {first_seed:,}:\n")
    print(f"policy      mean +-   std   minimum   {enough:g} or more   crashes")
    policies = {"greedy": agent.actor, "sampled": agent.actor, "random": random_policy}
    for name, policy in policies.items():
        scores, crashed = evaluate(policy, episodes, first_seed, name == "greedy")
        print(
            f"{name:8}{scores.mean():8.1f} +-{scores.std():6.1f}{scores.min():10.1f}"
            f"{(scores >= enough).mean():14.0%}{crashed.sum():10}"
        )


# ------------------------------------------------------------------------------------
# Showing
# ------------------------------------------------------------------------------------


def has_display() -> bool:
    """True if a window can be seen: without a screen, SDL draws into the void."""
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
def play_one_episode(agent: ActorCritic, env: gym.Env, seed: int) -> tuple[float, list]:
    """Fly one greedy episode; give its score and, in mode "rgb_array", its frames."""
    frames, score, ended = [], 0.0, False
    observation, _ = env.reset(seed=seed)
    while not ended:
        if env.render_mode == "rgb_array":  # mode "human" draws by itself
            frames.append(env.render())
        elif pygame.event.peek(pygame.QUIT):  # the window's close button
            raise KeyboardInterrupt
        action = agent.actor(torch.from_numpy(observation)[None]).argmax().item()
        observation, reward, terminated, truncated, _ = env.step(action)
        score += float(reward)
        ended = terminated or truncated
    return score, frames


def show(agent: ActorCritic) -> None:
    """Show landings in a window if there is a display, else write them as a GIF."""
    in_window = has_display()
    if in_window:
        print(f"\nA window shows {LANDINGS} greedy episodes. Close it to stop.")
    env = lesson.make_env(render_mode="human" if in_window else "rgb_array")
    scores, images = [], []
    for i in range(LANDINGS):
        score, frames = play_one_episode(agent, env, lesson.HELD_OUT_SEED + i)
        scores.append(f"{score:.0f}")
        for frame in frames[::GIF_EVERY]:
            images.append(Image.fromarray(frame).resize(GIF_SIZE).quantize(GIF_COLOURS))
    env.close()
    print(f"\nScores: {', '.join(scores)}.")
    if not in_window:
        options = {"append_images": images[1:], "loop": 0}
        options["duration"] = 20 * GIF_EVERY  # milliseconds: as fast as it really moves
        images[0].save(GIF_PATH, save_all=True, **options)
        print(f"No display: {Path(GIF_PATH).name} shows them.")


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Load the weights, print the report, show some episodes."""
    if not os.access(Path(GIF_PATH).parent, os.W_OK):
        sys.exit("GIF_PATH must be in a folder that can be written to.")
    agent = load_agent(lesson.WEIGHTS_PATH)
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
