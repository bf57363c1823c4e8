"""The models in grpo_tiny/: pairwise accuracy of the reward model, and GRPO's gain.

    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo_bundled.py

REAL_MODEL is the judge's folder; tests/benchmarks/grpo.py says how to get it from a
package. The judge scores a response by its mean log-likelihood in nats a token, given
the prompt. GRPO never uses it, but it is not independent: it is the teacher that wrote
the texts which the reward model was trained to prefer. common.py lists the words that
may follow the command. The parts, 25 minutes on one core in all:

    pairs    The teacher's answers on held-out topics, against an answer with each flaw
             (grpo_tiny/held_out_pairs.jsonl.gz, written by make_tiny.py). No answer
             about these topics was used in training.
    seeds    The lesson's main() on the two models with its default settings, seeds 10
             to 14. (Seeds 0 to 9 were looked at when the learning rate was chosen.)
             Before and after, 256 fresh responses to the prompt that is trained, and 32
             to each of 8 others, 4 of which are about held-out topics.
    edits    Seeds 0 to 4 of the same, and each edit of "Try this" with seeds 0 to 2.
"""

import functools
import gzip
import json
import statistics
import sys

import torch
import transformers
from common import ROOT, in_own_process, real_model, run_main, run_parts
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo_training as lesson

TINY = ROOT / "grpo_tiny"
SEEDS, SEEN_SEEDS = range(10, 15), range(5)
EDIT_SEEDS = range(3)
EDITS = {
    "LR = 2e-5": {"LR": 2e-5},
    "NUM_SAMPLES = 2": {"NUM_SAMPLES": 2},
    "INNER_STEPS = 4": {"INNER_STEPS": 4},
    "KL_COEF = 0.4": {"KL_COEF": 0.4},
}
TRAINED = "Explain why regular exercise is important."
OTHERS = [f"Explain why {x} is important." for x in ("sleep", "music", "clean water")]
OTHERS.append("Why does friendship matter?")
SAMPLES, OTHER_SAMPLES = 256, 32
FRESH_SEED = 2_000_000  # neither the lesson's training nor its evaluation samples here


def held_out_prompts() -> list[str]:
    """Four prompts about topics that no training has seen."""
    sys.path.insert(0, str(TINY))
    from make_tiny import HELD_OUT, TOPICS, read_topics

    topics = read_topics(TOPICS)[HELD_OUT]
    return [f"Explain why {topic} is important." for topic in topics[:40:10]]


@functools.cache
def reward_model() -> tuple:
    """The bundled reward model and its tokenizer."""
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(TINY / "reward")
    return model.eval(), AutoTokenizer.from_pretrained(TINY / "reward")


def score(prompt: str, texts: list[str]) -> list[float]:
    """The reward model's score of each response to a prompt."""
    model, tokenizer = reward_model()
    how = {"truncation": "only_second", "padding": True, "return_tensors": "pt"}
    how["max_length"] = model.config.max_position_embeddings
    pairs = tokenizer([prompt] * len(texts), texts, **how)
    with torch.no_grad():
        return model(**pairs).logits[:, 0].tolist()


def measure(policy_folder: str) -> dict:
    """Fresh responses of a policy to every prompt, and their rewards."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    policy = AutoModelForCausalLM.from_pretrained(policy_folder).eval()
    end, found = tokenizer.eos_token_id, {}
    sampling = {"do_sample": True, "top_k": 0, "pad_token_id": end}
    sampling |= {"temperature": lesson.TEMPERATURE, "top_p": lesson.TOP_P}
    sampling["max_new_tokens"] = lesson.MAX_NEW_TOKENS
    for prompt in [TRAINED, *OTHERS, *held_out_prompts()]:
        torch.manual_seed(FRESH_SEED)
        inputs = tokenizer(prompt, return_tensors="pt")
        samples = SAMPLES if prompt == TRAINED else OTHER_SAMPLES
        ids = policy.generate(**inputs, **sampling, num_return_sequences=samples)
        ids = ids[:, inputs.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        lengths = (ids != end).sum(1)
        found[prompt] = {
            "texts": [" ".join(text.split()) for text in texts],
            "rewards": score(prompt, texts),
            "cut off": (lengths == lesson.MAX_NEW_TOKENS).float().mean().item(),
            "length": lengths.float().mean().item(),
        }
    return found


def run(seed: int, settings: dict) -> dict:
    """The lesson's main() on the two models, then `measure` of the saved policy."""
    models = {"POLICY_MODEL_NAME": str(TINY / "policy")}
    models |= {"REWARD_MODEL_NAME": str(TINY / "reward")}
    with run_main(lesson, SEED=seed, **models, **settings) as done:
        (folder,) = done.folder.iterdir()
        return {"CPU seconds": done.seconds} | measure(str(folder))


def pairwise() -> dict:
    """Share of the held-out pairs that the reward model orders rightly, by flaw."""
    with gzip.open(TINY / "held_out_pairs.jsonl.gz", "rt") as file:
        lines = [json.loads(line) for line in file]
    won = {}
    for line in lines:
        texts = [line["chosen"], *line["rejected"].values()]
        chosen, *rejected = score(line["prompt"], texts)
        for flaw, reward in zip(line["rejected"], rejected, strict=True):
            won.setdefault(flaw, []).append(chosen > reward)
    return {flaw: round(100 * statistics.mean(w), 2) for flaw, w in won.items()}


def judge(texts: list[str]) -> float:
    """The teacher's mean log-likelihood of responses to TRAINED, in nats a token."""
    folder = real_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    chat, how = [{"role": "user", "content": TRAINED}], {"add_generation_prompt": True}
    start = tokenizer.apply_chat_template(chat, tokenize=False, **how)
    start, results = tokenizer(start).input_ids, []
    rows = sorted((tokenizer(text).input_ids for text in texts if text), key=len)
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        longest = len(part[-1])
        ids = torch.tensor([start + row + [0] * (longest - len(row)) for row in part])
        with torch.no_grad():
            logits = teacher(ids, logits_to_keep=longest + 1).logits[:, :-1].float()
        log_probs = logits.log_softmax(2).gather(2, ids[:, -longest:, None])[..., 0]
        for row, scores in zip(part, log_probs, strict=True):
            results.append(scores[: len(row)].mean().item())
    return statistics.mean(results)


def distinct_2(texts: list[str]) -> float:
    """Share of the pairs of neighbouring words, over all texts, that differ."""
    words = [text.lower().split() for text in texts]
    runs = [run for text in words for run in zip(text, text[1:], strict=False)]
    return len(set(runs)) / len(runs)


def gain(after: dict, prompts: list[str]) -> float:
    """Rise of the mean reward, in standard deviations of the initial rewards."""
    gains = []
    for prompt in prompts:
        old, new = before()[prompt]["rewards"], after[prompt]["rewards"]
        rise = statistics.mean(new) - statistics.mean(old)
        gains.append(rise / statistics.stdev(old))
    return statistics.mean(gains)


def figures(found: dict) -> dict:
    """What is said of the responses to the prompt of the training."""
    trained = found[TRAINED]
    return {
        "reward": statistics.mean(trained["rewards"]),
        "distinct-2": distinct_2(trained["texts"]),
        "judge": judge(trained["texts"]),
        "length": trained["length"],
        "cut off %": 100 * trained["cut off"],
    }


@functools.cache
def before() -> dict:
    """The responses of the policy as it is bundled."""
    return in_own_process(measure, str(TINY / "policy"))


@functools.cache
def start() -> dict:
    """Their figures."""
    return figures(before())


def train(seed: int, settings: dict) -> tuple[dict, list[str]]:
    """One run: its figures, and ten of its responses."""
    found = in_own_process(run, seed, settings)
    after = figures(found)
    row = {
        "seed": seed,
        "CPU seconds": found["CPU seconds"],
        "gain": gain(found, [TRAINED]),
        "gain on others": gain(found, OTHERS),
        "gain on held-out topics": gain(found, held_out_prompts()),
        "gain in reward": after["reward"] - start()["reward"],
        "gain in judge": after["judge"] - start()["judge"],
        "distinct-2 kept %": 100 * after["distinct-2"] / start()["distinct-2"],
    } | after
    print(settings, row, flush=True)
    return row, found[TRAINED]["texts"][:10]


def pairs() -> dict:
    """Pairwise accuracy of the reward model, in percent."""
    shares = in_own_process(pairwise)
    shares["all flaws"] = round(statistics.mean(shares.values()), 2)
    return {"summary": shares}


def seeds() -> dict:
    """Every held-out seed with the default settings."""
    runs, texts = zip(*(train(seed, {}) for seed in SEEDS), strict=True)
    summary = {f"{name} before": value for name, value in start().items()}
    first = {"before": {"texts": before()[TRAINED]["texts"][:10]}}
    first["after"] = {"texts": texts[0]}
    return {"summary": summary, "runs": runs, **first}


def edits() -> dict:
    """The lesson as it is, and with every edit of "Try this"."""
    runs = [{"edit": "as it is"} | train(seed, {})[0] for seed in SEEN_SEEDS]
    for edit, settings in EDITS.items():
        runs += [{"edit": edit} | train(seed, settings)[0] for seed in EDIT_SEEDS]
    return {"runs": runs}


if __name__ == "__main__":
    real_model()  # or there would be no judge
    parts = {"pairs": pairs, "seeds": seeds, "edits": edits}
    run_parts(["grpo_training.py"], ["torch", "transformers", "accelerate"], parts)
