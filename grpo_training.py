"""Lesson 4: GRPO (group relative policy optimization), fine-tuning a language model.

What you will learn
    The last step of RLHF (reinforcement learning from human feedback): how a language
    model that was trained to predict text learns to write what a second model, the
    reward model, scores highly. DeepSeek-R1 was trained with the same algorithm; for
    its reasoning tasks, a program that checks the answer took the place of the reward
    model.

The algorithm in 5 steps
    A pretrained language model is the policy: after any text it gives each token (a
    word or a piece of one) a probability of coming next.
    1. Let the policy write a group of responses to one prompt, by sampling each token
       from these probabilities.
    2. Let the reward model score each response: one number for a whole text.
    3. Compare within the group: the advantage of a response says how many standard
       deviations its reward is above the mean of the group. (PPO, lesson 3, trains a
       second network for this comparison, the critic. GRPO needs none.)
    4. Compute a loss. A step that lowers it makes the tokens of better responses more
       likely, and those of worse responses less likely.
    5. Take a gradient step, and go back to 1.

    Two settings add to this, and by default neither acts. With INNER_STEPS above 1,
    steps 4 and 5 are repeated with the same responses. The policy is then no longer the
    one that wrote them. The ratio rho of a token's probability now to that when it was
    sampled (1 at first) corrects for this. And a clip limits the push: a token that is
    being made more likely is pushed no further once its rho is above 1 + CLIP_EPS, and
    one that is being made less likely, once its rho is below 1 - CLIP_EPS. With KL_COEF
    above 0, a penalty holds the policy near the model that it was at the start.

Symbols (G responses, L tokens in the longest response, P in the prompt)
    q           prompt_ids      (G, P)  the prompt, repeated for each response
    o_i, o_it   completion_ids  (G, L)  response i, and its token t
    m_it        mask            (G, L)  1 up to the end of the response, 0 after it
    r_i, A_i    rewards, advantages (G,)  one for all the tokens of response i
    pi                                  the policy's probability of a token, given all
                                        the tokens before it
    ln pi       log_probs       (G, L)  of each token, by the policy as it is now
    ln pi_old   old_log_probs   (G, L)  ... by the policy that sampled the responses
    ln pi_ref   ref_log_probs   (G, L)  ... by the reference policy, a frozen copy of
                                        the policy before training
    rho_it      ratio           (G, L)  pi / pi_old: how much more likely a token became
    eps         CLIP_EPS                the bound of the clip
    beta        KL_COEF                 the weight of the penalty, the Kullback-Leibler
                                        (KL) divergence of pi from pi_ref

One group goes through all the equations below
    The vocabulary has three tokens: 0 is the end-of-sequence token, 1 is "yes" and 2 is
    "no". A response is cut off after three tokens (as response 4 is here); what
    follows its end is padding, which has the number 0 as well. The prompt is "Is
    exercise healthy?".
      i  response       completion_ids  mask       reward  advantage
      1  yes <end>         [1, 0, 0]    [1, 1, 0]     2        1.5
      2  no <end>          [2, 0, 0]    [1, 1, 0]     0       -0.5
      3  no no <end>       [2, 2, 0]    [1, 1, 1]     0       -0.5
      4  no no no          [2, 2, 2]    [1, 1, 1]     0       -0.5
    An advantage is the reward minus the mean of the group, 0.5, divided by its standard
    deviation, 1 (`group_advantages` computes both). The policy that sampled them gave
    the first token the probabilities [0.2, 0.4, 0.4]. A gradient step has changed these
    to [0.2, 0.6, 0.2] and, to keep it simple, no others. The reference policy is the
    one that sampled.

Run it, and what you should see (the manual is in README.md)
    python grpo_training.py
    This downloads 2.3 GB of models from the Hugging Face Hub. After that, a step takes
    about 20 seconds on one core of a CPU, so that 50 steps take 17 minutes.
    The two small models in grpo_tiny/ need no download, and take half a minute:
    uncomment the line below REWARD_MODEL_NAME to train them. (They are also used when
    the Hub cannot be reached, if both names are the default ones.) With them, the seed
    0 prints, among other lines:
    step  reward   std    best   loss     KL entropy clipped length cut off gradient
       0   -1.34  1.77   +2.98 +0.000  0.000    1.00    0.0%   61.4     88%     2.86
      49   -0.09  2.09   +2.95 +0.000  0.000    1.04    0.0%   52.6     50%     2.94
    32 fresh responses before training: mean reward -1.312 (std 1.316)
    32 fresh responses after training: mean reward +0.287 (std 1.934)
    A row shows the mean, the std and the best of the step's rewards; the loss; how far
    the policy is from the reference (KL; 0 if KL_COEF is 0, as it is not measured); how
    undecided it is (entropy, in nats per token); for which share of the tokens the
    clip has stopped the push; how long the responses are, in tokens; how many of them
    were cut off at MAX_NEW_TOKENS; and the norm of the gradient.

Try this (with the small models, seeds 0 to 2; the median gain in reward is 1.6)
    Edit              Gain
    LR = 2e-5         4.0     At the end, nearly all responses end in time.
    NUM_SAMPLES = 2   0.5     With two responses, the advantages are always about +0.71
                              and -0.71, however close the two rewards are.
    INNER_STEPS = 4   4.5     But the responses become alike, and then odd: the policy
                              finds flaws of the reward model.
    KL_COEF = 0.4     1.5     The policy stays nearer to the reference.

When it goes wrong
    Watch the reward, which should rise. The loss says nothing: see grpo_loss. Read the
    responses, too: if the reward rises while they get worse, the policy has found a
    flaw of the reward model. tests/bugs/README.md leads from a symptom to its cause.

Another task
    Edit PROMPTS, and replace the line REWARD_FUNCTION = None by a function that scores
    the responses to them. README.md has examples, one of them with right and wrong
    answers.

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
import functools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
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
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

# ------------------------------------------------------------------------------------
# Settings (on a first reading, go on with step 1 and come back)
# ------------------------------------------------------------------------------------

# Where it runs: a CUDA GPU or the GPU of a Mac (mps) if there is one, else the CPU.
mps = torch.backends.mps.is_available()
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
# The two models. Each is an id on the Hugging Face Hub or a folder beside this script.
POLICY_MODEL_NAME = "gpt2"
REWARD_MODEL_NAME = "OpenAssistant/reward-model-deberta-v3-large"
# Uncomment the next line to train the small models that come with this lesson. It then
# overrides the two names above.
# POLICY_MODEL_NAME, REWARD_MODEL_NAME = "grpo_tiny/policy", "grpo_tiny/reward"

# A function of your own, instead of the reward model: replace this line by
# `def REWARD_FUNCTION(prompt, responses):` that returns a number for each response.
REWARD_FUNCTION = None
# Prompts to train on, taken in turn. README.md shows how to read them from a file.
PROMPTS = ["Explain why regular exercise is important."]
# Prompts on which the gain is measured, before and after the training. None takes the
# first four of PROMPTS.
EVAL_PROMPTS = None
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
# eps: a token whose rho is above 1 + eps (if its advantage is positive) or below 1 -
# eps (if it is negative) is pushed no further. If eps is too small, later inner steps
# do nothing; if it is too large, nothing holds them back.
CLIP_EPS = 0.2
# Gradient steps per training step. With 1, rho is always 1 and the clip never acts.
# With more, the policy learns faster, but it also finds the flaws of the reward model
# sooner.
INNER_STEPS = 1
# beta, the weight of the pull towards the reference policy. Above 0, the policy learns
# more slowly and a second copy of it takes memory.
KL_COEF = 0.0
# Whether the advantages are divided by the standard deviation of the group's rewards.
# If not, a group whose rewards are nearly equal has a smaller gradient.
SCALE_BY_STD = True
# A gradient whose norm is larger is scaled down to this norm, which with 1.0 happens in
# nearly all steps of the small models. If it is large, one odd group may throw the
# policy off; if it is small, nearly all groups count the same, however clear their
# comparison is.
MAX_GRAD_NORM = 1.0

# LoRA (needs a higher LR, such as 3e-4): train two thin matrices of this rank beside
# each weight matrix, and leave the weights frozen. 0 trains all weights.
LORA_RANK = 0
# Recompute the activations in the backward pass instead of keeping them, which needs
# less memory and a quarter to a third more time.
GRADIENT_CHECKPOINTING = False

# A row is printed for every step, and the best and worst response to a prompt this
# often.
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
def generate_group(
    policy: nn.Module, tokenizer: Tokenizer, prompt: str, samples: int
) -> dict:
    """Sample responses to a prompt, token by token from pi (cut to TOP_P).

    Sampling ends when all responses have ended, or have MAX_NEW_TOKENS tokens.

    Gives a dict with the `responses` as texts, and `prompt_ids` (G, P),
    `completion_ids` (G, L) and `mask` (G, L), int64, where G is `samples`.
    """
    model = extract_model_from_parallel(policy)  # without main()'s wrapper
    prompt_ids = encode_prompt(tokenizer, prompt).to(model.device)  # (1, P)
    # A checkpoint may bring settings of its own for generate(), such as a top_k. They
    # would change the probabilities, so load_policy has dropped all of them but the
    # end-of-sequence tokens.
    ends = model.generation_config.eos_token_id
    sampling = GenerationConfig(
        do_sample=True,
        temperature=float(TEMPERATURE),
        top_p=float(TOP_P),
        top_k=0,  # without this, only the 50 most likely tokens would be sampled
        max_new_tokens=MAX_NEW_TOKENS,
        num_return_sequences=samples,
        eos_token_id=ends,
        pad_token_id=ends[0],  # any token would do, since the mask leaves padding out
    )
    ids = model.generate(prompt_ids, generation_config=sampling)  # (G, P + L)
    completion_ids = ids[:, prompt_ids.shape[1] :]
    mask = completion_mask(completion_ids, torch.tensor(ends, device=ids.device))
    return {
        "responses": decode(tokenizer, completion_ids, mask, ends),
        "prompt_ids": prompt_ids.expand(samples, -1),
        "completion_ids": completion_ids,
        "mask": mask,
    }


# ------------------------------------------------------------------------------------
# Step 2: the reward of each response
# ------------------------------------------------------------------------------------


def score_responses(reward: Callable, prompt: str, responses: list[str]) -> Tensor:
    """Rewards (G,) float32: one number for each response as a whole.

    `reward` is a RewardModel or your REWARD_FUNCTION. A reward model is a language
    model whose last layer gives one number instead of logits. Before this lesson it was
    trained on pairs of responses to a prompt, of which people preferred one, with the
    loss -ln sigmoid(score of the preferred one - score of the other), which is small if
    the preferred one scores much higher. (grpo_tiny/reward
    was trained on pairs that were made by rules.) Here it does not change any more.
    By hand: a function that gives 2 for "yes" and else 0 -> [2, 0, 0, 0].
    """
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
# pi(o) is here the probability with which the policy writes the whole text o after the
# prompt: the product of the probabilities of its tokens. The mean reward is
#     sum_o pi(o) r(o),  over all possible texts o.
# Below, grad is the gradient with respect to the policy's weights.
# The rewards do not depend on the weights, and grad pi = pi grad ln pi (the derivative
# of ln x is 1 / x). So the gradient of the mean reward is
#     sum_o r(o) grad pi(o) = sum_o pi(o) r(o) grad ln pi(o),
# the mean of r(o) grad ln pi(o) over texts that are sampled from pi: the *policy
# gradient*. A group of samples estimates it. As pi(o) is a product, ln pi(o) is the sum
# of the log-probabilities of the tokens. So all tokens of a text get the same factor
# r(o), whether each of them was a good choice or not; only many samples tell them
# apart. (This is REINFORCE, as in lesson 1.) The simplest loss is thus
# -mean_i( r_i ln pi(o_i) ). What follows changes r_i into an advantage, and step 4 adds
# a ratio with a clip, a mean over tokens and a KL penalty.
#
# Why the mean of the group may be subtracted.
#
# Subtracting from the reward a number b that does not depend on the text o changes the
# mean of r(o) grad ln pi(o) by
#     -b sum_o pi(o) grad ln pi(o) = -b grad sum_o pi(o) = -b grad 1 = 0.
# So b, the baseline, changes the gradient of one group, but not the mean of many. If b
# is near the mean reward, it makes the gradient less noisy. Without a baseline, rewards
# that are all around 100 would make all responses of the group more likely, good and
# bad ones, at the cost of all texts that just were not sampled. Over many groups this
# cancels; in a single one it is noise.


def group_advantages(rewards: Tensor, scale_by_std: bool = True) -> Tensor:
    """Advantages: how much better each response is than the average of its group.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    DeepSeekMath, section 4.1.2; the 1e-4, against a division by 0, is ours.
    The division makes the step independent of the scale of the rewards; nothing in the
    derivation above asks for it. Its price: a group whose rewards are nearly equal
    counts as much as any other. `scale_by_std=False` leaves it out.

    The mean of the group is not quite such a number b, since it contains r_i itself:
    r_i - mean(r) = (1 - 1/G) r_i - (the sum of the other rewards) / G. The second part
    does not depend on response i, so it is a baseline; the first makes the mean
    gradient 1 - 1/G times as long, and leaves its direction. Once we divide by the std,
    which contains r_i, too, this holds only approximately. (RLOO, arXiv 2402.14740,
    subtracts the mean of the other responses, which is exactly a baseline.)

    If all rewards are equal, rounding can leave advantages that are not quite 0. AdamW
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

    o_<t are the tokens of the response before o_t, and the sum is over the V tokens of
    the vocabulary. The logits are the model's V outputs at each place. Those at one
    token are about the next one, so z_t is read one place before o_t:
        input    q_1  q_2  q_3  o_1  o_2
        output             z_1  z_2  z_3
    o_L need not be read at all. An output depends on the token at its place and on
    those before it, so padding on the right changes nothing. Minus this log-probability
    is what PyTorch calls the cross-entropy.

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

    This is not used while KL_COEF is 0; on a first reading, go on with grpo_loss.

    Why one wants to know: a reward model can be trusted only on texts like those that
    it was trained on. Far from the pretrained model, the policy finds texts that score
    highly and are bad. As a penalty in the loss, k3 makes moving away cost something.

    The usual measure is the KL divergence, the mean of ln(pi/pi_ref) over tokens that
    are sampled from pi:
        KL(pi || pi_ref) = sum_v pi(v) ln(pi(v) / pi_ref(v)).
    One sampled token estimates it by ln(pi/pi_ref) = -ln(pi_ref/pi), which is noisy and
    may be negative. k3 adds pi_ref/pi - 1 to this. The mean of what is added is
    sum_v pi(v) pi_ref(v)/pi(v) - 1 = sum_v pi_ref(v) - 1 = 0, so the mean of k3 is
    still the KL divergence. And k3 is never negative, as ln x is at most x - 1; it is 0
    where both agree. (DeepSeekMath, eq. (4); k3 is J. Schulman's name.)

    The gradient of k3 is (1 - pi_ref/pi) grad ln pi, so a step downhill makes a token
    more likely where pi is below pi_ref, and less likely where it is above.

    The mean of k3 is KL(pi || pi_ref), but backward() sees only k3, and not that pi has
    also chosen the tokens over which the mean is taken. So the mean of the gradient of
    k3 is not the gradient of KL(pi || pi_ref). It is -sum_v pi_ref(v) grad ln pi(v),
    the gradient of KL(pi_ref || pi), with the roles swapped. The two divergences are 0
    only where pi is pi_ref.

    Both (G, L); gives (G, L).
    By hand: "yes" has pi 0.6 and pi_ref 0.4 -> 2/3 - ln(2/3) - 1 = 0.0721; "no" has 0.2
    and 0.4 -> 2 - ln 2 - 1 = 0.3069; the end-of-sequence token has 0.2 and 0.2 -> 0.
    Their mean, weighted with pi, is 0.2 * 0 + 0.6 * 0.0721 + 0.2 * 0.3069 = 0.1046,
    which is the KL divergence.
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

    The ratio. Where the simplest loss of step 3 has ln pi, this one has rho. As pi_old
    is a constant, grad rho = rho grad ln pi. In the first inner step, pi is pi_old and
    every rho is 1, so the gradient of this loss is that of
    -mean_i( A_i mean_t ln pi ): the simplest loss of step 3, with A_i in the place of
    r_i, and a mean over the tokens in the place of their sum (see below). Its value is
    then -mean(A) = 0 (plus beta k3), whatever the policy does, and says nothing.

    From the second inner step on, pi differs from the pi_old that sampled the
    responses, and rho corrects for this. The exact correction is to weight each text
    with pi(o)/pi_old(o), the product of the rho of its tokens: the mean over texts from
    pi_old is then sum_o pi_old(o) pi(o)/pi_old(o) A(o) = sum_o pi(o) A(o), the mean
    over texts from pi. But a product of many ratios is very noisy. GRPO, like PPO,
    weights each token with its own rho only, and leaves out those of the other tokens.
    That is much less noisy, but slightly wrong. The error vanishes as pi approaches
    pi_old, which is one more reason to stay near it.

    The min and the clip. A group says little about a policy that is far from the one
    that wrote it, so several steps on it must not carry the policy far. clip(x, a, b)
    is x, but a if x is below a, and b if x is above b. With it, a token is pushed no
    further once rho has moved by eps in the direction of the push. The clip alone would
    also stop a token whose rho has moved the wrong way: with A = 1 and rho = 0.5, it is
    the constant 0.8, without a gradient. The min takes rho A = 0.5 there, so that such
    a token can come back:
        A    rho              min takes   gradient
        > 0  above 1 + eps    clipped     0: it is already likely enough
        > 0  below 1 + eps    rho A       makes the token more likely
        < 0  below 1 - eps    clipped     0: it is already unlikely enough
        < 0  above 1 - eps    rho A       makes the token less likely

    The mean over the tokens of a response divides by its length, which does not follow
    from the policy gradient. It lets each token of a long response count less.
    Therefore long wrong answers are punished less per token than short ones, and become
    longer. Dr. GRPO (arXiv 2503.20783) drops the division by the length, and that by
    the std.

    The KL penalty stands in the loss. PPO for language models puts it into the rewards
    instead (DeepSeekMath, eq. 2).

    `log_probs`, `old_log_probs`, `ref_log_probs` (None without KL) and `mask` (G, L),
    `advantages` (G,); eps is `clip_eps`, beta is `kl_coef`. Gives a scalar.
    By hand, eps = 0.2 and beta = 0: for the first token, rho is 0.6 / 0.4 = 1.5 in
    response 1, and 0.2 / 0.4 = 0.5 in responses 2 to 4; for all later tokens it is 1.
        i     first token                            mean over its tokens
        1     min(1.5 * 1.5, 1.2 * 1.5) = 1.8        (1.8 + 1.5) / 2 = 1.65
        2     min(0.5 * -0.5, 0.8 * -0.5) = -0.4     (-0.4 - 0.5) / 2 = -0.45
        3, 4  -0.4, as in 2                          (-0.4 - 2 * 0.5) / 3 = -0.4667
    -> loss = -(1.65 - 0.45 - 2 * 0.4667) / 4 = -0.0667. Before the gradient step, it
    was 0. Each first token has been pushed far enough and has no gradient now.
    """
    # At padding, the exp below may be infinite, and infinity times 0 is nan. So there
    # is no product with the mask, but a masked_fill, and there are two: the one below,
    # so that padding adds no value; and this one, since backward() would multiply the 0
    # that comes back from there with the infinite exp.
    log_probs = log_probs.masked_fill(mask == 0, 0.0)
    ratio = (log_probs - old_log_probs).exp()  # has a gradient even where it is 1
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    advantages = advantages.unsqueeze(1)  # (G, 1): every token of a response alike
    objective = torch.min(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None:
        objective = objective - kl_coef * kl_estimate(log_probs, ref_log_probs)
    objective = objective.masked_fill(mask == 0, 0.0)
    return -(objective.sum(1) / mask.sum(1)).mean()


# ------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------


def train(policy, tokenizer, reference, reward, optimizer, first_step=0) -> Iterator:
    """The algorithm. Each turn of the loop is one step; main() prints what it yields.

    `policy` is the model that learns, `reference` gives the logits that it had before
    training (None without KL), and `reward` is the reward model or a REWARD_FUNCTION.
    Several processes run this at the same time, each with groups of its own. main() has
    wrapped their policies such that backward() gives all of them the mean of their
    gradients, so the policies stay equal.
    """
    for step in range(first_step, NUM_STEPS):
        groups = []
        for prompt in prompts_of_step(step):
            # 1. The policy samples a group of responses.
            group = generate_group(policy, tokenizer, prompt, NUM_SAMPLES)
            # 2. The reward model scores each of them.
            group["rewards"] = score_responses(reward, prompt, group["responses"])
            # 3. They are compared within their group.
            group["advantages"] = group_advantages(group["rewards"], SCALE_BY_STD)
            groups.append(group)
        # Batches of at most MICRO_BATCH_SIZE responses, each with its `share` in all.
        batches = split_groups(groups)
        for _ in range(INNER_STEPS):
            for batch in batches:
                # 4. The loss, from completion_log_probs of the responses in this batch.
                # The policy is in eval mode, since dropout would make it another policy
                # than the one that sampled: in a gpt2 of random weights, it changes
                # half of the tokens' probabilities by more than 20 %.
                log_probs = batch_log_probs(policy, batch)
                # In the first inner step, pi is still the pi_old that sampled, and its
                # log-probabilities are kept for the later ones.
                old = batch.setdefault("old_log_probs", log_probs.detach())
                ref = reference_log_probs(reference, batch)
                advantages, mask = batch["advantages"], batch["mask"]
                loss = grpo_loss(
                    log_probs, old, ref, advantages, mask, CLIP_EPS, KL_COEF
                )
                # backward() adds to the gradients of the batches before. Weighted with
                # their shares, the losses add up to the mean over all responses.
                (batch["share"] * loss).backward()
                batch |= {"log_probs": log_probs.detach(), "loss": loss.detach()}
            # 5. A gradient step, with a gradient of norm MAX_GRAD_NORM at most.
            gradient_norm = clip_gradient(policy)
            optimizer.step()
            optimizer.zero_grad()
        yield {"groups": groups, "batches": batches, "gradient": gradient_norm}


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TINY_MODELS = HERE / "grpo_tiny"
DEFAULT_MODELS = {"gpt2", "OpenAssistant/reward-model-deberta-v3-large"}
HEADER = "step  reward   std    best   loss     KL entropy clipped "
HEADER += "length cut off gradient"
ROW = "{step:4d} {reward:+7.2f} {std:5.2f} {best:+7.2f} {loss:+6.3f} {KL:6.3f} "
ROW += "{entropy:7.2f} {clipped:7.1%} {length:6.1f} {cut off:7.0%} {gradient:8.2f}"


def main() -> None:
    """Train the policy for NUM_STEPS steps, compare before and after, and save it."""
    check_settings()
    accelerator = start_accelerator()
    policy, tokenizer, reward = load_models()
    reference = make_reference(policy)
    if GRADIENT_CHECKPOINTING:
        recompute_activations(policy)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, LR, weight_decay=0.0, fused=True)
    # On several processes, `shared` averages gradients in backward(); it is the policy.
    shared, optimizer = accelerator.prepare(policy, optimizer)
    run = resume(accelerator, optimizer)
    first_step = len(run["rewards"])
    print_header(policy, reward)

    def save(suffix: str = "_interrupted") -> str:
        return save_run(policy, tokenizer, run["rewards"], suffix)

    with keep_unfinished_run(save) as stopped:
        if first_step == 0:
            run["before"] = evaluate(policy, tokenizer, reward)
            set_seed(SEED, device_specific=True)  # plus the number of the process
        say(HEADER)
        steps = train(shared, tokenizer, reference, reward, optimizer, first_step)
        options = {"initial": first_step, "total": NUM_STEPS, "disable": hide_bar()}
        for result in tqdm(steps, unit="step", leave=False, **options):
            metrics = measure(accelerator, result)
            print_step(len(run["rewards"]), metrics, result["groups"])
            accelerator.log(metrics, step=len(run["rewards"]))
            run["rewards"].append(all_rewards(accelerator, result))
            if SAVE_EVERY and len(run["rewards"]) % SAVE_EVERY == 0:
                save_checkpoint(accelerator, run)
            if stopped:
                accelerator.set_trigger()
            if accelerator.check_trigger():  # in any of the processes
                accelerator.wait_for_everyone()
                sys.exit(f"Stopped after {len(run['rewards'])} of {NUM_STEPS} steps.")
        print_gain(run["before"], evaluate(policy, tokenizer, reward))
        folder = save("")
        say(f"\nWritten:\n{folder}\nHow to use the model: README.md, lesson 4")
        show_in_notebook(Path(folder, "learning_curve.png"))
        if (SAVE_EVERY or RESUME) and accelerator.is_main_process:
            shutil.rmtree(folder_of("_checkpoint"), ignore_errors=True)  # of this run
    # PyTorch can hang if a process ends while the thread that exchanged its last tensor
    # is still busy. That thread is done when all the processes have met here.
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextlib.contextmanager
def keep_unfinished_run(save: Callable[[], str]) -> Iterator[list]:
    """Whatever ends the lines inside early, `save()` keeps the run so far.

    Ctrl-C, `kill` and a closed terminal only leave a mark in the list that this yields;
    main() looks at it once per step. So no signal can interrupt the writing of a file.
    """
    stopped, before = [], {}
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows lacks the last
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():  # the only one that may
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                before[number] = signal.signal(number, lambda *_: stopped.append(True))
    try:
        yield stopped
    except BaseException as ending:
        kept = save()
        with contextlib.suppress(OSError):  # a closed terminal cannot be printed to
            if isinstance(ending, torch.OutOfMemoryError):
                print("Out of memory. README.md, lesson 4, Memory: what needs less.")
            if kept:  # nothing is, before the first step
                print(f"\nThis run is kept in\n{kept}\nOlder weights are as they were.")
        if not (isinstance(ending, SystemExit) and "ipykernel" in sys.modules):
            raise
        print(ending)  # in a notebook, SystemExit would look like a crash
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * mps
    lists = [PROMPTS, eval_prompts()]
    texts = all(isinstance(prompts, list) and prompts for prompts in lists) and all(
        isinstance(text, str) and text.strip() for text in sum(lists, [])
    )
    steps = NUM_STEPS, PROMPTS_PER_STEP, INNER_STEPS, MICRO_BATCH_SIZE, REPORT_EVERY
    suffixes = ["", "_interrupted"] + ["_checkpoint"] * bool(SAVE_EVERY or RESUME)
    bundled = folder_of("").resolve().is_relative_to(TINY_MODELS)
    split = {os.getenv(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")}
    rules = {
        f"DEVICE must be {' or '.join(devices)}": DEVICE in devices,
        "MIXED_PRECISION must be no or bf16": MIXED_PRECISION in ("no", "bf16"),
        "PROMPTS, EVAL_PROMPTS must be lists of texts that are not blank": texts,
        "SEED must be from 0 to 499,999": 0 <= SEED < 500_000,
        "NUM_SAMPLES, EVAL_SAMPLES must be at least 2": NUM_SAMPLES > 1 < EVAL_SAMPLES,
        "NUM_STEPS, PROMPTS_PER_STEP, INNER_STEPS, MICRO_BATCH_SIZE, MAX_NEW_TOKENS, "
        "REPORT_EVERY must be at least 1": min(*steps, MAX_NEW_TOKENS) >= 1,
        "LR, TOP_P, CLIP_EPS must be above 0 and at most 1": all(
            0 < value <= 1 for value in (LR, TOP_P, CLIP_EPS)
        ),
        "TEMPERATURE, MAX_GRAD_NORM must be above 0": TEMPERATURE > 0 < MAX_GRAD_NORM,
        "KL_COEF, LORA_RANK, SAVE_EVERY must be at least 0": all(
            value >= 0 for value in (KL_COEF, LORA_RANK, SAVE_EVERY)
        ),
        "LORA_RANK must be 0 without the package peft": not LORA_RANK
        or find_spec("peft"),
        "SAVE_DIR must be a folder outside grpo_tiny/ that can be written to and holds "
        f"nothing but an earlier run, and {SAVE_DIR}_interrupted as well": not bundled
        and all(is_ours(folder_of(suffix)) for suffix in suffixes),
        "USE_WANDB must be False, or pip install wandb": not USE_WANDB
        or find_spec("wandb"),
        "FSDP, DeepSpeed must be off, since the model is needed whole": "true"
        not in split,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def eval_prompts() -> list[str]:
    """The prompts on which the gain is measured."""
    return PROMPTS[:4] if EVAL_PROMPTS is None else EVAL_PROMPTS


def folder_of(suffix: str) -> Path:
    """SAVE_DIR, or a folder beside it."""
    return HERE / f"{Path(SAVE_DIR)}{suffix}"


def files_of(folder: Path) -> set[str]:
    """The names of what earlier runs wrote into a folder, as save_run noted them."""
    names = {"unfinished.tmp", "replaced.tmp", "checkpoint", "older_checkpoint"}
    for place in (".", "unfinished.tmp", "replaced.tmp"):  # a run may have been killed
        log = folder / place / "training_log.json"
        names |= set(json.loads(log.read_text())["files"]) if log.exists() else set()
    return names


def is_ours(folder: Path) -> bool:
    """Whether the folder can be written to, and holds only what earlier runs wrote."""
    if os.getenv("RANK", "0") != "0":  # another one of several processes looks
        return True
    try:
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # the only sure way to find out
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
        if is_new:
            folder.rmdir()
        return names <= files_of(folder)
    except (OSError, ValueError, LookupError, TypeError):  # or the log is another's
        return False


def start_accelerator() -> Accelerator:
    """Join the other processes, if this is one of several, and choose the device."""
    if hasattr(sys.stdout, "reconfigure"):  # that of a notebook has not
        sys.stdout.reconfigure(errors="replace")  # no odd character may end a training
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    tracker = "wandb" if USE_WANDB else None
    where = {"cpu": DEVICE == "cpu", "mixed_precision": MIXED_PRECISION}
    accelerator = Accelerator(**where, log_with=tracker)
    settings = {"LR": LR, "KL_COEF": KL_COEF, "NUM_SAMPLES": NUM_SAMPLES, "SEED": SEED}
    settings |= {"policy": POLICY_MODEL_NAME, "reward model": REWARD_MODEL_NAME}
    accelerator.init_trackers("grpo_training", settings)
    return accelerator


@contextlib.contextmanager
def one_line_about(name: object) -> Iterator[None]:
    """Whatever goes wrong inside ends the program with one line that begins so."""
    try:
        yield
    except Exception as problem:  # there are many ways for a model to be broken
        reason = textwrap.shorten(str(problem), 400) or type(problem).__name__
        sys.exit(f"{name}: {reason}")


def load_models() -> tuple[nn.Module, Tokenizer, Callable]:
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
    if REWARD_FUNCTION is not None:
        return policy, tokenizer, REWARD_FUNCTION
    kind = transformers.AutoModelForSequenceClassification
    with one_line_about(found[1]):
        reward = RewardModel(*load_model(kind, found[1]))
        reward(PROMPTS[0], ["A response."])  # so that what is wrong is said now
    return policy, tokenizer, reward


def find_model(name: str) -> str | None:
    """The model's folder here or in the cache, or its id on the Hub; None: neither."""
    folder = HERE / Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    try:
        huggingface_hub.model_info(name, timeout=5)  # seconds
        return name
    except huggingface_hub.errors.HFValidationError:
        return name  # from_pretrained will say what is wrong
    except Exception as problem:  # it did not answer, refused, or is overloaded
        status = getattr(getattr(problem, "response", None), "status_code", 404)
        answered = isinstance(problem, huggingface_hub.errors.HfHubHTTPError)
        if answered and status != 429 and status < 500:
            return name
    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return str(Path(cached).parent) if isinstance(cached, str) else None


def load_model(kind: type, name: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model in float32, without dropout, and its tokenizer, both complete."""
    with one_line_about(name):
        base, adapter = name, transformers.utils.find_adapter_config_file(name)
        if adapter:  # a folder that the package peft has written
            named = json.loads(Path(adapter).read_text())["base_model_name_or_path"]
            base = find_model(named)
            a_path = named.startswith(("/", "."))  # and no name on the Hub
            if base is None or (a_path and not Path(base).is_dir()):
                raise ValueError(f"its base model {named} is not here")
        words = name if Path(name, "tokenizer_config.json").exists() else base
        tokenizer = transformers.AutoTokenizer.from_pretrained(words)
        for note in ("is_local", "local_files_only"):  # they would be saved with it
            tokenizer.init_kwargs.pop(note, None)
        is_policy = kind is transformers.AutoModelForCausalLM
        config = transformers.AutoConfig.from_pretrained(base)
        if is_policy and config.is_encoder_decoder:
            raise ValueError("an encoder-decoder cannot be a policy")
        if is_policy and hasattr(config, "quantization_config"):
            raise ValueError("a quantised model cannot be trained; name the original")
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, loading = kind.from_pretrained(base, **options)
        missing = sorted(loading["missing_keys"])  # they would be random numbers
        if missing or len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
            missing = ", ".join(missing) or "its tokenizer"
            raise ValueError(f"it is no complete {kind.__name__}, it lacks {missing}")
        inside = f"{model.base_model_prefix}."
        unused = [key for key in loading["unexpected_keys"] if key.endswith(".weight")]
        unused = [key for key in unused if not key.startswith(inside)]
        if is_policy and unused:  # the head of a classifier, for example
            raise ValueError(f"it is another kind of model, it has {', '.join(unused)}")
        if adapter:
            model = merge_adapter(model, tokenizer, name)
    return model.eval().to(DEVICE), tokenizer  # eval() switches dropout off, no more


def merge_adapter(model: PreTrainedModel, tokenizer: Tokenizer, name: str) -> nn.Module:
    """The model with the weights of an adapter of the package peft added to its own."""
    from peft import PeftModel

    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return model.requires_grad_(True)  # peft had frozen the weights


def load_policy(name: str) -> tuple[nn.Module, Tokenizer]:
    """The policy and its tokenizer. What it brings for generate() is put away."""
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, name)
    with one_line_about(name):
        ends = end_tokens(policy, tokenizer)
        policy.shipped_generation_config = policy.generation_config  # for save_run
        policy.generation_config = GenerationConfig(eos_token_id=ends)
        check_policy(policy, tokenizer)
    if not LORA_RANK:
        return policy, tokenizer
    from peft import LoraConfig, get_peft_model

    layers = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    set_seed(SEED)  # half of the new matrices begin with random numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sets right itself what it warns about
        return get_peft_model(policy, LoraConfig(r=LORA_RANK, **layers)), tokenizer


def end_tokens(policy: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """All end-of-sequence tokens: of the model, its tokenizer and its chat template."""
    own = policy.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # check_policy will say what is wrong
            text = chat_text(tokenizer, "Question", "Answer")
            closing = text.rpartition("Answer")[2].strip()  # what closes the turn
            ids = encode(tokenizer, closing)
            if len(ids) == 1 or ids[0] in tokenizer.added_tokens_decoder:
                ends.add(ids[0])
    known = policy.get_input_embeddings().num_embeddings
    ends = sorted(end for end in ends - {None} if end < known)
    if not ends:
        raise ValueError("it has no end-of-sequence token, so no response would end")
    return ends


def chat_text(tokenizer: Tokenizer, prompt: str, response: str | None) -> str:
    """A conversation in the format of the chat template; None: the response is next."""
    chat = [{"role": "user", "content": prompt}]
    if response is not None:
        chat.append({"role": "assistant", "content": response})
    next_turn = {"add_generation_prompt": response is None}
    return tokenizer.apply_chat_template(chat, tokenize=False, **next_turn)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, without the special tokens that a tokenizer adds."""
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt as token ids (1, P), in the format of a chat model if it is one."""
    if USE_CHAT_TEMPLATE and tokenizer.chat_template:
        return torch.tensor([encode(tokenizer, chat_text(tokenizer, prompt, None))])
    text, ids = encode(tokenizer, prompt), tokenizer(prompt).input_ids
    # The tokenizer may put a special token before the text, which a prompt that is
    # formatted already has. One that it puts behind the text would end the response.
    starts = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
    before = ids[: starts[0]] if starts else []
    return torch.tensor([text if text[: len(before)] == before else before + text])


def decode(
    tokenizer: Tokenizer, completion_ids: Tensor, mask: Tensor, ends: list
) -> list:
    """The texts of the responses, without their ends and what stands behind them."""
    lengths = mask.sum(1).tolist()
    rows = [row[:n] for row, n in zip(completion_ids.tolist(), lengths, strict=True)]
    rows = [row[:-1] if row[-1] in ends else row for row in rows]
    return tokenizer.batch_decode(rows, skip_special_tokens=not KEEP_SPECIAL_TOKENS)


def context_length(config: transformers.PretrainedConfig) -> int:
    """The number of tokens that a model can read at once."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return longest if longest > 0 else 10**9


def check_policy(policy: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Refuse a policy that cannot read the prompts, or trains other than it samples."""
    prompts = [encode_prompt(tokenizer, text) for text in PROMPTS + eval_prompts()]
    longest, size = context_length(policy.config), max(ids.shape[1] for ids in prompts)
    if size + MAX_NEW_TOKENS > longest:
        too_long = "tokens; prompt and MAX_NEW_TOKENS are more"
        raise ValueError(f"it reads {longest} {too_long}")
    known = policy.get_input_embeddings().num_embeddings
    if max(ids.max() for ids in prompts) >= known:
        raise ValueError("its tokenizer makes a token of a prompt that it lacks")
    ids, limits = prompts[0].to(policy.device), {"min_new_tokens": 8}
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=8, **limits)
    show = {"output_logits": True, "return_dict_in_generate": True}
    sampled = policy.generate(ids, generation_config=sampling, **show)
    completion_ids = sampled.sequences[:, ids.shape[1] :]
    log_probs = torch.stack(sampled.logits, 1).float().log_softmax(2)  # (1, 8, V)
    log_probs = log_probs.gather(2, completion_ids.unsqueeze(2)).squeeze(2)
    with torch.no_grad():
        trained = completion_log_probs(policy, ids, completion_ids, 1.0)
    if not (trained - log_probs).abs().max() < 1e-3:
        raise ValueError("the probability of its tokens depends on tokens after them")


class RewardModel:
    """A classifier with one output: its score of a response to a prompt."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        if model.num_labels != 1:
            raise ValueError(f"it has {model.num_labels} outputs, not 1 score")
        config = model.config.get_text_config()
        # With padding on the right, every token keeps its position. A decoder takes its
        # score from the last token that is no padding, so it must know that token. If
        # it knows none, it gets one text at a time.
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        self.pads = None not in (tokenizer.pad_token_id, config.pad_token_id)
        if self.pads:
            config.pad_token_id = tokenizer.pad_token_id
        self.longest = min(context_length(config), tokenizer.model_max_length)
        self.cut_prompts = set()

    @torch.no_grad()
    def __call__(self, prompt: str, responses: list[str]) -> Tensor:
        """Scores (n,) float32."""
        prompt = self.shorten(prompt)
        size = len(responses) if self.pads else 1
        parts = [responses[i : i + size] for i in range(0, len(responses), size)]
        inputs = [self.read(prompt, part).to(self.model.device) for part in parts]
        return torch.cat([self.model(**part).logits[:, 0].float() for part in inputs])

    def shorten(self, prompt: str) -> str:
        """The prompt, without its end if it leaves no room for a response."""
        room = max(self.longest // 2, self.longest - MAX_NEW_TOKENS - 16)
        short = self.cut(prompt, room)
        if short != prompt and prompt not in self.cut_prompts:
            self.cut_prompts.add(prompt)
            say(f"The reward model reads only the first {room} tokens of a prompt.")
        return short

    def cut(self, text: str, longest: int) -> str:
        """The text without its end, if it is longer than that many tokens."""
        ids = encode(self.tokenizer, text)
        if len(ids) <= longest:
            return text
        return self.tokenizer.decode(ids[: max(0, longest)])

    def read(self, prompt: str, responses: list[str]) -> dict:
        """Prompt and response as the model was trained to read them, as token ids.

        A tokenizer with a chat template makes a conversation of them, any other a pair
        with special tokens between the two. What is too long loses its end.
        """
        tokenizer = self.tokenizer
        options = {"padding": self.pads, "return_tensors": "pt"}
        if not tokenizer.chat_template:
            options |= {"truncation": "only_second", "max_length": self.longest}
            return tokenizer([prompt] * len(responses), responses, **options)
        room = self.longest - len(encode(tokenizer, chat_text(tokenizer, prompt, "")))
        cut = [self.cut(text, room) for text in responses]
        texts = [chat_text(tokenizer, prompt, text) for text in cut]
        return tokenizer(texts, add_special_tokens=False, **options)


def make_reference(policy: nn.Module) -> Callable | None:
    """What gives the logits of the policy before training; None without KL."""
    if KL_COEF == 0 or not LORA_RANK:
        return copy.deepcopy(policy) if KL_COEF else None

    def reference(*inputs: object, **options: object) -> object:
        with policy.disable_adapter():  # which needs no second copy
            return policy(*inputs, **options)

    return reference


def recompute_activations(policy: nn.Module) -> None:
    """Let backward() compute the activations of a layer again, instead of keeping them.

    The switch of transformers for this needs train mode, in which dropout acts.
    """
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        sys.exit("Settings: GRADIENT_CHECKPOINTING must be False with this policy.")
    for layer in layers:
        plain = layer.forward
        layer.forward = functools.partial(checkpoint, plain, use_reentrant=False)


def prompts_of_step(step: int) -> list[str]:
    """PROMPTS in turn, those for this process."""
    state = PartialState()
    first = (step * state.num_processes + state.process_index) * PROMPTS_PER_STEP
    return [PROMPTS[i % len(PROMPTS)] for i in range(first, first + PROMPTS_PER_STEP)]


def split_groups(groups: list[dict]) -> list[dict]:
    """Batches of at most MICRO_BATCH_SIZE responses, all of the same group.

    `share` is the share of a batch in the responses of all groups.
    """
    names, batches = ("prompt_ids", "completion_ids", "mask", "advantages"), []
    for group in groups:
        for rows in torch.arange(NUM_SAMPLES).split(MICRO_BATCH_SIZE):
            share = {"share": len(rows) / (len(groups) * NUM_SAMPLES)}
            batches.append({name: group[name][rows] for name in names} | share)
    return batches


def batch_log_probs(model: Callable, batch: dict) -> Tensor:
    """Log-probabilities (n, L) of the responses in a batch."""
    ids = batch["prompt_ids"], batch["completion_ids"]
    return completion_log_probs(model, *ids, TEMPERATURE)


@torch.no_grad()
def reference_log_probs(reference: Callable | None, batch: dict) -> Tensor | None:
    """Log-probabilities (n, L) by the reference policy, computed once per batch."""
    if reference is not None and "ref_log_probs" not in batch:
        batch["ref_log_probs"] = batch_log_probs(reference, batch)
    return batch.get("ref_log_probs")


def clip_gradient(policy: nn.Module) -> Tensor:
    """Scale the gradient down to the norm MAX_GRAD_NORM. Gives the norm before that."""
    norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
    if not norm.isfinite():
        sys.exit("The loss is not a finite number; the policy was left as it was.")
    return norm


@torch.no_grad()
def diagnose(batch: dict) -> dict[str, Tensor]:
    """What to watch. Each is a mean over the responses of a batch.

    * KL: k3, the distance from the reference; 0 to 0.1 is near, 1 is far. With
      KL_COEF = 0 there is no reference: it is not measured, and shown as 0.
    * entropy: -ln pi, how undecided the policy is, in nats (the unit of ln) per token.
      Near 0, only one response is left. With TOP_P < 1, the figure is a little too low,
      as the least likely tokens are missing.
    * clipped: the share of tokens that the clip pushes no further.
    * length: in tokens, with the end. cut off: the share with MAX_NEW_TOKENS of them.
    """
    log_probs, mask = batch["log_probs"], batch["mask"]
    kl = kl_estimate(log_probs, batch.get("ref_log_probs", log_probs))
    moved = (log_probs - batch["old_log_probs"]).exp() - 1
    # rho above 1 + eps where A > 0, below 1 - eps where A < 0
    clipped = moved * batch["advantages"].sign().unsqueeze(1) > CLIP_EPS
    length = mask.sum(1)
    found = {"KL": kl, "entropy": -log_probs, "clipped": clipped}
    for name, value in found.items():
        found[name] = (value.masked_fill(mask == 0, 0).sum(1) / length).mean()
    found |= {"length": length.float().mean(), "loss": batch["loss"]}
    return found | {"cut off": (length == MAX_NEW_TOKENS).float().mean()}


def all_rewards(accelerator: Accelerator, result: dict) -> Tensor:
    """The rewards (groups, G) of a step, of all processes."""
    return accelerator.gather(torch.stack([g["rewards"] for g in result["groups"]]))


def measure(accelerator: Accelerator, result: dict) -> dict[str, float]:
    """The metrics of a step, as means over the responses of all processes."""
    found = {"gradient": result["gradient"]}
    for batch in result["batches"]:
        for name, value in diagnose(batch).items():
            found[name] = found.get(name, 0) + batch["share"] * value
    found = accelerator.reduce(found, "mean")
    rewards = all_rewards(accelerator, result)
    found |= {"reward": rewards.mean(), "std": rewards.std(1).mean()}
    found["best"] = rewards.max()
    return {name: value.item() for name, value in found.items()}


def evaluate(policy: nn.Module, tokenizer: Tokenizer, reward: Callable) -> dict:
    """Rewards of fresh responses to EVAL_PROMPTS by all processes, and two texts."""
    set_seed(HELD_OUT_SEED, device_specific=True)  # plus the number of the process
    samples, rewards, texts = -(-EVAL_SAMPLES // PartialState().num_processes), [], []
    for prompt in eval_prompts():
        responses = generate_group(policy, tokenizer, prompt, samples)["responses"]
        rewards += score_responses(reward, prompt, responses).tolist()
        texts += responses[:2]
    return {"rewards": gather_object(rewards), "texts": texts[:2]}


def say(text: str) -> None:
    """Print above the progress bar, and in only one of several processes."""
    if PartialState().is_main_process and sys.stdout is not None:
        tqdm.write(text)


def hide_bar() -> bool:
    """Whether a progress bar would only fill a file."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = terminal or "ipykernel" in sys.modules
    return not (shown and PartialState().is_main_process)


def print_header(policy: nn.Module, reward: Callable) -> None:
    """What runs, and on what."""
    devices, model = PartialState().num_processes, getattr(reward, "model", None)
    responses = f"{PROMPTS_PER_STEP} x {NUM_SAMPLES} responses"
    say(f"GRPO on {devices} x {DEVICE}: {NUM_STEPS} steps of {responses}, LR {LR:g}.")
    say(f"Policy: {policy.name_or_path}")
    say(f"Reward: {model.name_or_path if model else 'REWARD_FUNCTION'}")
    say("Watch the reward, not the loss.")


def print_text(label: str, reward: float, text: str) -> None:
    """A response with its reward, wrapped and indented, at most five rows."""
    line = f"{label} [{reward:+.2f}] {' '.join(text.split())}"
    indents = {"initial_indent": "    ", "subsequent_indent": "        "}
    say(textwrap.fill(line, 88, max_lines=5, **indents))


def print_step(step: int, metrics: dict, groups: list[dict]) -> None:
    """A row of the table, and now and then the best and worst response to a prompt."""
    shown = {name: round(value, 3) + 0.0 for name, value in metrics.items()}  # no -0
    say(ROW.format(step=step, **shown))
    if step % REPORT_EVERY == 0:
        group, prompt = groups[0], prompts_of_step(step)[0]
        scored = list(zip(group["rewards"].tolist(), group["responses"], strict=True))
        if len(PROMPTS) > 1:
            say(f"    {textwrap.shorten('prompt ' + prompt, 84)}")
        print_text("best ", *max(scored))
        print_text("worst", *min(scored))


def print_gain(before: dict, after: dict) -> None:
    """Mean rewards of fresh responses before and after, and two texts of each."""
    for when, found in (("before", before), ("after", after)):
        rewards = torch.tensor(found["rewards"])
        mean = f"mean reward {rewards.mean():+.3f} (std {rewards.std():.3f})"
        say(f"\n{len(rewards)} fresh responses {when} training: {mean}")
        for reward, text in zip(found["rewards"], found["texts"], strict=False):
            print_text("", reward, text)


def save_checkpoint(accelerator: Accelerator, run: dict) -> None:
    """Write what resume() needs. At any moment, there is one complete checkpoint."""
    aside, newest, older = checkpoint_folders()
    accelerator.save_state(aside)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        torch.save(run, aside / "run.pt")
        shutil.rmtree(older, ignore_errors=True)
        if newest.exists():
            os.replace(newest, older)
        os.replace(aside, newest)


def resume(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> dict:
    """The run of the last checkpoint, if there is one and RESUME asks for it.

    Weights, optimizer and random numbers are set as they were.
    """
    _, *folders = checkpoint_folders()
    found = [folder for folder in folders if folder.exists()]
    if not (RESUME and found):
        if RESUME:
            say(f"RESUME: no checkpoint is in {folders[0].parent}; this is a new run.")
        elif found:
            say(f"A checkpoint is in {found[0]}. RESUME = True goes on from it.")
        return {"rewards": []}
    with one_line_about(f"{found[0]} does not fit these Settings"):
        accelerator.load_state(found[0])
        run = torch.load(found[0] / "run.pt", weights_only=True)
    for group in optimizer.param_groups:
        group["lr"] = LR  # which may have been changed since
    say(f"RESUME: going on after {len(run['rewards'])} steps.")
    return run


def checkpoint_folders() -> list[Path]:
    """Where a checkpoint is written, the newest, and the one before it."""
    names = "unfinished.tmp", "checkpoint", "older_checkpoint"
    return [folder_of("_checkpoint") / name for name in names]


def save_run(
    policy: nn.Module, tokenizer: Tokenizer, rewards: list, suffix: str
) -> str:
    """Write model, tokenizer and rewards into SAVE_DIR + `suffix`, and give its path.

    All is written into a folder inside that one, so on the same disk, and moved when it
    is complete. If a file cannot be moved, those of the older model are moved back.
    """
    if not (rewards and PartialState().is_main_process):
        return ""
    folder = folder_of(suffix)
    aside, replaced = folder / "unfinished.tmp", folder / "replaced.tmp"
    for path in (aside, replaced):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    model = policy.merge_and_unload() if LORA_RANK else policy
    model.save_pretrained(aside)
    # As it came: save_pretrained() refuses what some models ship, which loses the run.
    model.shipped_generation_config.to_json_file(aside / "generation_config.json")
    tokenizer.save_pretrained(aside)
    try:
        draw_learning_curve(rewards, aside / "learning_curve.png")
    except Exception as problem:  # a picture is no reason to lose a run
        say(f"The learning curve could not be drawn: {problem}")
    names = sorted([*os.listdir(aside), "training_log.json"], key="config.json".__eq__)
    log = {"files": names, "rewards": [row.tolist() for row in rewards]}
    (aside / "training_log.json").write_text(json.dumps(log))
    # A folder without config.json does not load. So it is moved away first, and comes
    # last: whatever happens in between, no mixture of two models can be loaded.
    old = files_of(folder) & set(os.listdir(folder)) - {aside.name, replaced.name}
    old = sorted(old, key="config.json".__ne__)
    moves = [(folder / name, replaced / name) for name in old]
    moves += [(aside / name, folder / name) for name in names]
    for done, (source, target) in enumerate(moves):
        try:
            os.replace(source, target)
        except OSError as problem:
            for source, target in reversed(moves[:done]):
                os.replace(target, source)
            where = f"{folder} cannot be changed, so the model is in {aside}"
            sys.exit(f"{where}: {problem}")
    shutil.rmtree(replaced)
    aside.rmdir()
    return str(folder)


def draw_learning_curve(rewards: list[Tensor], path: Path) -> None:
    """Write a picture of the rewards of each step: mean, spread and best."""
    table = torch.stack([row.flatten() for row in rewards]).cpu()  # (steps, responses)
    mean, std = table.mean(1), table.std(1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(table.amax(1), ".", color="0.7", label="best")
    axes.plot(mean, label="mean")
    axes.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    axes.set(title="GRPO (band: +- 1 std)", xlabel="step", ylabel="reward")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def show_in_notebook(picture: Path) -> None:
    """Show the learning curve below the cell, if this runs in a notebook."""
    if "ipykernel" in sys.modules and picture.exists():
        from IPython.display import Image, display

        display(Image(filename=str(picture)))


if __name__ == "__main__":
    main()
