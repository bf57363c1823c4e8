"""Tests of grpo_tiny/: the shipped pair, the script that makes it, and the fallback."""

import gzip
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
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
README = (TINY / "README.md").read_text()
ONE_LINE = " ".join(README.split())
spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make_tiny.py")
make_tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tiny)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair():
    """((policy, tokenizer), (reward model, tokenizer)), as lesson 4 loads them."""
    return load_pair(TINY)


def load_pair(folder):
    return (
        lesson.load_model(AutoModelForCausalLM, str(folder / "policy")),
        lesson.load_model(AutoModelForSequenceClassification, str(folder / "reward")),
    )


def rewards_of(pair, prompt, texts):
    return lesson.score_responses(*pair[1], prompt, texts)


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


def test_the_readme_beside_the_pair_has_the_figures_and_texts_that_were_measured():
    path = ROOT / "tests" / "benchmarks" / "results" / "grpo_tiny.json"
    results = json.loads(path.read_text())
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) >= 5
    for name, figure in rows:
        assert figure == f"{results['summary'][name]:.4g}", name
    quoted = re.findall(r"^\* (Before|After): (.+)$", README, re.MULTILINE)
    assert [when for when, _ in quoted] == ["Before"] * 2 + ["After"] * 2
    texts = results["before"]["texts"][:2] + results["runs"][0]["texts"][:2]
    assert [text for _, text in quoted] == texts
    assert f"`SEED = {results['runs'][0]['seed']}`" in README
    judged = [run["judge"] for run in results["runs"]]
    assert (
        min(judged) > results["before"]["judge"] and "rises with every seed" in README
    )
    assert len(README.splitlines()) <= 70


def test_the_readme_beside_the_pair_describes_the_models_and_the_settings_of_today():
    policy = AutoModelForCausalLM.from_pretrained(TINY / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(TINY / "reward")
    for model in (policy, reward):
        assert f" {sum(p.numel() for p in model.parameters()):,} |" in README
        assert f"`{type(model).__name__}`" in README
        sizes = model.config.n_layer, model.config.n_head, model.config.n_embd
        assert sizes == (make_tiny.LAYERS, make_tiny.HEADS, make_tiny.WIDTH)
    assert f" {', '.join(map(str, sizes))} |" in README
    assert f" {policy.config.vocab_size:,} byte-level BPE tokens" in README
    assert f" {policy.config.n_positions} tokens |" in README
    size = sum(
        p.stat().st_size for n in ("policy", "reward") for p in (TINY / n).iterdir()
    )
    assert f"({size / 1e6:.1f} MB together)" in README
    assert f" {make_tiny.POLICY_TOKENS / 1e6:g} million tokens" in README
    assert f" {100 * make_tiny.RAMBLING:g} % of the texts run on" in README


def test_the_readme_beside_the_pair_counts_the_texts_as_they_are():
    with gzip.open(make_tiny.TEXTS, "rt") as file:
        written = [json.loads(line) for line in file]
    topics = make_tiny.read_topics(make_tiny.TOPICS)
    held_out = set(topics[make_tiny.HELD_OUT])
    lines = make_tiny.clean(written)
    learnt = [line for line in lines if line["topic"] not in held_out]
    prompts = {(line["phrasing"], line["topic"]) for line in written}
    wrote = f" wrote {len(written):,} answers to {len(prompts):,} prompts about "
    assert f"{wrote}{len(topics)} topics" in ONE_LINE
    assert (
        f" {len(lines):,} remain after cleaning: {len(learnt):,} on "
        f"{len(topics) - len(held_out)} topics to train on and "
        f"{len(lines) - len(learnt):,} on {len(held_out)} held-out topics" in ONE_LINE
    )
    sentences = [len(re.findall(r"[^.!?]+[.!?]+", line["text"])) for line in lines]
    share = sum(count >= 3 for count in sentences) / len(lines)
    assert f"{share:.1%} have three or more".replace("%", " %") in ONE_LINE


def test_the_readme_beside_the_pair_says_which_held_out_names_training_texts_contain():
    with gzip.open(make_tiny.TEXTS, "rt") as file:
        lines = make_tiny.clean([json.loads(line) for line in file])
    held_out = set(make_tiny.read_topics(make_tiny.TOPICS)[make_tiny.HELD_OUT])
    lines = [line for line in lines if line["topic"] not in held_out]
    everything = "\n".join(line["text"] for line in lines)
    present = [topic for topic in held_out if make_tiny.is_named(topic, everything)]
    industry, email = (
        sum(make_tiny.is_named(topic, line["text"]) for line in lines)
        for topic in ("industry", "email")
    )
    assert f"{len(present)} of their names occur in training answers" in ONE_LINE
    assert (
        email == 1 and f'("industry" in {industry} of them, "email" in one)' in ONE_LINE
    )
    names = set(make_tiny.words_to_name(lines, held_out))
    parts = [topic for topic in held_out if names & set(topic.lower().split())]
    assert not names & held_out and "river" in names
    assert f"single words of {len(parts)} names" in ONE_LINE


def test_the_readme_beside_the_pair_counts_how_many_topics_were_renamed():
    """Over the six epochs of `train_policy`, drawn again with the same seed."""
    with gzip.open(make_tiny.TEXTS, "rt") as file:
        lines = make_tiny.clean([json.loads(line) for line in file])
    held_out = set(make_tiny.read_topics(make_tiny.TOPICS)[make_tiny.HELD_OUT])
    lines = [line for line in lines if line["topic"] not in held_out]
    names = make_tiny.words_to_name(lines, held_out)
    source, renamed = random.Random(make_tiny.SEED), 0
    for _ in range(6):
        varied = make_tiny.vary(lines, names, source)
        pairs = zip(varied, lines, strict=True)
        renamed += sum(new["topic"] != old["topic"] for new, old in pairs)
        # The order of the batches uses the same source; the lengths do not matter here.
        make_tiny.batches_of_like_length(
            [0] * len(lines), make_tiny.POLICY_BATCH, source
        )
    share = f"{100 * renamed / 6 / len(lines):.1f} %"
    assert "about six epochs" in ONE_LINE
    assert f"In {share} the topic is replaced" in ONE_LINE
    assert f"can be renamed: {share} are" in (TINY / "make_tiny.py").read_text()


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
    _, completions = lesson.generate_group(policy, tokenizer, PROMPT, 128)
    ended = (completions == tokenizer.eos_token_id).any(1)
    assert 0.1 < ended.float().mean() < 0.5
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
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
    monkeypatch.setattr(lesson, "DEVICE", "cpu")
    monkeypatch.setattr(lesson, "NUM_STEPS", 2)
    monkeypatch.setattr(lesson, "EVAL_SAMPLES", 4)
    monkeypatch.setattr(lesson, "SAVE_DIR", str(tmp_path / "trained_model"))
    return tmp_path


def used_learning_rates(monkeypatch):
    """A list that every optimizer adds its learning rate to."""
    rates, make = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, lr, **k: rates.append(lr) or make(p, lr, **k)
    )
    return rates


def loaded_models(monkeypatch):
    """A list that every model's folder is added to."""
    names, load = [], lesson.load_model
    monkeypatch.setattr(
        lesson, "load_model", lambda kind, name: names.append(name) or load(kind, name)
    )
    return names


def test_without_a_hub_the_script_says_so_and_goes_on_with_the_pair(tmp_path):
    text = (ROOT / "grpo_training.py").read_text()
    text = text.replace("NUM_STEPS = 50", "NUM_STEPS = 1")
    text = text.replace("EVAL_SAMPLES = 32", "EVAL_SAMPLES = 2")
    (tmp_path / "grpo_training.py").write_text(text)
    shutil.copytree(TINY, tmp_path / "grpo_tiny")
    env = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "PYTHONUNBUFFERED": "1"}
    env["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens there
    run = subprocess.Popen(
        [sys.executable, tmp_path / "grpo_training.py"],
        cwd=tmp_path / "grpo_tiny",  # another working directory
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started, said = None, []
    for line in run.stdout:
        started = started or time.time()  # imports are done, the first line is out
        if "grpo_tiny/" in line:
            said.append((line, time.time() - started))
    assert run.wait() == 0, run.stderr.read()
    assert len(said) == 1 and said[0][1] < 10
    assert "gpt2" in said[0][0] and "Hub" in said[0][0]
    assert (tmp_path / "trained_model" / "model.safetensors").exists()
    assert (tmp_path / "trained_model" / "learning_curve.png").exists()


@pytest.mark.parametrize("missing", ["POLICY_MODEL_NAME", "REWARD_MODEL_NAME"])
def test_one_missing_model_is_enough_for_both_to_be_replaced(
    no_hub, monkeypatch, capsys, missing
):
    name, find = getattr(lesson, missing), lesson.find_model  # the other is cached
    monkeypatch.setattr(
        lesson, "find_model", lambda x: find(x) if x == name else "a/cached/folder"
    )
    names, rates = loaded_models(monkeypatch), used_learning_rates(monkeypatch)
    lesson.main()
    assert "falling back" in capsys.readouterr().out
    assert names == [str(TINY / "policy"), str(TINY / "reward")]
    assert rates == [lesson.TINY_LR]


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


def test_a_run_of_10_steps_on_the_pair_raises_the_reward_and_its_model_writes(
    no_hub, monkeypatch, capsys
):
    monkeypatch.setattr(lesson, "POLICY_MODEL_NAME", "grpo_tiny/policy")
    monkeypatch.setattr(lesson, "REWARD_MODEL_NAME", "grpo_tiny/reward")
    monkeypatch.setattr(lesson, "NUM_STEPS", 10)
    monkeypatch.setattr(lesson, "TINY_LR", 1e-4)  # 10 steps are few: larger ones
    monkeypatch.setattr(lesson, "EVAL_SAMPLES", 64)
    rates = used_learning_rates(monkeypatch)
    lesson.main()
    out = capsys.readouterr().out
    assert "falling back" not in out and rates == [lesson.TINY_LR]
    before, after = (
        float(re.search(rf"  {name} +([+-]\d+\.\d+)", out)[1])
        for name in ("before", "after")
    )
    assert after > before + 0.5
    writer = pipeline("text-generation", str(no_hub / "trained_model"))
    text = writer(PROMPT, max_new_tokens=30)[0]["generated_text"]
    assert text.startswith(PROMPT) and len(text) > len(PROMPT) + 20
