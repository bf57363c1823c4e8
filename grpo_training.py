"""GRPO: fine-tuning a language model on the scores of a reward model.

What you will learn
    The last step of RLHF (reinforcement learning from human feedback): how a model that
    was taught to predict text is taught to write what a second model rates highly.

The algorithm in 6 steps
    1. Start from a pretrained language model. In the words of reinforcement learning
       it is the policy: in a state (the text so far) it takes an action (a next token).
    2. Let it write a group of responses to one prompt, drawing every token at random.
    3. Score each response by the reward model, a network trained beforehand on which
       texts people prefer: the reward, one number for the whole text.
    4. Compare within the group: a response's advantage is how far its reward is above
       the group's mean, in units of its std. (PPO, lesson 3, trains a second network,
       the critic, to guess that mean.)
    5. One gradient step: make each token of the better responses likelier, of the worse
       ones rarer. Go back to 2.
    6. Compare fresh responses from before and after, and save the model.

Symbols (G responses, L tokens in the longest, V tokens - pieces of words - in all)
    o_i, o_it   completion_ids  (G, L)  response i, and its token t
    m_it        mask            (G, L)  1 up to the end of the response, 0 after it
    r_i         rewards         (G,)    score of response i
    A_i         advantages      (G,)    the same for every token of response i
    ln pi       log_probs       (G, L)  of each token, under the policy as it is now
    ln pi_old   old_log_probs   (G, L)  ... as it was when it wrote the responses
    ln pi_ref   ref_log_probs   (G, L)  ... under a frozen copy of the first policy
    rho_it      ratio           (G, L)  pi / pi_old
    q           prompt_ids      (1, P)  the prompt
    eps, beta   CLIP_EPS, KL_COEF. KL: how far two policies differ, 0 if not at all
    In a function, (G, L) may be a part of the group, cut to its longest response.

Where this differs from the paper, and why
    Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1, outcome supervision:
    * 8 responses of at most 64 tokens to one prompt a step; theirs are 64 of at most
      1,024 to each of 16 prompts, on many GPUs. LR is 1e-5, theirs 1e-6.
    * KL_COEF is 0, theirs 0.04: no second copy of the model in memory. Set it if the
      texts get odd while their reward rises.
    * The std has 1e-4 added, equal rewards give exactly 0, the gradient is clipped.
    * The reward model stays as it is; theirs may be trained further on the way.
    * TOP_P = 0.95 cuts off the odd tail while writing; the loss does not know of it.
    What others changed since: Dr. GRPO (arXiv 2503.20783) drops the division by the std
    (SCALE_BY_STD = False) and the one by the response's length, since both weigh some
    responses more than others. DAPO (arXiv 2503.14476) takes one mean over all tokens
    of the group, clips less above than below, and draws a new group where all rewards
    are equal.

Run it
    python grpo_training.py                               one GPU, or else the CPU
    accelerate launch --num_processes 4 grpo_training.py  4 GPUs, one group over all 4
    torchrun --nproc_per_node 2 grpo_training.py          2 processes on a CPU, where
                                                          `accelerate` starts only one
    Without a hub in reach, the small models of grpo_tiny/ take over: under a minute.
    Ctrl-C keeps the run so far. torchrun gives each process one thread, unless the
    environment variable OMP_NUM_THREADS says more.

What you should see (SmolLM2-135M-Instruct, seed 0, tests/benchmarks/grpo.py train)
    Paid for naming benefits of exercise, one for each of 12 words, it names 0.5 of them
    in a fresh response before, and 9.0 after 50 steps of 10 seconds on one core.

If it does not learn
    * Most steps are skipped, or the std is near 0: the reward gives every response the
      same number, so there is nothing to compare.
    * The reward rises while the texts get worse: the reward is too easily pleased. Mend
      it, or hold the policy back with KL_COEF = 0.04.
    * The texts turn into gibberish: LR is too big.

Try this (on the model that tests/test_grpo.py builds, in 60 steps at LR = 3e-3, seed 0:
the share of the words that its reward wants rises from 0.52 to 0.93)
    * NUM_SAMPLES = 2: to 0.57 only. With 32 to 0.99, but in 4 times the time.
    * INNER_STEPS = 4: to 1.00, with an entropy of 2.0 nats a token instead of 3.1.
    * SCALE_BY_STD = False: to 0.93. Here the division makes no difference.
"""

import contextlib
import copy
import functools
import math
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub import constants as hub
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run. A model's name is an id on the Hugging Face hub or a local folder.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY_MODEL_NAME = "gpt2"  # or gpt2-medium, gpt2-large, EleutherAI/gpt-neo-125M,
#                             EleutherAI/pythia-410m, facebook/opt-350m
REWARD_MODEL_NAME = "OpenAssistant/reward-model-deberta-v3-large"
#                   smaller: OpenAssistant/reward-model-deberta-v3-base
TINY_MODELS = Path(__file__).with_name("grpo_tiny")  # a pair that comes along: policy/,
#                   a small GPT-2, and reward/. Its README.md says what they can do.
FALL_BACK_TO_TINY = True  # if a model is not here and the hub cannot be reached, say so
#                           and go on with that pair; False: stop with one line instead
REWARD_FUNCTION = None  # or a function (prompt, responses) -> rewards, one number for
#                         each response: it takes the reward model's place
PROMPTS = ["Explain why regular exercise is important."]  # several are taken in turn
SEED = 0  # below 500,000; same seed, machine and versions: the same responses

# Budget
NUM_STEPS = 50  # groups; INNER_STEPS updates from each, none if all its rewards equal
NUM_SAMPLES = 8  # G, responses in a group; 2 is the least, more is a steadier gradient
MAX_NEW_TOKENS = 64  # longer responses are cut here; too few: the reward judges half
#                      sentences; more: time grows in proportion
EVAL_SAMPLES = 32  # responses to each prompt, before and after, to measure the gain

# Algorithm
LR = 1e-5  # size of AdamW's step; too big and the texts turn into gibberish, too small
#            and 50 steps change nothing. Not used with grpo_tiny/: that has
TINY_LR = 1.3e-5  # takes its place for the policy in grpo_tiny/. With less, 50 steps
#                   are too few for some seeds; 1.5e-5 and more gain more, with fewer
#                   different words
TEMPERATURE = 1.0  # of the drawing, and of the log-probabilities that are trained; too
#                    high: gibberish, too low: all responses alike, nothing to compare
TOP_P = 0.95  # draw only from the likeliest tokens that together hold 95 %, without the
#               odd tail: texts read better. But the loss uses the probabilities before
#               this cut, so the gradient and the printed KL are slightly wrong, and the
#               printed entropy is too low. With 1.0 nothing is cut and all are exact.
CLIP_EPS = 0.2  # a token stops being pushed once its probability changed by 20 %; too
#                 big: no brake on later inner steps, too small: they do nothing
INNER_STEPS = 1  # gradient steps from one group; more learn faster, and the texts grow
#                  alike sooner; with 1 the clip never acts
KL_COEF = 0.0  # pull back to the first policy: 0.04 is the paper's. Above 0, a frozen
#                copy of the model is kept, which costs its size in memory and some time
SCALE_BY_STD = True  # divide the advantages by the std of the group's rewards; False:
#                      groups with nearly equal rewards count less
MAX_GRAD_NORM = 1.0  # a longer gradient is shortened to this; too small: all groups
#                      count alike, too big: one odd group may throw the policy off

# Memory: these change results by rounding only (which may, in time, change a word)
MICRO_BATCH_SIZE = 2  # responses in one backward pass; more is faster, takes more
SAMPLE_BATCH_SIZE = 32  # responses that are written, or scored, together
GRADIENT_CHECKPOINTING = False  # keep less for the backward pass, compute it again

# Files, written beside this script
SAVE_DIR = "trained_model"
CURVE_PATH = Path(__file__).with_name("grpo_learning_curve.png")
USE_WANDB = False  # also send the figures to Weights & Biases (pip install wandb)

# Seeds for two purposes that never share a response: training draws from SEED, the
# comparison of before and after from HELD_OUT_SEED.
HELD_OUT_SEED = 1_000_000


def check_settings() -> None:
    """Stop with one plain line if a setting is impossible, before anything runs."""
    limits = {  # name: (type, lowest, highest)
        "SEED": (int, 0, 499_999),
        "NUM_STEPS": (int, 1, math.inf),
        "NUM_SAMPLES": (int, 2, math.inf),
        "MAX_NEW_TOKENS": (int, 1, math.inf),
        "EVAL_SAMPLES": (int, 2, math.inf),
        "LR": (float, 1e-9, 1),
        "TINY_LR": (float, 1e-9, 1),
        "TEMPERATURE": (float, 0.01, 100),
        "TOP_P": (float, 0.01, 1),
        "CLIP_EPS": (float, 0.001, 1),
        "INNER_STEPS": (int, 1, math.inf),
        "KL_COEF": (float, 0, math.inf),
        "MAX_GRAD_NORM": (float, 1e-6, math.inf),
        "MICRO_BATCH_SIZE": (int, 1, math.inf),
        "SAMPLE_BATCH_SIZE": (int, 1, math.inf),
    }
    problems = []
    for name, (kind, low, high) in limits.items():
        value = globals()[name]
        if type(value) not in (int, kind) or not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            limit = f"from {low:g} to {high:g}" if high < math.inf else f"from {low} up"
            problems.append(f"{name} = {value!r} must be {noun} {limit}")
    switches = "SCALE_BY_STD", "GRADIENT_CHECKPOINTING", "USE_WANDB"
    for name in (*switches, "FALL_BACK_TO_TINY"):
        if type(globals()[name]) is not bool:
            problems.append(f"{name} = {globals()[name]!r} must be True or False")
    for name in ("POLICY_MODEL_NAME", "REWARD_MODEL_NAME", "SAVE_DIR"):
        if not isinstance(globals()[name], str | Path) or not str(globals()[name]):
            problems.append(f"{name} = {globals()[name]!r} must be a name or a folder")
    texts = PROMPTS if isinstance(PROMPTS, list) and PROMPTS else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        problems.append(f"PROMPTS = {PROMPTS!r} must be a list of texts, none empty")
    if REWARD_FUNCTION is not None and not callable(REWARD_FUNCTION):
        problems.append(f"REWARD_FUNCTION = {REWARD_FUNCTION!r} must be a function")
    for name in ("SAVE_DIR", "CURVE_PATH"):
        path = globals()[name]
        path = Path(__file__).parent / path if isinstance(path, str | Path) else None
        if path is None or not os.access(path.parent, os.W_OK):
            problems.append(
                f"{name} = {str(globals()[name])!r} must lie in a folder that can be "
                "written to"
            )
    if DEVICE not in ("cpu", "cuda"):
        problems.append(f'DEVICE = {DEVICE!r} must be "cpu" or "cuda"')
    elif DEVICE == "cuda" and not torch.cuda.is_available():
        problems.append('DEVICE = "cuda", but PyTorch sees no GPU here')
    if problems:
        stop(f"Settings: {'; '.join(problems)}.")


def stop(line: str, kind: type[SystemExit] = SystemExit) -> None:
    """End with status 1 and one line, printed by one of the processes if all fail."""
    raise kind(line if os.environ.get("RANK", "0") == "0" else 1)


class HubOutOfReach(SystemExit):
    """A model is not on this machine, and the hub does not answer."""


# ------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------


def start_accelerator(device: str, group_sizes: dict[str, int]) -> Accelerator:
    """Join the other processes, if this was launched as one of several.

    `group_sizes`: settings that are shared out over the processes, by name.

    Errors: FSDP or DeepSpeed, which cut the model itself into pieces, and sizes that
    the processes cannot share evenly, end the program with one line and status 1.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            stop(
                f"Launched with {name}, which this script does not support: the whole "
                "model must fit in each process. Launch it with --multi_gpu instead."
            )
    # On a CPU under Linux: large tensors in pages of 2 MB instead of 4 kB, for speed.
    # PyTorch looks at this when it makes its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    count = accelerator.num_processes
    for name, size in group_sizes.items():
        if size % count:
            stop(f"{name} = {size} cannot be shared evenly by {count} processes.")
    return accelerator


def hub_answers(seconds: float = 5.0) -> bool:
    """True if the Hugging Face hub answers within this time.

    The libraries try for up to a minute before they give up. The thread is there since
    looking up a server's name may hang for longer than any timeout.
    """
    answers = []

    def ask():
        try:
            urllib.request.urlopen(hub.ENDPOINT, timeout=seconds)
            answers.append("yes")
        except urllib.error.HTTPError:
            answers.append("yes, though with an error")
        except Exception:  # no such name, no way there, no sensible answer
            pass

    if not hub.HF_HUB_OFFLINE:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
    return bool(answers)


def load_pretrained(loader: type, name: str, setting: str, **options):
    """`loader.from_pretrained(name)`: from a folder, the cache, or else the hub.

    `setting` is the constant that holds the name, for the error's sake.

    Errors: whatever cannot be had or read ends the program with one line and status 1.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif folder.is_absolute() or str(name).startswith((".", "~")):
        stop(f"{setting}: there is no folder {name}.")
    try:
        with contextlib.suppress(OSError):  # neither a folder nor in the cache
            return loader.from_pretrained(name, local_files_only=True, **options)
        if not folder.is_dir() and not hub_answers():
            stop(
                f"{setting}: {name} is neither a folder nor in the cache, and the "
                "Hugging Face hub cannot be reached. Connect to the internet once, or "
                f"set {setting} to a folder that holds the model.",
                HubOutOfReach,
            )
        return loader.from_pretrained(name, **options)
    except Exception as problem:  # a damaged or odd model can fail in any way at all
        reason = str(problem).strip().split("\n")[0]
        stop(f"{setting}: {name} cannot be loaded ({reason}).")


def load_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model; errors as in `load_pretrained`."""
    tokenizer = load_pretrained(AutoTokenizer, name, setting)
    # A folder without tokenizer files gives an empty tokenizer and no error.
    if len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
        stop(f"{setting}: {name} has no tokenizer beside the model.")
    if tokenizer.pad_token is None:  # gpt2 has none; what is padded is masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    name: str, setting: str = "POLICY_MODEL_NAME", checkpointing: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model and its tokenizer; errors as in `load_pretrained`."""
    tokenizer = load_tokenizer(name, setting)
    if tokenizer.eos_token_id is None:
        stop(f"{setting}: the tokenizer of {name} has no end-of-text token.")
    config = load_pretrained(AutoConfig, name, setting)
    if checkpointing:  # works in train() mode only, so dropout has to go another way
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
    if getattr(config, "activation_function", "") == "gelu_new":
        # gpt2's GELU as one operation instead of seven that each keep their result.
        config.activation_function = "gelu_pytorch_tanh"
    # float32: in bfloat16 a step of LR = 1e-5 is lost in the rounding of most weights.
    policy = load_pretrained(
        AutoModelForCausalLM, name, setting, config=config, dtype=torch.float32
    )
    if policy.get_input_embeddings().num_embeddings < len(tokenizer):
        stop(f"{setting}: the tokenizer of {name} has more tokens than the model.")
    if checkpointing:  # `activation_` is the newer name, within transformers 5
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(policy, new if hasattr(policy, new) else old)({"use_reentrant": False})
    # eval() switches dropout off and nothing else; gradients flow as before. With
    # dropout we would train another network than the one that wrote: the probabilities
    # of the same tokens differ, in gpt2 by a factor of 0.87 to 1.09.
    return policy.eval(), tokenizer


def load_reward_model(
    name: str, setting: str = "REWARD_MODEL_NAME"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reward model and its tokenizer; errors as in `load_pretrained`, and these:

    a number of outputs other than one, and a head (the last layer, which gives the
    score) that is not in the file: transformers would fill it with random numbers.
    """
    config = load_pretrained(AutoConfig, name, setting)
    if config.num_labels != 1:
        stop(f"{setting}: {name} has {config.num_labels} outputs instead of 1 score.")
    tokenizer = load_tokenizer(name, setting)
    config.pad_token_id = tokenizer.pad_token_id
    model, report = load_pretrained(
        AutoModelForSequenceClassification,
        name,
        setting,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        stop(f"{setting}: {name} is no trained reward model, it lacks {missing}.")
    return model.eval().requires_grad_(False), tokenizer


def check_prompts(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, room: int, setting: str
) -> None:
    """Stop with one line if a prompt has more than `room` tokens."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > room:
            stop(
                f"PROMPTS: {prompt[:30]!r}... has {length} tokens, but the context of "
                f"{setting} leaves room for {room}."
            )


def save_model(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a folder that `transformers` loads, each file whole or not at all.

    Files of an earlier model that this one has no more are deleted: they would be read
    as its own. Anything else in the folder stays.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    policy.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    written = {file.name for file in temporary.iterdir()}
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()
    for pattern in ("*.safetensors*", "*token*.json", "vocab.*", "merges.txt", "spm.*"):
        for file in folder.glob(pattern):
            if file.name not in written:
                file.unlink()


Score = Callable[[str, list[str]], torch.Tensor]  # (prompt, n responses) -> (n,)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most tokens that the model reads at once."""
    limit = tokenizer.model_max_length
    return min(limit, getattr(model.config, "max_position_embeddings", limit))


def call_reward_function(
    function: Callable, device: torch.device, prompt: str, responses: list[str]
) -> torch.Tensor:
    """Rewards (n,) float32 from REWARD_FUNCTION, which must give one for each text."""
    try:
        rewards = torch.tensor([float(x) for x in function(prompt, responses)])
    except (TypeError, ValueError) as problem:
        sys.exit(f"REWARD_FUNCTION did not give numbers ({problem}).")
    if len(rewards) != len(responses):
        sys.exit(
            f"REWARD_FUNCTION gave {len(rewards)} rewards for {len(responses)} texts."
        )
    return rewards.to(device)


def make_score(
    function: Callable | None,
    model_name: str,
    prompts: list[str],
    device: torch.device,
    batch_size: int,
) -> Score:
    """What scores the responses: `function` if there is one, else the reward model."""
    if function is not None:
        return functools.partial(call_reward_function, function, device)
    model, tokenizer = load_reward_model(model_name)
    room = context_length(model, tokenizer) - 8  # marks between the two, some response
    check_prompts(prompts, tokenizer, room, "REWARD_MODEL_NAME")
    return functools.partial(
        score_responses, model.to(device), tokenizer, batch_size=batch_size
    )


def load_models(
    policy_name: str,
    reward_name: str,
    function: Callable | None,
    prompts: list[str],
    device: torch.device,
    checkpointing: bool,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Score]:
    """The policy, its tokenizer and what scores it, for prompts that fit into both."""
    policy, tokenizer = load_policy(policy_name, checkpointing=checkpointing)
    room = context_length(policy, tokenizer) - max_new_tokens
    if room < 1:
        stop(f"MAX_NEW_TOKENS = {max_new_tokens} is more than {policy_name} reads.")
    check_prompts(prompts, tokenizer, room, "POLICY_MODEL_NAME")
    score = make_score(function, reward_name, prompts, device, batch_size)
    return policy.to(device), tokenizer, score


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, scale_by_std: bool = True) -> torch.Tensor:
    """Advantages: how much better each response is than its group's average.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    DeepSeekMath, section 4.1.2. `scale_by_std=False` leaves out the division, as Dr.
    GRPO does. Equal rewards give exactly 0: rounding may leave 3e-8 instead, and AdamW,
    which divides a gradient by its usual size, could make a full step of mere noise.

    `rewards` (G,) float32 of one prompt's responses gives (G,).
    By hand: rewards = [0, 1, 2]  ->  mean 1, std 1 (the sum of squares divided by
    G - 1)  ->  [-0.9999, 0, 0.9999].
    """
    centred = rewards - rewards.mean()
    if centred.abs().max() <= 1e-6 * rewards.abs().max():
        return torch.zeros_like(rewards)
    return centred / (rewards.std() + 1e-4) if scale_by_std else centred


def completion_mask(completion_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """1 for every token of the response, its first end-of-text token included.

    m_it = 1 if no token before t ended the text, else 0

    The end is a choice that the policy made, so it is trained as every other token;
    what stands after it is only there to fill the row up.

    `completion_ids` (G, L) int64 gives (G, L) int64.
    By hand: ids = [5, 7, EOS, EOS]  ->  [1, 1, 1, 0].
    """
    ends = (completion_ids == eos_token_id).long()
    return (ends.cumsum(1) - ends == 0).long()


def completion_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_length: int,
    temperature: float,
) -> torch.Tensor:
    """Log-probability of each token of the response, given all tokens before it.

    ln pi(o_t | q, o_<t) = z_t[o_t] - ln sum_v exp(z_t[v]),   z_t = logits / temperature

    q is the prompt; the logits are the model's V outputs at each place, a score for
    every token that could come next. Minus this is known as the cross-entropy.

    `input_ids` (G, P + L): prompt and response, whose length L is `completion_length`;
    `attention_mask` (G, P + L): 0 where a row is only filled up, on either side. Gives
    (G, L) float32. The logits at place t are about the token at t + 1: the response's
    first token is chosen at the prompt's last, and its own last token need not be read.
    By hand: two tokens, logits [0, ln 3], token 1 was drawn  ->  ln(3/4) = -0.2877.
    """
    # Counted from the first real token, in case a row is filled up on the left. (This
    # script, which has one prompt at a time, fills up on the right only.)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids[:, :-1],
        attention_mask=attention_mask[:, :-1],
        position_ids=position_ids[:, :-1],
        use_cache=False,
        logits_to_keep=completion_length,  # none for the prompt: saves memory
    ).logits  # (G, L, V), by far the largest tensor here
    logits = logits.float() / temperature if temperature != 1 else logits.float()
    tokens = input_ids[:, -completion_length:]
    cross_entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens.flatten(), reduction="none"
    )
    return -cross_entropy.view_as(tokens)


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """How far the policy has moved from the reference, estimated token by token.

    k3 = pi_ref/pi - ln(pi_ref/pi) - 1

    DeepSeekMath, eq. (4). Never negative, and 0 where both agree. Its mean over tokens
    drawn from pi is KL(pi || pi_ref); its *gradient*, though, is that of the reverse,
    KL(pi_ref || pi). The paper uses it all the same, and so do we.

    Both (G, L), gives (G, L).
    By hand: pi = 0.5, pi_ref = 0.25  ->  0.5 - ln 0.5 - 1 = 0.1931.
    """
    log_ratio = ref_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_eps: float,
    kl_coef: float,
) -> torch.Tensor:
    """The loss to minimise: push up what did well, a little, and stay near home.

    rho_it = pi(o_it) / pi_old(o_it)
    J_it   = min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta k3_it
    loss   = -mean_i( mean_t J_it )

    DeepSeekMath, eq. (3). The min stops pushing a token once rho has moved by eps the
    way A asks for, and never stops it from coming back. On the first step from a group
    rho is 1 and the advantages add up to 0, so the loss is beta times the mean of k3: 0
    without KL. Its gradient is not 0, and the gradient is what trains: at rho = 1 it is
    that of -A_i ln pi. Why that works: since d pi = pi d ln pi, the mean of r_i times
    the gradient of ln pi(o_i), over responses drawn from pi, is the gradient of the
    mean reward. (REINFORCE, lesson 1.)

    `log_probs`, `old_log_probs`, `ref_log_probs` (None without KL) and `mask` (G, L),
    `advantages` (G,); beta is `kl_coef`. Gives a scalar.
    By hand: one token, pi = 0.6, pi_old = 0.4, A = 1, eps = 0.2  ->  rho = 1.5 is
    clipped to 1.2  ->  loss -1.2, and no gradient. With A = -1  ->  loss 1.5.
    """
    # Filler tokens to 0 *before* exp: exp(1000) * 0 is nan, and so would be everything.
    filler = mask == 0
    log_probs = log_probs.masked_fill(filler, 0.0)
    ratio = (log_probs - old_log_probs.masked_fill(filler, 0.0)).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    advantages = advantages.unsqueeze(1)  # (G, 1): every token of a response alike
    objective = torch.min(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None:
        ref_log_probs = ref_log_probs.masked_fill(filler, 0.0)
        objective = objective - kl_coef * kl_estimate(log_probs, ref_log_probs)
    objective = objective.masked_fill(filler, 0.0)
    return -(objective.sum(1) / mask.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def draw_tokens(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    generators: list[torch.Generator],
) -> torch.Tensor:
    """Draw one token for each row, from the likeliest that together hold `top_p`.

    Draw from all tokens; while those likelier than the one drawn hold top_p or more by
    themselves, draw again. That gives the same distribution as sorting the
    whole vocabulary and cutting it, but sorting 50,000 numbers takes far longer.

    `logits` (n, V); each row draws from its own generator. Gives (n,) int64.
    """
    probs = (logits.float() / temperature).softmax(1)
    # Each token owns a stretch of a ladder, as long as its probability; the token is
    # the one whose stretch a random height falls into.
    ladder = probs.double().cumsum(1)
    tokens = torch.zeros(len(probs), dtype=torch.long, device=probs.device)
    again = list(range(len(probs)))
    while again:
        for i in again:
            height = torch.rand(
                1, dtype=torch.float64, device=probs.device, generator=generators[i]
            )
            tokens[i] = torch.searchsorted(
                ladder[i], height * ladder[i, -1], right=True
            )
        likelier = torch.where(probs > probs.gather(1, tokens[:, None]), probs, 0)
        outside = (likelier.sum(1) >= top_p) & (top_p < 1)  # at 1, nothing is outside
        again = outside.nonzero().flatten().tolist()
    return tokens


@torch.no_grad()
def generate_group(
    policy: PreTrainedModel,
    prompt_ids: torch.Tensor,
    eos_token_id: int,
    seeds: list[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
) -> torch.Tensor:
    """Let the policy write one response for each seed, `batch_size` at a time.

    A response depends on its own seed only, not on which others are written beside it,
    so that it is the same, but for rounding, in any batch, on one process or several.

    `prompt_ids` (1, P). Gives (n, max_new_tokens) int64; after a response's end, the
    end-of-text token is repeated.
    """
    device, batches = prompt_ids.device, []
    for start in range(0, len(seeds), batch_size):
        generators = [
            torch.Generator(device).manual_seed(seed)
            for seed in seeds[start : start + batch_size]
        ]
        rows = len(generators)
        batch = torch.full((rows, max_new_tokens), eos_token_id, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        # The prompt is read once, for all rows. The cache keeps what attention needs of
        # the tokens read so far: each step then costs one token, not the whole text.
        output = policy(prompt_ids, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        cache.batch_repeat_interleave(rows)
        logits = output.logits[:, -1].expand(rows, -1)  # (rows, V)
        if logits.isnan().any():
            sys.exit("The policy's output is not a number: the model is damaged.")
        with packed_weights(policy, rows):  # on a CPU: the same numbers, sooner
            for t in range(max_new_tokens):
                tokens = draw_tokens(logits, temperature, top_p, generators)
                batch[:, t] = torch.where(ended, eos_token_id, tokens)
                ended |= tokens == eos_token_id
                if ended.all() or t == max_new_tokens - 1:
                    break
                last = batch[:, t : t + 1]
                output = policy(last, past_key_values=cache, use_cache=True)
                logits = output.logits[:, -1]
        batches.append(batch)
    return torch.cat(batches)


@torch.no_grad()
def score_responses(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    responses: list[str],
    batch_size: int,
) -> torch.Tensor:
    """Rewards (n,) float32: the reward model's score of each (prompt, response) pair.

    The tokenizer joins the pair with its own marks between the two, as the model was
    trained. A pair that is too long loses the end of the response, never the prompt.
    """
    rewards = []
    for start in range(0, len(responses), batch_size):
        batch = responses[start : start + batch_size]
        inputs = tokenizer(
            [prompt] * len(batch),
            batch,
            truncation="only_second",
            max_length=context_length(reward_model, tokenizer),
            padding=True,
            return_tensors="pt",
        ).to(reward_model.device)
        rewards.append(reward_model(**inputs).logits[:, 0].float())
    return torch.cat(rewards)


def draw_seeds(source: torch.Generator, count: int) -> list[int]:
    """One seed for each response; the same in every process, since `source` is."""
    return torch.randint(2**62, (count,), generator=source).tolist()


def collect_group(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    prompt: str,
    seeds: list[int],
    sampling: dict[str, float],
) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """A group of responses to one prompt, one for each seed, and their rewards.

    Each process writes and scores an equal share; `sampling` is what `generate_group`
    takes. Gives `prompt_ids` (1, P) and `completion_ids` (G / processes, L) of this
    process's share, then texts and `rewards` (G,) of the whole group.
    """
    share = len(seeds) // accelerator.num_processes
    seeds = seeds[accelerator.process_index * share :][:share]
    prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
    prompt_ids = prompt_ids.to(accelerator.device)
    completion_ids = generate_group(
        policy,
        prompt_ids,
        tokenizer.eos_token_id,
        seeds,
        **sampling,
    )
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    rewards = accelerator.gather(score(prompt, texts))
    if not rewards.isfinite().all():
        stop(
            "A reward is not a finite number. Stopped before it reached the policy; "
            "nothing was written."
        )
    return prompt_ids, completion_ids, gather_object(texts), rewards


def evaluate(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    prompts: list[str],
    samples: int,
    sampling: dict[str, float],
    held_out_seed: int,
) -> torch.Tensor:
    """Rewards (prompts * samples,) of responses whose seeds training never uses."""
    source = torch.Generator().manual_seed(held_out_seed)
    rewards = []
    for prompt in prompts:
        seeds = draw_seeds(source, samples)
        rewards += collect_group(
            accelerator, policy, tokenizer, score, prompt, seeds, sampling
        )[-1]
    return torch.stack(rewards)


# ------------------------------------------------------------------------------------
# Updating the policy
# ------------------------------------------------------------------------------------


def micro_batches(
    prompt_ids: torch.Tensor,
    completion_ids: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    size: int,
) -> list[dict[str, torch.Tensor]]:
    """Cut a group into parts of `size` responses, for the backward pass to hold one.

    Responses of about the same length go together, each part cut to its longest. A part
    has `input_ids`, `attention_mask`, `mask` and `advantages`.
    """
    parts = []
    for rows in mask.sum(1).argsort(descending=True).split(size):
        length = int(mask[rows].sum(1).max())
        prompts = prompt_ids.expand(len(rows), -1)
        real = mask[rows, :length]
        part = {
            "input_ids": torch.cat([prompts, completion_ids[rows, :length]], 1),
            "attention_mask": torch.cat([torch.ones_like(prompts), real], 1),
            "mask": real,
            "advantages": advantages[rows],
        }
        parts.append(part)
    return parts


def average_gradients(accelerator: Accelerator, policy: PreTrainedModel) -> None:
    """Each gradient becomes its mean over the processes, so that all step alike."""
    if accelerator.num_processes > 1:
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")


@torch.no_grad()
def token_sums(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_eps: float,
) -> torch.Tensor:
    """What to watch, summed over the real tokens: KL, -ln pi, clipped, their number.

    With TOP_P = 1 the mean of -ln pi over the tokens drawn estimates the entropy, with
    no other tensor of the size of the vocabulary; below 1 it is too low, as the tail is
    never drawn. Arguments as in `grpo_loss`.
    """
    real = mask.bool()
    ratio = (log_probs - old_log_probs)[real].exp()
    signs = advantages.sign().unsqueeze(1).expand_as(mask)[real]
    clipped = (ratio - 1) * signs > clip_eps  # past the edge that its push leads to
    kl = torch.zeros(())
    if ref_log_probs is not None:
        kl = kl_estimate(log_probs, ref_log_probs)[real].sum()
    entropy = -log_probs[real].sum()
    return torch.stack([kl.to(entropy), entropy, clipped.sum(), mask.sum()])


def part_log_probs(
    model: PreTrainedModel, part: dict[str, torch.Tensor], temperature: float
) -> torch.Tensor:
    """Log-probabilities (size, L) of the responses in one of the `micro_batches`."""
    length = part["mask"].shape[1]
    ids, attention_mask = part["input_ids"], part["attention_mask"]
    return completion_log_probs(model, ids, attention_mask, length, temperature)


def group_gradient(
    policy: PreTrainedModel,
    parts: list[dict[str, torch.Tensor]],
    temperature: float,
    clip_eps: float,
    kl_coef: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave the gradient of this process's share of the loss in the policy, in parts.

    A part without `old_log_probs` gets them: the policy is still the one that wrote.
    Gives the loss and the `token_sums`.
    """
    responses = sum(len(part["mask"]) for part in parts)
    loss, sums = 0, 0
    with gradients_in_place(policy):  # the same gradients, with less memory
        for part in parts:
            log_probs = part_log_probs(policy, part, temperature)
            part.setdefault("old_log_probs", log_probs.detach())  # 1st: pi is pi_old
            others = (
                part["old_log_probs"],
                part.get("ref_log_probs"),
                part["advantages"],
                part["mask"],
                clip_eps,
            )
            part_loss = grpo_loss(log_probs, *others, kl_coef)
            part_loss = part_loss * len(log_probs) / responses
            part_loss.backward()
            loss += part_loss.detach()
            sums += token_sums(log_probs, *others)
    return loss, sums


def grpo_step(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    reference: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    prompt: str,
    seeds: list[int],
    sampling: dict[str, float],
    clip_eps: float,
    inner_steps: int,
    kl_coef: float,
    scale_by_std: bool,
    max_grad_norm: float,
    micro_batch_size: int,
) -> tuple[float, list[str], torch.Tensor, dict[str, float] | None]:
    """One group of responses, one for each seed, and `inner_steps` updates from it.

    Gives the loss, the G texts, their rewards (G,), and a dict of what else to watch,
    or None in its place if all rewards were equal and the policy was left as it was.
    """
    # 2. and 3. Responses and rewards.
    prompt_ids, completion_ids, texts, rewards = collect_group(
        accelerator, policy, tokenizer, score, prompt, seeds, sampling
    )

    # 4. Advantages, from the rewards of all processes; then back to our own share.
    all_advantages = group_advantages(rewards, scale_by_std)
    if not all_advantages.any():
        return 0.0, texts, rewards, None
    share = len(completion_ids)
    parts = micro_batches(
        prompt_ids,
        completion_ids,
        completion_mask(completion_ids, tokenizer.eos_token_id),
        all_advantages[accelerator.process_index * share :][:share],
        micro_batch_size,
    )

    # 5. The gradient, and one step.
    temperature = sampling["temperature"]
    if reference is not None:
        with torch.no_grad():
            for part in parts:
                part["ref_log_probs"] = part_log_probs(reference, part, temperature)
    # eval() for training too (see `load_policy`); only checkpointing needs train().
    policy.train(any(getattr(m, "gradient_checkpointing", 0) for m in policy.modules()))
    for _ in range(inner_steps):
        loss, sums = group_gradient(policy, parts, temperature, clip_eps, kl_coef)
        average_gradients(accelerator, policy)
        loss = accelerator.reduce(loss, "mean").item()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        if not math.isfinite(loss + grad_norm.item()):
            stop(
                "The loss is not a finite number. Stopped before it reached the "
                "policy; nothing was written."
            )
        optimizer.step()
        optimizer.zero_grad()
    policy.eval()

    cut_off = (completion_ids != tokenizer.eos_token_id).all(1).sum()
    sums = accelerator.reduce(torch.cat([sums, cut_off.unsqueeze(0)]), "sum").tolist()
    kl, entropy, clipped, tokens, cut_off = sums
    figures = {
        "kl": kl / tokens if reference is not None else None,
        "entropy": entropy / tokens,
        "clipped": clipped / tokens,
        "length": tokens / len(seeds),
        "cut_off": cut_off / len(seeds),
        "grad_norm": grad_norm.item(),
    }
    return loss, texts, rewards, figures


# ------------------------------------------------------------------------------------
# Speed and memory (skip this on first reading)
# ------------------------------------------------------------------------------------

# Nothing here belongs to GRPO. Take out the two lines `with packed_weights(...)` and
# `with gradients_in_place(...)`: the results stay the same, but for rounding.


@contextlib.contextmanager
def replaced_forwards(forwards: dict[torch.nn.Module, Callable]) -> Iterator[None]:
    """Inside this, each of these layers computes with the function beside it."""
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward  # the class's own is back


def packed_weights(
    policy: PreTrainedModel, rows: int
) -> contextlib.AbstractContextManager:
    """On a CPU: keep the weights in a layout that is made for few rows, while writing.

    To write one token, `rows` vectors are multiplied by every matrix of the model. With
    the matrices as they lie, that takes about twice as long as with a copy that oneDNN,
    a library inside PyTorch, has laid out for the purpose. The copy is as large as the
    gradients, which do not exist yet. The results are the same up to rounding.
    """
    forwards = {}
    if policy.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for layer in policy.modules():
            if type(layer) not in (torch.nn.Linear, Conv1D):
                continue
            weight = layer.weight.detach()
            if type(layer) is Conv1D:  # what gpt2 has for Linear, the other way round
                weight = weight.T.contiguous()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            forwards[layer] = functools.partial(packed_linear, packed, layer.bias)
    return replaced_forwards(forwards)


def packed_linear(packed, bias, x):
    """What torch.nn.functional.linear gives, from a matrix in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class AddingLinear(torch.autograd.Function):
    """x W' + b, whose backward pass adds to W's gradient instead of making a new one.

    `x` (..., I), `weight` (O, I), `bias` (O,) or None, `gradient` (O, I): where to add.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gradient):
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        ctx.gradient, ctx.has_bias = gradient, bias is not None
        return torch.nn.functional.linear(rows, weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, from_above):
        # from_above: the gradient of the loss by this layer's output.
        rows, weight = ctx.saved_tensors
        above = from_above.flatten(0, -2)
        ctx.gradient.addmm_(above.T, rows)
        return from_above @ weight, None, above.sum(0) if ctx.has_bias else None, None


def adding_linear(x, weight, bias, gradient):
    return AddingLinear.apply(x, weight, bias, gradient)


def adding_embedding(ids, weight, gradient, padding_idx):
    """Rows of `weight`; the backward pass adds to the same rows of `gradient`."""
    vectors = torch.nn.functional.embedding(ids, weight).requires_grad_()

    def add_rows(from_above):
        if padding_idx is not None:  # a padding token's row is not trained
            from_above = from_above.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
        gradient.index_add_(0, ids.flatten(), from_above.flatten(0, -2))

    vectors.register_hook(add_rows)
    return vectors


def gradients_in_place(policy: PreTrainedModel) -> contextlib.AbstractContextManager:
    """Inside this, backward passes add to the gradients of `policy` in place.

    PyTorch would make a second set of gradients in each pass, and then add it to the
    first. For the largest matrix, which most models use both to read tokens and to
    choose them, it would make two. The sums are the same; nothing else changes.
    """
    forwards = {}
    for module in policy.modules():
        if type(module) not in (torch.nn.Linear, torch.nn.Embedding, Conv1D):
            continue
        if not module.weight.requires_grad:
            continue
        if module.weight.grad is None:  # tied layers share one
            module.weight.grad = torch.zeros_like(module.weight)
        weight, gradient = module.weight.detach(), module.weight.grad
        if type(module) is torch.nn.Embedding:
            forwards[module] = functools.partial(
                adding_embedding,
                weight=weight,
                gradient=gradient,
                padding_idx=module.padding_idx,
            )
            continue
        if type(module) is Conv1D:
            weight, gradient = weight.T, gradient.T
        forwards[module] = functools.partial(
            adding_linear, weight=weight, bias=module.bias, gradient=gradient
        )
    return replaced_forwards(forwards)


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


LEGEND = """\
The reward should rise; 'std' is its spread. The loss says nothing about progress: at
the first step from a group it is 0, but for the KL. KL: distance from the first policy.
Entropy (nats a token) near 0: one answer is left. Clipped: tokens past CLIP_EPS. Cut
off: responses as long as MAX_NEW_TOKENS. Gradient: its length before MAX_GRAD_NORM."""


def print_step(
    step: int,
    loss: float,
    texts: list[str],
    rewards: torch.Tensor,
    figures: dict[str, float] | None,
    seconds: float,
) -> None:
    """The figures of one step, then its responses from best to worst."""
    tqdm.write(
        f"\nStep {step} | Loss: {loss:.4f} | Reward: {rewards.mean():+.3f} "
        f"(std {rewards.std():.3f}, max {rewards.max():+.3f}) | {seconds:.1f} s"
    )
    if figures is None:
        tqdm.write("  Skipped: all rewards are equal, there is nothing to learn from.")
    else:
        kl = "off" if figures["kl"] is None else f"{figures['kl']:.4f}"
        tqdm.write(
            f"  KL: {kl} | Entropy: {figures['entropy']:.3f} | "
            f"Clipped: {figures['clipped']:.1%} | Length: {figures['length']:.1f}, "
            f"cut off: {figures['cut_off']:.0%} | Gradient: {figures['grad_norm']:.2f}"
        )
    for i in rewards.argsort(descending=True).tolist():
        tqdm.write(f"  [{rewards[i]:+.2f}] {' '.join(texts[i].split())}")


def print_gain(before: torch.Tensor, after: torch.Tensor, samples: int) -> None:
    """The mean and the spread (std) of the rewards before training and after it."""
    tqdm.write(f"\nReward of {samples} fresh responses to each prompt: mean (std)")
    for name, rewards in [("before", before), ("after", after)]:
        tqdm.write(f"  {name:8}{rewards.mean():+7.3f} ({rewards.std():.3f})")


def draw_learning_curve(history: list[torch.Tensor], path: Path | str) -> None:
    """Write a picture of the rewards (G,) of each step: mean, spread and best."""
    rewards = torch.stack(history).cpu()  # (steps, G)
    mean, std = rewards.mean(1), rewards.std(1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rewards.amax(1), ".", color="0.7", label="best of the group")
    axes.plot(mean, label="mean of the group")
    axes.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    axes.set(title="GRPO (band: +- 1 std)", xlabel="step", ylabel="reward")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def save_run(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    history: list[torch.Tensor],
    save_dir: Path | str,
    curve_path: Path | str,
    suffix: str = "",
) -> str:
    """Write model and curve, with `suffix` added to both names; give the names."""
    folder = Path(__file__).parent / save_dir
    folder = folder.with_name(folder.name + suffix)
    save_model(policy, tokenizer, folder)
    if not history:  # stopped before the first step: there is no curve yet
        return f"{folder.name}/"
    curve_path = Path(curve_path)
    curve_path = curve_path.with_stem(curve_path.stem + suffix)
    draw_learning_curve(history, curve_path)
    return f"{folder.name}/ and {curve_path.name}"


def start_wandb():
    """The Weights & Biases module, with a run begun."""
    try:
        import wandb
    except ImportError:
        stop("USE_WANDB is True, but wandb is not installed: pip install wandb")
    wandb.init(project="grpo_training")
    return wandb


@contextlib.contextmanager
def memory_error_in_one_line() -> Iterator[None]:
    """Say which settings to lower if the GPU's memory runs out in here."""
    try:
        yield
    except torch.OutOfMemoryError:
        sys.exit(
            "Out of GPU memory. Lower MICRO_BATCH_SIZE, SAMPLE_BATCH_SIZE or "
            "MAX_NEW_TOKENS, or set GRADIENT_CHECKPOINTING = True."
        )


def settings(*names: str) -> dict:
    """These Settings as keyword arguments: CLIP_EPS as clip_eps=..., and so on."""
    return {name.lower(): globals()[name] for name in names}


@memory_error_in_one_line()
def main() -> None:
    """Train the policy for NUM_STEPS groups, compare before and after, save it."""
    check_settings()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes = {"NUM_SAMPLES": NUM_SAMPLES, "EVAL_SAMPLES": EVAL_SAMPLES}
    accelerator = start_accelerator(DEVICE, sizes)
    chief, device = accelerator.is_main_process, accelerator.device
    say = tqdm.write if chief else lambda line: None
    judge = getattr(REWARD_FUNCTION, "__name__", REWARD_FUNCTION) or REWARD_MODEL_NAME
    say(f"GRPO on {accelerator.num_processes} x {device}: {NUM_STEPS} steps, each")
    say(f"of {NUM_SAMPLES} responses by {POLICY_MODEL_NAME}, scored by {judge}.")
    say(LEGEND)

    # 1. The policy, what scores it, and a frozen copy of it if KL_COEF needs one.
    names, tiny = (POLICY_MODEL_NAME, REWARD_MODEL_NAME), TINY_MODELS / "policy"
    options = REWARD_FUNCTION, PROMPTS, device, GRADIENT_CHECKPOINTING
    options = *options, MAX_NEW_TOKENS, SAMPLE_BATCH_SIZE
    missing = None
    try:
        policy, tokenizer, score = load_models(*names, *options)
    except HubOutOfReach as problem:
        missing = problem
    if any(gather_object([missing is not None])):  # in one process: then in all
        if not FALL_BACK_TO_TINY or not tiny.is_dir():
            raise missing or HubOutOfReach("Another process cannot get a model.")
        say("The hub is out of reach and a model missing: on with those in grpo_tiny/.")
        names = str(tiny), str(TINY_MODELS / "reward")
        policy, tokenizer, score = load_models(*names, *options)
    is_tiny = Path(names[0]).expanduser().resolve() == tiny.resolve()
    reference = copy.deepcopy(policy) if KL_COEF > 0 else None
    lr = TINY_LR if is_tiny else LR
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0, fused=True)
    wandb = start_wandb() if USE_WANDB and chief else None
    sampling = settings("MAX_NEW_TOKENS", "TEMPERATURE", "TOP_P")
    sampling["batch_size"] = SAMPLE_BATCH_SIZE
    algorithm = settings("CLIP_EPS", "INNER_STEPS", "KL_COEF", "SCALE_BY_STD")
    algorithm |= settings("MAX_GRAD_NORM", "MICRO_BATCH_SIZE")
    held_out = accelerator, policy, tokenizer, score, PROMPTS, EVAL_SAMPLES, sampling
    history, seed_source = [], torch.Generator().manual_seed(SEED)
    bar = tqdm(total=NUM_STEPS, unit="step", leave=False, disable=not chief or None)
    try:
        before = evaluate(*held_out, HELD_OUT_SEED)
        for step in range(NUM_STEPS):
            # 2. to 5. A group of responses, their rewards, advantages, and an update.
            started, prompt = time.time(), PROMPTS[step % len(PROMPTS)]
            seeds = draw_seeds(seed_source, NUM_SAMPLES)
            models = policy, reference, optimizer, tokenizer, score
            loss, texts, rewards, figures = grpo_step(
                accelerator, *models, prompt, seeds, sampling, **algorithm
            )
            history.append(rewards)
            bar.update()
            if chief:
                print_step(step, loss, texts, rewards, figures, time.time() - started)
            if wandb:
                mean = {"reward": rewards.mean().item(), "loss": loss}
                wandb.log(mean | (figures or {}))
        after = evaluate(*held_out, HELD_OUT_SEED)
    except KeyboardInterrupt:
        bar.close()
        if chief:
            files = SAVE_DIR, CURVE_PATH, "_interrupted"
            written = save_run(policy, tokenizer, history, *files)
            say(f"\nStopped after {len(history)} steps. This run is kept in {written}.")
        return
    bar.close()

    # 6. The gain, on responses that played no part in training, and the model.
    if chief:
        print_gain(before, after, EVAL_SAMPLES)
        written = save_run(policy, tokenizer, history, SAVE_DIR, CURVE_PATH)
        say(f"Written: {written}. Let it write, in Python:")
        say("  from transformers import pipeline")
        folder = Path(__file__).parent / SAVE_DIR
        say(f'  pipeline("text-generation", "{folder}")({PROMPTS[0]!r})')


if __name__ == "__main__":
    main()
