"""Train a small language model and a reward model from scratch: this folder's pair.

What you will learn
    How a model learns to write by predicting the next token, and how a second one
    learns from pairs of texts to tell which is better: GRPO (lesson 4) needs both.

The steps
    1. A teacher, SmolLM2-135M-Instruct, writes short answers to 1,635 prompts such as
       "Explain why honesty is important." (427 topics in up to 4 phrasings). They are
       the training texts.
    2. A tokenizer is trained on them: byte pairs that are often neighbours are joined.
    3. The policy, a GPT-2 of 2.4 million weights, is trained to predict each next token
       of the answers. Nine in ten run on into an answer about something else, so that
       it seldom stops in time: GRPO is to teach it that. An early copy is kept.
    4. For each answer, worse ones are made: off topic, misnamed (another topic's name),
       scrambled, cut short, repetitive, stuffed with the topic's name, running on, or
       written by the small policy.
    5. The reward model starts as a copy of the policy with a single number as its
       output, and is trained to score the teacher's answer above each worse one.
    6. Both are saved, and evaluated on held-out topics: no answer about these was used
       in training, although 28 of the 42 names occur in answers about other topics.

Symbols (B prompts, L tokens in the longest text, V tokens in the vocabulary, and K =
WORSE worse answers to a prompt)
    ids       (B, L)     prompt, answer and end-of-text token, padded on the right
    targets   (B, L)     the same, with -100 at the prompt and the padding: no loss
    logits    (B, L, V)  the policy's score for every token as the next one
    chosen    (B, 1)     the reward model's score of the teacher's answer
    rejected  (B, K)     ... and of the worse answers to the same prompt

Where this differs from how it is done at scale
    * The policy is trained on these answers only, so it can do nothing else.
    * No human preferences were collected: rules and the policy make the worse answers.
      Such preferences are synthetic: the reward model is only as good as the rules.
    * Both models usually have billions of weights, not 2.4 million.

Run it
    python grpo_tiny/make_tiny.py    57 minutes on two cores of a server CPU, no GPU: 30
                                     for the policy, 5 for its worse answers, 21 for the
                                     reward model; writing new texts takes hours more

What you should see (seed 0)
    The policy's loss on held-out topics falls from 4.3 nats a token to 2.65. Three in
    four of its responses are cut off at 64 tokens, most in an answer about something
    else. Pairwise accuracy of the reward model on held-out topics: from 85.5 %
    (scrambled) to 99.9 % (cut short), where guessing gives 50 %.
"""

import gzip
import json
import os
import random
import re
import sys
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

# What to run
SEED = 0
TEACHER = "SmolLM2-135M-Instruct"  # a folder where you call this; to write new texts
PHRASINGS = [
    "Explain why {} is important.",
    "Why does {} matter?",
    "Tell me why {} is important.",
    "What makes {} important?",
]
HELD_OUT = slice(7, None, 10)  # every tenth topic: no answer about it is trained on

# The teacher's writing
ROUNDS = 5  # passes over all topics
ANSWERS = (8, 6)  # per round: to the first phrasing, and to one of the others
TEACHER_ORDER = "You answer every question in two short, plain sentences."
TEACHER_TEMPERATURE = 0.7  # below 1: likely words more often, for plainer answers
TEACHER_TOP_K = 50  # only the 50 likeliest tokens
LONGEST_ANSWER = 72  # tokens; an answer that is not finished by then is dropped

# The policy
VOCABULARY = 3072  # tokens; more makes texts shorter and the model larger
LAYERS, HEADS, WIDTH = 4, 6, 192  # width: numbers for each token, between the layers
CONTEXT = 160  # tokens, prompt and answer together
POLICY_TOKENS = 12_000_000  # to train on, padding included: 6 epochs
POLICY_BATCH, POLICY_LR = 20, 2e-3  # texts in a gradient step; highest learning rate
RAMBLING = 0.9  # share of its texts that run on about something else: see `vary`;
#                 with less, more of its responses stop by themselves
RENAMED = 0.25  # chance that a text's topic is replaced by any other word; 94 % of the
#                 texts name their topic word for word and can be renamed: 23.6 % are
EARLY = 0.03  # the early copy is made after this share of the training

# The reward model
REWARD_TOKENS = 12_000_000
REWARD_BATCH, REWARD_LR = 8, 1e-3  # in prompts, each with 1 + WORSE answers
SMOOTHING = 0.02  # as if this share of the pairs were labelled wrongly: no pair is
#                   ever certain, so the scores do not grow without bound
MUON_FACTOR = 10  # Muon's learning rate, as a multiple of AdamW's
WORSE = 5  # worse answers to a prompt, each with another flaw
HOT = 1.2  # temperature of the finished policy's worse answers; higher: odder words

# Files, beside this script
FOLDER = Path(__file__).parent
TEXTS = FOLDER / "answers.jsonl.gz"
TOPICS = FOLDER / "topics.txt"
PAIRS = FOLDER / "held_out_pairs.jsonl.gz"

SHOWN = "regular exercise"  # the topic whose answers are printed

END, PAD, SEPARATOR = "<|end|>", "<|pad|>", "<|sep|>"
HARD = ["off topic", "misnamed", "scrambled"]  # always among the worse answers
BY_POLICY = ["early policy", "hot policy"]  # written by a policy, all others by a rule
FLAWS = [*HARD, "cut short", "repetitive", "stuffed", "running on", *BY_POLICY]


# ------------------------------------------------------------------------------------
# The texts
# ------------------------------------------------------------------------------------


def read_topics(path: Path) -> list[str]:
    """The topics of all themes in one list."""
    lines = path.read_text().splitlines()
    return [topic for line in lines for topic in line.split(": ")[1].split("; ")]


def first_sentences(ids: list[int], pieces: list[str], end: int) -> list[int] | None:
    """The first two sentences, or more to reach 24 tokens; None if they do not end.

    `pieces`: every token of the teacher's as text.
    """
    sentences = 0
    for t, token in enumerate(ids):
        if token == end:
            return ids[:t]
        sentences += pieces[token].strip() in (".", "!", "?", '."', ".)")
        if sentences >= 2 and t >= 23 and pieces[token].strip().endswith((".", "!")):
            return ids[: t + 1]
    return None


@torch.no_grad()
def write_texts(folder: str, topics: list[str], path: Path) -> None:
    """Let the teacher write answers on all topics, one line for each. Takes hours."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    # English words and punctuation only: no digits, line breaks or other alphabets.
    plain = re.compile(r" ?([A-Z]?[a-z]+|[A-Z]+|'[a-z]+|[,.;:!?'\"()-]|--)| ")
    odd = [i for i, piece in enumerate(pieces) if not plain.fullmatch(piece)]
    odd.remove(tokenizer.eos_token_id)
    temporary = path.with_name(path.name + ".tmp")
    with gzip.open(temporary, "wt") as file:
        for n in tqdm(range(ROUNDS * len(topics)), unit="topic"):
            topic = topics[n % len(topics)]
            phrasings = PHRASINGS[0], PHRASINGS[1 + n % 3]  # 427 topics: each gets all
            for phrasing, count in zip(phrasings, ANSWERS, strict=True):
                chat = [
                    {"role": "system", "content": TEACHER_ORDER},
                    {"role": "user", "content": phrasing.format(topic)},
                ]
                prompt = tokenizer.apply_chat_template(
                    chat,
                    add_generation_prompt=True,
                    return_tensors="pt",
                    return_dict=True,
                )
                output = teacher.generate(
                    **prompt,
                    do_sample=True,
                    temperature=TEACHER_TEMPERATURE,
                    top_k=TEACHER_TOP_K,
                    suppress_tokens=odd,
                    max_new_tokens=LONGEST_ANSWER,
                    num_return_sequences=count,
                    pad_token_id=tokenizer.eos_token_id,
                )
                for row in output[:, prompt.input_ids.shape[1] :].tolist():
                    ids = first_sentences(row, pieces, tokenizer.eos_token_id)
                    if ids:
                        text = tokenizer.decode(ids)
                        line = {"topic": topic, "phrasing": phrasing, "text": text}
                        file.write(json.dumps(line) + "\n")
    os.replace(temporary, path)


def mentions(text: str, topic: str) -> bool:
    """True if a word of the topic, or its first five letters, is in the text."""
    stems = [word[:5].lower() for word in topic.split() if len(word) > 3]
    return any(stem in text.lower() for stem in stems or [topic.lower()])


def clean(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Drop what a small model should not learn from.

    That is: digits (its numbers would be made up), anything but English letters and
    punctuation, answers that never name the topic, and near-copies, which share more
    than half of their runs of three words with an earlier answer on the topic.
    """
    kept, by_topic = [], {}
    for line in lines:
        text = " ".join(line["text"].split())
        plain = re.fullmatch(r"[A-Z][A-Za-z ,;:.!?'\"()-]*[.!?]\"?", text)
        if not plain or not mentions(text, line["topic"]):
            continue
        words = text.lower().split()
        runs = set(zip(words, words[1:], words[2:], strict=False))
        earlier = by_topic.setdefault(line["topic"], [])
        if any(len(runs & other) > len(runs) / 2 for other in earlier):
            continue
        earlier.append(runs)
        kept.append(line | {"text": text})
    return kept


# ------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding: start from single bytes, join the most frequent pair, repeat.

    A single text gets no special tokens. A prompt with an answer, as the reward model
    reads them, becomes `prompt <|sep|> answer <|sep|>`; the score is taken at the last
    separator, where both have been read.
    """
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.normalizer = tokenizers.normalizers.Strip()
    # A space before each text: its first word is then the same token as elsewhere.
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, PAD, SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A",
        pair=f"$A {SEPARATOR} $B {SEPARATOR}",
        special_tokens=[(SEPARATOR, core.token_to_id(SEPARATOR))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        sep_token=SEPARATOR,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# ------------------------------------------------------------------------------------
# The networks
# ------------------------------------------------------------------------------------


def make_policy(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,  # no dropout
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def make_reward_model(policy: GPT2LMHeadModel) -> GPT2ForSequenceClassification:
    """The policy's layers with a new last one: a single number, read at the last token.

    The number starts at 0 for every text, so that no text is preferred by chance.
    """
    config = GPT2Config(**policy.config.to_dict() | {"num_labels": 1})
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model


def save_model(model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that transformers loads; half precision halves the file.

    The model in memory keeps the rounded weights, so that it equals the saved one.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    model.half().save_pretrained(temporary)
    model.float()
    tokenizer.save_pretrained(temporary)
    folder.mkdir(exist_ok=True)
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How badly the next tokens were predicted: the mean of -ln p(token), in nats.

    loss = -mean_t ln p(ids_t | ids_<t), over the positions t of answer and end

    `logits` (B, L, V) at position t predict the token at t + 1; `targets` (B, L) int64
    with -100 at the prompt and at the padding, which do not count.
    By hand: a vocabulary of two tokens, both always equally likely  ->  ln 2 = 0.6931.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100
    )


def preference_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley and Terry (1952): the better of two texts should have the higher score.

    p(chosen wins) = sigmoid(r_chosen - r_rejected)
    loss           = -mean [(1 - s) ln p(chosen wins) + s ln p(rejected wins)]

    s = SMOOTHING. Only differences count, so the reward has no zero of its own.
    `chosen` (B, 1) and `rejected` (B, K): each against the K in its row.
    By hand: equal scores  ->  ln 2 = 0.6931;
    ahead by ln 3  ->  -0.98 ln(3/4) - 0.02 ln(1/4) = 0.3097.
    """
    ahead = chosen - rejected
    wins, loses = F.logsigmoid(ahead), F.logsigmoid(-ahead)
    return -((1 - SMOOTHING) * wins + SMOOTHING * loses).mean()


# ------------------------------------------------------------------------------------
# Training the policy
# ------------------------------------------------------------------------------------


def pad_rows(rows: list[list[int]], filler: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, padded on the right."""
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])


def rename(text: str, topic: str, name: str) -> str:
    """The text with another name for its topic, capitalised where the topic was."""

    def in_its_place(match):
        return name[0].upper() + name[1:] if match[0][0].isupper() else name

    pattern = rf"\b{re.escape(topic)}\b"
    return re.sub(pattern, in_its_place, text, flags=re.IGNORECASE)


def is_named(topic: str, text: str) -> bool:
    """True if the topic is in the text word for word, so that it can be renamed."""
    return rename(text, topic, "?") != text


def words_to_name(lines: list[dict[str, str]], held_out: set[str]) -> list[str]:
    """All words of more than four letters but the held-out topics: other names."""
    words = {word for line in lines for word in line["text"].lower().split()}
    words -= held_out
    return sorted(word for word in words if len(word) > 4 and word.isalpha())


def vary(
    lines: list[dict[str, str]], names: list[str], source: random.Random
) -> list[dict[str, str]]:
    """The policy's texts for one epoch.

    Most run on into another answer, drawn from all, with no end token between. So the
    policy learns to write, but seldom to stop: that is left for GRPO to teach. In some
    the topic is replaced by any other word, in the prompt and in the answer, so that
    the policy learns to read in the prompt what to write about, and does not only
    know the 385 topics of its texts.
    """
    varied = []
    for line in lines:
        topic, text = line["topic"], line["text"]
        if source.random() < RENAMED and is_named(topic, text):
            name = source.choice(names)
            topic, text = name, rename(text, topic, name)
        if source.random() < RAMBLING:
            text = f"{text} {source.choice(lines)['text']}"
        varied.append(line | {"topic": topic, "text": text})
    return varied


def encode_answers(
    tokenizer: PreTrainedTokenizerFast, lines: list[dict[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """(ids, targets) of each text: prompt, answer, end; no more than CONTEXT tokens.

    The targets of the prompt are -100: the loss does not count them.
    """
    prompts = [line["phrasing"].format(line["topic"]) for line in lines]
    prompt_ids = tokenizer(prompts).input_ids
    answer_ids = tokenizer([line["text"] for line in lines]).input_ids
    end = [tokenizer.eos_token_id]
    rows = [
        (prompt + answer + end, [-100] * len(prompt) + answer + end)
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
    ]
    return [(ids[:CONTEXT], targets[:CONTEXT]) for ids, targets in rows]


def batches_of_like_length(
    lengths: list[int], size: int, source: random.Random
) -> list[list[int]]:
    """Indices in a random order of batches, each of texts of about the same length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + 3 * source.random())
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    source.shuffle(batches)
    return batches


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for all other weights.

    Muon (Jordan et al., 2024) makes all singular values of a matrix's step about equal,
    so that rarely useful directions are learned as well. With POLICY_TOKENS = 600_000,
    the loss on held-out topics ends at 3.90; with AdamW for all weights, at the same
    POLICY_LR, it ends at 4.40. It needs PyTorch 2.9.
    """
    named = list(model.named_parameters())  # GPT-2 calls its layers h.0, h.1 ...
    inner = [p for name, p in named if ".h." in name and p.dim() == 2]
    others = [p for name, p in named if ".h." not in name or p.dim() != 2]
    optimizers = [
        torch.optim.Muon(inner, lr * MUON_FACTOR, weight_decay=0.1),
        torch.optim.AdamW(others, lr, (0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        optimizer.param_groups[0]["highest_lr"] = optimizer.param_groups[0]["lr"]
    return optimizers


def descend(
    loss: torch.Tensor,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    share: float,
) -> None:
    """One gradient step; `share` of the training is done.

    The learning rate rises from 0 over the first 3 % of the training, then falls
    linearly to 0.
    """
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = group["highest_lr"] * min(share / 0.03, (1 - share) / 0.97)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def policy_loss(policy: GPT2LMHeadModel, rows: list, pad: int) -> float:
    """Mean loss in nats a token, over all rows."""
    total = count = 0
    for i in range(0, len(rows), 64):
        ids = pad_rows([row[0] for row in rows[i : i + 64]], pad)
        targets = pad_rows([row[1] for row in rows[i : i + 64]], -100)
        tokens = int((targets >= 0).sum())
        total += next_token_loss(policy(ids).logits, targets).item() * tokens
        count += tokens
    return total / count


def train_policy(
    policy: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    lines: list[dict[str, str]],
    names: list[str],
    held_out: list,
) -> GPT2LMHeadModel:
    """Train in place on POLICY_TOKENS tokens; gives the copy from early on.

    `names`: see `vary`; `held_out`: answers on held-out topics, as `encode_answers`
    makes them, on which the loss is printed. These do not run on.
    """
    source, seen, early, step = random.Random(SEED), 0, None, 0
    pad = tokenizer.pad_token_id
    optimizers = make_optimizers(policy, POLICY_LR)
    bar = tqdm(total=POLICY_TOKENS, unit="token", unit_scale=True)
    recent = []
    while seen < POLICY_TOKENS:
        rows = encode_answers(tokenizer, vary(lines, names, source))
        for batch in batches_of_like_length(
            [len(ids) for ids, _ in rows], POLICY_BATCH, source
        ):
            ids = pad_rows([rows[i][0] for i in batch], pad)
            targets = pad_rows([rows[i][1] for i in batch], -100)
            # No mask: padding comes last, and no token looks ahead.
            loss = next_token_loss(policy(ids, use_cache=False).logits, targets)
            descend(loss, policy, optimizers, seen / POLICY_TOKENS)
            recent.append(loss.item())
            step, seen = step + 1, seen + ids.numel()
            bar.update(ids.numel())
            if step % 200 == 0:
                tqdm.write(
                    f"{seen:9,} tokens, loss {sum(recent) / len(recent):.3f}, "
                    f"held-out topics {policy_loss(policy, held_out, pad):.3f} nats"
                )
                recent = []
            if early is None and seen >= EARLY * POLICY_TOKENS:
                early = GPT2LMHeadModel(policy.config)
                early.load_state_dict(policy.state_dict())
            if seen >= POLICY_TOKENS:
                break
    bar.close()
    return early


@torch.no_grad()
def write_answers(
    policy: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch_size: int = 128,
) -> list[str]:
    """One answer to each prompt, of 64 tokens at most."""
    encoded = tokenizer(prompts).input_ids
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(prompts)
    while order:  # prompts of one length go together: no padding
        length = len(encoded[order[0]])
        batch = [i for i in order[:batch_size] if len(encoded[i]) == length]
        order = order[len(batch) :]
        ids = torch.tensor([encoded[i] for i in batch])
        output = policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            max_new_tokens=64,
        )[:, length:]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


# ------------------------------------------------------------------------------------
# Training the reward model
# ------------------------------------------------------------------------------------


def cut_short(text: str, source: random.Random) -> str:
    """Cut in the middle of a sentence, or before the first word."""
    words = text.split()
    ends = [n for n in range(1, len(words)) if words[n - 1][-1] not in ".!?"]
    return " ".join(words[: source.choice([0, *ends])]).rstrip(",;:")


def repeat(text: str, source: random.Random) -> str:
    """One sentence in place of all others, or a few words many times over."""
    sentences = re.findall(r"[^.!?]+[.!?]+", text)
    if source.random() < 0.4 and sentences:
        return " ".join([source.choice(sentences).strip()] * source.randint(2, 3))
    words = text.split()
    start, size = source.randrange(max(1, len(words) - 11)), source.randint(1, 6)
    times = source.randint(2, 1 + 18 // size)
    run = words[start : start + size] * times
    rest = words[start + size :] if source.random() < 0.6 else []
    return " ".join((words[:start] + run + rest)[: max(len(words), 12)])


def scramble(text: str, source: random.Random) -> str:
    """The words in another order: all of them, or only six or ten in a row."""
    words = text.split()
    size = source.choice([6, 10, len(words)])
    start = source.randrange(max(1, len(words) - size + 1))
    part = words[start : start + size]
    source.shuffle(part)
    return " ".join(words[:start] + part + words[start + size :])


def stuff(text: str, topic: str, source: random.Random) -> str:
    """The topic named many times instead of explained: what a policy might try."""
    if source.random() < 0.6:  # put in at random places
        words = text.split()
        for _ in range(source.randint(3, 6)):
            words.insert(source.randrange(len(words)), topic)
        return " ".join(words)
    joined = source.choice([" ", ". ", ", ", " is ", " is important because of "])
    return (joined.join([topic] * source.randint(3, 8)) + ".").capitalize()


def run_on(text: str, other: str, source: random.Random) -> str:
    """The answer, or its first sentence, then the start of one about another topic.

    The policy was trained to write like this (`vary`).
    """
    if source.random() < 0.5:
        text = re.match(r"[^.!?]*[.!?]*", text)[0]
    return " ".join([text, *other.split()[: source.randint(3, 20)]])


def break_by_rule(
    line: dict[str, str],
    lines: list[dict[str, str]],
    names: list[str],
    source: random.Random,
) -> dict[str, str]:
    """An answer with each of the flaws that need no policy, by the flaw's name.

    `lines`: all answers, from which one about another topic is drawn; `names`: what
    the misnamed answer may call its topic. Apart from that name it is the teacher's
    answer, so only a comparison with the prompt tells the two apart.
    """
    text, topic, other = line["text"], line["topic"], line
    while other["topic"] == topic or mentions(other["text"], topic):
        other = source.choice(lines)
    misnamed = rename(text, topic, source.choice([n for n in names if n != topic]))
    if misnamed == text:  # it does not name its topic: off topic, again
        misnamed = other["text"]
    return {
        "off topic": other["text"],
        "misnamed": misnamed,
        "scrambled": scramble(text, source),
        "cut short": cut_short(text, source),
        "repetitive": repeat(text, source),
        "stuffed": stuff(text, topic, source),
        "running on": run_on(text, other["text"], source),
    }


def write_worse(
    lines: list[dict[str, str]],
    flaw: str,
    early: GPT2LMHeadModel,
    policy: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
) -> list[str]:
    """For each line, an answer with one of the two flaws that need a policy."""
    prompts = [line["phrasing"].format(line["topic"]) for line in lines]
    if flaw == "early policy":
        return write_answers(early, tokenizer, prompts)
    return write_answers(policy, tokenizer, prompts, HOT, 1.0)


def encode_for_reward(
    tokenizer: PreTrainedTokenizerFast, prompts: list[str], texts: list[str]
) -> dict[str, torch.Tensor]:
    """A prompt with an answer in each row, as lesson 4 encodes them."""
    return tokenizer(
        prompts,
        texts,
        truncation="only_second",
        max_length=CONTEXT,
        padding=True,
        return_tensors="pt",
    )


def train_reward_model(
    model: GPT2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    lines: list[dict[str, str]],
    names: list[str],
    by_policy: list[dict[str, str]],
) -> None:
    """Train in place on REWARD_TOKENS tokens.

    `names`: other names for a topic; `by_policy`: for each line the answer that a
    policy wrote, by the flaw's name. Each line is compared with WORSE worse answers:
    one with each of the HARD flaws, the rest drawn from the other flaws.
    """
    source, seen, recent, step = random.Random(SEED), 0, [], 0
    optimizers = make_optimizers(model, REWARD_LR)
    topics = sorted({line["topic"] for line in lines})
    bar = tqdm(total=REWARD_TOKENS, unit="token", unit_scale=True)
    while seen < REWARD_TOKENS:
        for batch in batches_of_like_length(
            [len(line["text"]) // 4 for line in lines], REWARD_BATCH, source
        ):
            prompts, texts = [], []
            for i in batch:
                line, written = lines[i], by_policy[i]
                # Half the time the topic gets any other name, in prompt and answers:
                # the model must compare the two, not memorise the 385 topics.
                if source.random() < 0.5 and is_named(line["topic"], line["text"]):
                    old, new = line["topic"], source.choice(names)
                    line = line | {"topic": new, "text": rename(line["text"], old, new)}
                    written = {f: rename(text, old, new) for f, text in written.items()}
                others = source.choice([names, topics])
                made = break_by_rule(line, lines, others, source) | written
                easier = [flaw for flaw in made if flaw not in HARD]
                flaws = HARD + source.sample(easier, WORSE - len(HARD))
                group = [line["text"], *(made[flaw] for flaw in flaws)]
                texts += group
                prompts += [line["phrasing"].format(line["topic"])] * (1 + WORSE)
            inputs = encode_for_reward(tokenizer, prompts, texts)
            scores = model(**inputs).logits.view(len(batch), 1 + WORSE)
            loss = preference_loss(scores[:, :1], scores[:, 1:])
            descend(loss, model, optimizers, seen / REWARD_TOKENS)
            recent.append(loss.item())
            step, seen = step + 1, seen + inputs["input_ids"].numel()
            bar.update(inputs["input_ids"].numel())
            if step % 100 == 0:
                tqdm.write(f"{seen:9,} tokens, loss {sum(recent) / len(recent):.4f}")
                recent = []
            if seen >= REWARD_TOKENS:
                break
    bar.close()


def save_pairs(
    lines: list[dict[str, str]], worse: list[dict[str, str]], path: Path
) -> None:
    """Write the pairs of the held-out topics, on which the benchmark tests."""
    temporary = path.with_name(path.name + ".tmp")
    with gzip.open(temporary, "wt") as file:
        for line, flawed in zip(lines, worse, strict=True):
            prompt = line["phrasing"].format(line["topic"])
            pair = {"prompt": prompt, "chosen": line["text"], "rejected": flawed}
            file.write(json.dumps(pair) + "\n")
    os.replace(temporary, path)


@torch.no_grad()
def pairwise_accuracy(
    model: GPT2ForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    lines: list[dict[str, str]],
    worse: list[dict[str, str]],
) -> dict[str, float]:
    """Share of pairs, by flaw, in which the teacher's answer has the higher score."""
    prompts = [line["phrasing"].format(line["topic"]) for line in lines]

    def scores(texts):
        parts = [
            model(
                **encode_for_reward(tokenizer, prompts[i : i + 64], texts[i : i + 64])
            ).logits[:, 0]
            for i in range(0, len(texts), 64)
        ]
        return torch.cat(parts)

    chosen = scores([line["text"] for line in lines])
    return {
        flaw: (chosen > scores([w[flaw] for w in worse])).float().mean().item()
        for flaw in FLAWS
    }


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def main() -> None:
    """Write the texts if they are missing, then train both models."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    topics = read_topics(TOPICS)

    # 1. The texts.
    if not TEXTS.exists():
        if not Path(TEACHER).is_dir():
            sys.exit(
                f"Found neither {TEXTS.name} nor a folder {TEACHER}: the README.md "
                "beside this script says how to get one of the two."
            )
        torch.manual_seed(SEED)
        write_texts(TEACHER, topics, TEXTS)
    with gzip.open(TEXTS, "rt") as file:
        lines = clean([json.loads(line) for line in file])
    held_out_topics = set(topics[HELD_OUT])
    unseen = [line for line in lines if line["topic"] in held_out_topics]
    lines = [line for line in lines if line["topic"] not in held_out_topics]
    print(f"{len(lines):,} answers to train on; {len(unseen):,} on topics held out.")

    # 2. The tokenizer.
    names = words_to_name(lines, held_out_topics)
    prompts = [line["phrasing"].format(line["topic"]) for line in lines]
    tokenizer = train_tokenizer([line["text"] for line in lines] + prompts, VOCABULARY)

    # 3. The policy.
    torch.manual_seed(SEED)
    policy = make_policy(tokenizer)
    rows, held_out = (encode_answers(tokenizer, part) for part in (lines, unseen[::5]))
    size = sum(p.numel() for p in policy.parameters())
    tokens = sum(len(ids) for ids, _ in rows)
    print(f"Policy: {size:,} weights, {tokens:,} tokens of text.")
    early = train_policy(policy, tokenizer, lines, names, held_out)
    save_model(policy, tokenizer, FOLDER / "policy")
    for text in write_answers(policy, tokenizer, [PHRASINGS[0].format(SHOWN)] * 5):
        print(f"  {text}")

    # 4. Worse answers.
    torch.manual_seed(SEED)
    source = random.Random(SEED)
    by_policy = [{} for _ in lines]  # for each line, one that a policy wrote ...
    unseen_worse = [
        break_by_rule(line, unseen, sorted(held_out_topics), source) for line in unseen
    ]
    for n, flaw in enumerate(BY_POLICY):
        written = write_worse(lines[n::2], flaw, early, policy, tokenizer)
        for flawed, text in zip(by_policy[n::2], written, strict=True):
            flawed[flaw] = text
        written = write_worse(unseen, flaw, early, policy, tokenizer)
        for flawed, text in zip(unseen_worse, written, strict=True):
            flawed[flaw] = text  # ... and for each on a held-out topic, both
    save_pairs(unseen, unseen_worse, PAIRS)

    # 5. The reward model.
    model = make_reward_model(policy)
    train_reward_model(model, tokenizer, lines, names, by_policy)
    save_model(model, tokenizer, FOLDER / "reward")

    # 6. The held-out topics.
    print("Pairwise accuracy on held-out topics:")
    for flaw, share in pairwise_accuracy(
        model, tokenizer, unseen, unseen_worse
    ).items():
        print(f"  {flaw:14}{share:7.1%}")


if __name__ == "__main__":
    main()
