"""Benchmark of lesson 3: lunarlander_ppo.py with seeds 0-9, against a tuned library.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    taskset -c 0 python tests/benchmarks/lunarlander.py

Each run calls the lesson's own main(). What part of its time the environments take is
measured in two ways: inside the run, around each call of their step; and before and
after it, by stepping as many of them with random actions and nothing else (such
flights crash soon; the simulation of a lander on the ground takes longer). Before that,
stable-baselines3's PPO is trained with RL Zoo's settings for this environment; then we
look up when our own run of the same seed first had its score. Seeds after the command
repeat only those runs. Prints a table and writes results/lunarlander.json beside this
file, and the learning curves to assets/lunarlander_learning_curves.png.
"""

import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import lunarlander_ppo as lesson  # noqa: E402  (the line above finds it)

SEEDS = range(10)
STEPPING_STEPS = 100_000  # random steps before and as many after each run
SNAPSHOT_EVERY = 4  # updates between two looks at how good the agent was by then
LIBRARY_SEED = 0
RESULTS = Path(__file__).parent / "results" / "lunarlander.json"
CURVES = ROOT / "assets" / "lunarlander_learning_curves.png"


def machine() -> dict:
    """What ran it: processor, cores this process may use, Python and packages."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def versions() -> dict:
    """Python and the packages that matter."""
    packages = [torch, gymnasium, np, stable_baselines3]
    names = {package.__name__: package.__version__ for package in packages}
    return {"python": platform.python_version(), **names}


def stepping_seconds(steps: int, seed: int) -> float:
    """Seconds that stepping alone takes: random actions drawn beforehand, no network.

    Random flights are short (about 95 steps), so that this has its share of resets.
    """
    envs = lesson.make_envs(lesson.NUM_ENVS)
    envs.reset(seed=seed)
    rows = steps // lesson.NUM_ENVS
    actions = np.random.default_rng(seed).integers(4, size=(rows, lesson.NUM_ENVS))
    start = time.perf_counter()
    for row in actions:
        envs.step(row)
    return time.perf_counter() - start


class Recorder:
    """Watches a run of the lesson's main() from outside, and times its parts."""

    def __init__(self) -> None:
        self.in_step, self.history, self.updates = 0.0, [], 0
        self.snapshots, self.scores, self.seconds = [], {}, None

    def make_envs(self, copies: int):
        """The lesson's environments, with the time that is spent in step added up."""
        envs = originals["make_envs"](copies)
        step = envs.step

        def timed_step(actions):
            start = time.perf_counter()
            result = step(actions)
            self.in_step += time.perf_counter() - start
            return result

        envs.step = timed_step
        return envs

    def collect(self, envs, actor, *rest):
        """Keep a copy of the actor, and when it was, every so many updates."""
        if self.updates % SNAPSHOT_EVERY == 0:
            seconds = time.perf_counter() - self.start
            self.snapshots.append((seconds, copy.deepcopy(actor)))
        self.updates += 1
        return originals["collect"](envs, actor, *rest)

    def evaluate(self, policy, episodes, first_seed, greedy):
        """The training is over when the lesson first evaluates."""
        self.seconds = self.seconds or time.perf_counter() - self.start
        result = originals["evaluate"](policy, episodes, first_seed, greedy)
        self.scores["greedy" if greedy else "sampled"] = result
        return result

    def draw_learning_curve(self, history, path):
        self.history = history


originals = {
    name: getattr(lesson, name)
    for name in ("make_envs", "collect", "evaluate", "draw_learning_curve")
}


def train(seed: int, **changes) -> tuple[dict, Recorder]:
    """One run of the lesson's main(), with `changes` of the lesson's names.

    Gives the figures for the table, and the recorder. The fingerprint is that of the
    weights: whoever trains the same seed on the same machine gets the same one.
    """
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        changes = {
            "SEED": seed,
            "WEIGHTS_PATH": Path(folder) / "w.pt",
            "CURVE_PATH": Path(folder) / "c.png",
            **{name: getattr(recorder, name) for name in originals},
            **changes,
        }
        for name, value in changes.items():
            undo.callback(setattr, lesson, name, getattr(lesson, name))
            setattr(lesson, name, value)
        recorder.start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            lesson.main()
        weights = torch.load(next(Path(folder).glob("w*.pt")), weights_only=True)
    scores, crashed = recorder.scores["greedy"]
    sampled, _ = recorder.scores["sampled"]
    figures = {
        "seed": seed,
        "steps": int(recorder.history[-1][0]),
        "seconds": round(recorder.seconds, 2),
        "seconds inside env.step": round(recorder.in_step, 2),
        "greedy mean": round(float(scores.mean()), 2),
        "greedy std": round(float(scores.std()), 2),
        "greedy minimum": round(float(scores.min()), 2),
        "greedy episodes >= 200": int((scores >= lesson.SOLVED_SCORE).sum()),
        "greedy crashes": int(crashed.sum()),
        "sampled mean": round(float(sampled.mean()), 2),
        "fingerprint": fingerprint(weights["weights"]),
    }
    return figures, recorder


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights, in order."""
    numbers = torch.cat([tensor.flatten() for tensor in weights.values()])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def train_library(seed: int) -> tuple[dict, Callable]:
    """stable-baselines3's PPO with RL Zoo's settings for LunarLander-v3."""
    envs = make_vec_env(lesson.ENV_ID, n_envs=16, seed=seed)
    model = stable_baselines3.PPO(
        "MlpPolicy",
        envs,
        n_steps=1024,
        batch_size=64,
        n_epochs=4,
        gamma=0.999,
        gae_lambda=0.98,
        ent_coef=0.01,
        seed=seed,
        device="cpu",
    )
    start = time.perf_counter()
    model.learn(1_000_000)
    seconds = time.perf_counter() - start

    def policy(observations: torch.Tensor) -> torch.Tensor:
        return model.policy.get_distribution(observations).distribution.logits

    scores, crashed = lesson.evaluate(
        policy, lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED, greedy=True
    )
    return {
        "seed": seed,
        "steps": model.num_timesteps,
        "seconds": round(seconds, 1),
        "greedy mean": round(float(scores.mean()), 2),
        "greedy std": round(float(scores.std()), 2),
        "greedy minimum": round(float(scores.min()), 2),
        "greedy episodes >= 200": int((scores >= lesson.SOLVED_SCORE).sum()),
    }


def first_time_at(recorder: Recorder, score: float) -> float:
    """Seconds of training after which the agent's greedy score first reached this."""
    for seconds, actor in recorder.snapshots:
        scores, _ = lesson.evaluate(
            actor, lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED, greedy=True
        )
        if scores.mean() >= score:
            return round(seconds, 1)
    return math.inf


def draw(histories: list[list]) -> None:
    """Write a picture of all learning curves."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for history in histories:
        steps, returns, _ = np.array(history).T
        running = np.convolve(returns, np.full(100, 0.01), mode="valid")
        axes.plot(steps[99:], running, color="C0", alpha=0.5)
    axes.axhline(
        lesson.SOLVED_SCORE, color="green", linestyle="--", label="solved: 200"
    )
    axes.set(
        title=f"PPO on {lesson.ENV_ID}, seeds 0-{len(histories) - 1}",
        xlabel="steps",
        ylabel="return, mean of 100 episodes",
    )
    axes.legend(loc="lower right")
    CURVES.parent.mkdir(exist_ok=True)
    figure.savefig(CURVES, dpi=120)


def ratios(name: str, runs: list[dict], part: str) -> dict:
    """Median and worst of how many times as long the runs took as this part."""
    times = [run["seconds"] / run[part] for run in runs]
    return {
        f"{name}, median": round(statistics.median(times), 2),
        f"{name}, worst": round(max(times), 2),
    }


def summarise(runs: list[dict], library: dict) -> dict:
    """The figures that the README quotes."""
    means = [run["greedy mean"] for run in runs]
    episodes = len(runs) * lesson.HELD_OUT_EPISODES
    solved = sum(run["greedy episodes >= 200"] for run in runs)
    return {
        "mean of the seeds": round(statistics.mean(means), 1),
        "worst seed": min(means),
        "share of all episodes >= 200": round(solved / episodes, 4),
        "steps": runs[0]["steps"],
        "median seconds": statistics.median(run["seconds"] for run in runs),
        "slowest seconds": max(run["seconds"] for run in runs),
        **ratios("times random stepping", runs, "seconds of stepping alone"),
        **ratios("times its own stepping", runs, "seconds inside env.step"),
        "stable-baselines3: score": library["greedy mean"],
        "stable-baselines3: seconds": library["seconds"],
        "our seconds to that score": library["our seconds to its score"],
        "times as fast to that score": library["times as long"],
    }


def measure_seed(seed: int) -> tuple[dict, Recorder]:
    """One run, between two looks at stepping alone."""
    alone = stepping_seconds(STEPPING_STEPS, seed)
    figures, recorder = train(seed)
    alone += stepping_seconds(STEPPING_STEPS, seed)
    alone *= figures["steps"] / (2 * STEPPING_STEPS)
    figures["seconds of stepping alone"] = round(alone, 2)
    print(
        f"{seed:4}{figures['greedy mean']:13.1f} +-{figures['greedy std']:5.1f}"
        f"{figures['greedy minimum']:9.1f}{figures['greedy episodes >= 200']:7}"
        f"{figures['sampled mean']:9.1f}{figures['seconds']:9.1f}"
        f"{figures['seconds'] / alone:18.2f}"
        f"{figures['seconds'] / figures['seconds inside env.step']:13.2f}",
        flush=True,
    )
    return figures, recorder


def main() -> None:
    """Train the library, then all seeds; print the table, write JSON and picture."""
    torch.set_num_threads(1)
    only = [int(seed) for seed in sys.argv[1:]]  # these seeds anew, the rest as it was
    old = json.loads(RESULTS.read_text()) if only else None
    library = old["library"] if only else train_library(LIBRARY_SEED)
    print(f"stable-baselines3: {library}\n", flush=True)
    runs = {run["seed"]: run for run in old["runs"]} if only else {}
    histories = []
    print(
        "seed  greedy mean +-  std  minimum  >=200  sampled  seconds  / random stepping"
        "  / its own"
    )
    for seed in only or SEEDS:
        runs[seed], recorder = measure_seed(seed)
        histories.append(recorder.history)
        if seed == LIBRARY_SEED:
            seconds = first_time_at(recorder, library["greedy mean"])
            library["our seconds to its score"] = seconds
            library["times as long"] = round(library["seconds"] / seconds, 2)
    if len(histories) == len(SEEDS):
        draw(histories)

    runs = [runs[seed] for seed in sorted(runs)]
    summary = summarise(runs, library)
    for name, value in summary.items():
        print(f"{name:38}{value:g}")
    report = {
        "machine": machine(),
        "versions": versions(),
        "command": "taskset -c 0 python tests/benchmarks/lunarlander.py",
        "runs": runs,
        "library": library,
        "summary": summary,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
