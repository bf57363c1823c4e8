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
from lessons import ROOT, spy_on
from test_grpo import (
    EOS,
    PROMPT,
    chat_policy,
    fails_with,
    low_words,
    run_step,
    short_policy,
    tiny_llama,
    tiny_policy,
    tiny_reward_model,
    tiny_tokenizer,
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


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


# ------------------------------------------------------------------------------------
# Two processes
# ------------------------------------------------------------------------------------


def two_groups():
    """Two groups of short_policy() with rewards of different means."""
    policy, tokenizer = short_policy()
    groups = [write_group(policy, tokenizer, 6), write_group(policy, tokenizer, 6)]
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
    policy = short_policy()[0]
    options = {"rate": 0.3, "reference": tiny_policy(5)[0]}
    metrics = run_step(policy, *two_groups(), **options)
    assert (weights(policy) - weights(short_policy()[0])).abs().max() > 1e-3
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
def test_launches_that_split_the_model_are_refused(monkeypatch, capsys, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    fails_with(capsys, lesson.main, "FSDP", "DeepSpeed")


# ------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------


def test_main_prints_a_row_per_step_and_saves_a_model_that_loads_bit_for_bit(
    settings, tmp_path, capsys, monkeypatch
):
    saved = spy_on(monkeypatch, lesson, "save_run")
    settings(REPORT_EVERY=2, NUM_STEPS=3, REWARD_FUNCTION=low_words)
    lesson.main()
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    names = next(row for row in rows if row[:1] == ["step"])
    steps = [row for row in rows if row and row[0] in {"0", "1", "2"}]
    assert len(steps) == 3 and len(steps[0]) == len(names) - 1  # "cut off" is one
    assert [row[0] for row in rows if row].count("best") == 2  # of steps 0 and 2
    log = json.loads((tmp_path / "model" / "training_log.json").read_text())
    for row, rewards in zip(steps, log["rewards"], strict=True):
        assert float(row[1]) == pytest.approx(sum(rewards[0]) / 4, abs=0.006)
        assert float(row[3]) == pytest.approx(max(rewards[0]), abs=0.006)
    assert (
        max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 88
    )
    assert str(tmp_path / "model") in out.splitlines()
    kept = saved[-1]["policy"].state_dict()
    for name, value in loaded(tmp_path / "model").state_dict().items():
        assert torch.equal(value, kept[name]), name
    writer = transformers.pipeline("text-generation", str(tmp_path / "model"))
    assert writer(PROMPT, max_new_tokens=4)[0]["generated_text"].startswith(PROMPT)
    assert writer.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    curve = tmp_path / "model" / "learning_curve.png"
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert {*log["files"]} == {path.name for path in (tmp_path / "model").iterdir()}


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
    settings, monkeypatch
):
    scored = spy_on(monkeypatch, lesson, "score_responses")
    prompts = [f"w{i} w{j}" for i in range(10) for j in range(10)]
    settings(PROMPTS=prompts, PROMPTS_PER_STEP=3, REWARD_FUNCTION=low_words)
    lesson.main()
    few = prompts[:4]
    assert [call["prompt"] for call in scored] == few + prompts[:6] + few


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_exists_only_with_kl_and_stays_as_it_was(
    settings, monkeypatch, rank
):
    trained = spy_on(monkeypatch, lesson, "train")
    losses = spy_on(monkeypatch, lesson, "grpo_loss")
    settings(LORA_RANK=rank, REWARD_FUNCTION=low_words, LR=0.05, NUM_STEPS=3)
    lesson.main()
    assert trained[0]["reference"] is None and losses[0]["ref_log_probs"] is None
    settings(KL_COEF=0.1)
    lesson.main()
    reference, first = trained[1]["reference"], tiny_policy()[0]
    ids = torch.arange(10).unsqueeze(0)
    expected = first(ids, use_cache=False).logits
    if rank:  # after saving, nothing is left of the adapter: look at the losses instead
        assert not isinstance(reference, torch.nn.Module)
    else:
        assert torch.allclose(reference(ids, use_cache=False).logits, expected)
    ratios = [call["log_probs"] - call["ref_log_probs"] for call in losses[3:]]
    assert ratios[0].abs().max() < 1e-5 < 1e-3 < ratios[2].abs().max()


@pytest.mark.parametrize(
    "options", [{"LORA_RANK": 2}, {"GRADIENT_CHECKPOINTING": True}]
)
def test_lora_trains_few_weights_and_what_is_saved_is_a_plain_model(
    settings, tmp_path, monkeypatch, options
):
    trained = spy_on(monkeypatch, lesson, "train")
    settings(REWARD_FUNCTION=low_words, LR=0.05, **options)
    lesson.main()
    groups = trained[0]["optimizer"].param_groups
    size = sum(weight.numel() for group in groups for weight in group["params"])
    assert (size < weights(tiny_policy()[0]).numel() / 4) == ("LORA_RANK" in options)
    saved = loaded(tmp_path / "model")
    assert saved.state_dict().keys() == tiny_policy()[0].state_dict().keys()
    assert (weights(saved) - weights(tiny_policy()[0])).abs().max() > 1e-3


def test_equal_rewards_leave_the_policy_as_it_was(settings, tmp_path):
    settings(REWARD_FUNCTION=lambda prompt, texts: [0.3] * len(texts), LR=0.1)
    lesson.main()
    assert torch.equal(weights(loaded(tmp_path / "model")), weights(tiny_policy()[0]))


def test_the_settings_of_the_advantages_and_of_adamw_are_used(settings, monkeypatch):
    made, make = [], torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: made.append((a[1], k)) or make(*a, **k)
    )
    calls = spy_on(monkeypatch, lesson, "group_advantages")
    settings(LR=0.002, SCALE_BY_STD=False)
    lesson.main()
    assert [call["scale_by_std"] for call in calls] == [False, False]
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
    names = {"reward", "std", "loss", "KL", "entropy", "clipped", "length", "gradient"}
    assert names <= set(log[2][1])
    monkeypatch.setattr(lesson, "find_spec", lambda name: None)
    fails_with(capsys, lesson.main, "USE_WANDB", "pip install")


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
import os, signal, sys
import grpo_training as lesson
import test_grpo as tests

folder, resume, kill_at = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
calls = []

def reward(prompt, responses):
    calls.append(prompt)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return tests.low_words(prompt, responses)

settings = tests.SMALL | {"POLICY_MODEL_NAME": sys.argv[4], "REWARD_FUNCTION": reward}
settings |= {"NUM_STEPS": 7, "SAVE_DIR": folder + "/model", "SAVE_EVERY": 2}
settings |= {"RESUME": resume, "KL_COEF": 0.1, "LORA_RANK": int(sys.argv[5])}
for name, value in settings.items():
    setattr(lesson, name, value)
lesson.main()
"""


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_is_killed_and_resumed_ends_where_an_unbroken_one_does(
    folders, tmp_path, rank
):
    (tmp_path / "killed.py").write_text(KILLED)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(name, resume, kill_at):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, "killed.py", tmp_path / name, resume, str(kill_at)]
        command += [folders / "policy", str(rank)]
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=tmp_path, env=env, **options)

    assert run("whole", "no", 0).returncode == 0
    # Two calls measure, then there is one per step: in step 5, after 4 steps are kept.
    assert run("broken", "no", 8).returncode == -signal.SIGKILL
    done = run("broken", "resume", 0)
    assert done.returncode == 0 and "4 steps" in done.stdout, done.stderr
    whole, broken = (contents(tmp_path / n / "model") for n in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    for name in whole:
        assert whole[name] == broken[name], name
    assert not (tmp_path / "broken" / "model_checkpoint").exists()


def test_a_checkpoint_is_whole_whenever_the_writing_of_the_next_one_stops(
    settings, tmp_path, monkeypatch
):
    settings(SAVE_EVERY=1, NUM_STEPS=3, REWARD_FUNCTION=low_words)
    replace, resumed = os.replace, []
    for limit in range(4):
        moves = []

        def move(*names, limit=limit, moves=moves):
            if len(moves) == limit:
                raise KeyboardInterrupt  # as good as a power cut
            moves.append(names)
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", move)
            settings(RESUME=limit > 0)
            with pytest.raises(KeyboardInterrupt):
                lesson.main()
        tools.AccelerateTestCase().tearDown()
        resumed.append(
            sorted(p.name for p in (tmp_path / "model_checkpoint").iterdir())
        )
    assert all({"checkpoint", "older_checkpoint"} & set(names) for names in resumed[1:])
    settings(RESUME=True)
    lesson.main()
    assert loaded(tmp_path / "model")


def test_a_run_that_ends_before_its_first_step_writes_nothing(settings, tmp_path):
    settings(REWARD_FUNCTION=lambda prompt, texts: {}["a bug"])
    with pytest.raises(KeyError):
        lesson.main()
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_anywhere_leaves_the_older_model_whole_and_the_new_one_aside(
    tmp_path, monkeypatch, capsys
):
    """One file cannot be moved, or replaced, as on a read-only file in Docker."""
    rewards, folder = [torch.ones(1, 4)], tmp_path / "model"
    old, new = tiny_policy(1), tiny_policy(7)
    lesson.save_run(*old, rewards, "")
    good, replace = contents(folder), os.replace
    for stuck in range(100):
        moved = []

        def move(source, target, stuck=stuck, moved=moved):
            moved.append(source)
            if len(moved) == stuck + 1:
                raise OSError("Device or resource busy")
            replace(source, target)

        monkeypatch.setattr(os, "replace", move)
        new[0].generation_config = transformers.GenerationConfig(eos_token_id=[EOS])
        try:
            lesson.save_run(*new, rewards, "")
        except SystemExit as ending:
            aside = folder / "unfinished.tmp"
            assert str(aside) in str(ending)
            assert torch.equal(weights(loaded(aside)), weights(new[0]))
            assert contents(folder) == good
        else:
            break
    assert stuck > 8
    assert torch.equal(weights(loaded(folder)), weights(new[0]))
    assert not list(folder.glob("*.tmp"))


def test_a_save_that_is_killed_anywhere_leaves_a_folder_that_loads_whole_or_not_at_all(
    tmp_path, monkeypatch
):
    rewards, folder, replace = [torch.ones(1, 4)], tmp_path / "model", os.replace
    for cut in itertools.count():
        monkeypatch.setattr(os, "replace", replace)
        lesson.save_run(*tiny_policy(1), rewards, "")
        moved = []

        def move(*names, cut=cut, moved=moved):
            if len(moved) == cut:
                raise KeyboardInterrupt  # ends the function here, as a kill would
            moved.append(names)
            replace(*names)

        monkeypatch.setattr(os, "replace", move)
        try:
            lesson.save_run(*tiny_policy(7), rewards, "")
        except KeyboardInterrupt:
            if cut == 0:
                assert torch.equal(weights(loaded(folder)), weights(tiny_policy(1)[0]))
                continue
            with pytest.raises((OSError, ValueError)):
                loaded(folder)
        else:
            break
    assert cut > 8
    assert torch.equal(weights(loaded(folder)), weights(tiny_policy(7)[0]))


@pytest.mark.parametrize(
    "kind", ["sibling's file", "own file", "dangling link", "file"]
)
def test_a_folder_with_files_of_another_origin_is_refused_and_stays_as_it_is(
    settings, tmp_path, capsys, kind
):
    folder = tmp_path / "model"
    if kind == "dangling link":
        folder.symlink_to(tmp_path / "nowhere" / "at all")
    elif kind == "file":
        (tmp_path / "model_interrupted").write_text("mine")
    else:
        folder = folder if kind == "own file" else tmp_path / "model_interrupted"
        folder.mkdir()
        (folder / "config.json").write_text("my own")
    fails_with(capsys, lesson.main, "SAVE_DIR")
    if "file" in kind and kind != "file":
        assert (folder / "config.json").read_text() == "my own"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name] or kind == "file"


@pytest.mark.parametrize("kind", ["Path", "slash", "link to another folder", "again"])
def test_every_way_to_name_a_folder_works(settings, tmp_path, kind):
    folder = tmp_path / "model"
    (tmp_path / "other").mkdir()
    if kind.startswith("link"):
        folder.symlink_to(tmp_path / "other")
    names = {"Path": folder, "slash": f"{folder}/"}
    settings(SAVE_DIR=names.get(kind, str(folder)))
    for _ in range(1 + (kind == "again")):
        lesson.main()
    assert loaded(folder)
    expected = {"config.json", "model.safetensors", "learning_curve.png"}
    assert {path.name for path in folder.iterdir()} > expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_another_model_without_a_template_takes_the_old_one_s_place(
    settings, tmp_path, folders
):
    settings(POLICY_MODEL_NAME=chat_policy(tmp_path / "chat"), PROMPTS=[PROMPT])
    lesson.main()
    settings(POLICY_MODEL_NAME=str(folders / "policy"))
    lesson.main()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template is None and tokenizer.eos_token_id == EOS
    assert tokenizer(PROMPT).input_ids == [1, 2, 3]


# ------------------------------------------------------------------------------------
# Models and the Hub
# ------------------------------------------------------------------------------------


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


def test_folders_that_hold_no_whole_model_are_refused_in_one_line(
    settings, tmp_path, capsys, hub
):
    def folder(name, model=True, tokenizer=True):
        for part in itertools.compress(tiny_policy(), (model, tokenizer)):
            part.save_pretrained(tmp_path / name)
        return tmp_path / name

    folder("bare", tokenizer=False)
    folder("only_tokenizer", model=False)
    (folder("pointer") / "model.safetensors").write_text("version https://git-lfs")
    cut = folder("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (folder("aborted") / "model.safetensors").unlink()
    config = folder("sizes") / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    for name, words in {
        "me/nothing": ["me/nothing", "Hub", "internet", "folder"],
        "./nothing": ["./nothing"],  # these can be no ids on the Hub
        "no/such/folder": ["no/such/folder"],
        tmp_path / "bare": ["bare", "tokenizer"],
        tmp_path / "only_tokenizer": ["only_tokenizer"],
        tmp_path / "pointer": ["pointer"],
        tmp_path / "cut": ["cut"],
        tmp_path / "aborted": ["aborted"],
        tmp_path / "sizes": ["sizes"],
    }.items():
        settings(POLICY_MODEL_NAME=str(name))
        fails_with(capsys, lesson.main, *words)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", ["classifier", "tied classifier", "without a head"])
def test_a_policy_needs_a_language_model_s_own_head(settings, tmp_path, capsys, kind):
    if kind == "classifier":
        LlamaForSequenceClassification(tiny_llama().config).save_pretrained(
            tmp_path / "x"
        )
        word = "lm_head.weight"
    elif kind == "without a head":
        tiny_llama().model.save_pretrained(tmp_path / "x")
        word = "lm_head.weight"
    else:
        config = tiny_policy()[0].config
        config.num_labels, word = 1, "score.weight"
        transformers.GPT2ForSequenceClassification(config).save_pretrained(
            tmp_path / "x"
        )
    tiny_tokenizer().save_pretrained(tmp_path / "x")
    settings(POLICY_MODEL_NAME=str(tmp_path / "x"))
    fails_with(capsys, lesson.main, word)


def test_an_adapter_is_merged_into_its_base_and_a_broken_one_refused(
    settings, tmp_path, folders, capsys
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
    assert type(policy) is type(base) and len(tokenizer) == len(tiny_tokenizer())
    assert torch.allclose(weights(policy), expected, atol=1e-6)
    assert all(weight.requires_grad for weight in policy.parameters())
    settings(POLICY_MODEL_NAME=str(tmp_path / "adapter"), LORA_RANK=2)
    lesson.main()
    assert loaded(tmp_path / "model")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    fails_with(capsys, lesson.main, "adapter")


@pytest.mark.parametrize(
    ("options", "word"), [({"labels": 2}, "2 outputs"), ({"head": False}, "classifier")]
)
def test_a_reward_model_needs_a_trained_head_with_one_output(
    settings, tmp_path, capsys, options, word
):
    settings(REWARD_MODEL_NAME=tiny_reward_model(tmp_path / "reward", **options))
    fails_with(capsys, lesson.main, word)


def test_a_checkpoint_in_bfloat16_is_trained_in_float32_without_dropout(tmp_path):
    policy, tokenizer = tiny_policy()
    policy.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, _ = lesson.load_policy(str(tmp_path))
    assert policy.dtype == torch.float32 and not policy.training


def test_a_prompt_and_response_longer_than_the_context_are_refused(settings, capsys):
    settings(PROMPTS=[PROMPT, "w1 " * 50], MAX_NEW_TOKENS=15)
    fails_with(capsys, lesson.main, "MAX_NEW_TOKENS", "policy")
    settings(MAX_NEW_TOKENS=14, NUM_STEPS=1, REWARD_FUNCTION=low_words)
    lesson.main()  # 50 + 14 are exactly the 64 that the policy can read


def test_no_code_from_the_hub_is_ever_trusted():
    assert "trust_remote_code" not in (ROOT / "grpo_training.py").read_text()
