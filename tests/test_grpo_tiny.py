"""Tests of grpo_tiny/: the shipped pair, the script that makes it, and the fallback."""

import gzip
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from lessons import LESSONS, copy_lesson, quiet_environment, spy_on
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import grpo_training as lesson

ROOT = Path(lesson.__file__).parent
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


@pytest.fixture(scope="module")
def pair():
    """((policy, tokenizer), reward model), as lesson 4 loads them."""
    return load_pair(TINY)


def load_pair(folder):
    policy = lesson.load_policy(str(folder / "policy"))
    kind = AutoModelForSequenceClassification
    return policy, lesson.RewardModel(*lesson.load_model(kind, str(folder / "reward")))


def rewards_of(pair, prompt, texts):
    return pair[1](prompt, texts)


# ------------------------------------------------------------------------------------
# The folders
# ------------------------------------------------------------------------------------


def test_both_folders_are_complete_and_within_20_mb():
    for name in ("policy", "reward"):
        files = {path.name for path in (TINY / name).iterdir()}
        needed = {"config.json", "model.safetensors", "tokenizer.json"}
        assert files >= needed | {"tokenizer_config.json"}
        assert not [file for file in files if file.endswith((".py", ".bin", ".tmp"))]
    sizes = [
        p.stat().st_size for n in ("policy", "reward") for p in (TINY / n).iterdir()
    ]
    assert sum(sizes) <= 20e6


def test_the_plain_auto_classes_load_both_whole():
    policy, report = AutoModelForCausalLM.from_pretrained(
        TINY / "policy", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model, report = AutoModelForSequenceClassification.from_pretrained(
        TINY / "reward", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.num_labels == 1
    for loaded, name in ((policy, "policy"), (model, "reward")):
        tokenizer = AutoTokenizer.from_pretrained(TINY / name)
        assert loaded.config.vocab_size == len(tokenizer)
        assert loaded.config.eos_token_id == tokenizer.eos_token_id
        assert loaded.config.pad_token_id == tokenizer.pad_token_id
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert 1e6 < sum(p.numel() for p in loaded.parameters()) < 4e6


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
    group = lesson.generate_group(policy, tokenizer, PROMPT, 128)
    ended = (group["completion_ids"] == tokenizer.eos_token_id).any(1)
    assert 0.1 < ended.float().mean() < 0.5
    texts = group["responses"]
    assert sum("exercise" in text.lower() for text in texts) > 100
    assert len(set(texts)) > 100


# ------------------------------------------------------------------------------------
# What the reward model prefers
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "worse",
    [
        "Regular exercise is important because it strengthens the heart and",
        "Regular exercise is important. Regular exercise is important. "
        "Regular exercise is important. Regular exercise is important.",
        "Also stress the because strengthens and helps reduces it exercise. Regular "
        "people important heart to muscles is well the and sleep it.",
        "Regular exercise regular exercise regular exercise regular exercise.",
        "",
    ],
    ids=["cut short", "repetitive", "scrambled", "stuffed", "empty"],
)
def test_the_reward_model_prefers_a_plain_answer_to_one_with_a_flaw(pair, worse):
    good, bad = rewards_of(pair, PROMPT, [ANSWER, worse])
    assert good > bad


def test_pairwise_accuracy_on_held_out_topics_is_95_percent(pair):
    with gzip.open(TINY / "held_out_pairs.jsonl.gz", "rt") as file:
        pairs = [json.loads(line) for line in file][::16]
    topics = make_tiny.read_topics(make_tiny.TOPICS)[make_tiny.HELD_OUT]
    won = {}
    for line in pairs:
        assert any(topic in line["prompt"] for topic in topics)
        texts = [line["chosen"], *line["rejected"].values()]
        chosen, *rejected = rewards_of(pair, line["prompt"], texts).tolist()
        for flaw, score in zip(line["rejected"], rejected, strict=True):
            won.setdefault(flaw, []).append(chosen > score)
    assert list(won) == make_tiny.FLAWS
    shares = {flaw: sum(wins) / len(wins) for flaw, wins in won.items()}
    assert sum(shares.values()) / len(shares) >= 0.95, shares
    assert min(shares.values()) > 0.8, shares


def test_a_reward_does_not_depend_on_what_is_scored_beside_it(pair):
    alone = rewards_of(pair, PROMPT, [ANSWER])
    beside = rewards_of(pair, PROMPT, ["Yes.", ANSWER, ANSWER + " " + ANSWER])
    assert torch.allclose(alone[0], beside[1], atol=1e-4)


# ------------------------------------------------------------------------------------
# The script that makes them
# ------------------------------------------------------------------------------------


def test_the_docstring_cases_of_the_two_losses():
    logits, targets = torch.zeros(1, 3, 2), torch.tensor([[-100, 0, 1]])
    assert make_tiny.next_token_loss(logits, targets).item() == pytest.approx(
        0.6931, abs=1e-4
    )
    logits[0, 2] = torch.tensor([9.0, -9.0])  # about a token after the last: unused
    assert make_tiny.next_token_loss(logits, targets).item() == pytest.approx(
        0.6931, abs=1e-4
    )
    equal = make_tiny.preference_loss(torch.zeros(1, 1), torch.zeros(1, 2))
    ahead = make_tiny.preference_loss(torch.tensor([[3.0]]).log(), torch.zeros(1, 2))
    assert equal.item() == pytest.approx(0.6931, abs=1e-4)
    assert ahead.item() == pytest.approx(0.3097, abs=1e-4)


def test_only_the_answer_and_its_end_are_learnt(pair):
    tokenizer = pair[0][1]
    line = {"topic": "regular exercise", "phrasing": "Explain why {} is important."}
    ids, targets = make_tiny.encode_answers(tokenizer, [line | {"text": ANSWER}])[0]
    learnt = [t for t in targets if t >= 0]
    assert ids[-len(learnt) :] == learnt and learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt[:-1]).strip() == ANSWER
    assert ids[: len(ids) - len(learnt)] == tokenizer(PROMPT).input_ids


@pytest.mark.parametrize("seed", range(20))
def test_each_rule_makes_an_answer_that_is_worse_in_the_way_that_it_says(seed):
    source = random.Random(seed)
    cut = make_tiny.cut_short(ANSWER, source)
    assert ANSWER.startswith(cut) and not cut.endswith((".", "!", "?"))
    assert sorted(make_tiny.scramble(ANSWER, source).split()) == sorted(ANSWER.split())
    twelve = " ".join(ANSWER.split()[:12])  # the end of a short one is repeated, too
    for words in make_tiny.repeat(ANSWER, source), make_tiny.repeat(twelve, source):
        words = words.lower().split()
        runs = list(zip(words, words[1:], strict=False))
        assert len(set(runs)) < len(runs)
    stuffed = make_tiny.stuff(ANSWER, "regular exercise", source).lower()
    assert "regular exercise" in stuffed and stuffed != ANSWER.lower()
    other = "Honey keeps for years, so that it was found in graves. It is sweet."
    first = ANSWER.split(".")[0] + "."
    long = make_tiny.run_on(ANSWER, other, source)
    assert long.startswith(first) and len(long.split()) >= len(first.split()) + 3
    assert other.startswith(long.removeprefix(ANSWER).removeprefix(first).strip())


def test_every_flaw_has_its_answer_and_a_topic_can_be_renamed():
    lines = [
        {"topic": "regular exercise", "phrasing": "{}", "text": ANSWER},
        {"topic": "honey", "phrasing": "{}", "text": "Honey is sweet and keeps long."},
    ]
    made = make_tiny.break_by_rule(lines[0], lines, ["honey"], random.Random(0))
    assert list(made) == make_tiny.FLAWS[:7]
    assert made["off topic"] == lines[1]["text"]
    assert made["misnamed"] == ANSWER.replace("Regular exercise", "Honey")
    unnamed = lines[0] | {"text": "To exercise is important."}  # nothing to rename
    made = make_tiny.break_by_rule(unnamed, lines, ["honey"], random.Random(0))
    assert made["misnamed"] == lines[1]["text"]
    for seed in range(20):  # another name is never the topic's own
        source = random.Random(seed)
        names = ["honey", "regular exercise"]
        made = make_tiny.break_by_rule(lines[0], lines, names, source)
        assert made["misnamed"] == ANSWER.replace("Regular exercise", "Honey")


def test_another_name_is_capital_where_the_topic_was_and_whole_words_only():
    text = "Honey keeps. Honey, or what honey is made of, is no honeycomb."
    renamed = "Salt keeps. Salt, or what salt is made of, is no honeycomb."
    assert make_tiny.rename(text, "honey", "salt") == renamed
    assert make_tiny.is_named("DNA", "All of it is dna.")
    assert not make_tiny.is_named("rain", "Rainwater feeds the trains of thought.")


def test_no_held_out_topic_serves_as_another_name():
    lines = [{"text": "Bees make honey while honeycomb stays 4ever put."}]
    names = make_tiny.words_to_name(lines, {"honey", "stays"})
    assert names == ["honeycomb", "while"]


def test_the_policy_reads_texts_that_run_on_and_some_about_any_other_word():
    phrasing = "Why does {} matter?"
    texts = [f"Honey is good for {n} reasons." for n in ("two", "three", "four")]
    lines = [{"topic": "honey", "phrasing": phrasing, "text": text} for text in texts]
    varied = make_tiny.vary(lines * 1000, ["kettles"], random.Random(0))
    assert len(varied) == 3000
    ramble = rename = 0
    for line, given in zip(varied, lines * 1000, strict=True):
        topic = line["topic"]
        first = given["text"].replace("Honey", topic.capitalize())
        assert line["phrasing"] == phrasing and line["text"].startswith(first)
        rest = line["text"][len(first) :]
        assert rest in ["", *(f" {text}" for text in texts)]
        ramble, rename = ramble + bool(rest), rename + (topic == "kettles")
    assert ramble / 3000 == pytest.approx(make_tiny.RAMBLING, abs=0.03)
    assert rename / 3000 == pytest.approx(make_tiny.RENAMED, abs=0.03)
    assert [line["text"] for line in lines] == texts  # the answers stay as they were


def test_a_text_too_long_for_the_context_is_cut_there(pair):
    line = {"topic": "honey", "phrasing": "Why does {} matter?", "text": ANSWER * 9}
    ids, targets = make_tiny.encode_answers(pair[0][1], [line])[0]
    assert len(ids) == len(targets) == make_tiny.CONTEXT


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
    small = {"POLICY_TOKENS": 6000, "REWARD_TOKENS": 5000, "VOCABULARY": 500}
    small |= {"LAYERS": 1, "HEADS": 2, "WIDTH": 32, "HELD_OUT": slice(2, None, 3)}
    small |= {"POLICY_BATCH": 8, "REWARD_BATCH": 2}
    small |= {"FOLDER": tmp_path, "TEXTS": tmp_path / "answers.jsonl.gz"}
    small |= {"PAIRS": tmp_path / "held_out_pairs.jsonl.gz", "SHOWN": "honey"}
    for name, value in small.items():
        monkeypatch.setattr(make_tiny, name, value)
    weights = []
    for _ in range(2):  # the same seed, the same models
        make_tiny.main()
        pair = load_pair(tmp_path)
        policy, tokenizer = pair[0]
        rewards = rewards_of(pair, PROMPT, [ANSWER, "and the"])
        assert rewards.isfinite().all() and rewards[0] != rewards[1]
        weights.append(torch.cat([p.flatten() for p in policy.parameters()]))
    assert torch.equal(*weights)
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
def no_hub(tmp_path, monkeypatch):
    """Nothing is cached, the Hub is unreachable, and a run is short."""

    def model_info(name, **options):
        raise ConnectionError("no way to huggingface.co")

    cache = str(tmp_path.with_name("empty"))
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    short = {"DEVICE": "cpu", "NUM_STEPS": 2, "EVAL_SAMPLES": 4}
    for name, value in (short | {"SAVE_DIR": str(tmp_path / "trained_model")}).items():
        monkeypatch.setattr(lesson, name, value)
    return tmp_path


def test_without_a_hub_the_script_says_so_within_seconds_and_goes_on_with_the_pair(
    tmp_path,
):
    copy_lesson(tmp_path, LESSONS["grpo"], NUM_STEPS=1, EVAL_SAMPLES=2)
    run = subprocess.Popen(
        [sys.executable, "-u", tmp_path / "grpo_training.py"],
        cwd=TINY,  # another working directory
        env=quiet_environment(tmp_path),  # nothing is cached, nobody answers
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines, times = [], []
    for line in run.stdout:
        lines.append(line)
        times.append(time.time())
    assert run.wait() == 0, run.stderr.read()
    text, said = "".join(lines), ["falling back" in line for line in lines].index(True)
    assert times[said] - times[0] < 60  # seconds, imports included
    assert "gpt2" in text and "Hub" in text and "grpo_tiny/" in text
    assert (tmp_path / "trained_model" / "model.safetensors").exists()


@pytest.mark.parametrize("missing", ["POLICY_MODEL_NAME", "REWARD_MODEL_NAME"])
def test_one_missing_model_is_enough_for_both_to_be_replaced(
    no_hub, monkeypatch, capsys, missing
):
    name, find = getattr(lesson, missing), lesson.find_model  # the other is cached
    monkeypatch.setattr(
        lesson, "find_model", lambda x: find(x) if x == name else "a/cached/folder"
    )
    loaded = spy_on(monkeypatch, lesson, "load_model")
    lesson.main()
    assert "falling back" in capsys.readouterr().out
    names = [call["name"] for call in loaded]
    assert names == [str(TINY / "policy"), str(TINY / "reward")]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("POLICY_MODEL_NAME", "grpo_tiny/polcy"),  # a typo
        ("REWARD_MODEL_NAME", "me/my-reward-model"),
        ("POLICY_MODEL_NAME", str(TINY / "policy")),  # there, but the other is not
    ],
)
def test_only_the_default_models_are_replaced_and_the_missing_one_is_named(
    no_hub, monkeypatch, setting, name
):
    other = {"POLICY_MODEL_NAME": "REWARD", "REWARD_MODEL_NAME": "POLICY"}[setting]
    there = Path(name).is_dir()
    monkeypatch.setattr(lesson, setting, name)
    if not there:
        folder = TINY / other.lower()
        monkeypatch.setattr(lesson, f"{other}_MODEL_NAME", str(folder))
    missing = getattr(lesson, f"{other}_MODEL_NAME") if there else name
    with pytest.raises(SystemExit) as stopped:
        lesson.main()
    line = str(stopped.value)
    assert missing in line and "Hub" in line and "\n" not in line
    assert list(no_hub.iterdir()) == []


def test_the_commented_line_of_the_settings_chooses_the_pair(no_hub):
    script = (ROOT / "grpo_training.py").read_text()
    line = "# POLICY_MODEL_NAME, REWARD_MODEL_NAME = "
    assert script.count(line) == 1
    found = {}
    start = script.index(line) + 2
    exec(script[start : script.index("\n", start)], found)
    names = found["POLICY_MODEL_NAME"], found["REWARD_MODEL_NAME"]
    assert [lesson.find_model(n) for n in names] == [
        str(TINY / "policy"),
        str(TINY / "reward"),
    ]


@pytest.mark.parametrize(
    "options", [{}, {"LORA_RANK": 8, "LR": 3e-3, "GRADIENT_CHECKPOINTING": True}]
)
def test_a_run_of_10_steps_on_the_pair_raises_the_reward_and_its_model_writes(
    no_hub, monkeypatch, capsys, options
):
    """With the learning rate of the Settings: 10 steps are few, so it is larger."""
    settings = {"POLICY_MODEL_NAME": "grpo_tiny/policy", "NUM_STEPS": 10, "LR": 1e-4}
    settings |= {"REWARD_MODEL_NAME": "grpo_tiny/reward", "EVAL_SAMPLES": 64}
    for name, value in (settings | options).items():
        monkeypatch.setattr(lesson, name, value)
    measured = spy_on(monkeypatch, lesson, "evaluate")
    lesson.main()
    assert "falling back" not in capsys.readouterr().out
    before, after = (torch.tensor(call["return"]["rewards"]) for call in measured)
    assert after.mean() > before.mean() + 0.5
    writer = pipeline("text-generation", str(no_hub / "trained_model"))
    text = writer(PROMPT, max_new_tokens=30)[0]["generated_text"]
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 20
