"""Draw assets/cartpole.gif: the untrained policy of lesson 1 beside the trained one.

    python tests/benchmarks/pictures_cartpole.py

Both play greedily, in real time, from the same pole that leans. The untrained one has
the weights with which the shipped training began. Its fall is shown to the horizontal,
although an episode ends at 12 degrees already; then it begins again.
"""

import math

import gymnasium as gym
import numpy as np
import torch
from common import ASSETS
from PIL import Image, ImageDraw, ImageFont

import cartpoleinference
import train_cartpole as lesson
from cartpoleinference import GIF_EVERY, LEAN

SECONDS, HOLD = 6, 30  # HOLD: steps for which a fallen pole is shown
FONT = ImageFont.load_default(size=14)


@torch.no_grad()
def film(policy, caption: str) -> list[np.ndarray]:
    """Frames of this policy at play; {steps} in the caption becomes its first score."""
    env = gym.make(lesson.ENV_ID, render_mode="rgb_array").unwrapped
    start = {"low": LEAN, "high": LEAN}
    observation, _ = env.reset(options=start)
    frames, score, held = [], None, 0
    for step in range(50 * SECONDS):
        frames.append(env.render())
        if abs(observation[2]) < math.pi / 2:
            action = policy(torch.from_numpy(observation)[None]).argmax().item()
            observation, _, fallen, _, _ = env.step(action)
            env.steps_beyond_terminated = None  # or it warns that the episode is over
            score = score or (fallen and step + 1)
        elif held < HOLD:
            held += 1
        else:
            observation, held = env.reset(options=start)[0], 0
    small = [Image.fromarray(f).resize((270, 180)) for f in frames[::GIF_EVERY]]
    for frame in small:
        ImageDraw.Draw(frame).text((8, 5), caption.format(steps=score), "black", FONT)
    margin = (0, 0), (2, 2), (0, 0)
    return [np.pad(frame, margin, constant_values=255) for frame in small]


def main() -> None:
    """Play with both policies, and write the two films side by side."""
    checkpoint = torch.load(lesson.WEIGHTS_PATH, weights_only=True)
    torch.manual_seed(checkpoint["seed"])
    untrained = lesson.PolicyNetwork(checkpoint["hidden_units"])
    left = film(untrained, "Untrained: falls after {steps} steps")
    right = film(lesson.load_policy(), f"After {checkpoint['episodes']} episodes")
    pairs = [Image.fromarray(np.hstack(pair)) for pair in zip(left, right, strict=True)]
    cartpoleinference.GIF_PATH = ASSETS / "cartpole.gif"
    cartpoleinference.save_gif([pair.quantize(16) for pair in pairs])


if __name__ == "__main__":
    main()
