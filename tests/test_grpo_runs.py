"""Tests of lesson 4's main(): processes, runs that end early, files and models.

The equations, the sampling and the learning are tested in test_grpo.py; what every
lesson promises, such as keeping a run that Ctrl-C ends, in test_contract.py.
"""

import io
import itertools
import json
import os
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
from families import POLICIES, save
from lessons import LESSONS, ROOT, run_copy, spy_on
from test_grpo import PROMPT, fails_with, low_words, tiny_policy, weights
from transformers import AutoModelForCausalLM

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


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------
# Two processes
# ------------------------------------------------------------------------------------


def two_groups():
    """Two groups of tools.short_policy() with rewards of different means."""
    policy, tokenizer = tools.short_policy()
    groups = [tools.write_group(policy, tokenizer, 6) for _ in range(2)]
    groups[1]["rewards"] = 10 + torch.arange(6.0)
    return groups


SWITCHED_ON = {"INNER_STEPS": 2, "KL_COEF": 0.1, "MICRO_BATCH_SIZE": 4}
TWO_PROCESSES = """
import os, signal, sys, torch
import grpo_training as lesson
import test_grpo as tests
import test_grpo_runs as runs

policy_folder, folder = sys.argv[1:]
settings = tests.SMALL | {"POLICY_MODEL_NAME": policy_folder, "NUM_STEPS": 5}
settings |= {"SAVE_DIR": folder + "/model", "REWARD_FUNCTION": tests.low_words}
for name, value in (settings | runs.SWITCHED_ON).items():
    setattr(lesson, name, value)
accelerator = lesson.start_accelerator()
rank = accelerator.process_index
policy = tests.short_policy()[0]
reference = tests.tiny_policy(5)[0]
options = {"rate": 0.3, "reference": reference, "accelerator": accelerator}
metrics = tests.run_step(policy, runs.two_groups()[rank], **options)
report = {"metrics": metrics, "weights": tests.weights(policy), "seen": []}
step = lesson.generate_group

def sampled(policy, tokenizer, prompt, samples):
    group = step(policy, tokenizer, prompt, samples)
    report["seen"].append((prompt, group["completion_ids"]))
    if len(report["seen"]) == 4 and rank == 1:  # two to evaluate, two to train on
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C that only one process hears
    return group

lesson.generate_group = sampled
try:
    lesson.main()
except SystemExit as ending:
    report["ending"] = str(ending)
torch.save(report, f"{folder}/{rank}.pt")
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
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (folder / "1.pt").exists(), done.stderr
    reports = [torch.load(folder / f"{i}.pt", weights_only=True) for i in (0, 1)]
    return reports, folder


def test_two_processes_with_a_group_each_leave_what_one_leaves_with_both(
    two_processes, settings
):
    settings(**SWITCHED_ON)
    policy = tools.short_policy()[0]
    options = {"rate": 0.3, "reference": tiny_policy(5)[0]}
    metrics = tools.run_step(policy, *two_groups(), **options)
    assert (weights(policy) - weights(tools.short_policy()[0])).abs().max() > 1e-3
    for report in two_processes[0]:
        assert torch.allclose(weights(policy), report["weights"], atol=1e-6)
        assert report["metrics"] == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_processes_take_the_prompts_in_turn_and_sample_other_responses(two_processes):
    (first, second), _ = two_processes
    # Both prompts are evaluated; then process 0 takes the first, process 1 the second.
    assert [prompt for prompt, _ in first["seen"]] == [PROMPT, "w4", PROMPT, PROMPT]
    assert [prompt for prompt, _ in second["seen"]] == [PROMPT, "w4", "w4", "w4"]
    assert not torch.equal(first["seen"][0][1], second["seen"][0][1])


def test_ctrl_c_in_one_process_ends_both_after_the_same_step_and_keeps_the_run(
    two_processes,
):
    reports, folder = two_processes
    assert [len(report["seen"]) for report in reports] == [4, 4]
    assert all("2 of 5" in report["ending"] for report in reports)
    kept = loaded(folder / "model_interrupted")
    assert (weights(kept) - weights(tiny_policy()[0])).abs().max() > 1e-4
    log = json.loads((folder / "model_interrupted" / "training_log.json").read_text())
    assert [len(sum(step, [])) for step in log["rewards"]] == [8, 8]
    assert not (folder / "model").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launches_that_split_the_model_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    fails_with(lesson.main, "FSDP", "DeepSpeed")


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def test_main_prints_a_row_per_step_and_saves_a_model_that_loads_bit_for_bit(
    settings, tmp_path, capsys, monkeypatch
):
    saved = spy_on(monkeypatch, lesson, "save_run")
    settings(NUM_STEPS=3, REWARD_FUNCTION=low_words)
    lesson.main()
    folder = tmp_path / "model"
    lines = capsys.readouterr().out.splitlines()
    assert str(folder) in lines
    rows = [line.split() for line in lines]
    rows = [row for row in rows if row[:1] in (["0"], ["1"], ["2"])]
    log = json.loads((folder / "training_log.json").read_text())
    for row, rewards in zip(rows, log["rewards"], strict=True):
        assert float(row[1]) == pytest.approx(sum(rewards[0]) / 4, abs=0.006)
        assert float(row[3]) == pytest.approx(max(rewards[0]), abs=0.006)
    assert len(log["rewards"]) == 3
    kept = saved[-1]["policy"].state_dict()
    for name, value in loaded(folder).state_dict().items():
        assert torch.equal(value, kept[name]), name
    writer = transformers.pipeline("text-generation", str(folder))
    assert writer(PROMPT, max_new_tokens=4)[0]["generated_text"].startswith(PROMPT)
    assert writer.tokenizer.get_vocab() == tools.tiny_tokenizer().get_vocab()
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {*log["files"]} == {path.name for path in folder.iterdir()}


def test_the_printed_gain_is_the_reward_of_other_prompts_before_and_after(
    settings, capsys, monkeypatch
):
    settings(REWARD_FUNCTION=low_words, NUM_STEPS=25, LR=3e-3, PROMPTS=["w5"])
    settings(EVAL_SAMPLES=16, NUM_SAMPLES=8, EVAL_PROMPTS=["w6", "w7"])
    before = spy_on(monkeypatch, lesson, "evaluate")
    scored = spy_on(monkeypatch, lesson, "score_responses")
    lesson.main()
    first, last = (torch.tensor(call["return"]["rewards"]).mean() for call in before)
    assert first < 0.65 and last > first + 0.15
    assert [len(call["return"]["rewards"]) for call in before] == [32, 32]
    out = capsys.readouterr().out
    assert f"{first:+.3f}" in out and f"{last:+.3f}" in out
    prompts = [call["prompt"] for call in scored]
    assert prompts == ["w6", "w7"] + ["w5"] * 25 + ["w6", "w7"]


def test_a_hundred_prompts_are_trained_on_and_few_of_them_evaluated(
    settings, monkeypatch, capsys
):
    scored = spy_on(monkeypatch, lesson, "score_responses")
    prompts = [f"w{i} w{j}" for i in range(10) for j in range(10)]
    settings(PROMPTS=prompts, PROMPTS_PER_STEP=3, REWARD_FUNCTION=low_words)
    lesson.main()
    asked = [call["prompt"] for call in scored]
    assert asked == prompts[:4] + prompts[:6] + prompts[:4]
    assert prompts[0] in capsys.readouterr().out  # beside the responses to it


def test_equal_rewards_leave_the_policy_as_it_was(settings, tmp_path):
    settings(REWARD_FUNCTION=lambda prompt, texts: [0.3] * len(texts), LR=0.1)
    lesson.main()
    assert torch.equal(weights(loaded(tmp_path / "model")), weights(tiny_policy()[0]))


def test_the_settings_of_adamw_lora_and_the_advantages_are_used(settings, monkeypatch):
    trained = spy_on(monkeypatch, lesson, "train")
    calls = spy_on(monkeypatch, lesson, "group_advantages")
    settings(LR=0.002, SCALE_BY_STD=False, LORA_RANK=2)
    lesson.main()
    (group,) = trained[0]["optimizer"].param_groups
    assert group["lr"] == 0.002 and group["weight_decay"] == 0
    size = sum(weight.numel() for weight in group["params"])
    assert 0 < size < weights(tiny_policy()[0]).numel() / 4
    assert [call["scale_by_std"] for call in calls] == [False, False]


def test_wandb_gets_every_step_if_asked_for(settings, monkeypatch):
    log, trackers, configs = [], [], []

    class Fake(Accelerator):
        def __init__(self, log_with=None, **others):
            trackers.append(log_with)
            super().__init__(**others)

        def init_trackers(self, project, config):
            configs.append(config)

        def log(self, values, step):
            log.append((step, set(values)))

    monkeypatch.setattr(lesson, "Accelerator", Fake)
    lesson.main()
    settings(USE_WANDB=True, find_spec=lambda name: name == "wandb")
    lesson.main()
    assert trackers == [None, "wandb"] and [step for step, _ in log] == [0, 1] * 2
    assert {"reward", "std", "loss", "KL", "entropy", "clipped"} <= log[2][1]
    assert configs[1]["LR"] == lesson.LR and configs[1]["SEED"] == lesson.SEED
    settings(find_spec=lambda name: None)
    fails_with(lesson.main, "USE_WANDB", "pip install")


def test_no_output_at_all_and_odd_characters_never_end_a_run(monkeypatch, tmp_path):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for out in (narrow, None, io.StringIO()):  # IDLE's cannot be reconfigured
        monkeypatch.setattr(sys, "stdout", out)
        lesson.start_accelerator()
        lesson.print_text("best", 1.0, "caf\u00e9 \u4f60")
    narrow.flush()
    assert b"caf?" in narrow.buffer.getvalue()


# ------------------------------------------------------------------------------------
# Runs that end early, and files
# ------------------------------------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


KILLED = """
import os, signal
import grpo_training as lesson

def reward(prompt, responses):
    calls.append(prompt)
    if len(calls) == 8:  # in step 5, after 4 are kept
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in responses]

calls, lesson.REWARD_FUNCTION = [], reward
os.chdir("/")  # it writes beside itself, wherever it starts
lesson.main()
"""


@pytest.mark.parametrize(("how", "rank"), [("killed", 0), ("stopped", 2)])
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(
    settings, tmp_path, capsys, folders, how, rank
):
    calls = []

    def reward(prompt, responses):
        calls.append(prompt)
        if how == "stopped" and len(calls) == 11 + 8:
            raise KeyboardInterrupt
        return [float(len(text)) for text in responses]

    values = {"NUM_STEPS": 7, "SAVE_EVERY": 2, "KL_COEF": 0.1, "LORA_RANK": rank}
    settings(**values, REWARD_FUNCTION=reward, SAVE_DIR=str(tmp_path / "whole"))
    lesson.main()  # two calls measure, then there is one per step, then two measure
    settings(SAVE_DIR=str(tmp_path / "model"))
    if how == "killed":
        values |= {"POLICY_MODEL_NAME": str(folders / "policy"), "SAVE_DIR": "model"}
        values = tools.SMALL | values
        done = run_copy(tmp_path, LESSONS["grpo"], ["-c", KILLED], **values)
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        with pytest.raises(KeyboardInterrupt):
            lesson.main()
    settings(RESUME=True)
    lesson.main()
    assert "4 steps" in capsys.readouterr().out
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "model")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert whole[name] == resumed[name], name
    assert not (tmp_path / "model_checkpoint").exists()


REPLACE = os.replace


def cut_after(monkeypatch, moves, error):
    """From now on, so many files or folders can be moved; the next one raises it."""
    left = itertools.count(moves, -1)

    def move(*names):
        if next(left) == 0:
            raise error
        REPLACE(*names)

    monkeypatch.setattr(os, "replace", move)


def test_a_checkpoint_is_whole_whenever_the_writing_of_the_next_one_stops(
    settings, tmp_path, monkeypatch
):
    settings(SAVE_EVERY=1, NUM_STEPS=3, REWARD_FUNCTION=low_words)
    for moves in range(4):
        cut_after(monkeypatch, moves, KeyboardInterrupt)  # as good as a power cut
        settings(RESUME=moves > 0)
        with pytest.raises(KeyboardInterrupt):
            lesson.main()
        names = {path.name for path in (tmp_path / "model_checkpoint").iterdir()}
        assert moves == 0 or {"checkpoint", "older_checkpoint"} & names
    monkeypatch.setattr(os, "replace", REPLACE)
    lesson.main()
    assert loaded(tmp_path / "model")


@pytest.mark.parametrize("error", [KeyError, torch.OutOfMemoryError])
def test_an_error_before_the_first_step_writes_nothing_and_lack_of_memory_finds_help(
    settings, tmp_path, capsys, error
):
    def reward(prompt, texts):
        raise error

    settings(REWARD_FUNCTION=reward)
    with pytest.raises(error):
        lesson.main()
    assert not list(tmp_path.iterdir())
    no_memory = error is torch.OutOfMemoryError
    assert ("README.md" in capsys.readouterr().out) == no_memory


def test_a_run_says_if_it_does_not_go_on_from_a_checkpoint(settings, tmp_path, capsys):
    folder = tmp_path / "model_checkpoint"
    settings(RESUME=True)
    lesson.main()  # there is none
    assert str(folder) in capsys.readouterr().out
    (folder / "checkpoint").mkdir(parents=True)
    settings(RESUME=False)
    lesson.main()
    assert str(folder / "checkpoint") in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_stops_anywhere_leaves_no_mixture_of_two_models(
    settings, tmp_path, monkeypatch, error
):
    # After an error, as on a read-only file in Docker, the older model is whole and the
    # new one aside. After a `kill -9`, the folder loads whole or not at all.
    settings(draw_learning_curve=lambda rewards, path: path.write_text("a picture"))
    folder, rewards = tmp_path / "model", [torch.ones(1, 4)]
    new, old = weights(tiny_policy(7)[0]), weights(tiny_policy(1)[0])
    for moves in itertools.count():
        monkeypatch.setattr(os, "replace", REPLACE)
        lesson.save_run(*tiny_policy(1), rewards, "")
        before = contents(folder)
        cut_after(monkeypatch, moves, error)
        try:
            lesson.save_run(*tiny_policy(7), rewards, "")
            break
        except SystemExit as ending:
            aside = folder / "unfinished.tmp"
            assert str(aside) in str(ending) and contents(folder) == before
            assert torch.equal(weights(loaded(aside)), new)
        except KeyboardInterrupt:
            if moves == 0:
                assert torch.equal(weights(loaded(folder)), old)
                continue
            with pytest.raises((OSError, ValueError)):
                loaded(folder)
    assert moves > 8
    assert torch.equal(weights(loaded(folder)), new)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name", ["model", "model_interrupted"])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_folder_with_files_of_another_origin_is_refused_and_stays_as_it_is(
    tmp_path, name, kind
):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
        path = path / "config.json"
    if kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere" / "at all")
    else:
        path.write_text("my own")
    fails_with(lesson.main, "SAVE_DIR")
    assert path.is_symlink() or path.read_text() == "my own"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["Path", "slash", "link to another folder"])
def test_every_way_to_name_a_folder_works(settings, tmp_path, kind):
    folder = tmp_path / "model"
    (tmp_path / "other").mkdir()
    if kind.startswith("link"):
        folder.symlink_to(tmp_path / "other")
    names = {"Path": folder, "slash": f"{folder}/"}
    settings(SAVE_DIR=names.get(kind, str(folder)))
    for _ in range(2):  # the second time, over the first
        lesson.main()
    assert loaded(folder)
    expected = {"config.json", "model.safetensors", "learning_curve.png"}
    assert {path.name for path in folder.iterdir()} > expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_another_model_without_a_template_takes_the_old_one_s_place(
    settings, tmp_path, folders
):
    save(POLICIES["qwen 2, base"], tmp_path / "chat")
    for name in (tmp_path / "chat", folders / "policy"):
        settings(POLICY_MODEL_NAME=str(name), REWARD_FUNCTION=low_words)
        lesson.main()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template is None and tokenizer.eos_token_id == tools.EOS
    assert tokenizer(PROMPT).input_ids == [1, 2, 3]


# ------------------------------------------------------------------------------------
# Models and the Hub
# ------------------------------------------------------------------------------------


def test_a_hub_that_never_answers_is_given_up_within_seconds(monkeypatch, hub):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ask = huggingface_hub.HfApi(endpoint=url).model_info

        def hasty(name, timeout):
            return ask(name, timeout=timeout / 10)

        monkeypatch.setattr(huggingface_hub, "model_info", hasty)
        started = time.time()
        assert lesson.find_model("gpt2") is None
        assert 0.3 < time.time() - started < 3


@pytest.mark.parametrize(("status", "found"), [(404, "me/x"), (429, None), (503, None)])
def test_an_overloaded_hub_counts_as_unreachable_and_a_refusal_as_an_answer(
    hub, status, found
):
    response = types.SimpleNamespace(headers={}, request=None, status_code=status)
    hub(huggingface_hub.errors.HfHubHTTPError("no", response=response))
    assert lesson.find_model("me/x") == found  # from_pretrained says what is wrong


def test_a_cached_model_is_found_without_the_hub(tmp_path, hub):
    cached = tmp_path / "cache" / "models--me--model"
    for file, text in [("refs/main", "abc"), ("snapshots/abc/config.json", "{}")]:
        (cached / file).parent.mkdir(parents=True)
        (cached / file).write_text(text)
    assert lesson.find_model("me/model") == str(cached / "snapshots" / "abc")
    assert lesson.find_model("me/other") is None


@pytest.mark.parametrize(
    ("name", "word"),
    [("me/nothing", "Hub"), ("./nothing", "nothing"), ("no/such/folder", "folder")],
)
def test_a_model_that_is_nowhere_is_refused_in_one_line(
    settings, tmp_path, hub, name, word
):
    settings(POLICY_MODEL_NAME=name)
    fails_with(lesson.main, name, word)
    assert not (tmp_path / "model").exists()


def test_an_adapter_is_merged_into_its_base_and_a_broken_one_refused(
    settings, tmp_path, folders
):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    base = loaded(folders / "policy")
    adapted = get_peft_model(base, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folders / "policy")
    adapted.save_pretrained(tmp_path / "adapter")
    expected = weights(adapted.merge_and_unload())
    policy, tokenizer = lesson.load_policy(str(tmp_path / "adapter"))
    assert type(policy) is type(base) and len(tokenizer) == len(tools.tiny_tokenizer())
    assert torch.allclose(weights(policy), expected, atol=1e-6)
    assert all(weight.requires_grad for weight in policy.parameters())
    settings(POLICY_MODEL_NAME=str(tmp_path / "adapter"), LORA_RANK=2)
    lesson.main()
    assert loaded(tmp_path / "model")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    fails_with(lesson.main, "adapter")


def test_a_checkpoint_in_bfloat16_is_trained_in_float32_without_dropout(tmp_path):
    policy, tokenizer = tiny_policy()
    policy.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, _ = lesson.load_policy(str(tmp_path))
    assert policy.dtype == torch.float32 and not policy.training


def test_a_prompt_and_response_longer_than_the_context_are_refused(settings):
    settings(PROMPTS=[PROMPT, "w1 " * 50], MAX_NEW_TOKENS=15)
    fails_with(lesson.main, "MAX_NEW_TOKENS", "policy")
    settings(MAX_NEW_TOKENS=14, NUM_STEPS=1, REWARD_FUNCTION=low_words)
    lesson.main()  # 50 + 14 are exactly the 64 that the policy can read


def test_no_code_from_the_hub_is_ever_trusted():
    assert "trust_remote_code" not in (ROOT / "grpo_training.py").read_text()
