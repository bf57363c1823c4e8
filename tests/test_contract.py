"""What every lesson promises, whatever it teaches.

What cannot work is refused before the run, in one line. Whatever ends a run early, the
run so far is kept, in whole files, beside the good weights of an earlier run.
"""

import io
import os
import re
import signal
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.test_utils.testing import AccelerateTestCase
from lessons import LESSONS, ROOT, assert_one_plain_line, run_copy

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
EACH = pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)


def every(*names, of):
    """A parametrised test over what of(lesson) gives for each lesson."""
    cases = [(key, case) for key in LESSONS for case in of(LESSONS[key])]
    cases = [(key, *(x if type(x) is tuple else (x,))) for key, x in cases]
    values = [(LESSONS[key], *case) for key, *case in cases]
    ids = ["-".join(map(str, case)) for case in cases]
    return pytest.mark.parametrize(("lesson", *names), values, ids=ids)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A function that gives a lesson short Settings, and tmp_path to write into."""

    def use(lesson, **settings):
        for name in lesson.paths:
            move(monkeypatch, lesson, name, tmp_path)
        for name, value in (lesson.short | settings).items():
            monkeypatch.setattr(lesson.module_with(name), name, value)
        return lesson.module

    def unheard(number, frame):
        raise AssertionError(f"nothing handled {signal.Signals(number).name}")

    before = [signal.signal(number, unheard) for number in SIGNALS]
    yield use
    after = [signal.signal(n, handler) for n, handler in zip(SIGNALS, before)]  # noqa: B905
    AccelerateTestCase().tearDown()  # Accelerate keeps its state for the whole process
    assert after == [unheard] * 3  # a run gives the signals back as they were


def move(monkeypatch, lesson, name, folder):
    """Let a Setting with a path lead into this folder."""
    module = lesson.module_with(name)
    kind = type(getattr(module, name))  # a text or a Path
    path = folder / Path(getattr(module, name)).name
    monkeypatch.setattr(module, name, str(path) if kind is str else path)


def places(lesson, folder, suffix=""):
    """Where the weights of a run lie (of lesson 4, the folder of the model)."""
    for name in lesson.weights or [lesson.save_dir]:
        path = Path(getattr(lesson.module, name))
        yield folder / f"{path.stem}{suffix}{path.suffix}"


def weights(lesson, folder, suffix=""):
    """All weights of a run; this fails if a file is missing or is not whole."""
    loaders = [getattr(lesson.module, load) for load in lesson.weights.values()]
    loaders = loaders or [transformers.AutoModelForCausalLM.from_pretrained]
    paths = list(places(lesson, folder, suffix))
    networks = [load(path) for load, path in zip(loaders, paths, strict=True)]
    assert len({getattr(network, "run", None) for network in networks}) == 1
    assert not list(folder.glob("*tmp*"))  # and nothing half-written lies around
    tensors = [t.flatten() for x in networks for t in x.state_dict().values()]
    return torch.cat(tensors)


def put_older_weights(lesson, folder):
    """Leave what an earlier run might have left there; give it as contents() does."""
    if lesson.save_dir:
        lesson.module.main()
    for path in places(lesson, folder):
        if lesson.weights:
            path.write_bytes(b"good")
    return contents(folder)


def contents(folder):
    """Each file below a folder, and what it holds."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def after_two_updates(monkeypatch, lesson, act):
    """From now on, act() is called when the lesson's train() has given two updates."""
    real = lesson.module.train

    def train(*positional, **named):
        for count, update in enumerate(real(*positional, **named), 1):
            yield update
            if count == 2:
                act()

    monkeypatch.setattr(lesson.module, "train", train)


def press(number):
    """Send a signal to this process, as Ctrl-C or `kill` do."""
    os.kill(os.getpid(), number)


class Bomb:
    """Unpickling this would create a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def fail(*positional, **named):
    """An error where nobody expected one, such as a full disk."""
    raise OSError("No space left on device")


def line_of_the_end(call):
    """The one line with which this call ends the program with status 1."""
    with pytest.raises(BaseException) as end:  # a KeyboardInterrupt would end pytest
        call()
    assert isinstance(end.value, SystemExit), end.value
    assert isinstance(end.value.code, str) and "\n" not in end.value.code.strip()
    return end.value.code


def finish(lesson):
    """Run to the end, and give the suffix of the files that such a run writes."""
    if lesson.save_dir:  # lesson 4 has no aim to miss
        return lesson.module.main() or ""
    line_of_the_end(lesson.module.main)
    return "_unsolved"


# ------------------------------------------------------------------------------------
# Before a run
# ------------------------------------------------------------------------------------


PROGRAM = """
import os, signal
import {names}
print(sorted(os.listdir()), flush=True)
whole_train = {lesson}.train
def train(*positional, **named):
    for count, update in enumerate(whole_train(*positional, **named), 1):
        yield update
        if count == 2:
            os.kill(os.getpid(), signal.SIGINT)
{lesson}.train = train
{lesson}.main()
"""


@pytest.fixture(scope="module", params=LESSONS.values(), ids=LESSONS)
def program(request, tmp_path_factory):
    """A lesson whose main() ran in a program of its own, until Ctrl-C was pressed."""
    lesson, folder = request.param, tmp_path_factory.mktemp("program")
    names = [script.removesuffix(".py") for script in lesson.scripts]
    text = PROGRAM.format(names=", ".join(names), lesson=names[0])
    done = run_copy(folder, lesson, ["-c", text], **lesson.short)
    return types.SimpleNamespace(lesson=lesson, folder=folder, done=done)


def test_importing_the_scripts_prints_nothing_and_writes_nothing(program):
    files = sorted(program.lesson.scripts + program.lesson.folders)
    assert program.done.stdout.splitlines()[:1] == [str(files)], program.done.stderr


def test_ctrl_c_ends_a_program_with_one_line_and_keeps_the_run(program):
    assert_one_plain_line(program.done)
    assert len(weights(program.lesson, program.folder, "_interrupted"))
    assert not any(path.exists() for path in places(program.lesson, program.folder))


@every("script", of=lambda lesson: lesson.scripts)
def test_a_line_is_printed_before_the_slow_imports(tmp_path, lesson, script):
    run = "import runpy, sys; sys.modules['torch'] = None  # importing it fails\n"
    run += f"sys.path.insert(0, '.'); runpy.run_path({script!r}, run_name='__main__')"
    assert run_copy(tmp_path, lesson, ["-c", run]).stdout.strip()


@every(
    "name", "value", of=lambda x: [(n, v) for n, vs in x.impossible.items() for v in vs]
)
def test_an_impossible_setting_is_refused_before_anything_runs(
    prepared, tmp_path, capsys, lesson, name, value
):
    prepared(lesson, **{name: value})
    line = line_of_the_end(lesson.module_with(name).main)
    assert re.search(rf"\b{name}\b", line)
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@EACH
def test_all_impossible_settings_are_named_in_one_line(prepared, lesson):
    names = [n for n in lesson.impossible if lesson.module_with(n) is lesson.module]
    prepared(lesson, **{name: lesson.impossible[name][0] for name in names})
    line = line_of_the_end(lesson.module.main)
    assert not [name for name in names if name not in line]


@pytest.mark.parametrize("place", ["missing", "a file", "read-only"])
@every("name", of=lambda lesson: lesson.paths)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_run(
    prepared, tmp_path, monkeypatch, capsys, lesson, name, place
):
    prepared(lesson)
    folder, access, mkdir = tmp_path / "folder", os.access, os.mkdir
    if place == "a file":
        folder.write_text("mine")
    elif place == "read-only":
        folder.mkdir()  # without the right to write; root has it all the same

        def may(path, mode, **options):
            return Path(path) != folder and access(path, mode, **options)

        def make(path, *mode, **options):
            return mkdir(path, *mode) if Path(path).parent != folder else fail()

        monkeypatch.setattr(os, "access", may)
        monkeypatch.setattr(os, "mkdir", make)
    move(monkeypatch, lesson, name, folder)
    assert name in line_of_the_end(lesson.module_with(name).main)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------
# Files of weights
# ------------------------------------------------------------------------------------


BAD = "missing", "damaged", "empty", "foreign", "other task", "nan", "inf", "code"


@every("name", "bad", of=lambda x: [(name, bad) for name in x.weights for bad in BAD])
def test_weights_that_cannot_be_used_are_refused_in_one_line(
    tmp_path, lesson, name, bad
):
    path, shipped = tmp_path / "weights", ROOT / getattr(lesson.module, name).name
    checkpoint = torch.load(shipped, weights_only=True)
    if bad == "damaged":
        path.write_bytes(shipped.read_bytes()[:2000])
    elif bad == "empty":
        path.write_bytes(b"")
    elif bad == "foreign":
        torch.save(torch.nn.Linear(4, 2).state_dict(), path)
    elif bad == "other task":
        torch.save(checkpoint | {"env_id": "Other-v0"}, path)
    elif bad == "code":
        torch.save(checkpoint | {"weights": Bomb(tmp_path / "boom")}, path)
    elif bad != "missing":
        next(iter(checkpoint["weights"].values())).view(-1)[0] = float(bad)
        torch.save(checkpoint, path)
    load = getattr(lesson.module, lesson.weights[name])
    line = line_of_the_end(lambda: load(path))
    assert str(path) in line and f"python {lesson.scripts[0]}" in line
    assert not (tmp_path / "boom").exists()


@every("name", of=lambda lesson: lesson.weights)
def test_a_file_that_claims_a_huge_network_builds_what_it_holds(tmp_path, lesson, name):
    shipped = torch.load(ROOT / getattr(lesson.module, name).name, weights_only=True)
    torch.save(shipped | {"hidden_units": 10**12}, tmp_path / "big")
    network = getattr(lesson.module, lesson.weights[name])(tmp_path / "big")
    assert network.state_dict().keys() == shipped["weights"].keys()


# ------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------


@EACH
def test_the_same_seed_gives_the_same_weights_bit_for_bit(prepared, tmp_path, lesson):
    runs = []
    for seed in (0, 0, 1):
        prepared(lesson, SEED=seed)
        runs.append(weights(lesson, tmp_path, finish(lesson)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@every(of=lambda lesson: [()] if lesson.weights else [])
def test_a_run_that_misses_its_aim_says_so_and_keeps_the_good_weights(
    prepared, tmp_path, capsys, lesson
):
    prepared(lesson)
    older = put_older_weights(lesson, tmp_path)
    line = line_of_the_end(lesson.module.main)
    assert contents(tmp_path).items() >= older.items()
    assert len(weights(lesson, tmp_path, "_unsolved"))
    printed = "".join(capsys.readouterr()) + line
    for path in places(lesson, tmp_path, "_unsolved"):
        assert str(path) in printed


@every("name", of=lambda lesson: lesson.paths)
def test_what_a_script_writes_lies_beside_it_wherever_it_is_started(lesson, name):
    module = lesson.module_with(name)
    folder = getattr(module, "HERE", Path())  # lesson 4 joins it with its Setting
    assert folder / Path(getattr(module, name)).parent == ROOT


@pytest.mark.parametrize("end", ["an error", "a closed terminal"])
@EACH
def test_a_run_that_ends_early_is_kept_beside_the_good_weights(
    prepared, tmp_path, monkeypatch, lesson, end
):
    prepared(lesson)
    older = put_older_weights(lesson, tmp_path)
    monkeypatch.setattr(sys, "stdout", terminal := io.StringIO())

    def close():
        terminal.write = fail  # nobody can read any more what is printed
        press(signal.SIGHUP)

    after_two_updates(monkeypatch, lesson, fail if end == "an error" else close)
    with pytest.raises((OSError, SystemExit)) as shown:
        lesson.module.main()
    assert end != "an error" or "No space left" in str(shown.value)
    assert len(weights(lesson, tmp_path, "_interrupted"))
    assert contents(tmp_path).items() >= older.items()


@pytest.mark.parametrize("number", [signal.SIGTERM, None], ids=["stopped", "complete"])
@EACH
def test_no_signal_disturbs_the_writing_of_the_files(
    prepared, tmp_path, monkeypatch, lesson, number
):
    module = prepared(lesson)

    def impatient(real):
        def call(*positional, **named):
            press(signal.SIGINT), press(signal.SIGINT)
            return real(*positional, **named)

        return call

    for owner, name in [
        (torch, "save"),
        (transformers.PreTrainedModel, "save_pretrained"),
        (os, "replace"),
        (module, "draw_learning_curve"),
    ]:
        monkeypatch.setattr(owner, name, impatient(getattr(owner, name)))
    if number:
        after_two_updates(monkeypatch, lesson, lambda: press(number))
        line_of_the_end(module.main)
        suffix = "_interrupted"
    else:
        suffix = finish(lesson)
    assert len(weights(lesson, tmp_path, suffix))


@EACH
def test_an_error_while_the_curve_is_drawn_loses_nothing(
    prepared, tmp_path, monkeypatch, capsys, lesson
):
    monkeypatch.setattr(prepared(lesson), "draw_learning_curve", fail)
    assert len(weights(lesson, tmp_path, finish(lesson)))
    assert "No space left" in "".join(capsys.readouterr())


@every("file", of=lambda lesson: range(len(lesson.weights) or 1))
def test_a_full_disk_leaves_the_older_weights_whole(
    prepared, tmp_path, monkeypatch, lesson, file
):
    prepared(lesson)
    older, calls, save = put_older_weights(lesson, tmp_path), [], torch.save

    def half_written(content, path):
        calls.append(path)
        if len(calls) % (file + 1) == 0:
            Path(path).write_bytes(b"half")
            fail()
        save(content, path)

    monkeypatch.setattr(torch, "save", half_written)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises((OSError, SystemExit)):
        lesson.module.main()
    assert contents(tmp_path) == older


@pytest.mark.parametrize("place", ["a thread", "an editor", "Windows", "nohup"])
@EACH
def test_a_run_also_works_in(prepared, tmp_path, monkeypatch, lesson, place):
    prepared(lesson)
    ends = []
    run = threading.Thread(target=lambda: ends.append(finish(lesson)))
    if place == "a thread":  # which may not handle signals
        run.start(), run.join()
    else:
        if place == "an editor":  # its stdout may have no `reconfigure`
            monkeypatch.setattr(sys, "stdout", io.StringIO())
        elif place == "Windows":
            monkeypatch.delattr(signal, "SIGHUP")
        else:  # nohup lets a program ignore that its terminal is closed
            heard = signal.signal(signal.SIGHUP, signal.SIG_IGN)
            after_two_updates(monkeypatch, lesson, lambda: press(signal.SIGHUP))
        run.run()
    if place == "nohup":
        assert signal.signal(signal.SIGHUP, heard) == signal.SIG_IGN
    assert len(weights(lesson, tmp_path, *ends))


@EACH
def test_in_a_notebook_the_end_is_a_line_and_the_curve_is_shown(
    prepared, tmp_path, monkeypatch, capsys, lesson
):
    shown, notebook = [], types.ModuleType("IPython.display")
    notebook.display, notebook.Image = shown.append, lambda *a, **k: (a, k)
    notebook.version_info = (9, 0)  # which matplotlib wants to know
    for name, module in [("IPython", notebook), ("IPython.display", notebook)]:
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "ipykernel", notebook)
    prepared(lesson).main()
    assert len(weights(lesson, tmp_path, "" if lesson.save_dir else "_unsolved"))
    assert len(shown) == 1 and "curve" in str(shown[0])
