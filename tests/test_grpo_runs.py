"""Tests of lesson 4's main(): processes, runs that end early, files, models, settings.

The equations, the sampling and the learning are tested in test_grpo.py.
"""

import io
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import huggingface_hub
import pytest
import test_grpo as tools
import torch
import transformers
from accelerate import Accelerator
from test_grpo import (
    EOS,
    PAGE,
    PROMPT,
    ROOT,
    chat_policy,
    fails_with,
    low_words,
    short_policy,
    spy_on,
    tiny_llama,
    tiny_policy,
    tiny_reward_model,
    weights,
    write_group,
)
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import grpo_training as lesson

folders, settings = tools.folders, tools.settings  # fixtures


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Nothing is cached, and the Hub raises the error that this is called with."""

    def answer(problem):
        def model_info(name, **options):
            huggingface_hub.utils.validate_repo_id(name)  # as the real one does
            raise problem

        monkeypatch.setattr(huggingface_hub, "model_info", model_info)

    cache = str(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    answer(ConnectionError("no way to huggingface.co"))
    return answer


# ------------------------------------------------------------------------------------
# Two processes
# ------------------------------------------------------------------------------------


def two_updates(accelerator):
    """Weights and figures after two updates from a given group, with all switched on.

    Every process has its share of the group's six responses.
    """
    policy, tokenizer = short_policy()
    batch = write_group(policy, tokenizer, 6)
    count = 6 // accelerator.num_processes
    rows = slice(accelerator.process_index * count, None)
    share = {name: column[rows][:count] for name, column in batch.items()}
    reference = tiny_policy(5)[0]
    optimizer = torch.optim.SGD(policy.parameters(), 0.3)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    for _ in range(2):
        figures = lesson.grpo_step(accelerator, policy, reference, optimizer, share)
    return weights(policy), figures


SWITCHED_ON = {"INNER_STEPS": 2, "KL_COEF": 0.1, "MICRO_BATCH_SIZE": 2}
TWO_PROCESSES = """
import os, signal, sys, torch
import grpo_training as lesson
import test_grpo as tests
import test_grpo_runs as runs

policy, folder = sys.argv[1:]
settings = tests.SMALL | {"POLICY_MODEL_NAME": policy, "NUM_STEPS": 5, "NUM_SAMPLES": 6}
settings |= {"SAVE_DIR": folder + "/model"}
settings |= {"REWARD_FUNCTION": tests.low_words, **runs.SWITCHED_ON}
for name, value in settings.items():
    setattr(lesson, name, value)
accelerator = lesson.start_accelerator()
weights, figures = runs.two_updates(accelerator)

def spy(accelerator, policy, reference, optimizer, batch):
    seen.append((batch, tests.weights(policy)))
    if len(seen) == 2 and accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C that only one process hears
    return step(accelerator, policy, reference, optimizer, batch)

def ending(call):
    try:
        call()
    except SystemExit as problem:
        return str(problem.code)

lesson.NUM_SAMPLES = 5
report = {"weights": weights, "figures": figures, "uneven": ending(lesson.main)}
lesson.NUM_SAMPLES = 6
step, seen = lesson.grpo_step, []
lesson.grpo_step = spy
try:
    lesson.main()
finally:
    torch.save(report | {"seen": seen}, f"{folder}/{accelerator.process_index}.pt")
"""


@pytest.fixture(scope="module")
def two_processes(folders, tmp_path_factory):
    """What each of two processes reports, and the folder they wrote into."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO_PROCESSES)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, folder / "two.py", folders / "policy", folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert "KeyboardInterrupt" in done.stderr, done.stderr
    reports = [torch.load(folder / f"{i}.pt", weights_only=True) for i in (0, 1)]
    return reports, folder


def test_two_processes_leave_the_weights_and_figures_of_one(two_processes, settings):
    settings(**SWITCHED_ON)
    weights_1, figures_1 = two_updates(Accelerator(cpu=True))
    reports, _ = two_processes
    assert len(reports) == 2
    assert (weights_1 - weights(short_policy()[0])).abs().max() > 1e-3
    for report in reports:
        assert torch.allclose(weights_1, report["weights"], atol=1e-6)
        assert report["figures"] == pytest.approx(figures_1, rel=1e-3, abs=1e-6)


def test_each_process_learns_from_its_own_half_compared_with_the_whole(two_processes):
    tokenizer = tiny_policy()[1]
    seen = [report["seen"] for report in two_processes[0]]
    for step in (0, 1):
        first, second = (process[step] for process in seen)
        rows = [row for batch, _ in (first, second) for row in batch["completion_ids"]]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        assert len(set(texts)) == 6  # seeds differ
        whole = lesson.group_advantages(torch.tensor(low_words(PROMPT, texts)))
        halves = torch.cat([first[0]["advantages"], second[0]["advantages"]])
        assert torch.allclose(whole, halves, atol=1e-5)
        assert torch.allclose(first[1], second[1], atol=1e-6)


def test_ctrl_c_in_one_process_ends_both_and_keeps_the_run(two_processes):
    reports, folder = two_processes
    assert [len(report["seen"]) for report in reports] == [2, 2]
    kept = AutoModelForCausalLM.from_pretrained(folder / "model_interrupted")
    assert (weights(kept) - weights(tiny_policy()[0])).abs().max() > 1e-4
    assert (folder / "model_interrupted" / "learning_curve.png").exists()
    assert not (folder / "model").exists()


def test_a_group_that_processes_cannot_share_evenly_is_refused(two_processes):
    for report in two_processes[0]:
        assert "NUM_SAMPLES" in report["uneven"] and "2" in report["uneven"]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launches_that_split_the_model_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    fails_with(capsys, lesson.main, "FSDP", "DeepSpeed")


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def test_main_prints_its_figures_and_saves_a_model_that_loads_bit_for_bit(
    tmp_path, capsys, monkeypatch
):
    kept = {}
    spy_on(monkeypatch, "save_run", lambda policy, *a: kept.update(policy.state_dict()))
    lesson.main()
    out = capsys.readouterr().out
    for step in (0, 1):
        block = out.split(f"\nStep {step} | ")[1].splitlines()
        assert re.match(r"Reward [+-][\d.]+ \(std [\d.]+, max [+-][\d.]+\)$", block[0])
        names = ["loss", "KL", "entropy", "clipped", "length", "cut off", "gradient"]
        assert re.findall(r"([A-Za-z ]+) \d", block[1].replace("|", "")) == [
            *(f"  {name}" for name in names)
        ]
        assert max(map(len, block[:2])) <= 88
        scores = [float(re.match(r"  \[([+-]\d+\.\d\d)\] ", x)[1]) for x in block[2:6]]
        assert len(set(scores)) == 4 and scores == sorted(scores, reverse=True)
    assert "before" in out and "after" in out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, kept[name]), name
    writer = transformers.pipeline("text-generation", str(tmp_path / "model"))
    assert writer(PROMPT, max_new_tokens=4)[0]["generated_text"].startswith(PROMPT)
    assert writer.tokenizer.get_vocab() == tiny_policy()[1].get_vocab()
    curve = tmp_path / "model" / "learning_curve.png"
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_the_printed_gain_is_the_reward_before_and_after(settings, capsys):
    settings(REWARD_FUNCTION=low_words, NUM_STEPS=25, LR=3e-3, PROMPTS=["w5"])
    settings(EVAL_SAMPLES=16, NUM_SAMPLES=8)
    lesson.main()
    out = capsys.readouterr().out
    before, after = (
        float(re.search(rf"  {name} +([+-]\d+\.\d+)", out)[1])
        for name in ("before", "after")
    )
    assert before < 0.65 and after > before + 0.15


def test_the_reference_exists_only_with_kl_and_stays_as_it_was(settings, monkeypatch):
    seen = []
    spy_on(
        monkeypatch,
        "grpo_step",
        lambda a, policy, reference, *_: seen.append(
            (weights(policy), reference and weights(reference))
        ),
    )
    lesson.main()
    assert [reference for _, reference in seen] == [None, None]
    seen.clear()
    settings(KL_COEF=0.1, LR=0.01)
    lesson.main()
    assert torch.equal(seen[0][1], seen[0][0])  # a copy of the first policy
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[1][1], seen[1][0])


def test_prompts_are_taken_in_turn_and_a_function_can_score(settings):
    seen = []

    def judge(prompt, responses):
        seen.append(prompt)
        return [len(text) for text in responses]

    settings(REWARD_FUNCTION=judge, NUM_STEPS=3, REWARD_MODEL_NAME="never/asked-for")
    lesson.main()
    assert seen[2:5] == [PROMPT, "w4", PROMPT]  # after 2 to measure, and before 2 more


def test_the_same_seed_gives_the_same_run(capsys):
    runs = []
    for _ in range(2):
        lesson.main()
        runs.append(re.sub(r"\d+\.\d s", "", capsys.readouterr().out))
    assert runs[0] == runs[1]


def test_equal_rewards_skip_the_step_and_say_so(settings, tmp_path, capsys):
    settings(REWARD_FUNCTION=lambda prompt, texts: [0.3] * len(texts), LR=0.1)
    lesson.main()
    assert capsys.readouterr().out.count("Skipped") == 2
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(saved), weights(tiny_policy()[0]))


def test_the_settings_of_the_advantages_and_of_adamw_are_used(settings, monkeypatch):
    made, make = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: made.append((a[1], k)) or make(*a, **k)
    )
    calls = spy_on(monkeypatch, "group_advantages")
    settings(LR=0.002, SCALE_BY_STD=False)
    lesson.main()
    assert [scale for _, scale in calls] == [False, False]
    assert made[0][0] == 0.002 and made[0][1]["weight_decay"] == 0


def test_wandb_gets_every_step_if_asked_for(settings, monkeypatch, capsys):
    log, trackers = [], []

    class Fake(Accelerator):
        def __init__(self, log_with=None, **others):
            trackers.append(log_with)
            super().__init__(**others)

        def log(self, values, step):
            log.append((step, values))

    monkeypatch.setattr(lesson, "Accelerator", Fake)
    lesson.main()
    monkeypatch.setattr(lesson, "find_spec", lambda name: name == "wandb")
    settings(USE_WANDB=True)
    lesson.main()
    assert trackers == [None, "wandb"] and [step for step, _ in log] == [0, 1] * 2
    names = {"reward", "loss", "KL", "entropy", "clipped", "length", "gradient"}
    assert names <= set(log[2][1])
    monkeypatch.setattr(lesson, "find_spec", lambda name: None)
    fails_with(capsys, lesson.main, "USE_WANDB", "pip install")


def test_odd_characters_never_end_a_run(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    lesson.start_accelerator()
    rewards = torch.tensor([1.0, 2.0])
    lesson.print_step(0, ["caf\u00e9 \u4f60", "b"], rewards, {"loss": 1.0})
    narrow.flush()
    assert b"caf?" in narrow.buffer.getvalue()


# ------------------------------------------------------------------------------------
# Runs that end early, and files
# ------------------------------------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def fail_at_call(number, how):
    """A reward function that fails: 2 calls measure, then there is 1 in each step."""
    calls = []

    def judge(prompt, responses):
        calls.append(prompt)
        return how(responses) if len(calls) == number else low_words(prompt, responses)

    return judge


def raise_(problem):
    raise problem


@pytest.mark.parametrize("call", [4, 5], ids=["at step 1", "while measuring"])
@pytest.mark.parametrize(
    ("how", "ending"),
    [
        (lambda texts: {}["a bug"], KeyError),
        (lambda texts: [torch.nan] * len(texts), SystemExit),
        (lambda texts: raise_(KeyboardInterrupt), KeyboardInterrupt),
    ],
    ids=["a bug", "NaN", "Ctrl-C"],
)
def test_whatever_ends_a_run_early_keeps_it_beside_the_last_good_one(
    settings, tmp_path, how, ending, call
):
    lesson.save_run(*tiny_policy(), [torch.ones(4)], "")
    good = contents(tmp_path / "model")
    settings(REWARD_FUNCTION=fail_at_call(call, how), LR=0.1)
    with pytest.raises(ending):
        lesson.main()
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model_interrupted")
    assert (weights(kept) - weights(tiny_policy()[0])).abs().max() > 0.05
    assert (tmp_path / "model_interrupted" / "learning_curve.png").exists()
    assert contents(tmp_path / "model") == good and "learning_curve.png" in good
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_and_keeps_it(settings, tmp_path, monkeypatch, number):
    settings(NUM_STEPS=9)
    steps = spy_on(
        monkeypatch,
        "grpo_step",
        lambda *a: os.kill(os.getpid(), number) if len(steps) == 2 else None,
    )
    with pytest.raises(KeyboardInterrupt):
        lesson.main()
    assert len(steps) == 2
    assert (tmp_path / "model_interrupted" / "config.json").exists()
    assert not (tmp_path / "model").exists()


def test_a_run_that_ends_before_its_first_step_leaves_an_earlier_one_alone(
    settings, tmp_path
):
    settings(REWARD_FUNCTION=fail_at_call(1, lambda texts: {}["a bug"]))
    with pytest.raises(KeyError):
        lesson.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_signal_is_heard_while_saving_and_each_is_heard_again_afterwards(
    tmp_path, monkeypatch, number
):
    def ctrl_c(*args):
        os.kill(os.getpid(), number)

    spy_on(monkeypatch, "draw_learning_curve", ctrl_c)
    lesson.main()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "learning_curve.png").exists()
    assert not (tmp_path / "model_interrupted").exists()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    lesson.start_accelerator()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_files_of_the_user_s_own_stay_untouched_in_the_model_s_folder(tmp_path):
    own = "thesis.safetensors", "hf_token.json", "vocab.txt", "merges.txt", "notes.md"
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    for name in (*own, "more/config.json"):
        (folder / name).write_text(f"my {name}")
    lesson.main()
    for name in (*own, "more/config.json"):
        assert (folder / name).read_text() == f"my {name}"
    assert AutoModelForCausalLM.from_pretrained(folder)


def test_saving_over_another_model_leaves_a_model_that_loads_as_it_was_trained(
    settings, tmp_path
):
    folder = tmp_path / "model"
    chat_policy(folder)  # with a template, which must not stay
    settings(PROMPTS=[PROMPT])
    lesson.main()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is None and tokenizer.eos_token_id == EOS
    assert tokenizer(PROMPT).input_ids == [1, 2, 3]


def test_a_save_cut_off_anywhere_leaves_a_folder_that_loads_new_or_not_at_all(
    tmp_path, monkeypatch
):
    new, replace = tiny_policy(7), os.replace
    for part in tiny_policy():
        part.save_pretrained(tmp_path / "model")
    for cut in itertools.count():
        moved = []

        def move(*names, limit=cut, moved=moved):
            if len(moved) == limit:
                raise OSError("disk full")
            moved.append(names)
            replace(*names)

        monkeypatch.setattr(os, "replace", move)
        try:
            lesson.save_run(*new, [], "")
        except OSError:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        else:
            break
        assert [p.name for p in tmp_path.iterdir()] == ["model"]  # nothing beside it
    assert cut >= 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(loaded), weights(new[0]))


def test_names_are_looked_up_and_files_are_written_beside_the_script(
    settings, tmp_path, monkeypatch, folders, hub
):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    settings(HERE=here, SAVE_DIR="trained_model")
    lesson.main()
    settings(POLICY_MODEL_NAME="trained_model")  # to go on from there
    loaded = spy_on(monkeypatch, "load_model")
    lesson.main()
    assert loaded[0][1] == str(here / "trained_model")
    assert [path.name for path in here.iterdir()] == ["trained_model"]
    assert not list(elsewhere.iterdir())


# ------------------------------------------------------------------------------------
# Models and the Hub
# ------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_said_in_one_line_and_nothing_is_written(
    settings, tmp_path, capsys, hub
):
    settings(POLICY_MODEL_NAME="gpt2-large")
    fails_with(capsys, lesson.main, "gpt2", "Hub", "internet", "folder")
    assert not list(tmp_path.iterdir())


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch, hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ask = huggingface_hub.HfApi(endpoint=url).model_info
        monkeypatch.setattr(
            huggingface_hub,
            "model_info",
            lambda name, timeout: ask(name, timeout=timeout / 10),
        )
        started = time.time()
        assert lesson.find_model("gpt2") is None
        assert 0.3 < time.time() - started < 3


def test_a_cached_model_is_found_without_the_hub(tmp_path, hub):
    cached = tmp_path / "cache" / "models--me--model"
    for file, text in [("refs/main", "abc"), ("snapshots/abc/config.json", "{}")]:
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    assert lesson.find_model("me/model") == str(cached / "snapshots" / "abc")
    assert lesson.find_model("me/other") is None


def test_a_hub_that_refuses_is_no_hub_out_of_reach(hub):
    refused = huggingface_hub.errors.RepositoryNotFoundError
    problem = refused("404", response=types.SimpleNamespace(headers={}, request=None))
    hub(problem)
    assert lesson.find_model("gpt2") == "gpt2"  # from_pretrained says what is wrong


def test_folders_that_hold_no_model_or_no_tokenizer_are_refused(
    settings, tmp_path, capsys, hub
):
    tiny_policy()[0].save_pretrained(tmp_path / "bare")
    tiny_policy()[1].save_pretrained(tmp_path / "only_tokenizer")
    for name, words in [
        ("me/nothing", ["me/nothing", "Hub"]),
        ("./nothing", ["./nothing"]),  # these can be no ids on the Hub
        (str(tmp_path / "nothing"), ["nothing"]),
        ("no/such/folder", ["no/such/folder"]),
        (str(tmp_path / "bare"), ["tokenizer"]),
        (str(tmp_path / "only_tokenizer"), ["only_tokenizer"]),
    ]:
        settings(POLICY_MODEL_NAME=name)
        fails_with(capsys, lesson.main, *words)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, "without a head"])
def test_a_policy_needs_its_trained_head(settings, tmp_path, capsys, kind):
    if kind == "without a head":
        tiny_llama().model.save_pretrained(tmp_path / "llama")
    else:
        tiny_llama(kind).save_pretrained(tmp_path / "llama")
    tiny_policy()[1].save_pretrained(tmp_path / "llama")
    settings(POLICY_MODEL_NAME=str(tmp_path / "llama"))
    fails_with(capsys, lesson.main, "lm_head.weight")


@pytest.mark.parametrize(
    ("options", "word"), [({"labels": 2}, "2 outputs"), ({"head": False}, "classifier")]
)
def test_a_reward_model_needs_a_trained_head_with_one_output(
    settings, tmp_path, capsys, options, word
):
    settings(REWARD_MODEL_NAME=tiny_reward_model(tmp_path / "reward", **options))
    fails_with(capsys, lesson.main, word)


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(tmp_path):
    policy, tokenizer = tiny_policy()
    policy.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = lesson.load_model(AutoModelForCausalLM, str(tmp_path))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert tokenizer.pad_token_id == loaded.config.pad_token_id == EOS


def test_a_prompt_and_response_longer_than_the_context_are_refused(settings, capsys):
    settings(PROMPTS=[PROMPT, "w1 " * 50], MAX_NEW_TOKENS=15)
    fails_with(capsys, lesson.main, "MAX_NEW_TOKENS", "policy")
    settings(MAX_NEW_TOKENS=14, NUM_STEPS=1, REWARD_FUNCTION=low_words)
    lesson.main()  # 50 + 14 are exactly the 64 that the policy can read


@pytest.mark.parametrize("answer", [[1.0], [[1.0]] * 4, 3.0, [torch.inf] * 4])
def test_a_reward_function_that_gives_no_finite_number_each_is_refused(
    settings, capsys, answer
):
    settings(REWARD_FUNCTION=lambda prompt, texts: answer)
    fails_with(capsys, lesson.main, "finite")


def test_no_code_from_the_hub_is_ever_trusted():
    assert "trust_remote_code" not in PAGE


# ------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "DEVICE": ["gpu"],
    "PROMPTS": [[], "a text", [""]],
    "SEED": [500_000, -1],
    "NUM_SAMPLES": [1],
    "EVAL_SAMPLES": [1],
    "NUM_STEPS": [0],
    "MAX_NEW_TOKENS": [0],
    "INNER_STEPS": [0],
    "MICRO_BATCH_SIZE": [0],
    "LR": [-1e-5, float("nan"), 2],
    "TINY_LR": [0],
    "TOP_P": [0, 1.5],
    "CLIP_EPS": [0, float("inf")],
    "TEMPERATURE": [0, float("nan")],
    "KL_COEF": [-0.1, float("nan")],
    "MAX_GRAD_NORM": [-1, 0],
    "MIXED_PRECISION": ["fp16", None],
    "SAVE_DIR": ["grpo_training.py", "no/such/folder", "grpo_tiny", "grpo_tiny/new"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, vs in IMPOSSIBLE.items() for v in vs]
)
def test_an_impossible_setting_is_named_in_one_line(settings, capsys, name, value):
    settings(**{name: value})
    fails_with(capsys, lesson.main, name)


def test_every_setting_is_checked_in_one_go(settings, capsys):
    settings(NUM_SAMPLES=1, TOP_P=2)
    fails_with(capsys, lesson.main, "NUM_SAMPLES", "TOP_P")


def test_the_folder_of_the_bundled_models_is_never_written_to(settings, capsys):
    for name in ("grpo_tiny/policy", str(ROOT / "tests/../grpo_tiny/policy/new")):
        settings(SAVE_DIR=name)
        fails_with(capsys, lesson.main, "SAVE_DIR", "grpo_tiny/")
