"""Lesson 4: GRPO, fine-tuning a language model on the scores of a reward model.

What you will learn
    The last step of RLHF (reinforcement learning from human feedback): how a language
    model that was trained to predict text learns to write what a second model, the
    reward model, scores highly. DeepSeek-R1 was trained with the same algorithm; there,
    a program that checks the answer took the place of the reward model.

The algorithm in 5 steps
    A pretrained language model is the policy: after any text it gives each token (a
    word or a piece of one) a probability of coming next.
    1. Let the policy write a group of responses to one prompt, by sampling each token
       from these probabilities.
    2. Let the reward model score each response: one number for a whole text.
    3. Compare within the group: the advantage of a response says how many standard
       deviations its reward is above the mean of the group. (PPO, lesson 3, trains a
       second network for this comparison, the critic. GRPO needs none.)
    4. Write the loss whose gradient makes the tokens of better responses more likely
       and those of worse responses less likely.
    5. Take a gradient step, and go back to 1.

Symbols (G responses, L tokens in the longest, P in the prompt, V in the vocabulary)
    q           prompt_ids      (G, P)  the prompt, repeated for each response
    o_i, o_it   completion_ids  (G, L)  response i, and its token t
    m_it        mask            (G, L)  1 up to the end of the response, 0 after it
    r_i, A_i    rewards, advantages (G,)  one for all the tokens of response i
    ln pi       log_probs       (G, L)  of each token, by the policy as it is now
    ln pi_old   old_log_probs   (G, L)  ... by the policy that sampled the responses
    ln pi_ref   ref_log_probs   (G, L)  ... by the reference policy, a frozen copy of
                                        the policy before training
    rho_it      ratio           (G, L)  pi / pi_old: how much more likely a token became
    eps, beta   CLIP_EPS, KL_COEF       bounds of rho, and the weight of the
                                        Kullback-Leibler (KL) divergence from pi_ref

One group goes through all the equations below
    The vocabulary has three tokens: 0 is the end-of-sequence token, 1 is "yes" and 2 is
    "no". The policy may write three tokens. The prompt is "Is exercise healthy?".
      i  response       completion_ids  mask       reward  advantage
      1  yes <end>         [1, 0, 0]    [1, 1, 0]     2        1.5
      2  no <end>          [2, 0, 0]    [1, 1, 0]     0       -0.5
      3  no no <end>       [2, 2, 0]    [1, 1, 1]     0       -0.5
      4  no no no          [2, 2, 2]    [1, 1, 1]     0       -0.5
    The policy that sampled them gives the first token the probabilities [0.2, 0.4, 0.4].
    A gradient step changes these to [0.2, 0.6, 0.2], and, for simplicity, nothing else.

Run it, and what you should see (the manual is in README.md)
    python grpo_training.py
    This fetches 2.3 GB of models from the Hugging Face Hub; then a step takes 17 seconds
    on one core of a CPU. The two small models of grpo_tiny/ need no download and half a
    minute in all: uncomment the line below REWARD_MODEL_NAME. (They are also used when
    the Hub cannot be reached.) With them and seed 0:

Try this

When it goes wrong
    The reward should rise. The loss says nothing: see grpo_loss. Read the responses, too.
    A reward that rises while the text gets worse has a loophole. The museum of bugs,
    tests/bugs/README.md, leads from a symptom to its cause.

Another task
    Replace the line REWARD_FUNCTION = None by a function, and edit PROMPTS.

Where this differs from the paper (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300)
    * Section 4 takes 1,024 responses per step, 64 to a prompt, a learning rate of 1e-6
      and KL_COEF 0.04. Here a step has one prompt, and the learning rate is larger, as
      there are only 50 steps. There is no KL penalty by default, which saves the memory
      of the reference policy.
    * The paper samples from pi itself; here TOP_P leaves out the least likely tokens.
    * The paper renews the reference policy now and then (algorithm 1, line 3); here it
      stays the policy before training.
"""

if __name__ == "__main__":
    print("Loading PyTorch and Transformers ...", flush=True)  # this takes seconds

import contextlib
import copy
import json
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel, gather_object, set_seed
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# Where it runs: a CUDA GPU or the GPU of a Mac (mps) if there is one, else the CPU.
DEVICE = (
    "cuda"
    if torch.cuda.is_available()
    else ("mps" if torch.backends.mps.is_available() else "cpu")
)
# The two models. Each is an id on the Hugging Face Hub or a folder beside this script.
POLICY_MODEL_NAME = "gpt2"
REWARD_MODEL_NAME = "OpenAssistant/reward-model-deberta-v3-large"
# Uncomment the next line to train the small models that come with this lesson.
# POLICY_MODEL_NAME, REWARD_MODEL_NAME = "grpo_tiny/policy", "grpo_tiny/reward"

# A function of your own, instead of the reward model: replace this line by
# `def REWARD_FUNCTION(prompt, responses):` that returns a number for each response.
REWARD_FUNCTION = None
# Prompts to train on, taken in turn. From a file with one prompt per line:
# PROMPTS = Path("prompts.txt").read_text().splitlines()
PROMPTS = ["Explain why regular exercise is important."]
# Prompts on which the gain is measured, before and after the training.
EVAL_PROMPTS = PROMPTS[:4]
# A chat model gets the prompt in the format that it was trained on. False: as it is.
USE_CHAT_TEMPLATE = True
# Whether the reward sees special tokens, such as <think>, in the responses.
KEEP_SPECIAL_TOKENS = False

# The same seed, machine and versions give the same responses. The responses that
# measure the gain have a seed of their own, far above any SEED.
SEED = 0
HELD_OUT_SEED = 1_000_000

# Training steps. With several prompts, take at least 20 for each of them.
NUM_STEPS = 50
# Prompts, and so groups, per training step. More make the gradient less noisy, and a
# step takes longer in proportion.
PROMPTS_PER_STEP = 1
# G, the responses in a group, at least 2. More make the comparison less noisy, and a
# step takes longer in proportion.
NUM_SAMPLES = 8
# Tokens after which a response is cut off. With few, the reward model sees half
# sentences; with many, steps take long.
MAX_NEW_TOKENS = 64
# Responses to each of EVAL_PROMPTS, before and after the training.
EVAL_SAMPLES = 32
# Responses in one backward pass. Fewer need less memory; the result is the same.
MICRO_BATCH_SIZE = 8
# "bf16" computes in bfloat16, which is faster on GPUs. The weights stay in float32,
# since bfloat16 is so coarse that a step of LR would be rounded away.
MIXED_PRECISION = "no"

# Learning rate: AdamW moves each weight by about this much per gradient step. If it is
# too large, the text turns into gibberish; if too small, 50 steps change nothing.
LR = 1e-5
# The logits (the policy's outputs, one for each token of the vocabulary) are divided by
# this, in sampling and in training. A high temperature makes the probabilities more
# alike, and the text gibberish; a low one makes all responses alike.
TEMPERATURE = 1.0
# Nucleus sampling: only the most likely tokens that together have this probability are
# sampled. With 1.0, all are, and odd words appear. The loss uses the probabilities of
# all tokens, so below 1.0 its gradient is slightly biased.
TOP_P = 0.95
# eps: as soon as a token's rho has moved by this much in the direction in which its
# advantage pushes it, it is pushed no further. If it is too small, later inner steps do
# nothing; if too large, nothing holds them back.
CLIP_EPS = 0.2
# Gradient steps per training step. With 1, rho is always 1 and the clip never acts.
# More learn faster, but sooner exploit the flaws of the reward model.
INNER_STEPS = 1
# beta, the weight of the pull towards the reference policy. Above 0, the policy learns
# more slowly and a second copy of it takes memory.
KL_COEF = 0.0
# Whether the advantages are divided by the standard deviation of the group's rewards.
# If not, a group whose rewards are nearly equal has a smaller gradient.
SCALE_BY_STD = True
# A gradient whose norm is larger is scaled down to this norm. If it is large, one odd
# group may throw the policy off; if small, all steps have the same length.
MAX_GRAD_NORM = 1.0

# LoRA (needs a higher LR, such as 3e-4): train two thin matrices of this rank beside
# each weight matrix, and leave the weights frozen. 0 trains all weights.
LORA_RANK = 0
# Recompute the activations in the backward pass instead of keeping them, which needs
# less memory and a quarter to a third more time.
GRADIENT_CHECKPOINTING = False

# A row is printed for every step, and the best and worst response this often.
REPORT_EVERY = 10
# The folder beside this script for the trained model and the learning curve.
SAVE_DIR = "trained_model"
# Steps between checkpoints, from which RESUME = True goes on after a crash. 0: none.
SAVE_EVERY = 0
RESUME = False
# Also send the metrics to Weights & Biases (pip install wandb; wandb login).
USE_WANDB = False

# ------------------------------------------------------------------------------------
# Step 1: the policy samples a group of responses
# ------------------------------------------------------------------------------------


def completion_mask(completion_ids: Tensor, end_ids: Tensor) -> Tensor:
    """1 for every token of the response, its end-of-sequence token included.

    m_it = 1 if no token before t ended the response, else 0

    Ending is a choice of the policy like any other token, so it is trained. What
    follows the end only pads the row to the length of the longest response.
    A model may have several end-of-sequence tokens: one for a text, one for a turn of
    a chat.

    `completion_ids` (G, L) and `end_ids` (number of ends,), int64, give (G, L) int64.
    By hand: [2, 2, 0] ends with its third token -> [1, 1, 1], and [1, 0, 0] with its
    second -> [1, 1, 0].
    """
    ends = torch.isin(completion_ids, end_ids).long()
    ends_before = ends.cumsum(1) - ends  # (G, L)
    return (ends_before == 0).long()


@torch.no_grad()
def generate_group(policy: nn.Module, tokenizer: Tokenizer, prompt: str, samples: int):
    """Sample `samples` responses to the prompt: a dict with a group's texts and tensors.

    `responses` is a list of texts without their ends; `prompt_ids` (G, P),
    `completion_ids` and `mask` (G, L) are int64.
    """
    model = extract_model_from_parallel(policy)  # without the wrapper of Accelerate
    # load_policy has put all of the model's end-of-sequence tokens there, and has put
    # away what else a checkpoint brings, such as a top_k: it would change pi.
    ends = model.generation_config.eos_token_id
    sampling = GenerationConfig(
        do_sample=True,
        temperature=float(TEMPERATURE),
        top_p=float(TOP_P),
        top_k=0,  # the default of transformers would sample from the 50 most likely
        max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=samples,
        eos_token_id=ends,
        pad_token_id=ends[0],  # any token would do: the mask leaves padding out
    )
    prompt_ids = encode_prompt(tokenizer, prompt).to(model.device)  # (1, P)
    ids = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        generation_config=sampling,
    )  # (G, P + L)
    completion_ids = ids[:, prompt_ids.shape[1] :]
    end_ids = torch.tensor(ends, device=ids.device)
    mask = completion_mask(completion_ids, end_ids)
    is_text = (mask == 1) & ~torch.isin(completion_ids, end_ids)
    rows = [row[text] for row, text in zip(completion_ids, is_text, strict=True)]
    return {
        "responses": tokenizer.batch_decode(
            rows, skip_special_tokens=not KEEP_SPECIAL_TOKENS
        ),
        "prompt_ids": prompt_ids.expand(samples, -1),
        "completion_ids": completion_ids,
        "mask": mask,
    }


# ------------------------------------------------------------------------------------
# Step 2: the reward of each response
# ------------------------------------------------------------------------------------


class RewardModel:
    """A pretrained classifier with one output: its score of a response to a prompt.

    Before this lesson, it was trained to score the better one of two responses higher.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest

    @torch.no_grad()
    def __call__(self, prompt: str, responses: list[str]) -> Tensor:
        """Scores (n,) float32."""
        pads = (
            self.tokenizer.pad_token_id,
            self.model.config.get_text_config().pad_token_id,
        )
        size = 1 if None in pads else len(responses)  # without padding: one at a time
        parts = [responses[i : i + size] for i in range(0, len(responses), size)]
        inputs = [self.encode(prompt, part).to(self.model.device) for part in parts]
        return torch.cat([self.model(**part).logits[:, 0].float() for part in inputs])

    def encode(self, prompt: str, responses: list[str]) -> dict:
        """Prompt and response in the form in which the model was trained to read them.

        That is a conversation, if its tokenizer has a chat template, or else a pair of
        texts with the tokenizer's special tokens between them. If it is longer than the
        model can read, the end of the response is cut off.
        """
        options = {"padding": True, "return_tensors": "pt"}
        if not self.tokenizer.chat_template:
            return self.tokenizer(
                [prompt] * len(responses),
                responses,
                truncation="only_second",
                max_length=self.longest,
                **options,
            )
        room = self.longest - len(
            self.tokenizer(
                chat_text(self.tokenizer, prompt, ""), add_special_tokens=False
            ).input_ids
        )
        texts = [
            chat_text(self.tokenizer, prompt, cut(self.tokenizer, text, room))
            for text in responses
        ]
        return self.tokenizer(texts, add_special_tokens=False, **options)


def score_responses(reward: Callable, prompt: str, responses: list[str]) -> Tensor:
    """Rewards (G,) float32, by the reward model or by a REWARD_FUNCTION."""
    numbers = reward(prompt, responses)
    rewards = torch.as_tensor(numbers, dtype=torch.float32, device=DEVICE)
    if rewards.shape != (len(responses),) or not rewards.isfinite().all():
        sys.exit(f"Not a finite reward for each response: {rewards.tolist()}")
    return rewards


# ------------------------------------------------------------------------------------
# Step 3: the advantage of each response
# ------------------------------------------------------------------------------------

# Why responses that scored well are made more likely.
#
# The policy writes the text o with probability pi(o). Its mean reward is
#     sum_o pi(o) r(o),  over all possible texts o.
# The rewards do not depend on the weights, and grad pi = pi grad ln pi (the derivative
# of ln x is 1 / x). So the gradient of the mean reward is
#     sum_o r(o) grad pi(o) = sum_o pi(o) r(o) grad ln pi(o),
# the mean of r(o) grad ln pi(o) over texts that are sampled from pi. A group of samples
# estimates it. As pi(o) is the product of the probabilities of the tokens, ln pi(o) is
# the sum of their log-probabilities. (This is REINFORCE, as in lesson 1.)
#
# Why the mean of the group may be subtracted.
#
# Taking the same number b from all rewards changes the mean of r(o) grad ln pi(o) by
#     -b sum_o pi(o) grad ln pi(o) = -b grad sum_o pi(o) = -b grad 1 = 0.
# So b, the baseline, changes the gradient of one group, but not its mean over groups. A
# b near the mean reward makes it less noisy: if all rewards are around 100, then without
# a baseline all the responses are made more likely, good and bad.


def group_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """Advantages: how much better each response is than the average of its group.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    DeepSeekMath, section 4.1.2; the 1e-4, against a division by 0, is ours.
    `scale_by_std=False` leaves out the division.

    The mean of the group is not quite a baseline, as r_i is one of the numbers in it:
    r_i - mean(r) holds only the share 1 - 1/G of r_i. So the mean gradient keeps its
    direction and is 1 - 1/G times as long. (RLOO, arXiv 2402.14740, takes the mean of
    the other responses, which is a baseline.) This holds only with
    `scale_by_std=False`, since the std depends on r_i as well; without the division by
    the length in grpo_loss; and with TOP_P = 1.
    If all rewards are equal, rounding can leave advantages of 3e-8 instead of 0. AdamW
    divides a gradient by its recent size, so even these could move the weights by LR.
    Therefore they are set to exactly 0.

    `rewards` (G,) float32 of the responses to one prompt; gives (G,).
    By hand: rewards [2, 0, 0, 0] have the mean 0.5 and the std 1 (the squares of 1.5,
    -0.5, -0.5 and -0.5 add up to 3, divided by G - 1) -> [1.5, -0.5, -0.5, -0.5], up to
    the 1e-4.
    """
    centred = rewards - rewards.mean()
    if centred.abs().max() <= 1e-6 * rewards.abs().max():
        return torch.zeros_like(rewards)
    return centred / (rewards.std() + 1e-4) if scale_by_std else centred


# ------------------------------------------------------------------------------------
# Step 4: the loss
# ------------------------------------------------------------------------------------


def completion_log_probs(
    model: Callable, prompt_ids: Tensor, completion_ids: Tensor, temperature: float
) -> Tensor:
    """Log-probability of each token of the response, given all the tokens before it.

    ln pi(o_t | q, o_<t) = z_t[o_t] - ln sum_v exp(z_t[v]),   z_t = logits / temperature

    The logits are the model's V outputs at each place. Those at one token are about the
    next one, so z_t is read one place before o_t:
        input    q_1  q_2  q_3  o_1  o_2
        output             z_1  z_2  z_3
    o_L need not be read at all. An output depends on earlier tokens only, so padding on
    the right changes nothing before it. PyTorch knows minus this as the cross-entropy.

    `prompt_ids` (G, P) and `completion_ids` (G, L) int64; gives (G, L) float32.
    By hand: for the first token, the logits [0, ln 3, 0] give the probabilities
    [0.2, 0.6, 0.2] -> ln 0.6 = -0.5108 for "yes", ln 0.2 = -1.6094 for "no".
    """
    ids = torch.cat([prompt_ids, completion_ids], 1)[:, :-1]
    length = completion_ids.shape[1]
    # `logits_to_keep`: only z_1 to z_L are computed, which saves memory.
    logits = model(ids, use_cache=False, logits_to_keep=length).logits  # (G, L, V)
    logits = logits.float() / temperature if temperature != 1 else logits.float()
    cross_entropy = nn.functional.cross_entropy(
        logits.flatten(0, 1), completion_ids.flatten(), reduction="none"
    )
    return -cross_entropy.view_as(completion_ids)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """How far the policy has moved from the reference, estimated token by token.

    k3 = pi_ref/pi - ln(pi_ref/pi) - 1

    DeepSeekMath, eq. (4); k3 is J. Schulman's name. It is never negative, as ln x is at
    most x - 1, and 0 where both agree. Its mean over tokens sampled from pi is the KL
    divergence KL(pi || pi_ref) = sum_v pi(v) ln(pi(v) / pi_ref(v)): that is the mean of
    the middle term, and the two others cancel on average, since
    sum_v pi(v) pi_ref(v)/pi(v) = sum_v pi_ref(v) = 1. They only make it less noisy.
    As a loss, k3 has a gradient whose mean is that of KL(pi_ref || pi), with the roles
    swapped. Both pull pi towards pi_ref; the paper does the same.

    Both (G, L); gives (G, L).
    By hand: "yes" has pi 0.6 and pi_ref 0.4 -> 2/3 - ln(2/3) - 1 = 0.0721; "no" has 0.2
    and 0.4 -> 2 - ln 2 - 1 = 0.3069. The mean over the three tokens is
    0.2 * 0 + 0.6 * 0.0721 + 0.2 * 0.3069 = 0.1046, which is the KL divergence.
    """
    log_ratio = ref_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_eps: float,
    kl_coef: float,
) -> Tensor:
    """The loss to minimise: minus GRPO's clipped objective.

    rho_it = pi(o_it) / pi_old(o_it)
    J_it   = min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta k3_it
    loss   = -mean_i( mean_t J_it ),   mean_t over the tokens with m_it = 1

    DeepSeekMath, eq. (3).

    The ratio. The responses were sampled from pi_old, which differs from pi from the
    second gradient step on; rho corrects for that. pi_old is a constant, so
    grad rho = rho grad ln pi. In the first gradient step rho is 1: the value of the
    loss is then -mean(A) = 0 (plus beta k3), and so says nothing; but its gradient is
    that of -mean_i( A_i mean_t ln pi ), the policy gradient of step 3.

    The min and the clip. A token is pushed no further once rho has moved by eps in the
    direction of the push, and it can always come back:
        A    rho              min takes   gradient
        > 0  above 1 + eps    clipped     0: it is already likely enough
        > 0  below 1 + eps    rho A       makes the token more likely
        < 0  below 1 - eps    clipped     0: it is already unlikely enough
        < 0  above 1 - eps    rho A       makes the token less likely

    The mean over the tokens of a response, before that over responses, does not follow
    from the policy gradient. It lets each token of a long response count less. So long
    wrong answers are punished less per token than short ones, and become longer. Dr.
    GRPO (arXiv 2503.20783) drops this division and the one by the std.

    The KL penalty stands in the loss. PPO for language models puts it into the rewards
    instead (DeepSeekMath, eq. 2).

    `log_probs`, `old_log_probs`, `ref_log_probs` (None without KL) and `mask` (G, L),
    `advantages` (G,); eps is `clip_eps`, beta is `kl_coef`. Gives a scalar.
    By hand, eps = 0.2 and beta = 0: for the first token, rho is 0.6 / 0.4 = 1.5 in
    response 1, and 0.2 / 0.4 = 0.5 in the others; for all others it is 1.
        i = 1       min(1.5 * 1.5, 1.2 * 1.5) = 1.8         mean (1.8 + 1.5) / 2  =  1.65
        i = 2       min(0.5 * -0.5, 0.8 * -0.5) = -0.4      mean (-0.4 - 0.5) / 2 = -0.45
        i = 3, 4    the same, but with three tokens         mean -1.4 / 3         = -0.4667
    -> loss = -(1.65 - 0.45 - 0.4667 - 0.4667) / 4 = -0.0667. All first tokens have been
    pushed far enough and get no gradient; before that step, the loss was 0.
    """
    # masked_fill, since multiplying by the mask would turn an infinity into nan.
    padding = mask == 0
    log_probs = log_probs.masked_fill(padding, 0.0)
    ratio = (log_probs - old_log_probs).exp()  # 1 in value, but with a gradient
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    advantages = advantages.unsqueeze(1)  # (G, 1): every token of a response alike
    objective = torch.min(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None:
        objective = objective - kl_coef * kl_estimate(log_probs, ref_log_probs)
    objective = objective.masked_fill(padding, 0.0)
    return -(objective.sum(1) / mask.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------


def train(
    policy: nn.Module,
    tokenizer: Tokenizer,
    reference: Callable | None,
    reward: Callable,
    optimizer: torch.optim.Optimizer,
    first_step: int = 0,
) -> Iterator[dict]:
    """The algorithm. Each turn of the outer loop is a step; main() prints what it yields.

    With several processes, each runs this with groups of its own; backward() takes the
    mean of their gradients (main() has wrapped the policy so), and they stay alike.
    `reference` gives the logits of the policy before training, or is None without KL.
    """
    for step in range(first_step, NUM_STEPS):
        groups = []
        for prompt in prompts_of_step(step):
            # 1. The policy samples a group of responses.
            group = generate_group(policy, tokenizer, prompt, NUM_SAMPLES)
            # 2. The reward model scores them.
            group["rewards"] = score_responses(reward, prompt, group["responses"])
            # 3. They are compared within the group.
            group["advantages"] = group_advantages(group["rewards"], SCALE_BY_STD)
            groups.append(group)
        batches = split_groups(groups)
        for _ in range(INNER_STEPS):
            for batch in batches:
                # 4. The loss. The policy is in eval mode, without dropout: dropout would
                # change a token's probability by factors between 0.4 and 2.4 (a
                # random gpt2), so rho would not be 1 even in the first gradient step.
                ids = batch["prompt_ids"], batch["completion_ids"]
                log_probs = completion_log_probs(policy, *ids, TEMPERATURE)
                # In the first gradient step, the policy is still the one that sampled.
                old_log_probs = batch.setdefault("old_log_probs", log_probs.detach())
                ref_log_probs = reference_log_probs(reference, batch)
                loss = grpo_loss(
                    log_probs,
                    old_log_probs,
                    ref_log_probs,
                    batch["advantages"],
                    batch["mask"],
                    CLIP_EPS,
                    KL_COEF,
                )
                batch["log_probs"], batch["loss"] = log_probs.detach(), loss.detach()
                (
                    batch["share"] * loss
                ).backward()  # adds to the gradients of the others
            # 5. A gradient step.
            grad_norm = clip_gradient(policy)
            optimizer.step()
            optimizer.zero_grad()
        yield {"groups": groups, "batches": batches, "gradient": grad_norm}


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TINY_MODELS = HERE / "grpo_tiny"
DEFAULT_MODELS = {"gpt2", "OpenAssistant/reward-model-deberta-v3-large"}
COLUMNS = {  # of the printed table: name, and format of the number
    "step": "4d",
    "reward": "+8.3f",
    "std": "7.3f",
    "best": "+8.3f",
    "loss": "+8.3f",
    "KL": "7.3f",
    "entropy": "8.2f",
    "clipped": "8.1%",
    "length": "7.1f",
    "cut off": "8.0%",
    "gradient": "9.2f",
}


def main() -> None:
    """Train the policy for NUM_STEPS steps, compare before and after, save it."""
    check_settings()
    accelerator = start_accelerator()
    policy, tokenizer, reward = load_models()
    reference = make_reference(policy)
    if GRADIENT_CHECKPOINTING:
        keep_no_activations(policy)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, weight_decay=0.0, fused=True)
    # With several processes, this makes backward() average their gradients.
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    run = resume(accelerator, optimizer) or {"rewards": [], "before": None}
    print_header(policy, reward)

    with keep_unfinished_run(
        lambda: save_run(policy, tokenizer, run["rewards"], "_interrupted")
    ) as stopped:
        if run["before"] is None:
            run["before"] = evaluate(policy, tokenizer, reward)
            set_seed(SEED, device_specific=True)  # plus the number of the process
        first = len(run["rewards"])
        steps = train(wrapped, tokenizer, reference, reward, optimizer, first)
        bar = tqdm(
            steps,
            unit="step",
            leave=False,
            initial=first,
            total=NUM_STEPS,
            disable=hidden(),
        )
        say("".join(f"{name:>{width(name)}}" for name in COLUMNS))
        for result in bar:
            step = len(run["rewards"])
            metrics = measure(accelerator, result)
            run["rewards"].append(metrics.pop("rewards"))
            print_step(step, metrics, result["groups"])
            accelerator.log(metrics, step=step)
            if SAVE_EVERY and (step + 1) % SAVE_EVERY == 0:
                save_checkpoint(accelerator, run)
            if stopped:
                accelerator.set_trigger()
            if accelerator.check_trigger():  # in any of the processes
                sys.exit(f"Stopped after {step + 1} of {NUM_STEPS} steps.")
        print_gain(run["before"], evaluate(policy, tokenizer, reward))
        say(f"\nWritten:\n{save_run(policy, tokenizer, run['rewards'], '')}")
        say("How to use the model: README.md, lesson 4")
    accelerator.end_training()


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C, `kill` and a closed terminal only leave a mark in the list that this yields;
    main() looks at it once per step. So no signal can interrupt the writing of a file.
    """
    stopped, signals = [], ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that may
        for number in [
            getattr(signal, name) for name in signals if hasattr(signal, name)
        ]:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                before[number] = signal.signal(number, lambda *_: stopped.append(True))
    try:
        yield stopped
    except BaseException as ending:
        kept = save()
        with contextlib.suppress(OSError):  # a closed terminal cannot be printed to
            if kept:
                print(f"\nThis run is kept in\n{kept}\nOlder weights are as they were.")
        if not (isinstance(ending, SystemExit) and "ipykernel" in sys.modules):
            raise
        print(ending)  # in a notebook, SystemExit would look like a crash
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    split = {os.getenv(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")}
    folders = [folder_of("")] + [folder_of("_interrupted")] + [folder_of("_checkpoint")]
    devices = {"cpu": True, "cuda": torch.cuda.is_available()}
    devices["mps"] = torch.backends.mps.is_available()
    rules = {
        "DEVICE must be cpu, or cuda or mps with such a GPU": devices.get(
            DEVICE, False
        ),
        "MIXED_PRECISION must be no or bf16": MIXED_PRECISION in ("no", "bf16"),
        "PROMPTS and EVAL_PROMPTS must be lists of texts that are not blank": all(
            isinstance(texts, list)
            and texts
            and all(isinstance(text, str) and text.strip() for text in texts)
            for texts in (PROMPTS, EVAL_PROMPTS)
        ),
        "SEED must be from 0 to 499,999": 0 <= SEED < 500_000,
        "NUM_SAMPLES and EVAL_SAMPLES must be at least 2": min(
            NUM_SAMPLES, EVAL_SAMPLES
        )
        >= 2,
        "NUM_STEPS, PROMPTS_PER_STEP, MAX_NEW_TOKENS, INNER_STEPS, MICRO_BATCH_SIZE and "
        "REPORT_EVERY must be at least 1": all(
            n >= 1
            for n in (
                NUM_STEPS,
                PROMPTS_PER_STEP,
                MAX_NEW_TOKENS,
                INNER_STEPS,
                MICRO_BATCH_SIZE,
                REPORT_EVERY,
            )
        ),
        "LR, TOP_P and CLIP_EPS must be above 0 and at most 1": all(
            0 < value <= 1 for value in (LR, TOP_P, CLIP_EPS)
        ),
        "TEMPERATURE and MAX_GRAD_NORM must be above 0": TEMPERATURE > 0
        and MAX_GRAD_NORM > 0,
        "KL_COEF, LORA_RANK and SAVE_EVERY must be 0 or more": KL_COEF >= 0
        and LORA_RANK >= 0
        and SAVE_EVERY >= 0,
        "LORA_RANK needs the package peft": not LORA_RANK or find_spec("peft"),
        "SAVE_DIR must be a folder that can be written, with no files in it but those of "
        f"an earlier run, and so must {SAVE_DIR}_interrupted": not folders[0]
        .resolve()
        .is_relative_to(TINY_MODELS)
        and all(map(is_ours, folders[: 3 if SAVE_EVERY else 2])),
        "USE_WANDB needs the package wandb (pip install wandb)": not USE_WANDB
        or find_spec("wandb"),
        "FSDP and DeepSpeed must be off, as the model is needed whole": "true"
        not in split,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def folder_of(suffix: str) -> Path:
    """SAVE_DIR, or a folder beside it."""
    return HERE / f"{Path(SAVE_DIR)}{suffix}"


def is_ours(folder: Path) -> bool:
    """Whether the folder can be written to and holds only what an earlier run wrote."""
    if os.getenv("RANK", "0") != "0":  # another of several processes looks
        return True
    try:
        made = not folder.exists()
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # the only sure way to know
        names = {path.name for path in folder.iterdir() if path.name[0] != "."}
        if made:
            folder.rmdir()
    except OSError:
        return False
    return names <= {*files_of(folder), *TEMPORARY}


def start_accelerator() -> Accelerator:
    """Join the other processes, if this is one of several, and choose the device."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # no odd character may end a training
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator(
        cpu=DEVICE == "cpu",
        mixed_precision=MIXED_PRECISION,
        log_with="wandb" if USE_WANDB else None,
    )
    accelerator.init_trackers("grpo_training")
    return accelerator


def one_line(problem: object) -> str:
    """The text of an error without its line breaks, and not too long."""
    return textwrap.shorten(str(problem), 300) or type(problem).__name__


def find_model(name: str) -> str | None:
    """The model's folder here or in the cache, or its id on the Hub; None: neither."""
    folder, errors = HERE / Path(name).expanduser(), huggingface_hub.errors
    if folder.is_dir():
        return str(folder)
    try:
        huggingface_hub.model_info(name, timeout=5)  # seconds
        return name
    except errors.HFValidationError:
        return name  # from_pretrained will say what is wrong
    except errors.HfHubHTTPError as problem:
        status = getattr(problem.response, "status_code", 404)
        if status != 429 and status < 500:
            return name
    except Exception:  # there are many ways not to get there
        pass
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else None


def load_model(kind: type, name: str) -> tuple[Model, Tokenizer]:
    """A model in float32, and its tokenizer; one line if either is not complete."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, loading = kind.from_pretrained(name, **options)
    except Exception as problem:  # there are many ways to be broken
        sys.exit(f"{name} cannot be loaded: {one_line(problem)}")
    # transformers would fill what is missing with random numbers.
    if loading["missing_keys"] or len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
        missing = ", ".join(sorted(loading["missing_keys"])) or "its tokenizer"
        sys.exit(
            one_line(f"{name} is no complete {kind.__name__}, it lacks {missing}.")
        )
    inside = f"{model.base_model_prefix}."
    heads = [
        k
        for k in loading["unexpected_keys"]
        if k.endswith(".weight") and not k.startswith(inside)
    ]
    if heads and kind is transformers.AutoModelForCausalLM:  # a classifier, for example
        sys.exit(
            one_line(f"{name} is another kind of model, it has {', '.join(heads)}.")
        )
    return model.eval().to(DEVICE), tokenizer


def load_policy(name: str) -> tuple[Model, Tokenizer]:
    """The policy, ready to sample: its generation settings are its end tokens only."""
    kind = transformers.AutoModelForCausalLM
    if transformers.utils.find_adapter_config_file(name):
        policy, tokenizer = merge_adapter(name)
    else:
        config = load_config(name)
        if config.is_encoder_decoder:
            sys.exit(f"{name} is an encoder-decoder, which cannot be a policy.")
        if hasattr(config, "quantization_config"):
            sys.exit(f"{name} is quantised and cannot be trained: take the original.")
        policy, tokenizer = load_model(kind, name)
    ends = end_tokens(policy, tokenizer)
    if not ends:
        sys.exit(f"{name} has no end-of-sequence token, so its responses never end.")
    policy.shipped_generation_config = (
        policy.generation_config
    )  # saved again at the end
    policy.generation_config = GenerationConfig(eos_token_id=ends)
    check_policy(policy, tokenizer, name)
    return policy, tokenizer


def load_config(name: str) -> transformers.PretrainedConfig:
    """The model's configuration, or one line."""
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as problem:
        sys.exit(f"{name} cannot be loaded: {one_line(problem)}")


def merge_adapter(name: str) -> tuple[Model, Tokenizer]:
    """A folder of the package peft: its base model with the adapter merged into it."""
    from peft import PeftConfig, PeftModel

    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
        policy, tokenizer = load_model(
            transformers.AutoModelForCausalLM, find_model(base)
        )
        if Path(name, "tokenizer_config.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
            policy.resize_token_embeddings(len(tokenizer))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            policy = PeftModel.from_pretrained(policy, name).merge_and_unload()
    except Exception as problem:
        sys.exit(f"The adapter {name} cannot be loaded: {one_line(problem)}")
    return policy.eval(), tokenizer


def end_tokens(policy: Model, tokenizer: Tokenizer) -> list[int]:
    """All tokens that end a response, by the model, tokenizer and chat template."""
    own = policy.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template:  # the token with which it closes an assistant's turn
        with contextlib.suppress(Exception):  # encode_prompt will say what is wrong
            closing = chat_text(tokenizer, "Question", "Answer").rpartition("Answer")[2]
            ids = tokenizer(closing.strip(), add_special_tokens=False).input_ids
            if len(ids) == 1 or ids[0] in tokenizer.added_tokens_decoder:
                ends.add(ids[0])
    size = policy.get_input_embeddings().num_embeddings
    return sorted(end for end in ends - {None} if end < size)


def chat_text(tokenizer: Tokenizer, prompt: str, response: str) -> str:
    """A conversation of two turns in the model's own format."""
    turns = {"user": prompt, "assistant": response}
    chat = [{"role": role, "content": text} for role, text in turns.items()]
    return tokenizer.apply_chat_template(chat, tokenize=False)


def cut(tokenizer: Tokenizer, text: str, longest: int) -> str:
    """The text, without its end if it has more than `longest` tokens."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return text if len(ids) <= longest else tokenizer.decode(ids[: max(0, longest)])


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt as token ids (1, P), with a chat model's special tokens around it."""
    if USE_CHAT_TEMPLATE and tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    text = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(prompt).input_ids
    starts = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
    # What the tokenizer puts before a text, unless the prompt has it already; what it
    # puts behind one would end the text before the response begins.
    before = ids[: starts[0]] if starts else []
    return torch.tensor([text if text[: len(before)] == before else before + text])


def context_length(config: transformers.PretrainedConfig) -> int:
    """The number of tokens that a model can read at once."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return longest if longest > 0 else 10**9


def check_policy(policy: Model, tokenizer: Tokenizer, name: str) -> None:
    """Stop unless the probabilities that are trained are those that it samples from."""
    try:
        prompts = [
            encode_prompt(tokenizer, prompt) for prompt in PROMPTS + EVAL_PROMPTS
        ]
    except Exception as problem:
        sys.exit(
            f"{name} cannot read the prompt in its chat template: {one_line(problem)}"
        )
    longest = context_length(policy.config)
    if max(ids.shape[1] for ids in prompts) + MAX_NEW_TOKENS > longest:
        sys.exit(
            f"A prompt and MAX_NEW_TOKENS are together longer than the {longest} tokens of {name}."
        )
    if (
        max(ids.max() for ids in prompts)
        >= policy.get_input_embeddings().num_embeddings
    ):
        sys.exit(
            f"{name} does not know all tokens of its tokenizer, which the prompts contain."
        )
    ids = prompts[0].to(policy.device)
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=8,
        min_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    try:
        sampled = policy.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=sampling
        )
        completion = sampled.sequences[:, ids.shape[1] :]
        logits = torch.stack(sampled.logits, 1).float()
        expected = logits.log_softmax(2).gather(2, completion.unsqueeze(2)).squeeze(2)
        with torch.no_grad():
            error = (
                (completion_log_probs(policy, ids, completion, 1.0) - expected)
                .abs()
                .max()
            )
    except Exception as problem:
        sys.exit(f"{name} cannot be a policy: {one_line(problem)}")
    if not error < 1e-3:
        sys.exit(
            f"{name} cannot be a policy: a token's probability changes with the tokens after it."
        )


def load_reward_model(name: str) -> RewardModel:
    """The reward model; one line if it is not one."""
    model, tokenizer = load_model(transformers.AutoModelForSequenceClassification, name)
    if model.num_labels != 1:
        sys.exit(f"{name} has {model.num_labels} outputs, not 1 score.")
    # A decoder reads its score at the last token that is no padding, and most models
    # number positions from the left: the padding must stand on the right.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    config = model.config.get_text_config()
    if config.pad_token_id is not None and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    longest = min(context_length(model.config), tokenizer.model_max_length)
    return RewardModel(model, tokenizer, longest)


def load_models() -> tuple[Model, Tokenizer, Callable]:
    """Policy, its tokenizer, and the reward: those of the Settings or of grpo_tiny/."""
    names = [POLICY_MODEL_NAME, REWARD_MODEL_NAME][: 1 if REWARD_FUNCTION else 2]
    found = [find_model(name) for name in names]
    if None in found:
        missing = names[found.index(None)]
        line = f"{missing} is not here, and the Hugging Face Hub cannot be reached"
        if not DEFAULT_MODELS.issuperset(names):
            sys.exit(f"{line}: connect to the internet, or name a folder with a model.")
        say(f"{line}:\nfalling back to the models in grpo_tiny/.")
        found = [str(TINY_MODELS / "policy"), str(TINY_MODELS / "reward")]
    policy, tokenizer = load_policy(found[0])
    policy = add_lora(policy) if LORA_RANK else policy
    return policy, tokenizer, REWARD_FUNCTION or load_reward_model(found[1])


def add_lora(policy: Model) -> nn.Module:
    """The policy with frozen weights and thin trainable matrices beside them."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fan_in_fan_out")  # peft sets it by itself
        return get_peft_model(policy, lora)


def make_reference(policy: nn.Module) -> Callable | None:
    """What gives the logits of the policy before training; None without KL."""
    if KL_COEF == 0:
        return None
    if not LORA_RANK:
        return copy.deepcopy(policy)

    def reference(*inputs: object, **options: object) -> object:
        with policy.disable_adapter():  # no second copy in memory
            return policy(*inputs, **options)

    return reference


def keep_no_activations(policy: nn.Module) -> None:
    """Let the backward pass compute each layer's activations again.

    transformers' own switch for this works in training mode only, where dropout acts.
    """
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        sys.exit("Settings: GRADIENT_CHECKPOINTING must be False for this policy.")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def prompts_of_step(step: int) -> list[str]:
    """The prompts of this process's groups: PROMPTS in turn, over all processes."""
    state = PartialState()
    first = (step * state.num_processes + state.process_index) * PROMPTS_PER_STEP
    return [PROMPTS[i % len(PROMPTS)] for i in range(first, first + PROMPTS_PER_STEP)]


def split_groups(groups: list[dict]) -> list[dict]:
    """Batches of at most MICRO_BATCH_SIZE responses, all of one group.

    `share` is what a batch counts in the mean over all responses of all groups.
    """
    names = "prompt_ids", "completion_ids", "mask", "advantages"
    batches = []
    for group in groups:
        parts = zip(
            *(group[name].split(MICRO_BATCH_SIZE) for name in names), strict=True
        )
        batches += [dict(zip(names, part, strict=True)) for part in parts]
    for batch in batches:
        batch["share"] = len(batch["mask"]) / (len(groups) * NUM_SAMPLES)
    return batches


@torch.no_grad()
def reference_log_probs(reference: Callable | None, batch: dict) -> Tensor | None:
    """Log-probabilities (n, L) by the reference policy, computed once per batch."""
    if reference is not None and "ref_log_probs" not in batch:
        ids = batch["prompt_ids"], batch["completion_ids"]
        batch["ref_log_probs"] = completion_log_probs(reference, *ids, TEMPERATURE)
    return batch.get("ref_log_probs")


def clip_gradient(policy: nn.Module) -> Tensor:
    """Scale the gradient down to MAX_GRAD_NORM; gives its norm before that."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    if not norm.isfinite():
        sys.exit("The loss is not a finite number; the policy was left as it was.")
    return norm


@torch.no_grad()
def diagnose(batch: dict) -> dict[str, Tensor]:
    """What to watch, for each response of a batch: (n,) each.

    KL          k3, the distance from the reference: 0 to 0.1 is near, 1 is far
    entropy     -ln pi, how undecided the policy is, in nats per token (the unit of ln).
                Near 0, one response is left. With TOP_P < 1 it is a little too low, as
                unlikely tokens are never sampled
    clipped     the share of tokens that the clip pushes no further
    length      in tokens, the end-of-sequence token included
    cut off     whether it is MAX_NEW_TOKENS long
    """
    mask, log_probs = batch["mask"], batch["log_probs"]
    kl = kl_estimate(log_probs, batch.get("ref_log_probs", log_probs))
    moved = (log_probs - batch["old_log_probs"]).exp() - 1
    # rho above 1 + eps where A > 0, below 1 - eps where A < 0
    clipped = moved * batch["advantages"].sign().unsqueeze(1) > CLIP_EPS
    length = mask.sum(1).float()
    per_token = {"KL": kl, "entropy": -log_probs, "clipped": clipped.float()}
    means = {
        name: value.masked_fill(mask == 0, 0.0).sum(1) / length
        for name, value in per_token.items()
    }
    cut_off = (length == MAX_NEW_TOKENS).float()
    return means | {"length": length, "cut off": cut_off}


def measure(accelerator: Accelerator, result: dict) -> dict:
    """The metrics of a step: means over the responses of all the processes."""
    rewards = torch.stack([group["rewards"] for group in result["groups"]])
    rewards = accelerator.gather(rewards)  # (groups of all processes, G)
    found = [diagnose(batch) for batch in result["batches"]]
    metrics = {
        name: torch.cat([metric[name] for metric in found]).mean() for name in found[0]
    }
    losses = [batch["share"] * batch["loss"] for batch in result["batches"]]
    metrics |= {"loss": torch.stack(losses).sum(), "gradient": result["gradient"]}
    metrics = accelerator.reduce(metrics, "mean")
    metrics |= {"reward": rewards.mean(), "std": rewards.std(1).mean()}
    metrics |= {"best": rewards.max()}
    metrics = {name: value.item() + 0.0 for name, value in metrics.items()}
    return metrics | {"rewards": rewards.flatten().tolist()}


def evaluate(policy: nn.Module, tokenizer: Tokenizer, reward: Callable) -> tuple:
    """Rewards of fresh responses to EVAL_PROMPTS, and the first two of them as texts."""
    state = PartialState()
    set_seed(HELD_OUT_SEED, device_specific=True)  # plus the number of the process
    share = -(-EVAL_SAMPLES // state.num_processes)
    rewards, texts = [], []
    for prompt in EVAL_PROMPTS:
        responses = generate_group(policy, tokenizer, prompt, share)["responses"]
        rewards += score_responses(reward, prompt, responses).tolist()
        texts += responses[:2]
    return gather_object(rewards), texts[:2]


# ------------------------------------------------------------------------------------


def hidden() -> bool:
    """Whether a progress bar would only fill a file with its steps."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = terminal or "ipykernel" in sys.modules
    return not (shown and PartialState().is_main_process)


def say(text: str) -> None:
    """Print, above the progress bar, and in one of several processes only."""
    if PartialState().is_main_process and sys.stdout is not None:
        tqdm.write(text)


def width(name: str) -> int:
    """Of a column of the table."""
    return len(format(0, COLUMNS[name].replace("d", ".0f")))


def print_header(policy: nn.Module, reward: Callable) -> None:
    """What runs, before it runs."""
    processes = PartialState().num_processes
    judge = (
        reward.model.name_or_path
        if isinstance(reward, RewardModel)
        else "REWARD_FUNCTION"
    )
    say(
        f"GRPO on {processes} x {DEVICE}: {NUM_STEPS} steps of {PROMPTS_PER_STEP} x "
        f"{NUM_SAMPLES} responses, LR {LR:g}.\nPolicy: {policy.name_or_path}\n"
        f"Reward: {judge}\nWatch the reward, not the loss."
    )


def print_texts(rewards: list[float], texts: list[str], names: list[str]) -> None:
    """Responses with their rewards, wrapped and indented."""
    for reward, text, name in zip(rewards, texts, names, strict=True):
        line = f"{name} [{reward:+.2f}] {' '.join(text.split())}"
        say(
            textwrap.fill(
                line, 88, initial_indent="    ", subsequent_indent=" " * 8, max_lines=5
            )
        )


def print_step(step: int, metrics: dict, groups: list[dict]) -> None:
    """A row of the table, and now and then the best and the worst response."""
    row = {"step": step} | metrics
    say("".join(format(row[name], form) for name, form in COLUMNS.items()))
    if step % REPORT_EVERY == 0:
        rewards = torch.cat([group["rewards"] for group in groups])
        texts = [text for group in groups for text in group["responses"]]
        chosen = [int(rewards.argmax()), int(rewards.argmin())]
        print_texts(
            rewards[chosen].tolist(), [texts[i] for i in chosen], ["best ", "worst"]
        )


def print_gain(before: tuple, after: tuple) -> None:
    """The rewards of fresh responses and two texts, before and after the training."""
    for name, (rewards, texts) in {"before": before, "after": after}.items():
        found = torch.tensor(rewards)
        say(
            f"\n{len(rewards)} fresh responses {name} training: "
            f"mean reward {found.mean():+.3f} (std {found.std():.3f})"
        )
        print_texts(rewards[:2], texts, ["", ""])


def save_checkpoint(accelerator: Accelerator, run: dict) -> None:
    """Write all that resume() needs; at any moment one whole checkpoint exists."""
    folder = folder_of("_checkpoint")
    new, whole, old = (folder / name for name in ("unfinished.tmp", "newest", "older"))
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(run, new / "run.pt")
        shutil.rmtree(old, ignore_errors=True)
        if whole.exists():
            os.replace(whole, old)
        os.replace(new, whole)


def resume(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> dict | None:
    """The run that a checkpoint holds, with its weights and random numbers, or None."""
    folder = folder_of("_checkpoint")
    found = [path for path in (folder / "newest", folder / "older") if path.exists()]
    if not (RESUME and found):
        return None
    try:
        accelerator.load_state(str(found[0]))
        run = torch.load(found[0] / "run.pt", weights_only=True)
    except Exception as problem:
        sys.exit(f"{found[0]} does not fit these Settings: {one_line(problem)}")
    for group in optimizer.param_groups:  # it may have been changed since
        group["lr"] = LR
    say(f"Going on from step {len(run['rewards'])}, as RESUME is True.")
    return run


TEMPORARY = "unfinished.tmp", "replaced.tmp", "newest", "older"


def files_of(folder: Path) -> list[str]:
    """The names of the files that an earlier run wrote into the folder."""
    try:
        return json.loads((folder / "training_log.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def save_run(
    policy: nn.Module, tokenizer: Tokenizer, rewards: list, suffix: str
) -> str:
    """Write model, tokenizer, rewards and learning curve into SAVE_DIR + `suffix`.

    Gives the folder, or nothing if there is nothing to write. All is written into a
    folder inside that one, and moved out of it only when it is complete.
    """
    if not (rewards and PartialState().is_main_process):
        return ""
    folder = folder_of(suffix)
    aside, replaced = folder / "unfinished.tmp", folder / "replaced.tmp"
    for path in (aside, replaced):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    model = policy.merge_and_unload() if LORA_RANK else policy
    model.generation_config = model.shipped_generation_config
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        draw_learning_curve(rewards, aside / "learning_curve.png")
    except Exception as problem:
        say(f"The learning curve could not be drawn: {one_line(problem)}")
    files = sorted([*os.listdir(aside), "training_log.json"])
    log = json.dumps({"files": files, "rewards": rewards})
    (aside / "training_log.json").write_text(log)
    # Without its config.json, a folder does not load: so never half of a model.
    old = sorted(files_of(folder), key="config.json".__ne__)
    moves = [
        (folder / name, replaced / name) for name in old if (folder / name).exists()
    ]
    files.sort(key="config.json".__eq__)
    moves += [(aside / name, folder / name) for name in files]
    for count, (source, target) in enumerate(moves):
        try:
            os.replace(source, target)
        except OSError as problem:
            with contextlib.suppress(OSError):
                for source, target in reversed(moves[:count]):
                    os.replace(target, source)
            sys.exit(
                f"{folder} could not be written to; the model is in {aside}: {problem}"
            )
    shutil.rmtree(replaced)
    aside.rmdir()
    return str(folder)


def draw_learning_curve(rewards: list[list[float]], path: Path) -> None:
    """Write a picture of the rewards of each step: mean, spread and best."""
    table = torch.tensor(rewards)  # (steps, responses of a step)
    mean, std = table.mean(1), table.std(1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table.amax(1), ".", color="0.7", label="best of the step")
    axes.plot(mean, label="mean of the step")
    axes.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    axes.set(title="GRPO (band: +- 1 std)", xlabel="step", ylabel="reward")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
