"""Lesson 4 with a reward that checks an answer: sums of two numbers, on SmolLM2-135M.

    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/verifiable.py

REAL_MODEL is the model's folder; tests/benchmarks/grpo.py says how to get it from a
package. common.py lists the words that may follow the command. Each part, seed0 to
seed2, is the lesson's main() with that SEED and the settings of the README's example.

A problem is a pair of numbers from 10 to 49, of which the first is not the larger one.
Held-out problems are never trained, in either order. Their right answers are counted
before and after the training: in 4 sampled responses to each, and in the greedy one.
Other seeds than these were looked at when task and settings were chosen.
"""

import functools
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import in_own_process, patched, run_parts

SEEDS = range(3)
HELD_OUT = 50  # problems
SETTINGS = {
    "USE_CHAT_TEMPLATE": False,
    "NUM_STEPS": 200,
    "MAX_NEW_TOKENS": 4,
    "EVAL_SAMPLES": 4,
    "TOP_P": 1.0,
}


def make_prompts() -> list[str]:
    """All problems after a solved one, in an order that is always the same."""
    problems = [(a, b) for a in range(10, 50) for b in range(a, 50)]
    random.Random(0).shuffle(problems)
    return [f"52 + 17 = 69\n{a} + {b} =" for a, b in problems]


def right(prompt: str, responses: list[str]) -> list[float]:
    """The reward: 1 if the first word is the sum, else 0."""
    a, b = prompt.splitlines()[-1].strip(" =").split(" + ")
    return [float(text.split()[:1] == [str(int(a) + int(b))]) for text in responses]


def run(model: str, seed: int) -> dict:
    """One run of the lesson: the shares of right answers before and after."""
    import torch

    import grpo_training as lesson

    torch.set_num_threads(1)
    prompts, shares, texts, steps = make_prompts(), [], [], []
    evaluate, train = lesson.evaluate, lesson.train

    def measured(*arguments):
        sampled = evaluate(*arguments)
        with patched(lesson, TOP_P=1e-6, EVAL_SAMPLES=2):  # the most likely tokens only
            greedy = evaluate(*arguments)
        found = {"sampled": sampled["rewards"], "greedy": greedy["rewards"]}
        shares.append({how: statistics.mean(found[how]) for how in found})
        texts.append([sampled["texts"][0], time.time()])
        return sampled

    def watched(*arguments):
        for result in train(*arguments):
            steps.append(torch.cat([group["rewards"] for group in result["groups"]]))
            yield result

    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | {
            "POLICY_MODEL_NAME": model,
            "REWARD_FUNCTION": right,
            "PROMPTS": prompts[HELD_OUT:],
            "EVAL_PROMPTS": prompts[:HELD_OUT],
            "SEED": seed,
            "SAVE_DIR": f"{folder}/trained_model",
        }
        with patched(lesson, **settings, evaluate=measured, train=watched):
            lesson.main()
    minutes = (texts[1][1] - texts[0][1]) / 60  # with the second evaluation
    summary = {"seed": seed, "steps": len(steps), "minutes": round(minutes, 1)}
    for when, share in zip(("before", "after"), shares, strict=True):
        summary |= {f"{how} {when}": round(share[how], 3) for how in share}
    differ = statistics.mean(float(rewards.std() > 0) for rewards in steps)
    summary["share of groups that differ"] = round(differ, 3)
    return {
        "summary": summary,
        "settings": SETTINGS | {"held-out problems": HELD_OUT},
        "texts before and after": [text for text, _ in texts],
        "mean reward of each step": [rewards.mean().item() for rewards in steps],
    }


def measure(seed: int) -> dict:
    """The part of one seed."""
    model = os.environ.get("REAL_MODEL", "no folder")
    if not Path(model).is_dir():
        sys.exit("REAL_MODEL must name a folder: this file's first lines say how.")
    found = in_own_process(run, str(Path(model).resolve()), seed)
    print("  " + ", ".join(f"{k} {v}" for k, v in found["summary"].items()), flush=True)
    return found


if __name__ == "__main__":
    run_parts(
        ["grpo_training.py"],
        ["torch", "transformers", "accelerate"],
        {f"seed{seed}": functools.partial(measure, seed) for seed in SEEDS},
        rows=(run,),
    )
