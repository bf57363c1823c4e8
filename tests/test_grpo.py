"""Tests of lesson 4: its equations, the sampling, the rewards and the learning.

The policy is tiny and built here. Runs, files and processes: test_grpo_runs.py; other
models: test_grpo_families.py.
"""

import itertools
import types

import pytest
import tokenizers
import torch
import transformers
from accelerate import Accelerator
from accelerate.test_utils.testing import AccelerateTestCase
from families import REWARD_MODELS, save
from lessons import spy_on
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import grpo_training as lesson

EOS, WORDS = 64, 64  # the tiny policy's words are w0 ... w63, ids 0 to 63
PROMPT = "w1 w2 w3"
# Settings of every test, unless it changes some.
SMALL = {"DEVICE": "cpu", "PROMPTS": [PROMPT, "w4"], "NUM_STEPS": 2, "NUM_SAMPLES": 4}
SMALL |= {"MAX_NEW_TOKENS": 8, "EVAL_SAMPLES": 4, "LR": 1e-3, "TOP_P": 1.0}
SMALL |= {"MAX_GRAD_NORM": 1e9}
torch.set_num_threads(1)


def tiny_tokenizer():
    words = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<unk>": EOS + 1}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"eos_token": "<eos>", "unk_token": "<unk>"}  # none for padding
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


def tiny_policy(seed=0):
    """A random GPT-2, dropout 0.1 as in the real one, as load_policy leaves it."""
    torch.manual_seed(seed)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": EOS, "eos_token_id": EOS}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=EOS + 2, **sizes, **ends))
    model.shipped_generation_config = model.generation_config
    model.generation_config = transformers.GenerationConfig(eos_token_id=[EOS])
    return model.eval(), tiny_tokenizer()


def low_words(prompt, responses):
    """A reward function: the share of the response's words that are below w32."""
    low = {f"w{i}" for i in range(32)}
    return [
        sum(word in low for word in text.split()) / max(1, len(text.split()))
        for text in responses
    ]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Saved models: policy and reward."""
    root = tmp_path_factory.mktemp("models")
    for part in tiny_policy():
        part.save_pretrained(root / "policy")
    save(REWARD_MODELS["deberta"], root / "reward", "SequenceClassification")
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
    yield use
    AccelerateTestCase().tearDown()  # Accelerate keeps its state for the whole process


def load_reward(folder):
    kind = transformers.AutoModelForSequenceClassification
    return lesson.RewardModel(*lesson.load_model(kind, str(folder)))


def write_group(policy, tokenizer, samples=8):
    """A group of the policy's responses, rewarded for low words."""
    torch.manual_seed(0)
    group = lesson.generate_group(policy, tokenizer, PROMPT, samples)
    group["rewards"] = torch.tensor(low_words(PROMPT, group["responses"]))
    return group


def short_policy():
    """A policy that soon ends its texts, so that their lengths differ."""
    policy, tokenizer = tiny_policy()
    policy.lm_head.weight.data[EOS] += 0.3
    return policy, tokenizer


def run_step(policy, *groups, rate=1.0, reference=None, accelerator=None):
    """One step of train() on given groups, with plain gradient descent: its metrics.

    The sampling and scoring are left out: what they would give are the groups.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    optimizer = torch.optim.SGD(policy.parameters(), rate)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    given = iter(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lesson, "PROMPTS", [PROMPT])
        patch.setattr(lesson, "PROMPTS_PER_STEP", len(groups))
        patch.setattr(lesson, "NUM_SAMPLES", len(groups[0]["mask"]))
        patch.setattr(lesson, "generate_group", lambda *_: dict(next(given)))
        patch.setattr(lesson, "score_responses", lambda *_: scores.pop(0))
        scores = [group["rewards"] for group in groups]
        result = next(lesson.train(policy, None, reference, None, optimizer))
        return lesson.measure(accelerator, result)


def weights(policy):
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


def fails_with(call, *words):
    """The call ends the program with status 1 and one line that holds these words."""
    with pytest.raises(SystemExit) as ending:
        call()
    line = str(ending.value.code)
    assert "\n" not in line and len(line) > 20
    for word in words:
        assert word in line, line


# ------------------------------------------------------------------------------------
# The equations
# ------------------------------------------------------------------------------------

END_IDS = torch.tensor([EOS])


def loss_of(log_probs, old_log_probs=None, advantages=(1.0,), mask=None, **options):
    """grpo_loss with eps 0.2 and, unless asked for, without a mask and without KL."""
    mask = torch.ones(log_probs.shape) if mask is None else mask
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    ref, beta = options.get("ref_log_probs"), options.get("kl_coef", 0.0)
    advantages = torch.as_tensor(advantages)
    return lesson.grpo_loss(log_probs, old, ref, advantages, mask, 0.2, beta)


GROUP = torch.tensor([[1, 0, 0], [2, 0, 0], [2, 2, 0], [2, 2, 2]])  # yes, no, no no ...
BEFORE, AFTER = torch.tensor([0.2, 0.4, 0.4]), torch.tensor([0.2, 0.6, 0.2])


def test_one_group_goes_through_all_equations_as_the_docstrings_say():
    mask = lesson.completion_mask(GROUP, torch.tensor([0]))
    assert mask.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    score = lesson.score_responses(
        lambda prompt, texts: [2.0 * (text == "yes") for text in texts],
        "Is exercise healthy?",
        ["yes", "no", "no no", "no no no"],
    )
    assert score.tolist() == [2, 0, 0, 0]
    advantages = lesson.group_advantages(score)
    assert advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=2e-4)
    model = FixedLogits(torch.zeros(4, 4, 3))
    model.logits.data[:, 0, 1] = torch.tensor(3.0).log()
    prompt = torch.zeros(4, 1, dtype=torch.long)
    log_probs = lesson.completion_log_probs(model, prompt, GROUP, 1.0)
    first = log_probs[:, 0].tolist()
    assert first == pytest.approx([-0.5108, -1.6094, -1.6094, -1.6094], abs=1e-4)
    old = log_probs.detach().clone()
    old[:, 0] = BEFORE.log()[GROUP[:, 0]]
    k3 = lesson.kl_estimate(AFTER.log(), BEFORE.log())
    assert k3.tolist() == pytest.approx([0, 0.0721, 0.3069], abs=1e-4)
    assert (AFTER * k3).sum().item() == pytest.approx(0.1046, abs=1e-4)
    exact = (AFTER * (AFTER / BEFORE).log()).sum()
    assert (AFTER * k3).sum().item() == pytest.approx(exact.item(), abs=1e-6)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5])
    assert loss_of(old, old, advantages, mask).item() == pytest.approx(0, abs=1e-6)
    loss = loss_of(log_probs, old, advantages, mask)
    assert loss.item() == pytest.approx(-0.0667, abs=1e-4)
    loss.backward()
    assert model.logits.grad[:, 0].abs().max() == 0  # pushed far enough
    assert model.logits.grad[:, 1].abs().min() > 0


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_come_from_float32_whatever_the_model_gives(temperature):
    torch.manual_seed(0)
    logits, ids = (5 * torch.randn(1, 2, 50)).bfloat16(), torch.tensor([[3, 7]])
    model, ids = FixedLogits(logits), ids.split(1, 1)
    log_probs = lesson.completion_log_probs(model, *ids, temperature)
    expected = (logits[0, 0].double() / temperature).log_softmax(0)[7]
    assert log_probs.dtype == torch.float32
    assert log_probs.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_mask_ends_after_the_first_end_token_wherever_it_is():
    rows = {
        (EOS, 1, 2, 3): [1, 0, 0, 0],
        (1, EOS, 2, 3): [1, 1, 0, 0],
        (1, 2, 3, EOS): [1, 1, 1, 1],
        (1, 2, 3, 4): [1, 1, 1, 1],
        (1, EOS, 2, EOS): [1, 1, 0, 0],
        (1, EOS - 1, 2, EOS): [1, 1, 1, 1],
        (EOS, EOS, EOS, EOS): [1, 0, 0, 0],
    }
    mask = lesson.completion_mask(torch.tensor(list(rows)), END_IDS)
    assert mask.tolist() == list(rows.values())
    several = torch.tensor([[1, 7, EOS, 2], [EOS, 7, 1, 2], [1, 2, 3, 7]])
    mask = lesson.completion_mask(several, torch.tensor([EOS, 7]))
    assert mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


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
    batch = {"mask": torch.ones(1, 1), "old_log_probs": old, "loss": None}
    batch |= {"log_probs": log_probs, "advantages": torch.tensor([sign])}
    assert lesson.diagnose(batch)["clipped"].item() == stopped


def test_the_mean_is_over_tokens_first_and_then_over_responses():
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    loss = loss_of(torch.zeros(2, 4), advantages=[3.0, 1.0], mask=mask)
    assert loss.item() == pytest.approx(-(3 + 1) / 2)  # over all tokens: -(3 + 4) / 5


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
    scaled = lesson.group_advantages(torch.tensor([0.0, 10.0])).tolist()
    assert scaled == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-3)


# ------------------------------------------------------------------------------------
# Sampling and scoring
# ------------------------------------------------------------------------------------

HOSTILE = {"do_sample": False, "top_k": 2, "top_p": 0.2, "temperature": 0.1}
HOSTILE |= {"repetition_penalty": 5.0, "min_new_tokens": 3, "num_beams": 2}
HOSTILE |= {"suppress_tokens": [1, 2, 3], "no_repeat_ngram_size": 1, "max_length": 5}


@pytest.mark.parametrize(("top_p", "temperature"), [(1.0, 1.5), (0.7, 1.0)])
def test_tokens_are_sampled_from_the_whole_vocabulary_or_its_exact_nucleus(
    settings, tmp_path, top_p, temperature
):
    """Whatever generation settings the checkpoint brings."""
    policy, tokenizer = tiny_policy()
    policy.lm_head.weight.data[:, ::2] += 0.05 * torch.randn(EOS + 2, 16)
    policy.generation_config = policy.shipped_generation_config
    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "policy")
    own = transformers.GenerationConfig(**HOSTILE, eos_token_id=EOS).to_json_string()
    (tmp_path / "policy" / "generation_config.json").write_text(own)
    settings(TOP_P=top_p, TEMPERATURE=temperature, MAX_NEW_TOKENS=1)
    policy, tokenizer = lesson.load_policy(str(tmp_path / "policy"))
    logits = policy(torch.tensor([[1, 2, 3]])).logits[:, -1].detach() / temperature
    expected = transformers.TopPLogitsWarper(top_p)(None, logits).softmax(1)[0]
    torch.manual_seed(0)
    drawn = lesson.generate_group(policy, tokenizer, PROMPT, 20_000)["completion_ids"]
    assert drawn.shape == (20_000, 1)
    counts = torch.bincount(drawn[:, 0], minlength=len(expected)).float()
    assert (counts[expected == 0] == 0).all() and (counts > 0).sum() > 5
    spread = (expected * (1 - expected) / 20_000).sqrt()
    assert ((counts / 20_000 - expected).abs() <= 5 * spread + 2e-4).all()


@pytest.mark.parametrize("answer", [[1.0], [[1.0]] * 4, 3.0, [torch.inf] * 4])
def test_a_reward_that_is_no_finite_number_each_is_refused(answer):
    texts = ["a"] * 4
    fails_with(lambda: lesson.score_responses(lambda *_: answer, "", texts), "finite")


# ------------------------------------------------------------------------------------
# Learning
# ------------------------------------------------------------------------------------


def test_the_ratio_is_1_and_the_loss_0_at_first_and_then_the_clip_acts(
    settings, monkeypatch
):
    calls, results = spy_on(monkeypatch, lesson, "grpo_loss"), []
    for clip in (0.2, 1e-4, 1.0):
        settings(INNER_STEPS=3, CLIP_EPS=clip)
        calls.clear()
        policy, tokenizer = tiny_policy()
        metrics = run_step(policy, write_group(policy, tokenizer), rate=3.0)
        moved = [call["log_probs"] - call["old_log_probs"] for call in calls]
        assert len(moved) == 3 and (moved[0] == 0).all()
        assert moved[2].abs().max() > 0.2  # against the policy that sampled
        assert calls[0]["return"].abs() < 1e-5 and metrics["KL"] == 0
        assert torch.equal(calls[1]["old_log_probs"], calls[2]["old_log_probs"])
        results.append((weights(policy), metrics["clipped"]))
    assert min(results[0][1], results[1][1]) > results[2][1] >= 0
    assert not torch.equal(results[0][0], results[2][0])


def test_the_metrics_of_a_batch_worked_by_hand(settings):
    half, third = torch.tensor(0.5).log(), torch.tensor(1 / 3).log()
    batch = {
        "mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
        "old_log_probs": torch.stack([half, 9 * half, third]).repeat(2, 1),
        "ref_log_probs": torch.full((2, 3), 0.25).log(),
        "advantages": torch.tensor([-1.0, 1.0]),
        "log_probs": torch.stack([half, half, half]).repeat(2, 1),
        "loss": torch.tensor(0.25),
    }
    for limit, cut_off in [(3, 0.5), (4, 0.0)]:
        settings(MAX_NEW_TOKENS=limit)
        metrics = {name: value.item() for name, value in lesson.diagnose(batch).items()}
        assert metrics == {
            "KL": pytest.approx(0.1931, abs=1e-4),
            "entropy": pytest.approx(0.6931, abs=1e-4),
            "clipped": pytest.approx((0 + 2 / 3) / 2),
            "length": 2,
            "cut off": cut_off,
            "loss": 0.25,
        }


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_the_gradient_is_scaled_down_to_its_limit_and_reported_as_it_was(
    settings, limit
):
    settings(MAX_GRAD_NORM=limit)
    policy, tokenizer = tiny_policy()
    before = weights(policy)
    metrics = run_step(policy, write_group(policy, tokenizer))
    moved = (weights(policy) - before).norm().item()
    assert metrics["gradient"] > 0.01
    assert moved == pytest.approx(min(limit, metrics["gradient"]), rel=1e-3)


def test_a_step_trains_each_response_to_its_end_and_nothing_of_the_prompt():
    torch.manual_seed(0)
    group = {
        "prompt_ids": torch.tensor([[1, 2, 3]] * 2),
        "completion_ids": torch.tensor([[7, EOS, EOS], [8, 9, EOS]]),
        "rewards": torch.tensor([1.0, 0.0]),
        "responses": ["w7", "w8 w9"],
    }
    group["mask"] = lesson.completion_mask(group["completion_ids"], END_IDS)
    model = FixedLogits(torch.randn(2, 6, EOS + 2))
    before = model.logits.detach().clone()
    run_step(model, group)
    # The logits at place t choose the token at t + 1.
    changed = (model.logits - before).abs().sum(2) > 0
    assert changed.tolist() == [
        [False, False, True, True, False, False],
        [False, False, True, True, True, False],
    ]


def test_micro_batches_give_the_update_of_one_batch(settings):
    results = []
    for size in (8, 3, 1):
        settings(MICRO_BATCH_SIZE=size, INNER_STEPS=2, KL_COEF=0.1)
        policy, tokenizer = short_policy()
        group = write_group(policy, tokenizer)
        metrics = run_step(policy, group, rate=0.1, reference=tiny_policy(5)[0])
        results.append((weights(policy), metrics))
    assert not torch.equal(results[0][0], weights(short_policy()[0]))
    assert results[0][1]["KL"] > 0.01
    for other, metrics in results[1:]:
        assert torch.allclose(results[0][0], other, atol=1e-6)
        assert metrics == pytest.approx(results[0][1], rel=1e-3, abs=1e-6)


def test_several_groups_give_the_mean_of_their_gradients_each_with_its_own_mean():
    policy, tokenizer = short_policy()
    groups = [write_group(policy, tokenizer), write_group(policy, tokenizer)]
    groups[1]["rewards"] = 100 + torch.arange(8.0).flip(0)  # a prompt that is easier
    gradients = []
    for chosen in ([groups[0]], [groups[1]], groups):
        policy, _ = short_policy()
        before = weights(policy)
        run_step(policy, *chosen)
        gradients.append(before - weights(policy))
    assert torch.allclose(gradients[2], (gradients[0] + gradients[1]) / 2, atol=1e-6)


def test_the_group_s_size_does_not_set_what_is_held_at_once(settings):
    settings(MICRO_BATCH_SIZE=2, KL_COEF=0.1)
    policy, tokenizer = tiny_policy()
    group = write_group(policy, tokenizer, 9)
    sizes, reference = [], tiny_policy(5)[0]
    for model in (policy, reference):
        model.lm_head.register_forward_pre_hook(
            lambda module, args: sizes.append(tuple(args[0].shape[:2]))
        )
    run_step(policy, group, reference=reference)
    length = group["mask"].shape[1]  # logits of the response only, not of the prompt
    assert sizes == [(2, length)] * 8 + [(1, length)] * 2


@pytest.mark.parametrize(
    "spoil", [torch.tensor(torch.nan).mul, torch.sqrt], ids=["loss", "gradient only"]
)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(
    settings, spoil
):
    policy, tokenizer = tiny_policy()
    group, before = write_group(policy, tokenizer), weights(policy)
    settings(grpo_loss=lambda log_probs, *_: spoil((log_probs * 0).sum()))
    fails_with(lambda: run_step(policy, group), "loss", "finite")
    assert torch.equal(before, weights(policy))


ALL_ON = {"INNER_STEPS": 2, "KL_COEF": 0.01, "MICRO_BATCH_SIZE": 3}


@pytest.mark.parametrize(
    "options",
    [{}, {"SEED": 1}, ALL_ON | {"SCALE_BY_STD": False}],
    ids=["", "another seed", "inner steps, KL, micro-batches, no std"],
)
def test_it_learns(settings, monkeypatch, options):
    settings(REWARD_FUNCTION=low_words, NUM_STEPS=40, NUM_SAMPLES=8, LR=6e-3)
    settings(EVAL_SAMPLES=2, PROMPTS=[PROMPT], **options)
    saved = spy_on(monkeypatch, lesson, "save_run")
    lesson.main()
    means = torch.stack(saved[-1]["rewards"]).flatten(1).mean(1)
    assert means[:5].mean() < 0.65 and means[-5:].mean() > 0.8


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights_that_move(
    settings, tmp_path
):
    settings(MIXED_PRECISION="bf16", LR=1e-5)
    used, load = set(), lesson.load_policy

    def watched(name):
        policy, tokenizer = load(name)
        policy.lm_head.register_forward_hook(lambda m, args, out: used.add(out.dtype))
        return policy, tokenizer

    settings(load_policy=watched)
    lesson.main()
    assert used == {torch.bfloat16}
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype="auto")
    assert saved.dtype == torch.float32
    change = weights(saved) - weights(tiny_policy()[0])
    # Steps of 1e-5 that bfloat16 weights of 0.02 would lose. (Unused places stay.)
    large = weights(tiny_policy()[0]).abs() > 0.02
    assert (change[large] != 0).float().mean() > 0.8


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_stays_what_the_policy_was_while_the_policy_learns(
    settings, monkeypatch, rank
):
    losses = spy_on(monkeypatch, lesson, "grpo_loss")
    settings(LORA_RANK=rank, REWARD_FUNCTION=low_words, LR=0.05, NUM_STEPS=3)
    lesson.main()
    assert [call["ref_log_probs"] for call in losses] == [None] * 3
    settings(KL_COEF=0.1)
    lesson.main()
    ratios = [call["log_probs"] - call["ref_log_probs"] for call in losses[3:]]
    assert ratios[0].abs().max() < 1e-5 < 1e-3 < ratios[2].abs().max()
