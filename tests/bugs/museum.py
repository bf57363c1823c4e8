"""The museum of bugs: plant one in a lesson, train, and see what it looks like.

    python tests/bugs/museum.py                   lists the bugs
    python tests/bugs/museum.py cartpole-sign     trains with it, beside a healthy run
    python tests/bugs/museum.py check [names]     runs the test that has to catch it
    python tests/bugs/museum.py exercise          writes a lesson with a bug in it
    python tests/bugs/museum.py solution          shows which one it was
    python tests/bugs/museum.py measure [names]   trains all, three seeds each
    python tests/bugs/museum.py page              writes README.md and its pictures

A planted copy lives in a folder of its own and writes its files there.
"""

import contextlib
import difflib
import importlib
import io
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import symptoms
from catalogue import BUGS, CARTPOLE, GAME, GRPO, LANDER, TICTACTOE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results" / "bugs.json"
EXERCISE = HERE / "exercise"
SEEDS = (0, 1, 2)

# Runs short enough to try; the healthy runs beside the bugs have these Settings too.
SHORT = {
    CARTPOLE: {"MAX_EPISODES": 1_600, "CHECK_EPISODES": 300},
    TICTACTOE: {"NUM_UPDATES": 400, "MAX_UPDATES": 400, "REPORT_EVERY": 20},
    LANDER: {"TOTAL_STEPS": 300_000, "REPORT_EVERY": 3},
    GRPO: {
        "POLICY_MODEL_NAME": "grpo_tiny/policy",
        "REWARD_MODEL_NAME": "grpo_tiny/reward",
    },
}


def find(name: str) -> dict:
    """The bug of that name, or one line that says there is none."""
    for bug in BUGS:
        if bug["name"] == name:
            return bug
    sys.exit(f"No bug is called {name}; without a name, all are listed.")


def lesson_of(bug: dict) -> str:
    """The script that trains: the bugs of the game are seen in lesson 2."""
    return TICTACTOE if bug["file"] == GAME else bug["file"]


def test_of(bug: dict) -> str:
    """The test that has to catch a bug, as pytest takes it."""
    lesson = bug["name"].split("-")[0].replace("lander", "lunarlander")
    for file in sorted((ROOT / "tests").glob(f"test_{lesson}*.py")):
        if f"\ndef {bug['test']}(" in file.read_text():
            return f"tests/{file.name}::{bug['test']}"
    sys.exit(f"{bug['name']}: there is no test {bug['test']}")


def planted(bug: dict) -> str:
    """The text of the script with the bug in it."""
    text = (ROOT / bug["file"]).read_text()
    for right, wrong in bug["edits"]:
        if text.count(right) != 1:
            sys.exit(f"{bug['name']}: not exactly once in {bug['file']}: {right!r}")
        text = text.replace(right, wrong)
    return text


def with_settings(text: str, settings: dict) -> str:
    """The text of a script with other values of some Settings."""
    for name, value in settings.items():
        text, count = re.subn(
            rf"^{name} = .*?(?=  #|$)", f"{name} = {value!r}", text, flags=re.M
        )
        assert count == 1, name
    return text


def copy_lesson(lesson: str, bug: dict | None, settings: dict, folder: Path) -> None:
    """Write the lesson, with its bug and Settings, and what it needs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [lesson, GAME] if lesson == TICTACTOE else [lesson]
    for file in files:
        text = (ROOT / file).read_text()
        if bug and bug["file"] == file:
            text = planted(bug)
        if file == lesson:
            text = with_settings(text, settings)
        (folder / file).write_text(text)
    if lesson == GRPO:
        for part in ("policy", "reward"):
            target = folder / "grpo_tiny" / part
            shutil.copytree(ROOT / "grpo_tiny" / part, target, dirs_exist_ok=True)


# ------------------------------------------------------------------------------------
# One run, in a process of its own
# ------------------------------------------------------------------------------------


class Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)

    def reconfigure(self, **options) -> None:
        """As a real standard output has it."""


def load(folder: Path, lesson: str):
    """Import a lesson from a folder, whatever was imported under its name before."""
    for file in (GAME, lesson):
        sys.modules.pop(Path(file).stem, None)
    sys.path.insert(0, str(folder))
    module = importlib.import_module(Path(lesson).stem)
    sys.path.remove(str(folder))
    return module


def run(lesson: str, bug: dict | None, settings: dict, seed: int) -> dict:
    """Train with a bug, or without; gives the figures that symptoms.py reads.

    Scores of training and the printed table are those that one would see. `greedy` and
    `sampled` are measured by the healthy lesson on what was trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = SHORT[lesson] | settings | {"SEED": seed}
        copy_lesson(lesson, bug, settings, Path(folder))
        module = load(Path(folder), lesson)
        kept, out = [], Tee()
        module.save_run = lambda *arguments, **facts: (
            kept.append(arguments) or "nothing"
        )
        ended_by = ""
        with contextlib.redirect_stdout(out):
            try:
                module.main()
            except SystemExit as stop:
                ended_by = str(stop.code)
            except Exception as problem:
                ended_by = f"{type(problem).__name__}: {problem}"
        measured = {"seed": seed, "ended by": ended_by.replace(folder, "")}
        if kept:
            healthy = load(ROOT, lesson)
            reader = {
                CARTPOLE: read_cartpole,
                TICTACTOE: read_tictactoe,
                LANDER: read_lander,
                GRPO: read_grpo,
            }[lesson]
            measured |= reader(module, healthy, kept[-1], out.getvalue(), settings)
        return measured


def table(text: str, columns: int) -> list[list[float]]:
    """The rows of the printed table: lines of so many numbers and nothing else."""
    rows = []
    for line in text.splitlines():
        words = line.replace(",", "").replace("%", "").split()
        with contextlib.suppress(ValueError):
            numbers = [float(word) for word in words]
            if len(numbers) == columns:
                rows.append(numbers)
    return rows


def curve(xs: list, ys: list, points: int = 40) -> dict:
    """A learning curve in few points, each a mean; with its start, end and best."""
    size = max(1, len(ys) // points)
    pieces = [slice(i, i + size) for i in range(0, len(ys) - size + 1, size)]
    means = [statistics.fmean(ys[piece]) for piece in pieces]
    return {
        "x": [round(xs[piece][-1], 1) for piece in pieces],
        "y": [round(mean, 3) for mean in means],
        "start": means[0],
        "end": statistics.fmean(means[-2:]),
        "best": max(means),
    }


def moved(first: dict, last: dict) -> float:
    """The share of weights that are not what they were."""
    same = [(first[name] == last[name]).float().mean().item() for name in first]
    return 1 - statistics.fmean(same)


def entropies(column: list[float]) -> dict:
    """Entropy in the first row of the table, after a fifth of them, and at the end."""
    early = column[min(len(column) // 5, len(column) - 1)]
    return {
        "entropy first": column[0],
        "entropy early": early,
        "entropy": column[-1],
    }


def read_cartpole(module, healthy, kept, out, settings) -> dict:
    """Figures of lesson 1; `budget used` in episodes."""
    import torch

    policy, scores = kept[:2]
    rows = table(out, 4)
    held_out = {
        name: healthy.evaluate(policy, 100, healthy.HELD_OUT_SEED, greedy)
        for name, greedy in [("greedy", True), ("sampled", False)]
    }
    printed = re.search(r"played greedily: ([\d.]+)", out)
    torch.manual_seed(settings["SEED"])
    first = module.PolicyNetwork(healthy.HIDDEN_UNITS).state_dict()
    return (
        curve(list(range(1, len(scores) + 1)), scores, 50)
        | {"start": statistics.fmean(scores[:32]), "budget used": len(scores)}
        | {"end": statistics.fmean(scores[-100:])}
        | entropies([row[2] for row in rows])
        | {name: score.mean().item() for name, score in held_out.items()}
        | {"printed score": float(printed[1]) if printed else float("nan")}
        | {"weights moved": moved(first, policy.state_dict())}
    )


def read_tictactoe(module, healthy, kept, out, settings) -> dict:
    """Figures of lesson 2; the score is the mean of wins in both seats, in %."""
    import torch

    actor, critic = kept[:2]
    rows = table(out, 7)
    wins = [
        100 * healthy.play_every_line(actor, first)[1][0] for first in healthy.SEATS
    ]
    lost = [healthy.play_every_line(actor, first)[0][2] for first in healthy.SEATS]
    # How often the planted code lets the trained actor make an illegal move.
    torch.manual_seed(0)
    env = module.gym.make_vec(module.ENV_ID, num_envs=200)
    both, never = torch.arange(200) % 2 == 0, torch.zeros(200)
    games = module.play_games(env, actor, actor, both, never)
    boards, _, actions, mine, _ = games
    taken = (boards.gather(2, actions[..., None])[..., 0] != 0)[mine]
    # The critic's error where it can be known: on games of the healthy code.
    env = healthy.gym.make_vec(healthy.ENV_ID, num_envs=2_000)
    both, chances = torch.arange(2_000) % 2 == 0, torch.full((2_000,), 0.25)
    boards, _, _, learner_moved, results = healthy.play_games(
        env, actor, actor, both, chances
    )
    returns = results.expand_as(learner_moved)[learner_moved]
    values = critic(boards[learner_moved]).detach().flatten()
    torch.manual_seed(settings["SEED"])
    first = module.ActorNetwork(healthy.HIDDEN_UNITS)
    at_first = [
        100 * healthy.play_every_line(first, seat)[1][0] for seat in healthy.SEATS
    ]
    score = [sum(at_first) / 2] + [(row[0] + row[1]) / 2 for row in rows]
    return (
        curve([0.0] + [row[4] for row in rows], score)
        | {"end": score[-1], "budget used": rows[-1][4]}
        | entropies([row[5] for row in rows])
        | {"wins 1st": wins[0], "wins 2nd": wins[1], "greedy": sum(wins) / 2}
        | {"lines lost": sum(lost)}
        | {"loss": statistics.median(row[6] for row in rows)}
        | {"illegal moves": taken.float().mean().item()}
        | {"critic error": ((returns - values) ** 2).mean().item()}
        | {"weights moved": moved(first.state_dict(), actor.state_dict())}
    )


def read_lander(module, healthy, kept, out, settings) -> dict:
    """Figures of lesson 3; the score is the return, the budget is in steps."""
    import torch

    agent, rows = kept[0], table(out, 8)
    held_out = {
        name: healthy.evaluate(agent.actor, 100, healthy.HELD_OUT_SEED, greedy)[0]
        for name, greedy in [("greedy", True), ("sampled", False)]
    }
    torch.manual_seed(settings["SEED"])
    first = module.ActorCritic(healthy.HIDDEN_UNITS).actor.state_dict()
    early = rows[: len(rows) // 2]
    return (
        curve([row[2] for row in rows], [row[0] for row in rows], 30)
        | {"end": rows[-1][0], "budget used": rows[-1][2], "length": rows[-1][1]}
        | entropies([row[6] for row in rows])
        | {"KL": statistics.median(row[4] for row in early)}
        | {"clipped": statistics.median(row[5] for row in early) / 100}
        | {"explained": statistics.median(row[7] for row in rows)}
        | {name: float(score.mean()) for name, score in held_out.items()}
        | {"weights moved": moved(first, agent.actor.state_dict())}
    )


def read_grpo(module, healthy, kept, out, settings) -> dict:
    """Figures of lesson 4; the score is the mean reward of a group."""
    import torch
    import transformers

    policy, tokenizer, history = kept[:3]
    dtype, policy = policy.dtype, policy.float().eval()
    lines = re.findall(r"^  (loss .*)$", out, re.M)
    steps = [dict(re.findall(r"([A-Za-z ]+?) (\S+)(?: \||$)", line)) for line in lines]
    steps = [{name.strip(): float(x) for name, x in step.items()} for step in steps]
    rewards = [group.mean().item() for group in history]
    folder = ROOT / "grpo_tiny" / "policy"
    first = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype
    ).float()
    healthy.POLICY_MODEL_NAME = "grpo_tiny/policy"
    healthy.REWARD_MODEL_NAME = "grpo_tiny/reward"
    *_, judge, judge_tokenizer = healthy.load_models()
    torch.manual_seed(healthy.HELD_OUT_SEED)
    prompt = healthy.PROMPTS[0]
    _, ids = healthy.generate_group(policy, tokenizer, prompt, 64)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    mask = healthy.completion_mask(ids, tokenizer.eos_token_id)
    scored = healthy.score_responses(judge, judge_tokenizer, prompt, texts)
    return (
        curve(list(range(len(rewards))), rewards, 25)
        | {"end": statistics.fmean(rewards[-5:]), "budget used": len(rewards)}
        | (entropies([step["entropy"] for step in steps]) if steps else NO_STEPS)
        | {"greedy": scored.mean().item(), "length": mask.sum(1).float().mean().item()}
        | {"cut off": (mask.sum(1) == healthy.MAX_NEW_TOKENS).float().mean().item()}
        | {"KL": statistics.fmean(step["KL"] for step in steps) if steps else 0.0}
        | {"clipped": max((step["clipped"] for step in steps), default=0.0)}
        | {"first loss": steps[0]["loss"] if steps else 0.0}
        | {"first gradient": steps[0]["gradient"] if steps else 0.0}
        | {"steps skipped": 1 - len(steps) / len(rewards)}
        | {"weights moved": moved(first.state_dict(), policy.state_dict())}
    )


NO_STEPS = {"entropy first": 0.0, "entropy early": 0.0, "entropy": 0.0}


# ------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------


def list_bugs() -> None:
    """Every bug with its lesson and the reason why people write it."""
    for bug in BUGS:
        print(f"{bug['name']:45}{bug['why']}")
    print(f"\n{len(BUGS)} bugs. Train with one: python tests/bugs/museum.py NAME")


def start(name: str, seed: int, path: Path) -> subprocess.Popen:
    """Begin a run in a process of its own, which writes its figures to a file."""
    command = [sys.executable, "-u", __file__, "run", name, str(seed), str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def one_run(name: str, seed: str, path: str) -> None:
    """What `start` starts; `healthy-NAME` is the healthy run beside a bug."""
    bug = find(name.removeprefix("healthy-"))
    settings = bug.get("settings", {})
    planted_bug = None if name.startswith("healthy-") else bug
    found = run(lesson_of(bug), planted_bug, settings, int(seed))
    Path(path).write_text(json.dumps(found))


def show(name: str, seed: int = 0) -> None:
    """Train with the bug and without, side by side, and say what was seen."""
    bug = find(name)
    print("Lines that begin with | are those of the healthy run.\n")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, each) for each in ("bug", "healthy")]
        runs = [start(name, seed, paths[0]), start(f"healthy-{name}", seed, paths[1])]

        def follow(process: subprocess.Popen, mark: str) -> None:
            for line in process.stdout:
                print(f"{mark}{line}", end="", flush=True)

        threads = [
            threading.Thread(target=follow, args=pair)
            for pair in zip(runs, ("  ", "| "), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with_bug, healthy = (json.loads(path.read_text()) for path in paths)
    print(f"\n{bug['name']}: {bug['why']}")
    print("".join(diff(bug)))
    for key in symptoms.shown([with_bug], [healthy]):
        print(f"Seen in this run: {symptoms.words(key)}.")
    print(f"Caught by {test_of(bug)}")


def diff(bug: dict) -> list[str]:
    """The bug as a diff of the script."""
    right, wrong = (ROOT / bug["file"]).read_text(), planted(bug)
    lines = [text.splitlines(keepends=True) for text in (right, wrong)]
    return list(difflib.unified_diff(*lines, bug["file"], "with the bug", n=1))


def copy_of_repository(folder: Path) -> None:
    """Scripts, tests and weights in a folder, for tests to run on."""
    for pattern in ("*.py", "*.pt", "*.pth", "*.toml", "*.txt", "README.md"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    shutil.copytree(
        ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("exercise")
    )
    os.symlink(ROOT / "grpo_tiny", folder / "grpo_tiny")
    os.symlink(ROOT / "assets", folder / "assets")


def failing(bugs: list[dict], plant: bool = True) -> set[str]:
    """The names of bugs whose tests fail, of bugs in different lessons, all planted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_repository(folder)
        for bug in bugs if plant else []:
            (folder / bug["file"]).write_text(planted(bug))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no"]
        command += ["-rfE", *dict.fromkeys(test_of(bug) for bug in bugs)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            sys.exit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) ([^\s\[]+)", done.stdout, re.M)
        return {bug["name"] for bug in bugs if test_of(bug) in failed}


def check(names: list[str]) -> None:
    """Plant each bug and run its test, which has to fail; without the bug, to pass."""
    bugs = [find(name) for name in names] or BUGS
    queues = {}  # one bug of each lesson at a time: they do not meet
    for bug in bugs:
        queues.setdefault(lesson_of(bug), []).append(bug)
    batches = [
        [bug for bug in batch if bug]
        for batch in itertools.zip_longest(*queues.values())
    ]
    good = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = pool.submit(failing, bugs, plant=False)
        for batch, caught in zip(batches, pool.map(failing, batches), strict=True):
            for bug in batch:
                word = "caught" if bug["name"] in caught else "NOT CAUGHT"
                good += bug["name"] in caught
                print(f"{word:12}{bug['name']:45}{bug['test']}", flush=True)
        for name in wrong.result():
            print(f"FAILS WITHOUT THE BUG, TOO: {name}")
    print(f"{good} of {len(bugs)} caught")
    if good < len(bugs) or wrong.result():
        sys.exit(1)


NOT_PRINTED = {"hidden", "critic worse", "illegal", "nothing moves"}


def exercise_settings(bug: dict) -> dict:
    """As long as the runs on the page, to compare figures, but with another seed."""
    return SHORT[lesson_of(bug)] | bug.get("settings", {}) | {"SEED": len(SEEDS)}


def exercise(seed: str | None = None) -> None:
    """Write a lesson with a bug drawn at random, of those that show something."""
    results = json.loads(RESULTS.read_text())
    visible = [bug for bug in BUGS if set(seen(results, bug)) - NOT_PRINTED]
    bug = random.Random(seed).choice(visible)
    lesson = lesson_of(bug)
    shutil.rmtree(EXERCISE, ignore_errors=True)
    settings = exercise_settings(bug)
    copy_lesson(lesson, bug, settings, EXERCISE)
    shown_folder = os.path.relpath(EXERCISE)
    print(f"{shown_folder}/{lesson} has a bug, in one to three lines.")
    if lesson == TICTACTOE:
        print("(In it, or in the game beside it.)")
    if bug.get("settings"):
        print(f"Its Settings differ too, on purpose: {bug['settings']}")
    print(f"Run it:  python {shown_folder}/{lesson}")
    print(
        "Compare what it prints with the healthy row in tests/bugs/README.md, look the"
    )
    print("symptoms up there, and find the lines. It runs as long as the runs on that")
    print("page, with another seed. Then: python tests/bugs/museum.py solution")


def solution() -> None:
    """Show which bug the exercise has."""
    for bug in BUGS:
        written = EXERCISE / bug["file"]
        settings, text = exercise_settings(bug), planted(bug)
        if written.exists() and written.read_text() == (
            text if bug["file"] == GAME else with_settings(text, settings)
        ):
            print(f"{bug['name']}: {bug['why']}\n")
            print("".join(diff(bug)))
            print(f"Caught by {test_of(bug)}")
            return
    sys.exit("There is no exercise, or it was changed: python ... museum.py exercise")


def group_of(bug: dict) -> str:
    """The name of the healthy runs that a bug is compared with."""
    settings = ", ".join(f"{k} = {v}" for k, v in bug.get("settings", {}).items())
    return f"{lesson_of(bug)} ({settings})" if settings else lesson_of(bug)


def seen(results: dict, bug: dict) -> list[str]:
    """The symptoms of a bug in the results of `measure`."""
    healthy = results["healthy"][group_of(bug)]
    return symptoms.shown(results["bugs"][bug["name"]], healthy)


def measure(names: list[str]) -> None:
    """Train every bug and the healthy lessons beside them; write the JSON file."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault("bugs", {}), results.setdefault("healthy", {})
    bugs = [find(name) for name in names] or BUGS
    jobs = {}
    for bug in bugs:
        jobs["bugs", bug["name"]] = bug["name"]
        jobs["healthy", group_of(bug)] = f"healthy-{bug['name']}"
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1

    def train(job: tuple) -> dict:
        (kind, key), name, seed = job
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "figures.json")
            process = start(name, seed, path)
            said = process.communicate()[0]
            if process.returncode:
                sys.exit(f"{name}, seed {seed}: {said[-3000:]}")
            found = json.loads(path.read_text())
        level = found.get("end", float("nan"))
        print(
            f"{name:50} seed {seed} {level:9.2f} {found['ended by'][:40]}", flush=True
        )
        return found

    wanted = [(key, name, seed) for key, name in jobs.items() for seed in SEEDS]
    with ThreadPoolExecutor(workers) as pool:
        for job, found in zip(wanted, pool.map(train, wanted), strict=True):
            (kind, key), _, seed = job
            runs = results[kind].setdefault(key, [])
            runs[:] = [each for each in runs if each["seed"] != seed] + [found]
    results["machine"] = machine()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(results), indent=1) + "\n")


def rounded(value):
    """The same with floats of four digits, which is what the seeds are good for."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict:
    """Where the figures come from."""
    import platform

    import gymnasium
    import torch

    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
    }


def main() -> None:
    """See the top of this file."""
    command, *rest = sys.argv[1:] or ["list"]
    if command == "page":
        import page

        return page.write()
    commands = {
        "list": lambda: list_bugs(),
        "run": lambda: one_run(*rest),
        "check": lambda: check(rest),
        "exercise": lambda: exercise(*rest),
        "solution": lambda: solution(),
        "measure": lambda: measure(rest),
    }
    commands.get(command, lambda: show(command, *map(int, rest)))()


if __name__ == "__main__":
    main()
