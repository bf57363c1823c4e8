"""The models in grpo_tiny/: pairwise accuracy of the reward model, and GRPO's gain.

    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo_tiny.py

REAL_MODEL is the judge's folder; tests/benchmarks/grpo.py says how to get it from a
package. The judge scores a response by its mean log-likelihood in nats a token, given
the prompt. GRPO never uses it, but it is not independent: it is the teacher that wrote
the texts which the reward model was trained to prefer.

* Pairs: the teacher's answers on held-out topics, against an answer with each flaw
  (grpo_tiny/held_out_pairs.jsonl.gz, written by make_tiny.py). No answer about these
  topics was used in training.
* GRPO: the lesson's main() on the two models with its default settings, for ten seeds;
  before and after, 256 fresh responses to the prompt that is trained, and 32 to each of
  8 others, 4 of which are about held-out topics. Seeds 0 to 9 were looked at when
  TINY_LR was chosen; seeds 10 to 14 are held out.
* The edits of the lesson's "Try this", seeds 0 to 2. Edits of your own, only printed:
  python tests/benchmarks/grpo_tiny.py row run 0 TINY_LR=1e-5
"""

import ast
import gzip
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT_PATH = Path(__file__).parent / "results" / "grpo_tiny.json"
TINY = ROOT / "grpo_tiny"
SEEDS = [*range(5), *range(10, 15)]
TRY_THIS, TRY_THIS_SEEDS = ["NUM_SAMPLES=2", "INNER_STEPS=4", "KL_COEF=0.4"], range(3)
TRAINED = "Explain why regular exercise is important."
OTHERS = [
    "Explain why sleep is important.",
    "Explain why music is important.",
    "Explain why clean water is important.",
    "Why does friendship matter?",
]
SAMPLES, OTHER_SAMPLES = 256, 32
FRESH_SEED = 2_000_000  # neither the lesson's training nor its evaluation draws here
sys.path[:0] = str(ROOT), str(TINY)

from make_tiny import HELD_OUT, TOPICS, read_topics  # noqa: E402

topics = read_topics(TOPICS)[HELD_OUT]
HELD_OUT_TOPICS = [f"Explain why {topic} is important." for topic in topics[:40:10]]


def load_pair(policy_folder):
    """A policy and the reward model, each with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import grpo_training as lesson

    return (
        lesson.load_model(AutoModelForCausalLM, str(policy_folder)),
        lesson.load_model(AutoModelForSequenceClassification, str(TINY / "reward")),
    )


def measure(policy_folder):
    """Fresh responses of a policy to every prompt, and their rewards."""
    from accelerate.utils import set_seed

    import grpo_training as lesson

    (policy, tokenizer), reward = load_pair(policy_folder)
    found = {}
    for prompt in [TRAINED, *OTHERS, *HELD_OUT_TOPICS]:
        count = SAMPLES if prompt == TRAINED else OTHER_SAMPLES
        set_seed(FRESH_SEED)
        _, completions = lesson.generate_group(policy, tokenizer, prompt, count)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = lesson.score_responses(*reward, prompt, texts)
        lengths = (completions != tokenizer.eos_token_id).sum(1)
        found[prompt] = {
            "texts": [" ".join(text.split()) for text in texts],
            "rewards": rewards.tolist(),
            "cut off": (lengths == lesson.MAX_NEW_TOKENS).float().mean().item(),
            "length": lengths.float().mean().item(),
        }
    return found


def run(seed, *edits):
    """The lesson's main() on the two models, then `measure` of the saved policy."""
    import grpo_training as lesson

    lesson.POLICY_MODEL_NAME = str(TINY / "policy")
    lesson.REWARD_MODEL_NAME = str(TINY / "reward")
    lesson.SEED = int(seed)
    for edit in edits:  # such as TINY_LR=1e-5
        name, value = edit.split("=")
        assert hasattr(lesson, name), f"{name} is no Setting"
        setattr(lesson, name, ast.literal_eval(value))
    with tempfile.TemporaryDirectory() as folder:
        lesson.SAVE_DIR = f"{folder}/trained_model"
        started = time.process_time()  # of this process, whatever else is running
        lesson.main()
        seconds = time.process_time() - started
        return {"seed": seed, "CPU seconds": seconds} | measure(lesson.SAVE_DIR)


def pairs():
    """Pairwise accuracy of the reward model on the held-out pairs, by flaw."""
    import grpo_training as lesson

    _, reward = load_pair(TINY / "policy")
    with gzip.open(TINY / "held_out_pairs.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    won = {}
    for line in lines:
        texts = [line["chosen"], *line["rejected"].values()]
        rewards = lesson.score_responses(*reward, line["prompt"], texts)
        chosen, *rejected = rewards.tolist()
        for flaw, score in zip(line["rejected"], rejected, strict=True):
            won.setdefault(flaw, []).append(chosen > score)
    return {"pairs": len(lines)} | {f: statistics.mean(w) for f, w in won.items()}


def judge(folder, prompt, texts):
    """The teacher's mean log-likelihood of each response, in nats a token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    chat = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    start = tokenizer(start).input_ids
    results = []
    rows = sorted(tokenizer(text).input_ids for text in texts if text)
    rows.sort(key=len)
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        longest = len(part[-1])
        ids = torch.tensor([start + row + [0] * (longest - len(row)) for row in part])
        with torch.no_grad():
            logits = teacher(ids, logits_to_keep=longest + 1).logits[:, :-1].float()
        log_probs = logits.log_softmax(2).gather(2, ids[:, -longest:, None])[..., 0]
        results += [
            log_probs[j, : len(row)].mean().item() for j, row in enumerate(part)
        ]
    return statistics.mean(results)


def distinct_2(texts):
    """Share of the pairs of neighbouring words, over all texts, that differ."""
    words = [text.lower().split() for text in texts]
    runs = [run for text in words for run in zip(text, text[1:], strict=False)]
    return len(set(runs)) / len(runs)


def gain(before, after, prompts):
    """Rise of the mean reward, in standard deviations of the initial rewards."""
    gains = [
        (
            statistics.mean(after[prompt]["rewards"])
            - statistics.mean(before[prompt]["rewards"])
        )
        / statistics.stdev(before[prompt]["rewards"])
        for prompt in prompts
    ]
    return statistics.mean(gains)


def machine():
    """What ran it: processor, and the cores that this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def row(*arguments):
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "row", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    if sys.argv[1:2] == ["row"]:
        what, *rest = sys.argv[2:]
        function = {"run": run, "pairs": pairs}.get(what)
        result = function(*rest) if function else measure(TINY / "policy")
        print("\n" + json.dumps(result))
        return
    found = row("pairs")
    print(f"reward model: {found.pop('pairs')} held-out answers; pairwise accuracy")
    for flaw, share in found.items():
        print(f"  against {flaw:16}{share:7.1%}")

    before = row("measure")
    folder = os.environ.get("REAL_MODEL")
    runs, try_this = [], {}
    untrained = before[TRAINED]

    def judged(result):
        return judge(folder, TRAINED, result["texts"]) if folder else None

    start = {
        "reward": statistics.mean(untrained["rewards"]),
        "std": statistics.stdev(untrained["rewards"]),
        "distinct-2": distinct_2(untrained["texts"]),
        "judge": judged(untrained),
        "length": untrained["length"],
        "cut off": untrained["cut off"],
    }
    print(
        "GRPO      CPU s  reward  gain in stds: trained  others  held-out topics",
        end="",
    )
    print("  distinct-2   judge  tokens  cut off")
    print(f"before{start['reward']:17.2f}{start['distinct-2']:60.3f}", end="")
    print(f"{start['judge'] or 0:8.3f}{start['length']:8.1f}{start['cut off']:9.0%}")
    plan = [(seed, []) for seed in SEEDS]
    plan += [(seed, [edit]) for edit in TRY_THIS for seed in TRY_THIS_SEEDS]
    for seed, edits in plan:
        after = row("run", seed, *edits)
        trained = after[TRAINED]
        result = {
            "seed": seed,
            "CPU seconds": after["CPU seconds"],
            "reward": statistics.mean(trained["rewards"]),
            "gain": gain(before, after, [TRAINED]),
            "gain on others": gain(before, after, OTHERS),
            "gain on held-out topics": gain(before, after, HELD_OUT_TOPICS),
            "distinct-2": distinct_2(trained["texts"]),
            "judge": judged(trained),
            "length": trained["length"],
            "cut off": trained["cut off"],
            "texts": trained["texts"][:10],
        }
        (try_this.setdefault(edits[0], []) if edits else runs).append(result)
        print(
            f"seed {seed}{result['CPU seconds']:9.1f}{result['reward']:8.2f}"
            f"{result['gain']:23.2f}{result['gain on others']:8.2f}"
            f"{result['gain on held-out topics']:17.2f}{result['distinct-2']:12.3f}"
            f"{result['judge'] or 0:8.3f}{result['length']:8.1f}"
            f"{result['cut off']:9.0%}  {' '.join(edits)}",
            flush=True,
        )
    summary = {f"pairwise accuracy, {f}, %": 100 * s for f, s in found.items()}
    summary["pairwise accuracy, all flaws, %"] = 100 * statistics.mean(found.values())
    summary["cut off before, %"] = 100 * start["cut off"]
    summary["CPU seconds of a run, most"] = max(r["CPU seconds"] for r in runs)
    for part in runs[:5], runs[5:]:
        worst = {
            "gain on the prompt, stds, least": min(r["gain"] for r in part),
            "gain on other prompts, stds, least": min(
                r["gain on others"] for r in part
            ),
            "gain on held-out topics, stds, least": min(
                r["gain on held-out topics"] for r in part
            ),
            "distinct-2 kept, %, least": min(
                100 * r["distinct-2"] / start["distinct-2"] for r in part
            ),
            "cut off after, %, most": 100 * max(r["cut off"] for r in part),
        }
        middle = {
            "gain on the prompt, stds, median": [r["gain"] for r in part],
            "distinct-2 kept, %, median": [
                100 * r["distinct-2"] / start["distinct-2"] for r in part
            ],
        }
        if folder:
            gains = [r["judge"] - start["judge"] for r in part]
            worst["judge's gain, nats a token, least"] = min(gains)
            middle["judge's gain, nats a token, median"] = gains
        worst |= {name: statistics.median(x) for name, x in middle.items()}
        seeds = f"seeds {part[0]['seed']} to {part[-1]['seed']}"
        summary |= {f"{seeds}: {name}": value for name, value in worst.items()}
    start_of = {"reward": start["reward"], "judge": start["judge"] or 0}
    for edit, part in {"as it is": runs[:3], **try_this}.items():
        for what, value in start_of.items():
            gains = [(r[what] or 0) - value for r in part]
            name = f"Try this, {edit}: gain in {what}, median of seeds 0 to 2"
            summary[name] = statistics.median(gains)
    summary = {name: round(value, 3) for name, value in summary.items()}
    for name, value in summary.items():
        print(f"| {name} | {value:g} |")
    names = ("torch", "transformers", "accelerate")
    result = {
        "machine": machine(),
        "versions": {name: version(name) for name in names},
        "command": "REAL_MODEL=SmolLM2-135M-Instruct "
        "python tests/benchmarks/grpo_tiny.py",
        "before": start | {"texts": untrained["texts"][:10]},
        "runs": runs,
        "try_this": try_this,
        "summary": summary,
    }
    RESULT_PATH.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
