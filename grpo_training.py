"""Lesson 4: GRPO, fine-tuning a language model on the scores of a reward model.

What you will learn
    The last step of RLHF (reinforcement learning from human feedback): how a model that
    was taught to predict text is taught to write what a second model rates highly.

The algorithm in 6 steps
    1. Start from a pretrained language model, the policy pi. It gives each token (a
       word or a piece of one) a probability of coming next after the text so far.
    2. Draw a group of responses to one prompt, token by token, with its probabilities.
    3. Score each response with the reward model, a network trained beforehand on which
       texts people prefer (the bundled one: on made-up pairs). One number for a text.
    4. Compare within the group: a response's advantage is how far its reward is above
       the group's mean, in standard deviations (std). Lesson 3 has a critic for that.
    5. Take a gradient step: better responses likelier, worse ones rarer. Go back to 2.
    6. Compare fresh responses from before and after, and save the model.

Symbols (G responses, L tokens in the longest, P in the prompt, V in the vocabulary)
    q           prompt_ids      (G, P)  the prompt, once for each response
    o_i, o_it   completion_ids  (G, L)  response i, and its token t
    m_it        mask            (G, L)  1 up to the end of the response, 0 after it
    r_i, A_i    rewards, advantages (G,)  one for all the tokens of response i
    ln pi       log_probs       (G, L)  of each token, by the policy as it is now
    ln pi_old   old_log_probs   (G, L)  ... by the policy that wrote the responses
    ln pi_ref   ref_log_probs   (G, L)  ... by a frozen copy of the first policy
    rho_it      ratio           (G, L)  pi / pi_old: how much likelier a token became
    eps, beta   CLIP_EPS, KL_COEF (KL: how far two policies differ, 0 if not at all)

Where this differs from the paper, and why
    Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4, take 1,024 responses a
    step, 64 to a prompt, LR 1e-6 and KL_COEF 0.04. Here: one prompt a step; a larger
    LR, as there are only 50 steps; no KL, which saves a second copy of the model.

Run it, and what you should see (manual: README.md; what goes wrong: tests/bugs/)
    python grpo_training.py      fetches 560 million weights, then 17 s a step on a CPU
    core. Offline it trains the small models of grpo_tiny/, 20 s in all. Seed 0 then:
        Step 0 | Reward -1.175 (std 1.633, max +2.764)
        Step 49 | Reward +2.138 (std 0.925, max +2.930)
          loss 0 | KL 0 | entropy 0.892 | clipped 0 | length 43.4 | cut off 0.125 | ...
    Fresh responses: -0.748 before, +1.635 after. Loss 0 is right: see grpo_loss.

Try this (bundled models, seeds 0-2; as it is, the median gain in reward is 2.4)
    * NUM_SAMPLES = 2: 0.2. A quarter of the data, and advantages always near +-0.71.
    * INNER_STEPS = 4: 4.2, but the texts become gibberish that the reward model likes.
    * KL_COEF = 0.4: 1.8. It stays nearer to where it started.
"""

import copy
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run. A model is an id on the Hugging Face Hub (README.md: which to try), or a
# folder beside this script, such as "grpo_tiny/policy" and "grpo_tiny/reward": these
# two small models are used if the Hub is unreachable and both names are as here.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY_MODEL_NAME = "gpt2"
REWARD_MODEL_NAME = "OpenAssistant/reward-model-deberta-v3-large"
REWARD_FUNCTION = None  # or put def REWARD_FUNCTION(prompt, responses) in this line's
#                         place: it returns a number for each response (README.md)
PROMPTS = ["Explain why regular exercise is important."]  # several are taken in turn
USE_CHAT_TEMPLATE = True  # a chat model gets the prompt in the format it was trained on
SEED = 0  # same seed, machine and versions: the same responses
HELD_OUT_SEED = 1_000_000  # of the responses that measure the gain; SEED is far below

# Budget
NUM_STEPS = 50  # groups, each used for INNER_STEPS gradient steps
NUM_SAMPLES = 8  # G, responses in a group, 2 or more; more: steadier gradient, slower
MAX_NEW_TOKENS = 64  # longer responses are cut off; few: half sentences; many: slow
EVAL_SAMPLES = 32  # responses to each prompt, before and after, to measure the gain
MICRO_BATCH_SIZE = 8  # responses in one backward pass; fewer take less memory
MIXED_PRECISION = "no"  # "bf16": compute in bfloat16, faster on GPUs; weights stay
#                         float32: in bfloat16 a step of LR would be rounded away

# Algorithm
LR = 1e-5  # about how far AdamW, the optimizer, moves each weight in a step; too big:
#            gibberish, too small: 50 steps do nothing
TINY_LR = 1.3e-5  # takes the place of LR for the policy in grpo_tiny/
TEMPERATURE = 1.0  # divides the logits (the model's scores of the tokens) when writing
#                    and when training; high: gibberish; low: all responses alike
TOP_P = 0.95  # write with the likeliest tokens whose probabilities add up to 95 %; 1.0:
#               odd words. The loss ignores this cut, so the gradient is slightly off
CLIP_EPS = 0.2  # a token is pushed no further once rho has moved 20 % the way A asks;
#                 too small: later inner steps do nothing; too big: nothing brakes them
INNER_STEPS = 1  # gradient steps from one group; more: learns faster, but turns to
#                  gibberish sooner. With 1 the clip never acts: see grpo_step
KL_COEF = 0.0  # beta, the pull back to the first policy; above 0: slower, more memory
SCALE_BY_STD = True  # divide advantages by the group's std; False: groups with nearly
#                      equal rewards count less; no effect where MAX_GRAD_NORM acts
MAX_GRAD_NORM = 1.0  # a longer gradient (at step 0: 2.67) is shortened to this; big:
#                      one odd group may throw the policy off; small: all count alike

# Files
SAVE_DIR = "trained_model"  # beside this script: model, tokenizer and learning curve
USE_WANDB = False  # also send the figures to Weights & Biases (pip install wandb)

# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, scale_by_std: bool = True) -> torch.Tensor:
    """Advantages: how much better each response is than its group's average.

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)

    DeepSeekMath, section 4.1.2; the 1e-4, against a division by 0, is ours.
    `scale_by_std=False` leaves out the division. Why the mean may be subtracted (read
    grpo_loss first): taking b from all rewards changes the expected gradient by
    -b sum_o pi(o) grad ln pi(o) = -b grad sum_o pi(o) = -b grad 1 = 0 (o: all texts),
    and makes it less noisy. This is exact only without grpo_loss's division by length
    and with TOP_P = 1. The mean contains r_i, which, without the division by std,
    shortens the expected gradient to 1 - 1/G of itself.
    The advantages of equal rewards are set to exactly 0: rounding can leave 3e-8, which
    AdamW, dividing a gradient by its usual size, could turn into a full step of noise.

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

    The end is a choice that the policy made, so it is trained like any other token;
    what stands after it is only there to fill the row up.

    `completion_ids` (G, L) int64 gives (G, L) int64.
    By hand: ids = [5, 7, EOS, EOS]  ->  [1, 1, 1, 0].
    """
    ends = (completion_ids == eos_token_id).long()
    return (ends.cumsum(1) - ends == 0).long()


def completion_log_probs(
    model: torch.nn.Module,
    prompt_ids: torch.Tensor,
    completion_ids: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Log-probability of each token of the response, given all tokens before it.

    ln pi(o_t | q, o_<t) = z_t[o_t] - ln sum_v exp(z_t[v]),   z_t = logits / temperature

    q is the prompt; the logits are the model's V outputs at each place, a score for
    every token that could come next. Minus this is known as the cross-entropy.

    `prompt_ids` (G, P) and `completion_ids` (G, L) int64 give (G, L) float32. The
    model's output at one token is about the next: z_t is found one place earlier, z_1
    at the prompt's last token, and o_L need not be read. An output depends on earlier
    tokens only, so what fills a row up after its end changes nothing before it.
    By hand: two tokens, logits [0, ln 3], token 1 was drawn  ->  ln(3/4) = -0.2877.
    """
    ids = torch.cat([prompt_ids, completion_ids], 1)[:, :-1]
    length = completion_ids.shape[1]  # keep only the logits about these: saves memory
    logits = model(ids, use_cache=False, logits_to_keep=length).logits  # (G, L, V)
    logits = logits.float() / temperature if temperature != 1 else logits.float()
    cross_entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), completion_ids.flatten(), reduction="none"
    )
    return -cross_entropy.view_as(completion_ids)


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """How far the policy has moved from the reference, estimated token by token.

    k3 = pi_ref/pi - ln(pi_ref/pi) - 1      (printed as KL)

    DeepSeekMath, eq. (4); k3 is J. Schulman's name. Never negative, and 0 where both
    agree. As pi_ref/pi - 1 is 0 on average over tokens drawn from pi, the mean of k3 is
    KL(pi || pi_ref), with KL(p || q) = sum_v p(v) ln(p(v) / q(v)). The mean of its
    *gradient* is that of KL(pi_ref || pi), roles swapped, as in the paper.

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
    """The loss to minimise: minus GRPO's clipped objective.

    rho_it = pi(o_it) / pi_old(o_it)
    J_it   = min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i) - beta k3_it
    loss   = -mean_i( mean_t J_it ),   mean_t over the tokens with m_it = 1

    DeepSeekMath, eq. (3). The min stops pushing a token once rho has moved by eps the
    way A asks for, and never stops it from coming back. On the first step from a group
    rho is 1 and the advantages add up to 0, so the loss is beta times the mean of k3: 0
    without KL. What trains is the gradient, here that of -mean_i( A_i mean_t ln pi ).
    Why that raises the reward: over all possible texts o, as grad pi = pi grad ln pi,
    grad sum_o pi(o) r(o) = sum_o pi(o) r(o) grad ln pi(o). So the gradient of the mean
    reward is the mean of r(o) grad ln pi(o) over responses drawn from pi; and ln pi(o)
    is the sum over its tokens. (REINFORCE, lesson 1.) The divisions by length and std
    are no part of this. Dr. GRPO (arXiv 2503.20783) drops both: the first makes each
    token of a long response count less, the second makes groups with similar rewards
    count more.

    `log_probs`, `old_log_probs`, `ref_log_probs` (None without KL) and `mask` (G, L),
    `advantages` (G,); beta is `kl_coef`. Gives a scalar.
    By hand: one token, pi = 0.6, pi_old = 0.4, A = 1, eps = 0.2  ->  rho = 1.5 is
    clipped to 1.2  ->  loss -1.2, and no gradient. With A = -1  ->  loss 1.5.
    """
    # Not times 0: infinity * 0 is nan, and one nan spoils the mean and the gradient.
    filler = mask == 0
    log_probs = log_probs.masked_fill(filler, 0.0)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    advantages = advantages.unsqueeze(1)  # (G, 1): every token of a response alike
    objective = torch.min(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None:
        objective = objective - kl_coef * kl_estimate(log_probs, ref_log_probs)
    objective = objective.masked_fill(filler, 0.0)
    return -(objective.sum(1) / mask.sum(1).clamp(min=1)).mean()


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> torch.Tensor:
    """The prompt as token ids (1, P), with a chat model's own marks around it."""
    if not (USE_CHAT_TEMPLATE and tokenizer.chat_template):
        return tokenizer(prompt, return_tensors="pt").input_ids
    chat = [{"role": "user", "content": prompt}]
    marked = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return marked.input_ids


def draw_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row of `logits` (n, V), by TEMPERATURE and TOP_P: (n, 1).

    Draw from all tokens; draw again where the tokens likelier than the one drawn add up
    to TOP_P or more. The same as sorting and cutting off the tail, but faster.
    """
    probs = (logits.float() / TEMPERATURE).softmax(1)
    # To draw one, PyTorch would make a random number for each of V: draw two, use one.
    tokens = probs.multinomial(2, replacement=True)[:, :1]
    redraw = torch.full((len(probs),), TOP_P < 1, device=probs.device)
    while redraw.any():
        likelier = probs.where(probs > probs.gather(1, tokens), 0).sum(1)
        redraw = likelier >= TOP_P
        tokens[redraw] = probs[redraw].multinomial(2, replacement=True)[:, :1]
    return tokens


@torch.no_grad()
def generate_group(
    policy: Model, tokenizer: Tokenizer, prompt: str, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the policy write responses, one token a round for all of them.

    Gives prompt_ids (samples, P) and completion_ids (samples, L), filled up with ends.
    """
    prompt_ids = ids = encode_prompt(tokenizer, prompt).to(policy.device)
    cache, columns = None, []
    ended = torch.zeros(samples, 1, dtype=torch.bool, device=policy.device)
    while len(columns) < MAX_NEW_TOKENS and not ended.all():
        # The cache holds the results for all earlier tokens: only the newest is read.
        output = policy(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[:, -1], output.past_key_values
        if not columns:  # the prompt was read, once for all responses
            logits = logits.expand(samples, -1)
            cache.batch_repeat_interleave(samples)
        ids = draw_tokens(logits).masked_fill(ended, tokenizer.eos_token_id)
        ended |= ids == tokenizer.eos_token_id
        columns.append(ids)
    return prompt_ids.expand(samples, -1), torch.cat(columns, 1)


@torch.no_grad()
def score_responses(
    model: Model | None, tokenizer: Tokenizer | None, prompt: str, responses: list[str]
) -> torch.Tensor:
    """Rewards (n,) float32, one for each pair of the prompt and a response.

    The reward model's tokenizer joins a pair with its own marks between the two, as the
    model was trained. A pair that is too long loses the end of the response.
    """
    if REWARD_FUNCTION is not None:
        rewards = torch.tensor(REWARD_FUNCTION(prompt, responses), device=DEVICE)
    else:
        inputs = tokenizer(
            [prompt] * len(responses),
            responses,
            truncation="only_second",
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        rewards = model(**inputs).logits[:, 0]
    if rewards.shape != (len(responses),) or not rewards.isfinite().all():
        sys.exit(f"Not a finite reward for each response: {rewards.tolist()}")
    return rewards.float()


def evaluate(
    accelerator: Accelerator, policy: Model, tokenizer: Tokenizer, *judge: object
) -> torch.Tensor:
    """Rewards (len(PROMPTS) * EVAL_SAMPLES,) of responses that are not trained on."""
    set_seed(HELD_OUT_SEED, device_specific=True)  # plus the number of the process
    share, rewards = EVAL_SAMPLES // accelerator.num_processes, []
    for prompt in PROMPTS:
        _, completion_ids = generate_group(policy, tokenizer, prompt, share)
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        scores = score_responses(*judge, prompt, texts)  # judge: model and tokenizer
        rewards.append(accelerator.gather(scores))
    return torch.cat(rewards)


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def batch_log_probs(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Log-probabilities (G, L) of the responses in a batch, or a part of one."""
    prompt_ids, completion_ids = batch["prompt_ids"], batch["completion_ids"]
    return completion_log_probs(model, prompt_ids, completion_ids, TEMPERATURE)


@torch.no_grad()
def diagnose(log_probs: torch.Tensor, batch: dict) -> torch.Tensor:
    """What to watch: means over the responses; 1 to 3 first over a response's tokens.

    1. KL: k3, how far the policy is from the reference: 0 to 0.1 is near, 1 is far.
    2. entropy: how undecided the policy is, in nats (the unit of ln) a token: -ln pi.
       Near 0, one answer is left. A little too low if TOP_P < 1: no unlikely tokens.
    3. The share of tokens past the edge of the clip, which are pushed no further.
    4. The length in tokens. 5. The share of responses MAX_NEW_TOKENS long.
    """
    mask, ref = batch["mask"], batch["ref_log_probs"]
    kl = kl_estimate(log_probs, log_probs if ref is None else ref)  # 0 without KL
    moved = (log_probs - batch["old_log_probs"]).exp() - 1
    # rho above 1 + eps where A > 0, below 1 - eps where A < 0
    past_edge = moved * batch["advantages"].sign().unsqueeze(1) > CLIP_EPS
    length = mask.sum(1)
    sums = torch.stack([kl, -log_probs, past_edge]).masked_fill(mask == 0, 0.0).sum(2)
    return torch.stack([*(sums / length), length, length == MAX_NEW_TOKENS]).mean(1)


def grpo_step(
    accelerator: Accelerator,
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
) -> dict[str, float]:
    """INNER_STEPS gradient steps from one group, MICRO_BATCH_SIZE responses at a time.

    With INNER_STEPS = 1 the policy that learns is still the one that wrote: every ratio
    is exactly 1, and the clip never acts. A second gradient step meets a policy that
    has moved: ratios spread around 1, and the clip can act.
    On several processes each has a share of the group; Accelerate averages gradients.

    `batch` holds `prompt_ids` (G, P), `completion_ids` and `mask` (G, L), `advantages`
    (G,). Gives the loss, the figures of `diagnose` and the length of the gradient, of
    the last gradient step.
    """
    responses = len(batch["mask"])
    parts = [
        {name: column[rows] for name, column in batch.items()}
        for rows in torch.arange(responses).split(MICRO_BATCH_SIZE)
    ]
    for inner_step in range(INNER_STEPS):
        figures = 0
        for part in parts:
            log_probs = batch_log_probs(policy, part)  # (n, L)
            if inner_step == 0:  # the policy has not moved since it wrote: it is pi_old
                part["old_log_probs"] = log_probs.detach()
                part["ref_log_probs"] = None
                if reference is not None:
                    with torch.no_grad():
                        part["ref_log_probs"] = batch_log_probs(reference, part)
            old, ref = part["old_log_probs"], part["ref_log_probs"]
            advantages, mask = part["advantages"], part["mask"]
            loss = grpo_loss(log_probs, old, ref, advantages, mask, CLIP_EPS, KL_COEF)
            weight = len(log_probs) / responses  # so that the parts add up to the mean
            accelerator.backward(weight * loss)  # adds to the gradient of earlier parts
            watched = torch.cat([loss.detach().view(1), diagnose(log_probs, part)])
            figures = figures + weight * watched
        gradient = accelerator.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        if not (figures[0] + gradient).isfinite():
            sys.exit("The loss is not a finite number; the policy was left as it was.")
        optimizer.step()
        optimizer.zero_grad()
    names = "loss", "KL", "entropy", "clipped", "length", "cut off"
    figures = accelerator.reduce(figures, "mean").tolist()  # over the processes
    return dict(zip(names, figures, strict=True)) | {"gradient": gradient.item()}


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Train the policy on NUM_STEPS groups, compare before and after, save it."""
    check_settings()
    accelerator = start_accelerator()
    where = f"{accelerator.num_processes} x {accelerator.device}, {NUM_STEPS} steps"
    accelerator.print(f"GRPO on {where}. Watch the reward, not the loss.")
    size = NUM_SAMPLES // accelerator.num_processes  # of this process's share

    # 1. The policy, the reward model, and, with KL, a frozen copy of the first policy.
    writer, tokenizer, *judge = load_models()
    reference = copy.deepcopy(writer) if KL_COEF > 0 else None
    if reference is not None:
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    lr = TINY_LR if writer.name_or_path == str(TINY_MODELS / "policy") else LR
    optimizer = torch.optim.AdamW(writer.parameters(), lr, weight_decay=0.0, fused=True)
    # `policy` averages gradients over several processes; `writer` is the bare model.
    policy, optimizer = accelerator.prepare(writer, optimizer)
    history = []  # the rewards (G,) of each step

    try:
        before = evaluate(accelerator, writer, tokenizer, *judge)
        set_seed(SEED, device_specific=True)
        for step in tqdm(range(NUM_STEPS), unit="step", leave=False, disable=None):
            prompt = PROMPTS[step % len(PROMPTS)]

            # 2. Write this process's share of a group.
            prompt_ids, completion_ids = generate_group(writer, tokenizer, prompt, size)
            texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)

            # 3. Score it, and collect the rewards of the whole group.
            rewards = accelerator.gather(score_responses(*judge, prompt, texts))

            # 4. Compare within the group.
            advantages = group_advantages(rewards, SCALE_BY_STD)

            # 5. Learn, unless all rewards are equal (then even the KL is left out).
            figures = {}
            if advantages.any():
                batch = {
                    "prompt_ids": prompt_ids,
                    "completion_ids": completion_ids,
                    "mask": completion_mask(completion_ids, tokenizer.eos_token_id),
                    "advantages": advantages.split(size)[accelerator.process_index],
                }
                figures = grpo_step(accelerator, policy, reference, optimizer, batch)
            history.append(rewards.cpu())
            accelerator.log(figures | {"reward": rewards.mean().item()}, step=step)
            texts = gather_object(texts)
            if accelerator.is_main_process:
                print_step(step, texts, history[-1], figures)

        # 6. The gain, on responses that played no part in training, and the model.
        after = evaluate(accelerator, writer, tokenizer, *judge)
        accelerator.print(f"\n{len(after)} fresh responses: mean reward (std)")
        for name, rewards in [("before", before), ("after", after)]:
            accelerator.print(f"  {name} {rewards.mean():+.3f} ({rewards.std():.3f})")
    except BaseException:  # Ctrl-C, a bug in REWARD_FUNCTION: the run so far is kept
        if history:
            save_run(writer, tokenizer, history, "_interrupted")
        raise
    save_run(writer, tokenizer, history, "")


# ------------------------------------------------------------------------------------
# Housekeeping
# ------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
TINY_MODELS = HERE / "grpo_tiny"
DEFAULT_MODELS = {"gpt2", "OpenAssistant/reward-model-deberta-v3-large"}
# Ctrl-C, `kill`, a closed terminal (which Windows does not have)
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}


def check_settings() -> None:
    """Stop with one line that names every impossible setting, before anything runs."""
    folder, processes = (HERE / SAVE_DIR).resolve(), int(os.getenv("WORLD_SIZE", "1"))
    writable = not folder.is_file() and os.access(folder.parent, os.W_OK)
    split = {os.getenv(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")}
    rules = {
        "DEVICE: cpu, or cuda with a GPU": DEVICE == "cpu" or torch.cuda.is_available(),
        "MIXED_PRECISION: no or bf16": MIXED_PRECISION in ("no", "bf16"),
        "PROMPTS: a list of texts": isinstance(PROMPTS, list) and any(PROMPTS),
        "SEED: from 0 to 499,999": 0 <= SEED < 500_000,
        f"NUM_SAMPLES, EVAL_SAMPLES: from 2, shared by {processes} processes": all(
            n >= 2 and n % processes == 0 for n in (NUM_SAMPLES, EVAL_SAMPLES)
        ),
        "NUM_STEPS, MAX_NEW_TOKENS, INNER_STEPS, MICRO_BATCH_SIZE: from 1": all(
            n >= 1 for n in (NUM_STEPS, MAX_NEW_TOKENS, INNER_STEPS, MICRO_BATCH_SIZE)
        ),
        "LR, TINY_LR, TOP_P, CLIP_EPS: above 0, at most 1": all(
            0 < value <= 1 for value in (LR, TINY_LR, TOP_P, CLIP_EPS)
        ),
        "TEMPERATURE, MAX_GRAD_NORM: above 0": TEMPERATURE > 0 and MAX_GRAD_NORM > 0,
        "KL_COEF: from 0": KL_COEF >= 0,
        "SAVE_DIR: a folder outside grpo_tiny/ that can be written": writable
        and not folder.is_relative_to(TINY_MODELS),
        "USE_WANDB: pip install wandb": not USE_WANDB or find_spec("wandb"),
        "FSDP and DeepSpeed: the model is needed whole": "true" not in split,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        sys.exit(f"Settings: {'; '.join(broken)}.")


def start_accelerator() -> Accelerator:
    """Join the other processes, if this is one of several."""
    sys.stdout.reconfigure(errors="replace")  # no odd character may end a training
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # under `nohup` it is not
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C has it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    trackers = "wandb" if USE_WANDB else None
    accelerator = Accelerator(
        cpu=DEVICE == "cpu", mixed_precision=MIXED_PRECISION, log_with=trackers
    )
    accelerator.init_trackers("grpo_training")
    return accelerator


def find_model(name: str) -> str | None:
    """The model's folder here or in the cache, or its id on the Hub; None: neither."""
    folder, errors = HERE / Path(name).expanduser(), huggingface_hub.errors
    if folder.is_dir():
        return str(folder)
    try:
        huggingface_hub.model_info(name, timeout=5)  # seconds
    except (errors.HfHubHTTPError, errors.HFValidationError):
        pass  # from_pretrained will say what is wrong
    except Exception:  # there are many ways not to get there
        cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
        return str(Path(cached).parent) if isinstance(cached, str) else None
    return name


def load_model(kind: type, name: str) -> tuple[Model, Tokenizer]:
    """A model in float32, and its tokenizer; one line if either is not complete."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, loading = kind.from_pretrained(name, **options)
    except (OSError, ValueError) as problem:
        sys.exit(f"{name} cannot be loaded: {str(problem).strip()}".split("\n")[0])
    # transformers would fill what is missing with random numbers.
    if loading["missing_keys"] or len(tokenizer) <= len(tokenizer.all_special_ids) + 1:
        missing = ", ".join(sorted(loading["missing_keys"])) or "its tokenizer"
        sys.exit(f"{name} is no complete {kind.__name__}, it lacks {missing}.")
    if tokenizer.pad_token is None:  # gpt2 has none; what is padded is masked anyway
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(model.config, "max_position_embeddings", 10**9)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    # eval() switches dropout off, no more. With it, another network than the one that
    # wrote would learn: gpt2's probabilities differ by a factor of 0.87 to 1.09.
    return model.eval().to(DEVICE), tokenizer


def load_models() -> tuple[Model, Tokenizer, Model | None, Tokenizer | None]:
    """Policy and reward model, each with its tokenizer; or both of grpo_tiny/."""
    names = [POLICY_MODEL_NAME, REWARD_MODEL_NAME][: 1 if REWARD_FUNCTION else 2]
    found = [find_model(name) for name in names]
    if None in found:
        missing = names[found.index(None)]
        line = f"{missing} is not here, and the Hugging Face Hub cannot be reached"
        if not DEFAULT_MODELS.issuperset(names):
            sys.exit(f"{line}: connect to the internet, or name a folder with a model.")
        PartialState().print(f"{line}: falling back to the models in grpo_tiny/.")
        found = [str(TINY_MODELS / "policy"), str(TINY_MODELS / "reward")]
    policy, tokenizer = load_model(transformers.AutoModelForCausalLM, found[0])
    longest = max(encode_prompt(tokenizer, prompt).shape[1] for prompt in PROMPTS)
    if longest + MAX_NEW_TOKENS > tokenizer.model_max_length:
        sys.exit(f"A prompt and MAX_NEW_TOKENS together are too long for {found[0]}.")
    if REWARD_FUNCTION is not None:
        return policy, tokenizer, None, None
    judge = load_model(transformers.AutoModelForSequenceClassification, found[1])
    if judge[0].num_labels != 1:
        sys.exit(f"{found[1]} has {judge[0].num_labels} outputs, not 1 score.")
    return policy, tokenizer, *judge


def save_run(policy: Model, tokenizer: Tokenizer, history: list, suffix: str) -> None:
    """Write model, tokenizer and the curve of the rewards into SAVE_DIR + `suffix`."""
    if not PartialState().is_main_process:
        return
    heard = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    folder = HERE / (SAVE_DIR + suffix)
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".tmp") as aside:
        policy.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if history:
            draw_learning_curve(history, Path(aside, "learning_curve.png"))
        for name in ("config.json", "chat_template.jinja"):  # of an older model
            (folder / name).unlink(missing_ok=True)
        # config.json last: until then, the folder does not load as half of a model.
        for name in sorted(os.listdir(aside), key="config.json".__eq__):
            os.replace(Path(aside, name), folder / name)
    for number, handler in heard.items():
        signal.signal(number, handler)
    print(f"\nWritten: {folder.name}/. How to use the model: README.md, lesson 4")


def draw_learning_curve(history: list[torch.Tensor], path: Path) -> None:
    """Write a picture of the rewards (G,) of each step: mean, spread and best."""
    rewards = torch.stack(history)  # (steps, G)
    mean, std = rewards.mean(1), rewards.std(1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rewards.amax(1), ".", color="0.7", label="best of the group")
    axes.plot(mean, label="mean of the group")
    axes.fill_between(range(len(mean)), mean - std, mean + std, alpha=0.2)
    axes.set(title="GRPO (band: +- 1 std)", xlabel="step", ylabel="reward")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def print_step(step: int, texts: list, rewards: torch.Tensor, figures: dict) -> None:
    """Print the figures of one step, then its responses from best to worst."""
    mean, std, best = rewards.mean(), rewards.std(), rewards.max()
    tqdm.write(f"\nStep {step} | Reward {mean:+.3f} (std {std:.3f}, max {best:+.3f})")
    shown = [f"{name} {round(value, 4) + 0.0:.3g}" for name, value in figures.items()]
    tqdm.write(f"  {' | '.join(shown) or 'Skipped: all rewards are equal.'}")
    for i in rewards.argsort(descending=True).tolist():
        tqdm.write(f"  [{rewards[i]:+.2f}] {' '.join(texts[i].split())}")


if __name__ == "__main__":
    main()
