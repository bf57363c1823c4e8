"""Tests of grpo_tiny/: the shipped pair, the script that makes it, and the fallback."""

import gzip
import importlib.util
import json
import random
import re

import pytest
import torch
from lessons import ROOT, spy_on
from test_grpo import fails_with, load_reward
from test_grpo_runs import hub as no_hub
from transformers import AutoTokenizer

import grpo_training as lesson

hub = no_hub  # a fixture
TINY = ROOT / "grpo_tiny"
PROMPT = "Explain why regular exercise is important."
ANSWER = (
    "Regular exercise is important because it strengthens the heart and the muscles. "
    "It also reduces stress and helps people to sleep well."
)
spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make_tiny.py")
make_tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tiny)
torch.set_num_threads(1)


def load_pair(folder):
    """((policy, tokenizer), reward model), as lesson 4 loads them: complete."""
    policy = lesson.load_policy(str(folder / "policy"))
    return policy, load_reward(folder / "reward")


@pytest.fixture(scope="module")
def pair():
    return load_pair(TINY)


# ------------------------------------------------------------------------------------
# The pair
# ------------------------------------------------------------------------------------


def test_text_survives_the_tokenizer_and_a_pair_is_joined_by_marks():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "reward")
    assert tokenizer.decode(tokenizer(ANSWER).input_ids).strip() == ANSWER
    ids = tokenizer([PROMPT], [ANSWER]).input_ids[0]
    mark = tokenizer.sep_token_id
    assert ids[-1] == mark and ids.count(mark) == 2
    assert ids[: ids.index(mark)] == tokenizer(PROMPT).input_ids
    assert tokenizer(PROMPT, "  " + ANSWER).input_ids == ids  # blanks do not count


def test_the_policy_names_the_topic_and_does_not_yet_know_when_to_stop(pair):
    policy, tokenizer = pair[0]
    torch.manual_seed(0)
    group = lesson.generate_group(policy, tokenizer, PROMPT, 64)
    ended = (group["completion_ids"] == tokenizer.eos_token_id).any(1)
    assert 0.1 < ended.float().mean() < 0.5
    texts = group["responses"]
    assert sum("exercise" in text.lower() for text in texts) > 50
    assert len(set(texts)) > 50


def test_pairwise_accuracy_on_held_out_topics_is_95_percent(pair):
    with gzip.open(TINY / "held_out_pairs.jsonl.gz", "rt") as file:
        pairs = [json.loads(line) for line in file][::64]
    topics = make_tiny.read_topics(make_tiny.TOPICS)[make_tiny.HELD_OUT]
    won = {}
    for line in pairs:
        assert any(topic in line["prompt"] for topic in topics)
        texts = [line["chosen"], *line["rejected"].values()]
        chosen, *rejected = pair[1](line["prompt"], texts).tolist()
        for flaw, score in zip(line["rejected"], rejected, strict=True):
            won.setdefault(flaw, []).append(chosen > score)
    assert list(won) == make_tiny.FLAWS
    shares = {flaw: sum(wins) / len(wins) for flaw, wins in won.items()}
    assert sum(shares.values()) / len(shares) >= 0.95, shares
    assert min(shares.values()) > 0.8, shares


# ------------------------------------------------------------------------------------
# The script that makes them
# ------------------------------------------------------------------------------------


def test_the_docstring_cases_of_the_two_losses():
    logits, targets = torch.zeros(1, 3, 2), torch.tensor([[-100, 0, 1]])
    logits[0, 2] = torch.tensor([9.0, -9.0])  # about a token after the last: unused
    loss = make_tiny.next_token_loss(logits, targets)
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    for ratio, expected in [(1.0, 0.6931), (3.0, 0.3097)]:
        chosen, rejected = torch.tensor([[ratio]]).log(), torch.zeros(1, 2)
        loss = make_tiny.preference_loss(chosen, rejected)
        assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_only_the_answer_and_its_end_are_learnt_as_far_as_the_context_reaches(pair):
    tokenizer = pair[0][1]
    line = {"topic": "regular exercise", "phrasing": "Explain why {} is important."}
    ids, targets = make_tiny.encode_answers(tokenizer, [line | {"text": ANSWER}])[0]
    learnt = [t for t in targets if t >= 0]
    assert ids[-len(learnt) :] == learnt and learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt[:-1]).strip() == ANSWER
    assert ids[: len(ids) - len(learnt)] == tokenizer(PROMPT).input_ids
    ids, targets = make_tiny.encode_answers(tokenizer, [line | {"text": ANSWER * 9}])[0]
    assert len(ids) == len(targets) == make_tiny.CONTEXT


@pytest.mark.parametrize("seed", range(20))
def test_each_rule_makes_an_answer_that_is_worse_in_the_way_that_it_says(seed):
    source = random.Random(seed)
    cut = make_tiny.cut_short(ANSWER, source)
    assert ANSWER.startswith(cut) and not cut.endswith((".", "!", "?"))
    assert sorted(make_tiny.scramble(ANSWER, source).split()) == sorted(ANSWER.split())
    for length in (12, 99):  # the end of a short one is repeated, too
        text = " ".join(ANSWER.split()[:length])
        words = make_tiny.repeat(text, source).lower().split()
        runs = list(zip(words, words[1:], strict=False))
        assert len(set(runs)) < len(runs)
    stuffed = make_tiny.stuff(ANSWER, "regular exercise", source).lower()
    assert stuffed.count("regular exercise") > 1
    other = "Honey keeps for years, so that it was found in graves. It is sweet."
    long = make_tiny.run_on(ANSWER, other, source)
    first = ANSWER.split(".")[0] + "."
    rest = long.removeprefix(ANSWER).removeprefix(first).strip()
    assert long.startswith(first) and other.startswith(rest) and rest


def test_every_flaw_has_its_answer_and_a_topic_can_be_renamed():
    honey = {"topic": "honey", "text": "Honey is sweet and keeps long."}
    line = {"topic": "regular exercise", "text": ANSWER}
    names = ["honey", "regular exercise"]  # the topic's own is never taken
    for seed in range(20):
        source = random.Random(seed)
        made = make_tiny.break_by_rule(line, [line, honey], names, source)
        assert list(made) == make_tiny.FLAWS[:7]
        assert made["off topic"] == honey["text"]
        assert made["misnamed"] == ANSWER.replace("Regular exercise", "Honey")
    line["text"] = "To exercise is important."  # nothing to rename
    made = make_tiny.break_by_rule(line, [line, honey], names, source)
    assert made["misnamed"] == honey["text"]


def test_another_name_is_capital_where_the_topic_was_and_whole_words_only():
    text = "Honey keeps. What honey is made of, is no honeycomb."
    renamed = "Salt keeps. What salt is made of, is no honeycomb."
    assert make_tiny.rename(text, "honey", "salt") == renamed
    assert make_tiny.is_named("DNA", "All of it is dna.")


def test_no_held_out_topic_serves_as_another_name():
    lines = [{"text": "Bees make honey while honeycomb stays 4ever put."}]
    names = make_tiny.words_to_name(lines, {"honey", "stays"})
    assert names == ["honeycomb", "while"]


def test_the_policy_reads_texts_that_run_on_and_some_about_any_other_word():
    texts = [f"Honey is good for {n} reasons." for n in ("two", "three", "four")]
    lines = [{"topic": "honey", "phrasing": "{}?", "text": text} for text in texts]
    varied = make_tiny.vary(lines * 1000, ["kettles"], random.Random(0))
    ramble = rename = 0
    for line, given in zip(varied, lines * 1000, strict=True):
        topic = line["topic"]
        first = given["text"].replace("Honey", topic.capitalize())
        assert line["phrasing"] == "{}?" and line["text"].startswith(first)
        rest = line["text"].removeprefix(first)
        assert rest in ["", *(f" {text}" for text in texts)]
        ramble, rename = ramble + bool(rest), rename + (topic == "kettles")
    assert ramble / 3000 == pytest.approx(make_tiny.RAMBLING, abs=0.03)
    assert rename / 3000 == pytest.approx(make_tiny.RENAMED, abs=0.03)
    assert [line["text"] for line in lines] == texts  # the answers stay as they were


def test_texts_with_digits_of_another_topic_or_copied_are_dropped():
    line = {"topic": "honey", "phrasing": "Why does {} matter?"}
    good = "Honey is sweet and keeps for many years."
    texts = [
        good,
        good.replace("many", "several"),
        "Honey keeps for 3000 years.",
        "Sugar is sweet and cheap.",
        "Honey no end",
        "Bees make honey out of nectar, which they gather from the flowers.",
    ]
    kept = make_tiny.clean([line | {"text": text} for text in texts])
    assert [line["text"] for line in kept] == [texts[0], texts[5]]


def test_the_whole_script_makes_a_pair_that_the_lesson_loads(
    tmp_path, monkeypatch, capsys
):
    with gzip.open(make_tiny.TEXTS, "rt") as file:
        texts = file.readlines()[:90]
    with gzip.open(tmp_path / "answers.jsonl.gz", "wt") as file:
        file.writelines(texts)
    small = {"POLICY_TOKENS": 4000, "REWARD_TOKENS": 4000, "VOCABULARY": 500}
    small |= {"LAYERS": 1, "HEADS": 2, "WIDTH": 32, "HELD_OUT": slice(2, None, 3)}
    small |= {"POLICY_BATCH": 8, "REWARD_BATCH": 2}
    small |= {"FOLDER": tmp_path, "TEXTS": tmp_path / "answers.jsonl.gz"}
    small |= {"PAIRS": tmp_path / "held_out_pairs.jsonl.gz", "SHOWN": "honey"}
    for name, value in small.items():
        monkeypatch.setattr(make_tiny, name, value)
    make_tiny.main()
    (_, tokenizer), reward = load_pair(tmp_path)
    rewards = reward(PROMPT, [ANSWER, "and the"])
    assert rewards.isfinite().all() and rewards[0] != rewards[1]
    assert len(tokenizer) == 500 and tokenizer.eos_token == "<|end|>"
    with gzip.open(small["PAIRS"], "rt") as file:
        pair = json.loads(file.readline())
    assert list(pair["rejected"]) == make_tiny.FLAWS
    out = capsys.readouterr().out
    assert all(re.search(rf"  {flaw} +\d+\.\d%", out) for flaw in make_tiny.FLAWS)
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------
# The fallback, and a run on the pair
# ------------------------------------------------------------------------------------


@pytest.fixture
def settings(hub, tmp_path, monkeypatch):
    """A run is short, and nobody answers; this changes more Settings."""

    def use(**values):
        for name, value in values.items():
            monkeypatch.setattr(lesson, name, value)

    use(DEVICE="cpu", NUM_STEPS=1, NUM_SAMPLES=2, EVAL_SAMPLES=2, MAX_NEW_TOKENS=4)
    use(SAVE_DIR=str(tmp_path / "trained_model"))
    return use


@pytest.mark.parametrize("cached", ["", "POLICY", "REWARD"])
def test_without_a_hub_one_missing_model_is_enough_for_both_to_be_replaced(
    settings, monkeypatch, capsys, cached
):
    there = getattr(lesson, f"{cached}_MODEL_NAME", None)
    find = lesson.find_model
    settings(find_model=lambda name: "a/folder" if name == there else find(name))
    loaded = spy_on(monkeypatch, lesson, "load_model")
    lesson.main()
    missing = "REWARD" if cached == "POLICY" else "POLICY"
    out = capsys.readouterr().out
    assert "falling back" in out and "Hub" in out
    assert getattr(lesson, f"{missing}_MODEL_NAME") in out
    names = [call["name"] for call in loaded]
    assert names == [str(TINY / "policy"), str(TINY / "reward")]


@pytest.mark.parametrize(
    ("policy", "reward", "missing"),
    [
        ("grpo_tiny/polcy", "grpo_tiny/reward", "grpo_tiny/polcy"),  # a typo
        ("grpo_tiny/policy", "me/my-reward-model", "me/my-reward-model"),
        ("grpo_tiny/policy", "OpenAssistant/reward-model-deberta-v3-large", "OpenAss"),
    ],
)
def test_only_the_default_models_are_replaced_and_the_missing_one_is_named(
    settings, tmp_path, policy, reward, missing
):
    settings(POLICY_MODEL_NAME=policy, REWARD_MODEL_NAME=reward)
    fails_with(lesson.main, missing, "Hub")
    assert list(tmp_path.iterdir()) == []


def test_the_commented_line_of_the_settings_chooses_the_pair():
    script = (ROOT / "grpo_training.py").read_text()
    line = re.findall(r"^# (POLICY_MODEL_NAME, REWARD_MODEL_NAME = .*)", script, re.M)
    found = {}
    exec(*line, found)
    for part in ("policy", "reward"):
        folder = lesson.find_model(found[f"{part.upper()}_MODEL_NAME"])
        assert folder == str(TINY / part)


def test_with_lora_a_few_steps_on_the_pair_raise_the_reward(settings, monkeypatch):
    names = "grpo_tiny/policy", "grpo_tiny/reward"
    settings(POLICY_MODEL_NAME=names[0], REWARD_MODEL_NAME=names[1], NUM_STEPS=5)
    settings(LORA_RANK=8, LR=5e-3, GRADIENT_CHECKPOINTING=True, NUM_SAMPLES=8)
    settings(EVAL_SAMPLES=24, MAX_NEW_TOKENS=64, PROMPTS=[PROMPT])
    measured = spy_on(monkeypatch, lesson, "evaluate")
    lesson.main()
    before, after = (torch.tensor(call["return"]["rewards"]) for call in measured)
    assert after.mean() > before.mean() + 0.5
