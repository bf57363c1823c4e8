"""Tests of lesson 4: grpo_training.py, on tiny models that they build themselves."""

import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
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
EOS, WORDS = 64, 64  # the tiny policy's words are w0 ... w63, ids 0 to 63
PROMPT = "w1 w2 w3"
SAMPLING = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0, "batch_size": 8}
STEP = {
    "clip_eps": 0.2,
    "inner_steps": 1,
    "kl_coef": 0.0,
    "scale_by_std": True,
    "max_grad_norm": 1e9,
    "micro_batch_size": 8,
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


def tiny_llama(**other):
    """A random Llama: no bias, another position code, a padding token if asked for."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=EOS + 5,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=EOS,
        eos_token_id=EOS,
        **other,
    )
    return LlamaForCausalLM(config).eval()


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models: policy and reward."""
    root = tmp_path_factory.mktemp("models")
    for part in tiny_policy():
        part.save_pretrained(root / "policy")
    tiny_reward_model(root / "reward")
    return root


@pytest.fixture
def in_folder(tmp_path, monkeypatch, folders):
    """main() on the tiny pair, for two steps, writing into an empty folder."""
    settings = {
        "DEVICE": "cpu",
        "POLICY_MODEL_NAME": str(folders / "policy"),
        "REWARD_MODEL_NAME": str(folders / "reward"),
        "PROMPTS": [PROMPT, "w4"],
        "NUM_STEPS": 2,
        "NUM_SAMPLES": 4,
        "EVAL_SAMPLES": 4,
        "MAX_NEW_TOKENS": 8,
        "SAVE_DIR": str(tmp_path / "trained_model"),
        "CURVE_PATH": tmp_path / "curve.png",
    }
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)
    return tmp_path


def run_step(policy, tokenizer, optimizer, seed=0, score=None, reference=None, **other):
    """One grpo_step with the settings above; `other` replaces some."""
    sampling = {k: other.pop(k, v) for k, v in SAMPLING.items()}
    source = torch.Generator().manual_seed(seed)
    return lesson.grpo_step(
        Accelerator(cpu=True),
        policy,
        reference,
        optimizer,
        tokenizer,
        score or (lambda prompt, texts: torch.tensor(low_words(prompt, texts))),
        PROMPT,
        lesson.draw_seeds(source, other.pop("group", 8)),
        sampling,
        **{**STEP, **other},
    )


def sgd(policy, rate=1.0):
    return torch.optim.SGD(policy.parameters(), rate)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


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


def test_the_docstring_cases_worked_by_hand():
    advantages = lesson.group_advantages(torch.tensor([0.0, 1.0, 2.0]))
    assert advantages.tolist() == pytest.approx([-0.9999, 0, 0.9999], abs=1e-6)
    mask = lesson.completion_mask(torch.tensor([[5, 7, EOS, EOS]]), EOS)
    assert mask.tolist() == [[1, 1, 1, 0]]
    pi, ref = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert lesson.kl_estimate(pi, ref).item() == pytest.approx(0.1931, abs=1e-4)
    now, then = torch.tensor([[0.6]]).log(), torch.tensor([[0.4]]).log()
    for sign, expected in [(1.0, -1.2), (-1.0, 1.5)]:
        loss = lesson.grpo_loss(
            now, then, None, torch.tensor([sign]), torch.ones(1, 1), 0.2, 0.0
        )
        assert loss.item() == pytest.approx(expected, abs=1e-5)
    model = FixedLogits(torch.tensor([[[0.0, 3.0], [0.0, 0.0]]]).log1p())
    ids = torch.tensor([[0, 1]])
    model.logits.data[0, 0] = torch.tensor([0.0, torch.tensor(3.0).log()])
    log_probs = lesson.completion_log_probs(model, ids, torch.ones_like(ids), 1, 1.0)
    assert log_probs.item() == pytest.approx(-0.2877, abs=1e-4)


class FixedLogits(torch.nn.Module):
    """A stand-in for a language model whose logits (G, P + L, V) are its parameters."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, logits_to_keep, **others):
        read = self.logits[:, : input_ids.shape[1]]
        return types.SimpleNamespace(logits=read[:, -logits_to_keep:])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("padding", [0, 2])
def test_log_probs_equal_a_token_by_token_loop(temperature, padding):
    policy, _ = tiny_policy()
    ids = torch.randint(0, WORDS, (3, 9))
    filler = torch.full((3, padding), EOS)
    attention = torch.cat([torch.zeros_like(filler), torch.ones_like(ids)], 1)
    actual = lesson.completion_log_probs(
        policy, torch.cat([filler, ids], 1), attention, 5, temperature
    )
    for row in range(3):
        for t in range(5):
            logits = policy(ids[row : row + 1, : 4 + t]).logits[0, -1] / temperature
            expected = logits.log_softmax(0)[ids[row, 4 + t]]
            assert actual[row, t].item() == pytest.approx(expected.item(), abs=1e-5)


def test_what_fills_up_on_the_right_does_not_change_the_log_probs():
    policy, _ = tiny_policy()
    ids = torch.randint(0, WORDS, (2, 9))
    attention = torch.ones_like(ids)
    alone = lesson.completion_log_probs(policy, ids, attention, 5, 1.0)
    filled = torch.cat([ids, torch.full((2, 3), EOS)], 1)
    attention = torch.cat([attention, torch.zeros(2, 3, dtype=torch.long)], 1)
    padded = lesson.completion_log_probs(policy, filled, attention, 8, 1.0)
    assert torch.allclose(alone, padded[:, :5], atol=1e-5)


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
    attention = torch.cat([torch.ones(1, 3, dtype=torch.long), mask], 1)
    log_probs = lesson.completion_log_probs(model, ids, attention, 4, 1.0)
    ref = log_probs.detach() + 0.5
    lesson.grpo_loss(
        log_probs, log_probs.detach(), ref, torch.ones(1), mask, 0.2, 0.1
    ).backward()
    # The logits at place t choose the token at t + 1: 2 and 3 choose "4" and EOS.
    changed = model.logits.grad[0].abs().sum(1) > 0
    assert changed.tolist() == [False, False, True, True, False, False, False]


def test_the_gradient_on_a_one_token_bandit_is_the_analytic_policy_gradient():
    probs = torch.tensor([0.5, 0.25, 0.25])
    logits = probs.log().requires_grad_()
    drawn = torch.tensor([0, 0, 1, 2])  # as often as their probabilities say
    advantages = lesson.group_advantages(torch.tensor([0.0, 0.0, 1.0, 3.0]))
    log_probs = logits.log_softmax(0)[drawn].unsqueeze(1)
    mask = torch.ones(4, 1)
    lesson.grpo_loss(
        log_probs, log_probs.detach(), None, advantages, mask, 0.2, 0.0
    ).backward()
    per_action = advantages[[0, 2, 3]]
    exact = -probs * (per_action - (probs * per_action).sum())
    assert torch.allclose(logits.grad, exact, atol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 1.5])
def test_the_clip_stops_the_push_only_past_the_edge_that_it_leads_to(sign, ratio):
    log_probs = torch.tensor([[ratio]]).log().requires_grad_()
    loss = lesson.grpo_loss(
        log_probs,
        torch.zeros(1, 1),
        None,
        torch.tensor([sign]),
        torch.ones(1, 1),
        0.2,
        0,
    )
    loss.backward()
    stopped = (sign > 0 and ratio > 1.2) or (sign < 0 and ratio < 0.8)
    assert log_probs.grad.item() == pytest.approx(0 if stopped else -sign * ratio)
    clipped = lesson.token_sums(
        log_probs, torch.zeros(1, 1), None, torch.tensor([sign]), torch.ones(1, 1), 0.2
    )[2]
    assert clipped.item() == stopped


def test_the_mean_is_over_tokens_first_and_then_over_responses():
    log_probs = torch.zeros(2, 4)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    loss = lesson.grpo_loss(
        log_probs, log_probs, None, torch.tensor([3.0, 1.0]), mask, 0.2, 0.0
    )
    assert loss.item() == pytest.approx(-(3 + 1) / 2)  # over all tokens: -(3 + 4) / 5


def test_k3_averages_to_the_exact_kl_divergence_over_all_tokens():
    torch.manual_seed(0)
    log_pi, log_ref = torch.randn(2, 50).log_softmax(1)
    expected = (log_pi.exp() * (log_pi - log_ref)).sum()
    k3 = lesson.kl_estimate(log_pi, log_ref)
    assert (log_pi.exp() * k3).sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert (k3 >= 0).all()


def test_the_kl_term_pulls_towards_the_reference():
    for ref in (-1.0, 1.0):
        log_probs = torch.zeros(1, 1, requires_grad=True)
        lesson.grpo_loss(
            log_probs,
            torch.zeros(1, 1),
            torch.full((1, 1), ref),
            torch.zeros(1),
            torch.ones(1, 1),
            0.2,
            0.1,
        ).backward()
        assert (-log_probs.grad.item() > 0) == (ref > 0)


def test_wild_numbers_under_the_mask_do_not_become_nan():
    log_probs = torch.tensor([[-1.0, 1000.0, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[1, 0, 0]])
    old = torch.tensor([[-1.0, -1000.0, 0.0]])
    loss = lesson.grpo_loss(log_probs, old, old, torch.ones(1), mask, 0.2, 0.1)
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()
    assert log_probs.grad[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("rewards", [[0.3] * 8, [0.0] * 4, [0.1 + 0.2, 0.3] * 4])
def test_equal_rewards_give_exactly_no_advantage_float_noise_included(rewards):
    assert not lesson.group_advantages(torch.tensor(rewards)).any()
    noisy = torch.tensor(rewards) * (1 + 1e-7 * torch.arange(len(rewards)) % 2)
    assert not lesson.group_advantages(noisy).any()


def test_the_switch_for_the_std_leaves_the_plain_difference():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert lesson.group_advantages(rewards, False).tolist() == [-2, -1, 3]
    scaled = lesson.group_advantages(rewards * 10)
    assert torch.allclose(scaled, lesson.group_advantages(rewards), atol=1e-3)


# ------------------------------------------------------------------------------------
# Collecting data
# ------------------------------------------------------------------------------------


def generate(policy, seeds=range(8), **other):
    ids = torch.tensor([[1, 2, 3]])
    return lesson.generate_group(policy, ids, EOS, list(seeds), **{**SAMPLING, **other})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cold_drawing_equals_the_library_s_greedy_search(family):
    policy = tiny_policy(3)[0] if family == "gpt2" else tiny_llama()
    policy.lm_head.weight.data.normal_()
    drawn = generate(policy, seeds=[1], temperature=0.01)[0]
    greedy = policy.generate(
        torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=16, pad_token_id=EOS
    )[0, 3:]
    assert drawn[: len(greedy)].tolist() == greedy.tolist()


def test_packed_weights_give_the_same_logits_and_leave_the_policy_as_it_was():
    policy, _ = tiny_policy()
    ids = torch.randint(0, WORDS, (8, 1))
    with torch.no_grad():
        plain = policy(ids).logits
        with pytest.raises(KeyError), lesson.packed_weights(policy, 8):
            packed = policy(ids).logits
            assert "forward" in vars(policy.lm_head)
            raise KeyError
        assert torch.allclose(plain, packed, atol=1e-5)
        assert torch.equal(plain, policy(ids).logits)
    assert not any("forward" in vars(module) for module in policy.modules())


def test_a_response_depends_on_its_seed_only_and_not_on_its_neighbours():
    policy, _ = tiny_policy()
    together = generate(policy, top_p=0.9)
    apart = generate(policy, top_p=0.9, batch_size=3)
    assert torch.equal(together, apart)
    assert torch.equal(together[5:6], generate(policy, seeds=[5], top_p=0.9))
    assert len({tuple(row.tolist()) for row in together}) == 8


def test_after_its_end_a_response_holds_nothing_but_end_tokens():
    policy, _ = tiny_policy()
    policy.lm_head.weight.data[EOS] += 0.5
    ids = generate(policy, seeds=range(40))
    mask = lesson.completion_mask(ids, EOS)
    assert 0 < mask.sum() < mask.numel()
    assert (ids[mask == 0] == EOS).all()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_drawn_from_the_whole_vocabulary_or_its_exact_nucleus(top_p):
    torch.manual_seed(0)
    logits = torch.randn(1, 200)
    warper = transformers.TopPLogitsWarper(top_p)
    expected = warper(None, logits / 1.5).softmax(1)[0]
    generators = [torch.Generator().manual_seed(0)]
    rows = [lesson.draw_tokens(logits, 1.5, top_p, generators) for _ in range(6_000)]
    counts = torch.bincount(torch.cat(rows), minlength=200).float()
    assert (counts[expected == 0] == 0).all()
    assert (counts > 0).sum() > 50  # a hidden top_k would leave 50
    spread = (expected * (1 - expected) / 6_000).sqrt()
    assert ((counts / 6_000 - expected).abs() <= 5 * spread + 1e-6).all()


def test_the_reward_model_reads_pairs_cut_on_the_response_only(folders):
    model, tokenizer = lesson.load_reward_model(str(folders / "reward"))
    prompt, long = (" ".join(f"w{i}" for i in range(n)) for n in (30, 60))
    responses = ["w5 w6", long, "w7"]
    scores = lesson.score_responses(model, tokenizer, prompt, responses, 2)
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
    model, tokenizer = lesson.load_reward_model(str(tmp_path))
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "spm.model"))
    prompt, response = "why is exercise good?", "it helps."
    expected = [1, *pieces.encode(prompt), 2, *pieces.encode(response), 2]
    assert tokenizer(prompt, response).input_ids == expected
    assert lesson.score_responses(model, tokenizer, prompt, [response], 4).isfinite()


# ------------------------------------------------------------------------------------
# Updating the policy
# ------------------------------------------------------------------------------------


def test_on_the_first_step_the_ratio_is_1_and_the_gradient_is_not_0(monkeypatch):
    policy, tokenizer = tiny_policy()
    before, ratios, good = weights(policy), [], lesson.grpo_loss

    def spy(log_probs, old_log_probs, *others):
        ratios.append((log_probs - old_log_probs).detach().exp())
        return good(log_probs, old_log_probs, *others)

    monkeypatch.setattr(lesson, "grpo_loss", spy)
    loss, texts, rewards, figures = run_step(policy, tokenizer, sgd(policy))
    assert (ratios.pop() == 1).all()
    assert loss == pytest.approx(0, abs=1e-6)
    assert figures["clipped"] == 0 and figures["grad_norm"] > 1e-3
    assert not torch.equal(before, weights(policy))
    assert len(texts) == len(rewards) == 8
    assert rewards.tolist() == pytest.approx(low_words(PROMPT, texts))
    run_step(policy, tokenizer, sgd(policy, 5), inner_steps=3)
    assert (ratios[0] == 1).all()
    assert (ratios[2] - 1).abs().max() > 0.01  # against the policy that wrote


def test_dropout_never_acts():
    runs = []
    for _ in range(2):  # with dropout, whose noise nobody seeds, these would differ
        policy, tokenizer = tiny_policy()
        torch.seed()
        run_step(policy, tokenizer, sgd(policy, 0.1), inner_steps=2)
        runs.append(weights(policy))
    assert torch.equal(*runs)


def test_one_step_makes_better_responses_likelier_and_worse_ones_rarer():
    policy, tokenizer = tiny_policy()
    ids = generate(policy, lesson.draw_seeds(torch.Generator().manual_seed(0), 8))
    full = torch.cat([torch.tensor([[1, 2, 3]]).expand(8, -1), ids], 1)
    mask, ones = lesson.completion_mask(ids, EOS), torch.ones_like(full)

    def likelihood():
        log_probs = lesson.completion_log_probs(policy, full, ones, 16, 1.0)
        return (log_probs * mask).sum(1).detach() / mask.sum(1)

    before = likelihood()
    _, _, rewards, _ = run_step(policy, tokenizer, sgd(policy, 0.01))
    change, better = likelihood() - before, rewards > rewards.mean()
    assert change[better].mean() > 0 > change[~better].mean()


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama, tied and padded"])
def test_gradients_added_in_place_are_those_of_autograd(family):
    policy = tiny_policy()[0] if family == "gpt2" else tiny_llama()
    if "tied" in family:  # the row of a padding token is not trained where it is read
        policy = tiny_llama(tie_word_embeddings=True, pad_token_id=5)
        assert policy.lm_head.weight is policy.model.embed_tokens.weight
    texts = torch.randint(0, WORDS, (2, 3, 12))
    texts[:, :, 2] = 5

    def gradients():
        for ids in texts:  # two backward passes, whose gradients add up
            log_probs = lesson.completion_log_probs(
                policy, ids, torch.ones_like(ids), 8, 0.7
            )
            log_probs.square().sum().backward()
        found = {name: x.grad.clone() for name, x in policy.named_parameters()}
        policy.zero_grad()
        return found

    expected = gradients()
    with lesson.gradients_in_place(policy):
        actual = gradients()
    assert not any("forward" in vars(module) for module in policy.modules())
    for name, gradient in expected.items():
        assert torch.allclose(gradient, actual[name], rtol=1e-4, atol=1e-4), name


def test_micro_batches_give_the_update_of_one_batch():
    results = []
    for size in (8, 3, 1):
        policy, tokenizer = tiny_policy()
        policy.lm_head.weight.data[EOS] += 0.3  # lengths that differ
        reference, _ = tiny_policy(5)
        run_step(
            policy,
            tokenizer,
            sgd(policy, 0.1),
            micro_batch_size=size,
            inner_steps=2,
            kl_coef=0.1,
            reference=reference.eval(),
        )
        results.append(weights(policy))
    assert not torch.equal(results[0], weights(tiny_policy()[0]))
    for other in results[1:]:
        assert torch.allclose(results[0], other, atol=1e-6)


def test_the_group_s_size_does_not_set_what_is_held_at_once():
    policy, tokenizer = tiny_policy()
    rows = {True: set(), False: set()}  # with gradients, and without
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: rows[torch.is_grad_enabled()].add(
            len(args[0]) if args else len(kwargs["input_ids"])
        ),
        with_kwargs=True,
    )
    texts = run_step(
        policy, tokenizer, sgd(policy), group=32, micro_batch_size=2, batch_size=4
    )[1]
    assert len(texts) == 32
    assert max(rows[True]) == 2 and max(rows[False]) == 4


def test_gradient_checkpointing_gives_the_same_update_and_really_recomputes(folders):
    results, calls = [], []
    for switch in (False, True):
        policy, tokenizer = lesson.load_policy(
            str(folders / "policy"), checkpointing=switch
        )
        policy.transformer.h[0].mlp.register_forward_pre_hook(
            lambda *_: calls.append(torch.is_grad_enabled())
        )
        calls.clear()
        run_step(policy, tokenizer, sgd(policy, 0.1))
        results.append((weights(policy), calls.count(True)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert [count for _, count in results] == [1, 2]


def three_steps(accelerator):
    """Weights, rewards and figures after three steps with everything switched on."""
    policy, tokenizer = tiny_policy()
    policy.lm_head.weight.data[EOS] += 0.3
    for step in range(3):
        _, _, rewards, figures = run_step(
            policy,
            tokenizer,
            sgd(policy, 0.1),
            seed=step,
            reference=tiny_policy(5)[0],
            kl_coef=0.1,
            inner_steps=2,
            micro_batch_size=3,
            top_p=0.9,
        )
    return weights(policy), rewards, figures


TWO_PROCESSES = """
import sys, torch
from accelerate import Accelerator
from test_grpo import three_steps
accelerator = Accelerator(cpu=True)
results = accelerator.num_processes, *three_steps(accelerator)
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
torch.distributed.destroy_process_group()
"""


def test_two_processes_give_the_same_update_as_one(tmp_path):
    script, out = tmp_path / "two.py", tmp_path / "out.pt"
    script.write_text(TWO_PROCESSES)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(script), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    processes, weights_2, rewards_2, figures_2 = torch.load(out, weights_only=True)
    weights_1, rewards_1, figures_1 = three_steps(Accelerator(cpu=True))
    assert processes == 2
    assert torch.equal(rewards_1, rewards_2)
    assert torch.allclose(weights_1, weights_2, atol=1e-6)
    assert figures_2 == pytest.approx(figures_1, rel=1e-4)


def learn(seed, monkeypatch=None, advantages=None):
    """Mean reward of the last of 60 steps, from a policy that writes at random."""
    if advantages:
        monkeypatch.setattr(lesson, "group_advantages", advantages)
    policy, tokenizer = tiny_policy(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    rewards = [
        run_step(policy, tokenizer, optimizer, seed=1000 * seed + step)[2].mean()
        for step in range(60)
    ]
    return torch.stack(rewards)[:5].mean().item(), torch.stack(rewards)[-5:].mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns(seed):
    first, last = learn(seed)
    assert first < 0.65 and last > 0.85


def test_it_unlearns_with_the_sign_flipped(monkeypatch):
    right = lesson.group_advantages
    first, last = learn(0, monkeypatch, lambda *a: -right(*a))
    assert first > 0.35 and last < 0.15


def test_it_does_not_learn_from_shuffled_advantages(monkeypatch):
    right = lesson.group_advantages
    generator = torch.Generator().manual_seed(0)

    def shuffled(*a):
        return right(*a)[torch.randperm(len(a[0]), generator=generator)]

    assert learn(0, monkeypatch, shuffled)[1] < 0.75


def test_equal_rewards_skip_the_step_and_nan_stops_before_the_weights_change(
    capsys, monkeypatch
):
    policy, tokenizer = tiny_policy()
    before, optimizer = weights(policy), sgd(policy)
    equal = run_step(
        policy, tokenizer, optimizer, score=lambda p, texts: torch.full((8,), 0.3)
    )
    assert equal[0] == 0 and equal[3] is None
    for bad in (torch.nan, torch.inf):
        rewards = torch.tensor([bad] + [0.0] * 7)
        fails_with(
            capsys,
            lambda r=rewards: run_step(
                policy, tokenizer, optimizer, score=lambda p, texts: r
            ),
            "reward",
            "finite",
        )
    good = lesson.grpo_loss
    monkeypatch.setattr(lesson, "grpo_loss", lambda *a: good(*a) * torch.nan)
    fails_with(capsys, lambda: run_step(policy, tokenizer, optimizer), "loss", "finite")
    assert torch.equal(before, weights(policy))


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def test_main_prints_its_figures_and_saves_a_model_that_loads_bit_for_bit(
    in_folder, capsys, monkeypatch
):
    kept = {}
    save = lesson.save_model
    monkeypatch.setattr(
        lesson, "save_model", lambda p, *a: (kept.update(p.state_dict()), save(p, *a))
    )
    lesson.main()
    out = capsys.readouterr().out
    for step in (0, 1):
        block = out.split(f"\nStep {step} | ")[1].splitlines()
        assert re.match(r"Loss: -?\d\.\d{4} \| Reward: [+-]\d", block[0])
        for word in ("std", "max", " s"):
            assert word in block[0]
        for word in ("KL", "Entropy", "Clipped", "Length", "cut off", "Gradient"):
            assert word in block[1]
        assert max(map(len, block[:2])) <= 88
        scores = [float(re.match(r"  \[([+-]\d+\.\d\d)\] ", x)[1]) for x in block[2:6]]
        assert len(set(scores)) == 4 and scores == sorted(scores, reverse=True)
    assert "before" in out and "after" in out
    folder = in_folder / "trained_model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, kept[name]), name
    writer = transformers.pipeline("text-generation", str(folder))
    assert writer(PROMPT, max_new_tokens=4)[0]["generated_text"].startswith(PROMPT)
    assert writer.tokenizer.get_vocab() == tiny_policy()[1].get_vocab()
    assert (in_folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(in_folder.glob("*.tmp"))


def test_saving_over_another_model_leaves_nothing_of_that_model(tmp_path):
    policy, tokenizer = tiny_policy()
    lesson.save_model(policy, tokenizer, tmp_path / "new")
    folder = tmp_path / "old"
    folder.mkdir()
    stale = "model-00001-of-00002.safetensors", "vocab.json", "added_tokens.json"
    for name in (*stale, "config.json", "my_notes.txt"):
        (folder / name).write_text("of another model")
    lesson.save_model(policy, tokenizer, folder)
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert {file.name for file in folder.iterdir()} == names | {"my_notes.txt"}
    assert "another" not in (folder / "config.json").read_text()


def test_the_reference_exists_only_with_kl_and_stays_as_it_was(in_folder, monkeypatch):
    seen, step = [], lesson.grpo_step

    def spy(accelerator, policy, reference, *others, **more):
        seen.append((reference, reference and weights(reference)))
        return step(accelerator, policy, reference, *others, **more)

    monkeypatch.setattr(lesson, "grpo_step", spy)
    lesson.main()
    assert all(reference is None for reference, _ in seen)
    seen.clear()
    monkeypatch.setattr(lesson, "KL_COEF", 0.1)
    monkeypatch.setattr(lesson, "LR", 0.01)
    lesson.main()
    assert torch.equal(seen[0][1], weights(seen[-1][0]))


def test_prompts_are_taken_in_turn_and_a_function_can_score(in_folder, monkeypatch):
    seen = []

    def judge(prompt, responses):
        seen.append(prompt)
        return [len(text) for text in responses]

    monkeypatch.setattr(lesson, "REWARD_FUNCTION", judge)
    monkeypatch.setattr(lesson, "NUM_STEPS", 3)
    monkeypatch.setattr(lesson, "REWARD_MODEL_NAME", "never/asked-for")
    lesson.main()
    assert seen[2:5] == [PROMPT, "w4", PROMPT]  # after 2 to measure, and before 2 more


def test_the_same_seed_gives_the_same_run(in_folder, capsys):
    runs = []
    for _ in range(2):
        lesson.main()
        out = capsys.readouterr().out
        runs.append(re.sub(r"\d+\.\d s", "", out))
    assert runs[0] == runs[1]


def test_ctrl_c_keeps_this_run_beside_the_last_good_one(in_folder, monkeypatch, capsys):
    lesson.main()
    good = (in_folder / "trained_model" / "model.safetensors").read_bytes()
    real, calls = lesson.grpo_step, []

    def interrupted(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(lesson, "grpo_step", interrupted)
    monkeypatch.setattr(lesson, "LR", 0.1)
    lesson.main()
    assert "Stopped after 1 steps" in capsys.readouterr().out
    kept = in_folder / "trained_model_interrupted" / "model.safetensors"
    assert kept.read_bytes() != good
    assert (in_folder / "trained_model" / "model.safetensors").read_bytes() == good


def test_wandb_gets_every_step(in_folder, monkeypatch, capsys):
    log = []
    fake = types.SimpleNamespace(init=lambda **_: None, log=log.append)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(lesson, "USE_WANDB", True)
    lesson.main()
    assert len(log) == 2 and {"reward", "loss", "entropy"} <= set(log[0])
    monkeypatch.setitem(sys.modules, "wandb", None)
    fails_with(capsys, lesson.main, "wandb", "pip install")


# ------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUM_SAMPLES", 1),
        ("NUM_SAMPLES", "8"),
        ("NUM_STEPS", 0),
        ("MAX_NEW_TOKENS", 2.5),
        ("LR", -1e-5),
        ("LR", float("nan")),
        ("TEMPERATURE", 0),
        ("TOP_P", 1.5),
        ("CLIP_EPS", 0),
        ("INNER_STEPS", True),
        ("KL_COEF", None),
        ("MICRO_BATCH_SIZE", 0),
        ("SEED", 500_000),
        ("SCALE_BY_STD", "yes"),
        ("PROMPTS", []),
        ("SAVE_DIR", 5),
        ("CURVE_PATH", None),
        ("PROMPTS", "a text"),
        ("PROMPTS", [" "]),
        ("POLICY_MODEL_NAME", ""),
        ("REWARD_FUNCTION", "f"),
        ("DEVICE", "gpu"),
    ],
)
def test_an_impossible_setting_is_named_in_one_line(capsys, monkeypatch, name, value):
    monkeypatch.setattr(lesson, name, value)
    fails_with(capsys, lesson.main, name, repr(value))


def test_every_setting_is_checked_in_one_go(capsys, monkeypatch):
    monkeypatch.setattr(lesson, "NUM_SAMPLES", 1)
    monkeypatch.setattr(lesson, "TOP_P", 2)
    fails_with(capsys, lesson.main, "NUM_SAMPLES", "TOP_P")


def test_a_hub_out_of_reach_is_said_within_seconds_and_nothing_is_written(tmp_path):
    text = (ROOT / "grpo_training.py").read_text()
    (tmp_path / "grpo_training.py").write_text(text)
    env = {**os.environ, "HF_HOME": str(tmp_path / "empty")}
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    started = time.time()
    done = subprocess.run(
        [sys.executable, "grpo_training.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and time.time() - started < 40
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in ("gpt2", "POLICY_MODEL_NAME", "hub", "internet", "folder"):
        assert word in done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"empty", "__pycache__"}
    assert left == {"grpo_training.py"}


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch):
    monkeypatch.setattr(lesson.urllib.request, "urlopen", lambda *a, **k: time.sleep(9))
    started = time.time()
    assert not lesson.hub_answers(seconds=0.2)
    assert time.time() - started < 2


def test_folders_that_hold_no_model_or_no_tokenizer_are_refused(
    in_folder, monkeypatch, capsys, folders
):
    missing = str(in_folder / "nothing")
    monkeypatch.setattr(lesson, "POLICY_MODEL_NAME", missing)
    fails_with(capsys, lesson.main, missing, "POLICY_MODEL_NAME")
    tiny_policy()[0].save_pretrained(in_folder / "bare")
    monkeypatch.setattr(lesson, "POLICY_MODEL_NAME", str(in_folder / "bare"))
    fails_with(capsys, lesson.main, "tokenizer")
    tiny_policy()[1].save_pretrained(in_folder / "only_tokenizer")
    monkeypatch.setattr(lesson, "POLICY_MODEL_NAME", str(in_folder / "only_tokenizer"))
    fails_with(capsys, lesson.main, "POLICY_MODEL_NAME")
    assert not (in_folder / "trained_model").exists()


def test_a_reward_model_needs_a_trained_head_with_one_output(
    in_folder, monkeypatch, capsys
):
    for name, options, words in [
        ("two", {"labels": 2}, ["2 outputs"]),
        ("none", {"head": False}, ["classifier.weight"]),
    ]:
        folder = tiny_reward_model(in_folder / name, **options)
        monkeypatch.setattr(lesson, "REWARD_MODEL_NAME", folder)
        fails_with(capsys, lesson.main, "REWARD_MODEL_NAME", *words)


def test_a_prompt_longer_than_a_context_is_refused(in_folder, monkeypatch, capsys):
    for words, setting in [(60, "POLICY"), (44, "REWARD")]:
        monkeypatch.setattr(lesson, "PROMPTS", ["w1 " * words])
        fails_with(capsys, lesson.main, "PROMPTS", f"{setting}_MODEL_NAME")


def test_responses_longer_than_the_context_are_refused(in_folder, monkeypatch, capsys):
    monkeypatch.setattr(lesson, "MAX_NEW_TOKENS", 64)
    fails_with(capsys, lesson.main, "MAX_NEW_TOKENS = 64", "reads")


def test_launches_that_would_not_work_are_refused(monkeypatch, capsys):
    for name in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{name}", "true")
            fails_with(capsys, lambda: lesson.start_accelerator("cpu", {}), name)
    three = types.SimpleNamespace(num_processes=3)
    monkeypatch.setattr(lesson, "Accelerator", lambda **_: three)
    fails_with(
        capsys, lambda: lesson.start_accelerator("cpu", {"NUM_SAMPLES": 8}), "8", "3"
    )


@pytest.mark.parametrize("where", ["load_reward_model", "grpo_step"])
def test_gpu_memory_that_runs_out_names_the_settings_to_lower(
    in_folder, monkeypatch, capsys, where
):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lesson, where, full)
    fails_with(capsys, lesson.main, "MICRO_BATCH_SIZE", "MAX_NEW_TOKENS")


@pytest.mark.parametrize("answer", [None, [1.0], ["good"] * 4, 3.0])
def test_a_reward_function_that_gives_no_numbers_is_refused(
    in_folder, monkeypatch, capsys, answer
):
    monkeypatch.setattr(lesson, "REWARD_FUNCTION", lambda prompt, texts: answer)
    fails_with(capsys, lesson.main, "REWARD_FUNCTION")


def test_no_code_from_the_hub_is_ever_trusted(folders):
    text = (ROOT / "grpo_training.py").read_text()
    assert "trust_remote_code" not in text
    config = AutoConfig.from_pretrained(folders / "policy")
    assert config.vocab_size >= len(AutoTokenizer.from_pretrained(folders / "policy"))
