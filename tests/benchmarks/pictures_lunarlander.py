"""Make assets/lunarlander.gif: the untrained agent of lesson 3 beside the trained one.

    python tests/benchmarks/pictures_lunarlander.py

Both fly over the same terrain, from the same start, in real time. The untrained agent
samples its actions, as in the first rollout; the trained one is greedy.
"""

import torch
from common import ASSETS
from PIL import Image, ImageDraw, ImageFont

import lunarlander_ppo as lesson

TERRAINS = (1_000_002, 1_000_000)  # seeds of the held-out episodes that are shown
FRAME_EVERY, MILLISECONDS = 2, 40  # the lander moves at 50 frames a second
SIZE, CAPTION, COLOURS, HOLD = (300, 200), 22, 32, 25  # frames that the end stays
TEXTS = ("untrained", "trained for a minute")
GIF = ASSETS / "lunarlander.gif"


@torch.no_grad()
def fly(actor: torch.nn.Module, seed: int, greedy: bool) -> list[Image.Image]:
    """The frames of one episode; the last one stays for HOLD frames."""
    env, frames, ended = lesson.make_env(render_mode="rgb_array"), [], False
    observation, _ = env.reset(seed=seed)
    while not ended:
        frames.append(Image.fromarray(env.render()).resize(SIZE))
        logits = actor(torch.from_numpy(observation)[None])
        action = logits.argmax(1) if greedy else logits.softmax(1).multinomial(1)
        observation, _, terminated, truncated, _ = env.step(action.item())
        ended = terminated or truncated
    return [*frames[::FRAME_EVERY], *[frames[-1]] * HOLD]


def main() -> None:
    """Fly over each terrain twice, put the frames side by side, write the GIF."""
    torch.manual_seed(lesson.SEED)
    untrained, trained = lesson.ActorCritic(), lesson.load_agent()
    (width, height), pictures = SIZE, []
    for seed in TERRAINS:
        flights = fly(untrained.actor, seed, False), fly(trained.actor, seed, True)
        for t in range(max(map(len, flights))):
            picture = Image.new("RGB", (2 * width + 4, height + CAPTION), "white")
            draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
            for x, frames, text in zip((0, width + 4), flights, TEXTS, strict=True):
                draw.text((x + width / 2, 2), text, "black", font, anchor="ma")
                picture.paste(frames[min(t, len(frames) - 1)], (x, CAPTION))
            pictures.append(picture.quantize(COLOURS))
    options = {"append_images": pictures[1:], "duration": MILLISECONDS, "loop": 0}
    pictures[0].save(GIF, save_all=True, **options)


if __name__ == "__main__":
    main()
