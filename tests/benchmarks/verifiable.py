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
import random
import statistics
import time

import torch
from common import in_own_process, patched, real_model, run_main, run_parts

import grpo_training as lesson

SEEDS = range(3)
HELD_OUT = 50  # problems
SETTINGS = {"USE_CHAT_TEMPLATE": False, "NUM_STEPS": 200, "MAX_NEW_TOKENS": 4}
SETTINGS |= {"EVAL_SAMPLES": 4, "TOP_P": 1.0}


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
    torch.set_num_threads(1)
    prompts, looks, evaluate = make_prompts(), [], lesson.evaluate

    def measured(*arguments):
        began, sampled = time.time(), evaluate(*arguments)
        with patched(lesson, TOP_P=1e-6, EVAL_SAMPLES=2):  # the most likely tokens only
            greedy = evaluate(*arguments)
        looks.append((began, sampled, greedy))
        return sampled

    settings = {"POLICY_MODEL_NAME": model, "REWARD_FUNCTION": right, "SEED": seed}
    settings |= {"PROMPTS": prompts[HELD_OUT:], "EVAL_PROMPTS": prompts[:HELD_OUT]}
    with run_main(lesson, **SETTINGS, **settings, evaluate=measured) as done:
        steps = done.history  # the rewards (groups, G) of each
    minutes = (looks[1][0] - looks[0][0]) / 60  # with the first evaluation
    summary = {"seed": seed, "steps": len(steps), "minutes": round(minutes, 1)}
    for when, (_, *found) in zip(("before", "after"), looks, strict=True):
        for how, result in zip(("sampled", "greedy"), found, strict=True):
            share = statistics.mean(result["rewards"])
            summary[f"{how} {when}"] = round(share, 3)
    differ = torch.cat(steps).std(1) > 0
    summary["share of groups that differ"] = round(differ.float().mean().item(), 3)
    return {
        "summary": summary,
        "settings": SETTINGS | {"held-out problems": HELD_OUT},
        "texts before and after": [sampled["texts"][0] for _, sampled, _ in looks],
        "mean reward of each step": [rewards.mean().item() for rewards in steps],
    }


def measure(seed: int) -> dict:
    """The part of one seed."""
    found = in_own_process(run, real_model(), seed)
    print("  " + ", ".join(f"{k} {v}" for k, v in found["summary"].items()), flush=True)
    return found


if __name__ == "__main__":
    parts = {f"seed{seed}": functools.partial(measure, seed) for seed in SEEDS}
    run_parts(["grpo_training.py"], ["torch", "transformers", "accelerate"], parts)
