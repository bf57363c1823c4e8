"""Tests of lesson 4: grpo_training.py, on tiny models that they build themselves."""

import ast
import itertools
import re
import signal
import types
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.test_utils.testing import AccelerateTestCase
from transformers import (
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import grpo_training as lesson

ROOT = Path(lesson.__file__).parent
PAGE = (ROOT / "grpo_training.py").read_text()
EOS, WORDS = 64, 64  # the tiny policy's words are w0 ... w63, ids 0 to 63
PROMPT = "w1 w2 w3"
PROMPT_IDS = torch.tensor([[1, 2, 3]])
SMALL = {  # settings of every test, unless it changes some
    "DEVICE": "cpu",
    "PROMPTS": [PROMPT, "w4"],
    "NUM_STEPS": 2,
    "NUM_SAMPLES": 4,
    "MAX_NEW_TOKENS": 8,
    "EVAL_SAMPLES": 4,
    "LR": 1e-3,
    "TOP_P": 1.0,
    "MAX_GRAD_NORM": 1e9,
}
torch.set_num_threads(1)


def word_tokenizer():
    words = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<unk>": EOS + 1}
    words |= {"[CLS]": EOS + 2, "[SEP]": EOS + 3, "[PAD]": EOS + 4}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return core


def tiny_policy(seed=0):
    """A random GPT-2, dropout 0.1 as in the real one, and its tokenizer without pad."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=EOS + 5,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), eos_token="<eos>", unk_token="<unk>"
    )
    return GPT2LMHeadModel(config).eval(), tokenizer


def tiny_llama(kind=LlamaForCausalLM):
    """A random Llama: no bias, another position code, an untied head."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=EOS + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return kind(config).eval()


def low_words(prompt, responses):
    """A reward function: the share of the response's words that are below w32."""
    low = {f"w{i}" for i in range(32)}
    return [
        sum(word in low for word in text.split()) / max(1, len(text.split()))
        for text in responses
    ]


def tiny_reward_model(folder, labels=1, head=True, words=True):
    """A folder with a random DeBERTa that scores a pair, and its tokenizer."""
    torch.manual_seed(1)
    config = DebertaV2Config(
        vocab_size=EOS + 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=48,
        pad_token_id=EOS + 4,
        pooler_hidden_size=16,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        num_labels=labels,
        initializer_range=1.0,  # scores that really differ
    )
    model = DebertaV2ForSequenceClassification(config)
    (model if head else model.deberta).save_pretrained(folder)
    if not head:
        config.save_pretrained(folder)
    if words:
        core = word_tokenizer()
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", EOS + 2), ("[SEP]", EOS + 3)],
        )
        PreTrainedTokenizerFast(
            tokenizer_object=core,
            unk_token="<unk>",
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
        ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved models: policy and reward."""
    root = tmp_path_factory.mktemp("models")
    for part in tiny_policy():
        part.save_pretrained(root / "policy")
    tiny_reward_model(root / "reward")
    return root


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch, folders):
    """Small settings, an empty folder to write into, and a function to change some."""

    def use(**values):
        for name, value in values.items():
            monkeypatch.setattr(lesson, name, value)

    use(**SMALL, SAVE_DIR=str(tmp_path / "model"))
    use(POLICY_MODEL_NAME=str(folders / "policy"))
    use(REWARD_MODEL_NAME=str(folders / "reward"))
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in signals}
    yield use
    for number, handler in handlers.items():  # start_accelerator() sets some
        signal.signal(number, handler)
    AccelerateTestCase().tearDown()  # Accelerate keeps its state for the whole process


def write_group(policy, tokenizer, samples=8):
    """A batch for grpo_step: responses of the policy, rewarded for low words."""
    torch.manual_seed(0)
    pair = lesson.generate_group(policy, tokenizer, PROMPT, samples)
    texts = tokenizer.batch_decode(pair[1], skip_special_tokens=True)
    return {
        "prompt_ids": pair[0],
        "completion_ids": pair[1],
        "mask": lesson.completion_mask(pair[1], EOS),
        "advantages": lesson.group_advantages(torch.tensor(low_words(PROMPT, texts))),
    }


def short_policy():
    """A policy that soon ends its texts, so that their lengths differ."""
    policy, tokenizer = tiny_policy()
    policy.lm_head.weight.data[EOS] += 0.3
    return policy, tokenizer


def run_step(policy, batch, rate=1.0, reference=None):
    """One grpo_step with plain gradient descent, which shows the gradient's length."""
    optimizer = torch.optim.SGD(policy.parameters(), rate)
    return lesson.grpo_step(Accelerator(cpu=True), policy, reference, optimizer, batch)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def spy_on(monkeypatch, name, then=lambda *args: None):
    """The arguments of every call of a function of the lesson; `then` sees them too."""
    calls, real = [], getattr(lesson, name)

    def spy(*args):
        calls.append(args)
        then(*args)
        return real(*args)

    monkeypatch.setattr(lesson, name, spy)
    return calls


def fails_with(capsys, call, *words):
    """The call ends the program with status 1 and one line that holds these words."""
    with pytest.raises(SystemExit) as ending:
        call()
    line = str(ending.value.code)
    assert "\n" not in line and len(line) > 20
    assert "Traceback" not in capsys.readouterr().err
    for word in words:
        assert word in line, line


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------


def loss_of(log_probs, old_log_probs=None, advantages=(1.0,), mask=None, **options):
    """grpo_loss with eps 0.2 and, unless asked for, without a mask and without KL."""
    mask = torch.ones(log_probs.shape) if mask is None else mask
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    ref, beta = options.get("ref_log_probs"), options.get("kl_coef", 0.0)
    advantages = torch.as_tensor(advantages)
    return lesson.grpo_loss(log_probs, old, ref, advantages, mask, 0.2, beta)


def test_the_docstring_cases_worked_by_hand():
    advantages = lesson.group_advantages(torch.tensor([0.0, 1.0, 2.0]))
    assert advantages.tolist() == pytest.approx([-0.9999, 0, 0.9999], abs=1e-6)
    mask = lesson.completion_mask(torch.tensor([[5, 7, EOS, EOS]]), EOS)
    assert mask.tolist() == [[1, 1, 1, 0]]
    pi, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert lesson.kl_estimate(pi, ref).item() == pytest.approx(0.1931, abs=1e-4)
    now, then = torch.tensor([[0.6]]).log().requires_grad_(), torch.tensor([[0.4]])
    for sign, expected in [(1.0, -1.2), (-1.0, 1.5)]:
        loss = loss_of(now, then.log(), [sign])
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        gradient = torch.autograd.grad(loss, now)[0]
        assert (gradient.item() == 0) == (sign > 0)
    model = FixedLogits(torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]))
    model.logits.data[0, 0, 1] = torch.tensor(3.0).log()
    prompt, drawn = torch.tensor([[0]]), torch.tensor([[1]])
    log_probs = lesson.completion_log_probs(model, prompt, drawn, 1.0)
    assert log_probs.item() == pytest.approx(-0.2877, abs=1e-4)


class FixedLogits(torch.nn.Module):
    """A stand-in for a language model whose logits (G, P + L, V) are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, logits_to_keep, **others):
        read = self.logits[:, : input_ids.shape[1]]
        return types.SimpleNamespace(logits=read[:, -logits_to_keep:])


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_log_probs_equal_a_token_by_token_loop(temperature):
    policy, _ = tiny_policy()
    ids = torch.randint(0, WORDS, (3, 9))
    actual = lesson.completion_log_probs(policy, ids[:, :4], ids[:, 4:], temperature)
    for row in range(3):
        for t in range(5):
            logits = policy(ids[row : row + 1, : 4 + t]).logits[0, -1] / temperature
            expected = logits.log_softmax(0)[ids[row, 4 + t]]
            assert actual[row, t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_what_fills_up_on_the_right_does_not_change_the_log_probs():
    policy, _ = tiny_policy()
    ids = torch.randint(0, WORDS, (2, 9))
    prompt, response = ids[:, :4], ids[:, 4:]
    alone = lesson.completion_log_probs(policy, prompt, response, 1.0)
    filled = torch.cat([response, torch.full((2, 3), EOS)], 1)
    padded = lesson.completion_log_probs(policy, prompt, filled, 1.0)
    assert torch.allclose(alone, padded[:, :5], atol=1e-5)


def test_log_probs_come_from_float32_whatever_the_model_gives():
    torch.manual_seed(0)
    logits = 5 * torch.randn(1, 2, 50)
    ids = torch.tensor([[3, 7]])
    for temperature in (1.0, 0.7):
        model = FixedLogits(logits.bfloat16())
        log_probs = lesson.completion_log_probs(
            model, ids[:, :1], ids[:, 1:], temperature
        )
        exact = logits[0, 0].bfloat16().double() / temperature
        expected = exact.log_softmax(0)[7].item()
        assert log_probs.dtype == torch.float32
        assert log_probs.item() == pytest.approx(expected, abs=1e-5)


def test_the_mask_ends_after_the_first_end_token_wherever_it_is():
    rows = {
        (EOS, 1, 2, 3): [1, 0, 0, 0],
        (1, EOS, 2, 3): [1, 1, 0, 0],
        (1, 2, 3, EOS): [1, 1, 1, 1],
        (1, 2, 3, 4): [1, 1, 1, 1],
        (1, EOS, 2, EOS): [1, 1, 0, 0],
        (EOS, EOS, EOS, EOS): [1, 0, 0, 0],
    }
    mask = lesson.completion_mask(torch.tensor(list(rows)), EOS)
    assert mask.tolist() == list(rows.values())


def test_prompt_and_filler_get_exactly_no_gradient_and_the_end_token_gets_some():
    torch.manual_seed(0)
    model = FixedLogits(torch.randn(1, 7, EOS + 1))
    ids = torch.tensor([[1, 2, 3, 4, EOS, EOS, EOS]])  # prompt of 3, then a response
    mask = lesson.completion_mask(ids[:, 3:], EOS)
    log_probs = lesson.completion_log_probs(model, ids[:, :3], ids[:, 3:], 1.0)
    ref = log_probs.detach() + 0.5
    loss_of(log_probs, mask=mask, ref_log_probs=ref, kl_coef=0.1).backward()
    # The logits at place t choose the token at t + 1: 2 and 3 choose "4" and EOS.
    changed = model.logits.grad[0].abs().sum(1) > 0
    assert changed.tolist() == [False, False, True, True, False, False, False]


def test_the_gradient_on_a_one_token_bandit_is_the_analytic_policy_gradient():
    probs = torch.tensor([0.5, 0.25, 0.25])
    logits = probs.log().requires_grad_()
    drawn = torch.tensor([0, 0, 1, 2])  # as often as their probabilities say
    advantages = lesson.group_advantages(torch.tensor([0.0, 0.0, 1.0, 3.0]))
    log_probs = logits.log_softmax(0)[drawn].unsqueeze(1)
    loss_of(log_probs, advantages=advantages).backward()
    per_action = advantages[[0, 2, 3]]
    exact = -probs * (per_action - (probs * per_action).sum())
    assert torch.allclose(logits.grad, exact, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_the_group_s_own_mean_shortens_the_expected_gradient_to_1_less_1_over_g(size):
    probs, payoff = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, -2.0, 4.0])
    logits = probs.log().requires_grad_()
    expected = torch.zeros(3)
    for actions in itertools.product(range(3), repeat=size):  # every possible group
        advantages = lesson.group_advantages(payoff[list(actions)], False)
        log_probs = logits.log_softmax(0)[list(actions)].unsqueeze(1)
        loss = loss_of(log_probs, advantages=advantages)
        gradient = -torch.autograd.grad(loss, logits)[0]
        expected += probs[list(actions)].prod() * gradient
    exact = probs * (payoff - (probs * payoff).sum())  # of the mean payoff
    assert torch.allclose(expected, (1 - 1 / size) * exact, atol=1e-5)


@pytest.mark.parametrize("sign", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_the_clip_stops_the_push_only_past_the_edge_that_it_leads_to(sign, ratio):
    log_probs = torch.tensor([[ratio]]).log().requires_grad_()
    old = torch.zeros(1, 1)
    loss_of(log_probs, old, [sign]).backward()
    stopped = (sign > 0 and ratio > 1.2) or (sign < 0 and ratio < 0.8)
    assert log_probs.grad.item() == pytest.approx(0 if stopped else -sign * ratio)
    batch = {"mask": torch.ones(1, 1), "old_log_probs": old, "ref_log_probs": None}
    figures = lesson.diagnose(log_probs, batch | {"advantages": torch.tensor([sign])})
    assert figures[2].item() == stopped


def test_the_mean_is_over_tokens_first_and_then_over_responses():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    loss = loss_of(torch.zeros(2, 4), advantages=[3.0, 1.0], mask=mask)
    assert loss.item() == pytest.approx(-(3 + 1) / 2)  # over all tokens: -(3 + 4) / 5


def test_k3_averages_to_the_exact_kl_divergence_over_all_tokens():
    torch.manual_seed(0)
    log_pi, log_ref = torch.randn(2, 50).log_softmax(1)
    expected = (log_pi.exp() * (log_pi - log_ref)).sum()
    k3 = lesson.kl_estimate(log_pi, log_ref)
    assert (log_pi.exp() * k3).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert (k3 >= 0).all()


def test_the_gradient_of_k3_is_that_of_the_reverse_kl_divergence():
    torch.manual_seed(0)
    logits = torch.randn(50).requires_grad_()
    log_ref = torch.randn(50).log_softmax(0)
    log_pi = logits.log_softmax(0)
    (log_pi.detach().exp() * lesson.kl_estimate(log_pi, log_ref)).sum().backward()
    reverse = (log_ref.exp() * (log_ref - logits.log_softmax(0))).sum()
    assert torch.allclose(logits.grad, torch.autograd.grad(reverse, logits)[0], 0, 1e-6)


@pytest.mark.parametrize("ref", [-1.0, 1.0])
def test_the_kl_term_is_beta_times_k3_and_pulls_towards_the_reference(ref):
    log_probs = torch.zeros(1, 1, requires_grad=True)
    ref = torch.full((1, 1), ref)
    loss = loss_of(log_probs, advantages=[0.0], ref_log_probs=ref, kl_coef=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (ref.exp() - ref - 1).item())
    assert (-log_probs.grad.item() > 0) == (ref.item() > 0)


def test_wild_numbers_under_the_mask_do_not_become_nan():
    log_probs = torch.tensor([[-1.0, 1000.0, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[1, 0, 0]])
    for old, ref in [(-1000.0, 5.0), (5.0, -1000.0), (-torch.inf, 2000.0)]:
        log_probs.grad = None
        old, ref = torch.tensor([[-1.0, old, 0.0]]), torch.tensor([[-1.0, ref, 1e4]])
        loss = loss_of(log_probs, old, mask=mask, ref_log_probs=ref, kl_coef=0.1)
        loss.backward()
        assert loss.isfinite() and log_probs.grad.isfinite().all()
        assert log_probs.grad[0, 1:].tolist() == [0, 0]


def test_a_response_without_a_token_counts_as_0():
    log_probs = torch.full((2, 2), -1.0, requires_grad=True)
    loss = loss_of(log_probs, mask=torch.tensor([[1, 1], [0, 0]]))
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    "rewards", [[0.3] * 8, [0.0] * 4, [0.1 + 0.2, 0.3] * 4, [-1000.3] * 3]
)
def test_equal_rewards_give_exactly_no_advantage_float_noise_included(rewards):
    for scale in (True, False):
        assert not lesson.group_advantages(torch.tensor(rewards), scale).any()
        noise = 1e-7 * (torch.arange(len(rewards)) % 2)
        noisy = torch.tensor(rewards) * (1 + noise)
        assert not lesson.group_advantages(noisy, scale).any()


def test_rewards_that_are_small_or_near_to_each_other_are_not_taken_for_equal():
    one_worse = lesson.group_advantages(torch.tensor([1.0] * 7 + [1 - 5e-6]))
    assert one_worse[7] < 0 < one_worse[0]
    for rewards in ([1e-4, 2e-4], [1.0, 1.00001], [-1000.0, -999.0], [0.0, 1e-3]):
        advantages = lesson.group_advantages(torch.tensor(rewards), False)
        half = (rewards[1] - rewards[0]) / 2
        assert advantages.tolist() == pytest.approx([-half, half], rel=0.02)
        assert lesson.group_advantages(torch.tensor(rewards))[1] > 0


def test_the_switch_for_the_std_leaves_the_plain_difference():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert lesson.group_advantages(rewards, False).tolist() == [-2, -1, 3]
    scaled = lesson.group_advantages(rewards * 10)
    assert torch.allclose(scaled, lesson.group_advantages(rewards), atol=1e-3)


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.5), (0.7, 1.0), (0.9, 2.0)])
def test_tokens_are_drawn_from_the_whole_vocabulary_or_its_exact_nucleus(
    settings, top_p, temperature
):
    torch.manual_seed(0)
    settings(TOP_P=top_p, TEMPERATURE=temperature)
    logits = 2 * torch.randn(2, 200)  # two rows that differ, 20,000 draws of each
    warper = transformers.TopPLogitsWarper(top_p)
    expected = warper(None, logits / temperature).softmax(1)
    tokens = lesson.draw_tokens(logits.repeat(20_000, 1))
    assert tokens.shape == (40_000, 1)
    for row in (0, 1):
        counts = torch.bincount(tokens[row::2, 0], minlength=200).float()
        assert (counts[expected[row] == 0] == 0).all()
        assert (counts > 0).sum() > 50 or top_p < 1  # a hidden top_k would leave 50
        spread = (expected[row] * (1 - expected[row]) / 20_000).sqrt()
        assert ((counts / 20_000 - expected[row]).abs() <= 5 * spread + 2e-4).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cold_drawing_equals_the_library_s_greedy_search(settings, family):
    settings(TEMPERATURE=1e-3, MAX_NEW_TOKENS=16)
    policy, tokenizer = tiny_policy(3)
    policy = policy if family == "gpt2" else tiny_llama()
    policy.lm_head.weight.data.normal_()
    prompt_ids, drawn = lesson.generate_group(policy, tokenizer, PROMPT, 3)
    assert prompt_ids.tolist() == PROMPT_IDS.expand(3, -1).tolist()
    greedy = policy.generate(
        PROMPT_IDS, do_sample=False, max_new_tokens=16, pad_token_id=EOS
    )[0, 3:]
    for row in drawn:
        assert row.tolist() == greedy.tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_probabilities_that_are_trained_are_those_that_were_drawn_from(
    settings, monkeypatch, family
):
    settings(TEMPERATURE=1.3)
    policy, tokenizer = short_policy()
    policy = policy if family == "gpt2" else tiny_llama()
    calls = spy_on(monkeypatch, "draw_tokens")
    batch = write_group(policy, tokenizer, 24)
    drawn = (torch.stack([logits for (logits,) in calls], 1) / 1.3).log_softmax(2)
    drawn = drawn.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    trained = lesson.batch_log_probs(policy, batch)
    assert 0 < batch["mask"].sum() < batch["mask"].numel() or family == "llama"
    difference = (trained - drawn).masked_fill(batch["mask"] == 0, 0)
    assert difference.abs().max() < 1e-5


def test_a_response_holds_end_tokens_after_its_end_and_writing_ends_with_the_last():
    policy, tokenizer = short_policy()
    torch.manual_seed(0)
    _, ids = lesson.generate_group(policy, tokenizer, PROMPT, 40)
    mask = lesson.completion_mask(ids, EOS)
    assert 0 < mask.sum() < mask.numel() and ids.shape[1] == lesson.MAX_NEW_TOKENS
    assert (ids[mask == 0] == EOS).all()
    assert len({tuple(row.tolist()) for row in ids}) > 20
    policy.transformer.ln_f.bias.data += 100 * policy.lm_head.weight.data[EOS]
    _, ids = lesson.generate_group(policy, tokenizer, PROMPT, 4)
    assert ids.tolist() == [[EOS]] * 4


def chat_policy(folder):
    """A policy in a folder, whose tokenizer has a chat template with two marks."""
    policy, tokenizer = tiny_policy()
    marks = {"additional_special_tokens": ["[CLS]", "[SEP]"]}
    tokenizer.add_special_tokens(marks)
    tokenizer.chat_template = (
        "{% for m in messages %}[CLS] {{ m['role'] == 'user' and m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %} [SEP]{% endif %}"
    )
    policy.lm_head.weight.data[EOS + 2 : EOS + 4] += 0.2  # writes marks, too
    for part in (policy, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def test_a_chat_model_gets_the_prompt_in_its_own_format(settings, tmp_path):
    kind = transformers.AutoModelForCausalLM
    tokenizer = lesson.load_model(kind, chat_policy(tmp_path / "chat"))[1]
    marked = [[EOS + 2, 1, 2, 3, EOS + 3]]
    assert lesson.encode_prompt(tokenizer, PROMPT).tolist() == marked
    settings(USE_CHAT_TEMPLATE=False)
    assert lesson.encode_prompt(tokenizer, PROMPT).tolist() == [[1, 2, 3]]
    settings(USE_CHAT_TEMPLATE=True)
    plain = tiny_policy()[1]  # has no template
    assert lesson.encode_prompt(plain, PROMPT).tolist() == [[1, 2, 3]]


def test_what_is_scored_and_printed_of_a_chat_is_plain_text(
    settings, tmp_path, monkeypatch, capsys
):
    seen, wrote = [], []

    def judge(prompt, responses):
        seen.append((prompt, responses))
        return [len(text) + i for i, text in enumerate(responses)]

    settings(POLICY_MODEL_NAME=chat_policy(tmp_path / "chat"), REWARD_FUNCTION=judge)
    batches = spy_on(monkeypatch, "grpo_step", lambda *a: wrote.append(a[4]))
    lesson.main()
    out = capsys.readouterr().out
    texts = [text for _, responses in seen for text in responses]
    ids = torch.cat([b["completion_ids"].flatten() for b in wrote])
    assert (ids >= EOS + 2).any()  # marks were written
    assert {prompt for prompt, _ in seen} == {PROMPT, "w4"}
    for mark in ("[CLS]", "[SEP]", "<eos>"):
        assert not any(mark in text for text in texts) and mark not in out
    assert all(text in out for text in seen[2][1])
    assert batches[0][4]["prompt_ids"][0].tolist() == [EOS + 2, 1, 2, 3, EOS + 3]


@pytest.mark.parametrize("prompt", [[1, 2, 3], [EOS + 2, 1, 2, 3, EOS + 3]])
def test_a_step_trains_the_response_and_its_end_and_nothing_of_the_prompt(prompt):
    torch.manual_seed(0)
    size = len(prompt)
    batch = {
        "prompt_ids": torch.tensor([prompt] * 2),
        "completion_ids": torch.tensor([[7, EOS, EOS], [8, 9, EOS]]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    batch["mask"] = lesson.completion_mask(batch["completion_ids"], EOS)
    model = FixedLogits(torch.randn(2, size + 3, EOS + 5))
    before = model.logits.detach().clone()
    run_step(model, batch)
    # The logits at place t choose the token at t + 1.
    changed = (model.logits - before).abs().sum(2) > 0
    for row, length in [(0, 2), (1, 3)]:
        trained = [size - 1 <= t < size - 1 + length for t in range(size + 3)]
        assert changed[row].tolist() == trained


def load_reward(folder):
    kind = transformers.AutoModelForSequenceClassification
    return lesson.load_model(kind, str(folder))


def test_the_reward_model_reads_pairs_cut_on_the_response_only(folders):
    model, tokenizer = load_reward(folders / "reward")
    prompt, long = (" ".join(f"w{i}" for i in range(n)) for n in (30, 60))
    responses = ["w5 w6", long, "w7"]
    scores = lesson.score_responses(model, tokenizer, prompt, responses)
    for text, score in zip(responses, scores, strict=True):
        words = [int(w[1:]) for w in text.split()][: 48 - 33]
        ids = [EOS + 2, *range(30), EOS + 3, *words, EOS + 3]
        kinds = [0] * 32 + [1] * (len(words) + 1)
        expected = model(
            input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])
        ).logits
        assert score.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_tokenizer_that_is_only_an_spm_model_works(tmp_path):
    tiny_reward_model(tmp_path, words=False)
    text = tmp_path / "text.txt"
    text.write_text("why is exercise good for you? it helps you to sleep.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    model, tokenizer = load_reward(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    prompt, response = "why is exercise good?", "it helps."
    expected = [1, *pieces.encode(prompt), 2, *pieces.encode(response), 2]
    assert tokenizer(prompt, response).input_ids == expected
    assert lesson.score_responses(model, tokenizer, prompt, [response]).isfinite()


def test_the_responses_before_and_after_do_not_depend_on_the_seed(settings, capsys):
    settings(REWARD_FUNCTION=low_words)
    outs = []
    for seed in (0, 1):
        settings(SEED=seed)
        lesson.main()
        outs.append(capsys.readouterr().out)
    before = [re.search(r"before +(\S+)", out)[1] for out in outs]
    steps = [re.findall(r"\[\+\d\.\d\d\] .*", out) for out in outs]
    assert before[0] == before[1] and steps[0] != steps[1]


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def ratios_of(calls):
    return [(call[0] - call[1]).detach().exp() for call in calls]


def test_with_one_inner_step_ratio_is_1_and_loss_0_while_the_gradient_is_not(
    monkeypatch,
):
    policy, tokenizer = tiny_policy()
    before = weights(policy)
    calls = spy_on(monkeypatch, "grpo_loss")
    figures = run_step(policy, write_group(policy, tokenizer))
    assert (ratios_of(calls)[0] == 1).all()
    assert f"{abs(figures['loss']):.4f}" == "0.0000" and figures["KL"] == 0
    assert figures["clipped"] == 0 and figures["gradient"] > 1e-3
    assert not torch.equal(before, weights(policy))


def test_with_two_inner_steps_the_ratio_leaves_1_and_the_clip_acts(
    settings, monkeypatch
):
    calls, results = spy_on(monkeypatch, "grpo_loss"), []
    for clip in (0.2, 1e-4, 1.0):
        settings(INNER_STEPS=3, CLIP_EPS=clip)
        calls.clear()
        policy, tokenizer = tiny_policy()
        figures = run_step(policy, write_group(policy, tokenizer), rate=3.0)
        ratios = ratios_of(calls)
        assert len(ratios) == 3 and (ratios[0] == 1).all()
        assert (ratios[2] - 1).abs().max() > 0.2  # against the policy that wrote
        assert torch.equal(calls[1][1], calls[2][1])
        results.append((weights(policy), figures["clipped"]))
    assert min(results[0][1], results[1][1]) > results[2][1] >= 0
    assert not torch.equal(results[0][0], results[2][0])


def test_the_figures_of_a_step_worked_by_hand(settings):
    settings(MAX_NEW_TOKENS=3)
    half, third = torch.tensor(0.5).log(), torch.tensor(1 / 3).log()
    batch = {
        "mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
        "old_log_probs": torch.stack([half, 9 * half, third]).repeat(2, 1),
        "ref_log_probs": torch.full((2, 3), 0.25).log(),
        "advantages": torch.tensor([-1.0, 1.0]),
    }
    log_probs = torch.stack([half, half, half]).repeat(2, 1)
    kl, entropy, clipped, length, cut_off = lesson.diagnose(log_probs, batch).tolist()
    assert kl == pytest.approx(0.1931, abs=1e-4)
    assert entropy == pytest.approx(0.6931, abs=1e-4)
    assert clipped == pytest.approx((0 + 2 / 3) / 2)
    assert length == 2 and cut_off == 0.5
    settings(MAX_NEW_TOKENS=4)
    assert lesson.diagnose(log_probs, batch)[4] == 0


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_the_gradient_is_shortened_to_its_limit_and_printed_as_it_was(settings, limit):
    settings(MAX_GRAD_NORM=limit)
    policy, tokenizer = tiny_policy()
    before = weights(policy)
    figures = run_step(policy, write_group(policy, tokenizer))
    moved = (weights(policy) - before).norm().item()
    assert figures["gradient"] > 0.01
    assert moved == pytest.approx(min(limit, figures["gradient"]), rel=1e-3)


def test_one_step_makes_better_responses_likelier_and_worse_ones_rarer():
    policy, tokenizer = tiny_policy()
    batch = write_group(policy, tokenizer)

    def likelihood():
        log_probs = lesson.batch_log_probs(policy, batch).detach() * batch["mask"]
        return log_probs.sum(1) / batch["mask"].sum(1)

    before, better = likelihood(), batch["advantages"] > 0
    run_step(policy, batch, rate=0.01)
    change = likelihood() - before
    assert change[better].mean() > 0 > change[~better].mean()


def test_micro_batches_give_the_update_of_one_batch(settings):
    results = []
    for size in (8, 3, 1):
        settings(MICRO_BATCH_SIZE=size, INNER_STEPS=2, KL_COEF=0.1)
        policy, tokenizer = short_policy()
        batch = write_group(policy, tokenizer)
        figures = run_step(policy, batch, 0.1, tiny_policy(5)[0])
        results.append((weights(policy), figures))
    assert not torch.equal(results[0][0], weights(short_policy()[0]))
    assert results[0][1]["KL"] > 0.01
    for other, figures in results[1:]:
        assert torch.allclose(results[0][0], other, atol=1e-6)
        assert figures == pytest.approx(results[0][1], rel=1e-3, abs=1e-6)


def test_the_group_s_size_does_not_set_what_is_held_at_once(settings):
    settings(MICRO_BATCH_SIZE=2)
    policy, tokenizer = tiny_policy()
    batch = write_group(policy, tokenizer, 9)
    sizes = []
    policy.lm_head.register_forward_pre_hook(
        lambda module, args: sizes.append(tuple(args[0].shape[:2]))
    )
    run_step(policy, batch)
    length = batch["mask"].shape[1]  # logits of the response only, not of the prompt
    assert sizes == [(2, length)] * 4 + [(1, length)]


def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(
    capsys, monkeypatch
):
    policy, tokenizer = tiny_policy()
    batch, before, good = write_group(policy, tokenizer), weights(policy), None
    good = lesson.grpo_loss
    for spoil in (
        lambda log_probs, loss: loss * torch.nan,
        lambda log_probs, loss: loss + (log_probs.sum() * 0).sqrt(),  # gradient only
    ):
        monkeypatch.setattr(lesson, "grpo_loss", lambda *a, f=spoil: f(a[0], good(*a)))
        fails_with(capsys, lambda: run_step(policy, batch), "loss", "finite")
        policy.zero_grad()
    assert torch.equal(before, weights(policy))


def test_dropout_never_acts(settings, monkeypatch):
    calls, training = spy_on(monkeypatch, "grpo_loss"), []
    spy_on(monkeypatch, "grpo_step", lambda *a: training.append(a[1].training))
    lesson.main()  # with dropout, the policy that learns is not the one that wrote
    assert training == [False, False]
    rows = []
    policy, tokenizer = tiny_policy()
    batch = write_group(policy, tokenizer)
    for _ in range(2):
        torch.seed()
        rows.append(lesson.batch_log_probs(policy, batch))
    assert torch.equal(*rows) and len(calls) == 2


def learn(settings, monkeypatch, seed=0):
    """Mean rewards of the first and of the last 5 of 40 steps of main()."""
    settings(REWARD_FUNCTION=low_words, NUM_STEPS=40, NUM_SAMPLES=8, SEED=seed)
    settings(LR=6e-3, MAX_NEW_TOKENS=8, EVAL_SAMPLES=2, PROMPTS=[PROMPT])
    saved = spy_on(monkeypatch, "save_run")
    lesson.main()
    means = torch.stack(saved[-1][2]).mean(1)
    assert len(means) == 40
    return means[:5].mean().item(), means[-5:].mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns(settings, monkeypatch, seed):
    first, last = learn(settings, monkeypatch, seed)
    assert first < 0.65 and last > 0.85


def test_it_learns_with_inner_steps_kl_and_micro_batches(settings, monkeypatch):
    settings(INNER_STEPS=2, KL_COEF=0.01, MICRO_BATCH_SIZE=3, SCALE_BY_STD=False)
    first, last = learn(settings, monkeypatch)
    assert first < 0.65 and last > 0.8


def test_it_unlearns_with_the_sign_flipped(settings, monkeypatch):
    right = lesson.group_advantages
    settings(group_advantages=lambda *a: -right(*a))
    first, last = learn(settings, monkeypatch)
    assert first > 0.35 and last < 0.15


def test_it_does_not_learn_from_shuffled_advantages(settings, monkeypatch):
    right, source = lesson.group_advantages, torch.Generator().manual_seed(0)
    settings(
        group_advantages=lambda rewards, *others: right(rewards, *others)[
            torch.randperm(len(rewards), generator=source)
        ]
    )
    assert 0.25 < learn(settings, monkeypatch)[1] < 0.75


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights_that_move(
    settings, tmp_path, monkeypatch
):
    settings(MIXED_PRECISION="bf16", LR=1e-5)
    used = set()

    def watch(accelerator, policy, *others):
        head = policy.lm_head
        head.register_forward_hook(lambda m, args, out: used.add(out.dtype))
        assert {p.dtype for p in policy.parameters()} == {torch.float32}

    spy_on(monkeypatch, "grpo_step", watch)
    lesson.main()
    assert used == {torch.bfloat16}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert saved.dtype == torch.float32
    change = weights(saved) - weights(tiny_policy()[0])
    # Steps of 1e-5 that bfloat16 weights of 0.02 would lose. (Unused places stay.)
    large = weights(tiny_policy()[0]).abs() > 0.02
    assert (change[large] != 0).float().mean() > 0.8


# ------------------------------------------------------------------------------------
# The page itself
# ------------------------------------------------------------------------------------


def test_the_first_page_is_the_lesson_and_housekeeping_comes_last():
    lines = PAGE.splitlines()
    functions = {
        node.name: node
        for node in ast.parse(PAGE).body
        if isinstance(node, ast.FunctionDef)
    }
    banners = [
        lines.index(f"# {name}") + 1 for name in ("The equations", "Collecting data")
    ]
    below = lines.index("# Housekeeping") + 1
    assert functions["main"].end_lineno < below
    assert len(lines) - functions["main"].end_lineno <= 170
    equations = [
        name for name, f in functions.items() if banners[0] < f.lineno < banners[1]
    ]
    assert functions[equations[0]].lineno <= 190
    for name, function in functions.items():
        assert name in equations or len(function.args.args) <= 6, name


def test_the_settings_are_20_to_26_constants_and_each_is_used():
    page = PAGE.split("\n# Settings\n")[1].split("\n# The equations\n")
    names = re.findall(r"^([A-Z_]+) = ", page[0], re.MULTILINE)
    derived = {"HELD_OUT_SEED"}  # nobody needs to change it
    assert 20 <= len(set(names) - derived) <= 26
    for name in names:
        assert re.search(rf"\b{name}\b", re.sub("#.*", "", page[1])), name
