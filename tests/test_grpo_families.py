"""Lesson 4 on the kinds of models that people bring: tests/families.py builds them."""

import dataclasses
import json
import shutil

import pytest
import sentencepiece
import torch
from accelerate.test_utils.testing import AccelerateTestCase
from families import NO_POLICIES, POLICIES, REWARD_MODELS, save
from lessons import spy_on
from test_grpo import fails_with, load_reward
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import grpo_training as lesson

PROMPT, TEMPERATURE, SAMPLES = "Say hi", 0.8, 16
CLASSIFIER = "SequenceClassification"
torch.set_num_threads(1)


def length(prompt, responses):
    """A reward function that prefers long responses, so that the weights move."""
    return [float(len(text)) for text in responses]


def change_settings(monkeypatch, **settings):
    """Change these Settings of the lesson, and those that every test has."""
    small = {"DEVICE": "cpu", "PROMPTS": [PROMPT], "REWARD_FUNCTION": length}
    small |= {"NUM_STEPS": 2, "NUM_SAMPLES": SAMPLES, "MICRO_BATCH_SIZE": SAMPLES}
    small |= {"EVAL_SAMPLES": 2, "MAX_NEW_TOKENS": 16, "LR": 1e-3, "TOP_P": 1.0}
    small |= {"TEMPERATURE": TEMPERATURE}
    for name, value in (small | settings).items():
        monkeypatch.setattr(lesson, name, value)


def near(expected):
    return pytest.approx(expected.numpy(), abs=2e-5)


# ------------------------------------------------------------------------------------
# Policies
# ------------------------------------------------------------------------------------


def make_ends_likely(model, ends):
    """Let each of these tokens be sampled now and then: the head adds to its logit."""
    bias = torch.zeros(model.get_input_embeddings().num_embeddings)
    bias[ends] = TEMPERATURE * torch.tensor(0.07 * len(bias)).log()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits + bias)


ALL_ON = {"LORA_RANK": 2, "KL_COEF": 0.1, "GRADIENT_CHECKPOINTING": True}
RUNS = {name: {} for name in POLICIES}
RUNS |= {f"{name}, LoRA": ALL_ON for name in ("gpt2", "opt", "llama 3")}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """Two steps of main() on a policy of each family, and all that they computed."""
    family = POLICIES[request.param.removesuffix(", LoRA")]
    root = tmp_path_factory.mktemp("run")
    save(family, root / "loaded")
    tokenizer, scored = AutoTokenizer.from_pretrained(root / "loaded"), []
    ends = family.ids(family.ends) or [tokenizer.eos_token_id]

    def reward(prompt, responses):
        scored.append(responses)
        return length(prompt, responses)

    def load(name):
        policy, tokenizer = load_policy(name)
        make_ends_likely(policy, ends)
        return policy, tokenizer

    def multinomial(probs, *rest, **options):  # whoever samples, calls this
        sampled_from.append(probs)
        return sample(probs, *rest, **options)

    load_policy, sample, sampled_from = lesson.load_policy, torch.multinomial, []
    with pytest.MonkeyPatch.context() as patch:
        settings = {"PROMPTS": [family.prompt], "SAVE_DIR": str(root / "saved")}
        settings |= {"POLICY_MODEL_NAME": str(root / "loaded")}
        change_settings(
            patch, REWARD_FUNCTION=reward, **settings, **RUNS[request.param]
        )
        patch.setattr(lesson, "load_policy", load)
        patch.setattr(torch, "multinomial", multinomial)
        groups = spy_on(patch, lesson, "generate_group")
        losses = spy_on(patch, lesson, "grpo_loss")
        lesson.main()
    AccelerateTestCase().tearDown()  # Accelerate keeps its state for the whole process
    groups = [call["return"] for call in groups if call["samples"] == SAMPLES]
    probs = [probs for probs in sampled_from if len(probs) == SAMPLES]
    return {
        **{"family": family, "tokenizer": tokenizer, "ends": ends, "root": root},
        "steps": list(zip(groups, losses, scored[1:3], strict=True)),
        "probs": torch.stack(probs, 1),  # (G, L of both steps, V)
    }


def test_the_prompt_is_what_the_model_was_trained_to_read(run):
    family, tokenizer = run["family"], run["tokenizer"]
    before = family.tokens.partition(" | ")[2].partition("$A")[0].strip()
    expected = before + family.prompt.removeprefix(before)
    if family.template:
        chat, options = [{"role": "user", "content": PROMPT}], {"tokenize": False}
        options |= {"add_generation_prompt": True}
        expected = tokenizer.apply_chat_template(chat, **options)
    for group, _, _ in run["steps"]:
        for row in group["prompt_ids"]:
            assert tokenizer.decode(row) == expected


def test_the_probabilities_that_are_trained_are_those_that_were_sampled_from(run):
    tokens = torch.cat([group["completion_ids"] for group, _, _ in run["steps"]], 1)
    mask = torch.cat([loss["mask"] for _, loss, _ in run["steps"]], 1) == 1
    trained = torch.cat([loss["log_probs"] for _, loss, _ in run["steps"]], 1).detach()
    sampled = run["probs"].log().gather(2, tokens[:, :, None])[:, :, 0]
    assert trained[mask] == near(sampled[mask])


def test_a_response_ends_with_the_first_of_all_ends_and_each_end_occurs(run):
    occurred = set()
    for group, loss, scored in run["steps"]:
        rows = zip(group["completion_ids"].tolist(), loss["mask"], scored, strict=True)
        for ids, mask, text in rows:
            places = [t for t, token in enumerate(ids) if token in run["ends"]]
            last = places[0] if places else len(ids) - 1
            assert mask.tolist() == [int(t <= last) for t in range(len(ids))]
            words = ids[:last] if places else ids
            assert text == run["tokenizer"].decode(words, skip_special_tokens=True)
            occurred |= {ids[last]} & set(run["ends"])
    assert occurred == set(run["ends"])


def test_the_saved_folder_differs_from_the_loaded_one_in_its_weights_only(run):
    before, after = run["root"] / "loaded", run["root"] / "saved"
    names = {path.name for path in before.iterdir()}
    more = {path.name for path in after.iterdir()} - names
    assert more == {"learning_curve.png", "training_log.json"}
    for name in sorted(names - {"model.safetensors"}):
        texts = [(folder / name).read_text() for folder in (before, after)]
        if name.endswith(".json"):
            texts = [json.loads(text) for text in texts]
            texts = [text | {"transformers_version": None} for text in texts]
        assert texts[0] == texts[1], name
    models = [AutoModelForCausalLM.from_pretrained(x) for x in (before, after)]
    old, new = (model.state_dict() for model in models)
    assert [x.shape for x in old.values()] == [x.shape for x in new.values()]
    assert any(not old[name].equal(new[name]) for name in old)


def test_the_template_of_a_chat_and_special_tokens_can_be_chosen(tmp_path, monkeypatch):
    save(POLICIES["qwen 2, base"], tmp_path)
    change_settings(monkeypatch, USE_CHAT_TEMPLATE=False)
    policy, tokenizer = lesson.load_policy(str(tmp_path))
    plain = tokenizer(PROMPT).input_ids
    assert lesson.encode_prompt(tokenizer, PROMPT).tolist() == [plain]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    make_ends_likely(policy, [start, end])
    for keep in (False, True):
        monkeypatch.setattr(lesson, "KEEP_SPECIAL_TOKENS", keep)
        group = lesson.generate_group(policy, tokenizer, PROMPT, 32)
        assert (group["completion_ids"] == start).any()
        assert ("<|im_start|>" in "".join(group["responses"])) == keep
        assert "<|im_end|>" not in "".join(group["responses"])


# ------------------------------------------------------------------------------------
# Reward models
# ------------------------------------------------------------------------------------

RESPONSES = ["Hi!", "Hello to you and to everyone else", "", "no"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save(POLICIES["gpt2"], folder)
    return folder


@pytest.fixture(params=REWARD_MODELS)
def reward_model(request, tmp_path):
    """The folder of each reward model, and the reward that the lesson makes of it."""
    save(REWARD_MODELS[request.param], tmp_path, CLASSIFIER)
    return tmp_path, load_reward(tmp_path)


def score_alone(folder, prompt, response):
    """What the reward model says of one response, read as it was trained to read."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    turns = zip(("user", "assistant"), (prompt, response), strict=True)
    chat = [{"role": role, "content": content} for role, content in turns]
    options = {"return_tensors": "pt", "return_dict": True}
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(chat, **options)
    else:
        inputs = tokenizer([prompt], [response], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.item()


def test_a_score_is_that_of_the_response_alone_as_the_model_was_trained(reward_model):
    folder, reward = reward_model
    expected = torch.tensor([score_alone(folder, PROMPT, text) for text in RESPONSES])
    assert expected.std() > 0.05
    assert torch.as_tensor(reward(PROMPT, RESPONSES)) == near(expected)


def test_a_text_too_long_for_the_reward_model_loses_its_end(reward_model, capsys):
    _, reward = reward_model
    long = "very " * 100  # 500 tokens, and the model reads 256
    scores = reward(PROMPT, [long, long + "bad", "bad " + long])
    assert scores[0] == scores[1] != scores[2]
    assert capsys.readouterr().out == ""
    scores = [reward(long, ["yes", "no"]) for _ in range(2)]
    assert scores[0].isfinite().all() and scores[0][0] != scores[0][1]
    assert torch.equal(*scores)
    assert len(capsys.readouterr().out.splitlines()) == 1  # said once


def test_a_reward_model_s_tokenizer_may_be_an_spm_model_only(tmp_path):
    save(REWARD_MODELS["deberta"], tmp_path, CLASSIFIER)
    without("tokenizer.json", "tokenizer_config.json")(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("why is exercise good for you? it helps you to sleep.\n" * 50)
    marks = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
    marks |= {"unk_piece": "[UNK]", "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    marks |= {"input": str(text), "model_prefix": str(tmp_path / "spm")}
    train = sentencepiece.SentencePieceTrainer.train
    train(**marks, vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    scores = load_reward(tmp_path)("why is exercise good?", ["it helps.", "why"])
    assert scores.isfinite().all() and scores[0] != scores[1]


# ------------------------------------------------------------------------------------
# What cannot be used
# ------------------------------------------------------------------------------------


def edit(folder, name="config.json", **values):
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def no_end(folder):
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        edit(folder, name, eos_token_id=None, eos_token=None)


def half_a_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def adapter_without_its_base(folder):
    (folder / "config.json").unlink()
    base = {"base_model_name_or_path": str(folder.parent / "nowhere")}
    edit(folder, "adapter_config.json", peft_type="LORA", **base)


def a_token_that_the_model_lacks(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([PROMPT])
    tokenizer.save_pretrained(folder)


def without_a_head(folder):
    other("llama 3, chat", CLASSIFIER)(folder)
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def other(name, head):
    return lambda folder: save((REWARD_MODELS | NO_POLICIES)[name], folder, head)


NO_USER = "{% if messages[0].role == 'user' %}{{ raise_exception('No!') }}{% endif %}"
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
MISTAKES = {  # and a word of the line that says why
    "no end token": (no_end, "end"),
    "4 bits": (lambda folder: edit(folder, quantization_config=BITS), "quantised"),
    "an adapter without its base": (adapter_without_its_base, "base"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "half a file": (half_a_file, ""),
    "no user": (lambda f: (f / "chat_template.jinja").write_text(NO_USER), "No!"),
    "a token too many": (a_token_that_the_model_lacks, "tokenizer"),
    "a classifier": (other("gpt2, pads on the left", CLASSIFIER), "score.weight"),
    "an untied classifier": (other("llama 3, chat", CLASSIFIER), "lm_head.weight"),
    "no head": (without_a_head, "lm_head.weight"),
    "an encoder": (other("an encoder", "MaskedLM"), "tokens after"),
    "BART": (other("bart", "Seq2SeqLM"), "encoder-decoder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_policy_that_cannot_be_trained_is_refused_in_one_line_that_says_why(
    mistake, policy, tmp_path, monkeypatch
):
    folder = shutil.copytree(policy, tmp_path / "broken")
    spoil, why = MISTAKES[mistake]
    spoil(folder)
    change_settings(monkeypatch, POLICY_MODEL_NAME=str(folder))
    fails_with(lesson.load_models, "broken", why)


@pytest.mark.parametrize(
    ("head", "why"),
    [(CLASSIFIER, "2 outputs"), ("MaskedLM", "classifier")],
)
def test_a_reward_model_needs_a_trained_head_with_one_output(
    policy, tmp_path, monkeypatch, head, why
):
    family = dataclasses.replace(REWARD_MODELS["deberta"], sizes={"num_labels": 2})
    save(family, tmp_path / "broken", head)
    names = {"POLICY_MODEL_NAME": str(policy), "REWARD_FUNCTION": None}
    change_settings(monkeypatch, REWARD_MODEL_NAME=str(tmp_path / "broken"), **names)
    fails_with(lesson.load_models, "broken", why)
