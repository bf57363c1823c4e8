"""Benchmark of lesson 3: lunarlander_ppo.py with seeds 0-9, against a tuned library.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    taskset -c 0 python tests/benchmarks/lunarlander.py

Each run calls the lesson's own main(). Words after the command run only these parts,
in this order, and leave the results of the others as they were:

    seeds     Seeds 0-9; numbers after the word: only these. Score, and what part of the
              time the environments take, measured in two ways: inside the run, around
              each call of their step; and before and after it, by stepping as many of
              them with random actions and nothing else (such flights crash soon; the
              simulation of a lander on the ground takes longer).
    own       stable-baselines3's PPO with the lesson's own settings, read from its
              constants: this compares the two implementations.
    zoo       stable-baselines3's PPO with RL Zoo's settings for this environment, and
              when the lesson's run of the same seed first had its score: this compares
              settings more than implementations.
    frontier  Today's settings with fewer steps, the learning rate falling to 0 within
              them as always, or never falling: mean and worst of ten seeds. (Today's
              number of steps is the part "seeds".)

Prints a table and writes results/lunarlander.json beside this file, and the learning
curves with the frontier to assets/lunarlander_learning_curves.png.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import lunarlander_ppo as lesson  # noqa: E402  (the line above finds it)

PARTS = ("seeds", "own", "zoo", "frontier")
SEEDS = range(10)
STEPPING_STEPS = 100_000  # random steps before and as many after each run
SNAPSHOT_EVERY = 4  # updates between two looks at how good the agent was by then
CURVE_EVERY = 10_000  # steps between two points of a learning curve
LIBRARY_SEED = 0
ZOO_STEPS = 1_000_000
FRONTIER = (200_000, 300_000, 400_000)  # steps, below those of the settings
FRONTIER_RATES = (0.0, 1.0)  # FINAL_RATE: the learning rate falls to 0, or never
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
        self.snapshots, self.scores, self.seconds = [], None, None

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

    def collect(self, envs, actor, observations):
        """Keep a copy of the actor, and when it was, every so many updates."""
        if self.updates % SNAPSHOT_EVERY == 0:
            seconds = time.perf_counter() - self.start
            self.snapshots.append((seconds, copy.deepcopy(actor)))
        self.updates += 1
        return originals["collect"](envs, actor, observations)

    def evaluate(self, policy, episodes, first_seed, greedy):
        """The training is over when the lesson evaluates."""
        self.seconds = time.perf_counter() - self.start
        self.scores = originals["evaluate"](policy, episodes, first_seed, greedy)
        return self.scores

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
        agent = lesson.ActorCritic(weights["hidden_units"])
        agent.load_state_dict(weights["weights"])
        sampled, _ = originals["evaluate"](agent.actor, *held_out(), greedy=False)
    scores, crashed = recorder.scores
    figures = {
        "seed": seed,
        "steps": weights["steps"],
        "seconds": round(recorder.seconds, 2),
        "seconds inside env.step": round(recorder.in_step, 2),
        **greedy_figures(scores),
        "greedy crashes": int(crashed.sum()),
        "sampled mean": round(float(sampled.mean()), 2),
        "fingerprint": fingerprint(weights["weights"]),
    }
    return figures, recorder


def held_out() -> tuple[int, int]:
    """How many held-out episodes there are, and the seed of the first."""
    return lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED


def greedy_figures(scores: np.ndarray) -> dict:
    """What the table says of the scores of the greedy episodes."""
    return {
        "greedy mean": round(float(scores.mean()), 2),
        "greedy std": round(float(scores.std()), 2),
        "greedy minimum": round(float(scores.min()), 2),
        "greedy episodes >= 200": int((scores >= lesson.SOLVED_SCORE).sum()),
    }


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights, in order."""
    numbers = torch.cat([tensor.flatten() for tensor in weights.values()])
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def train_library(envs, steps: int, **settings) -> dict:
    """stable-baselines3's PPO with these settings; its figures."""
    model = stable_baselines3.PPO(
        "MlpPolicy", envs, seed=LIBRARY_SEED, device="cpu", **settings
    )
    start = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - start

    def policy(observations: torch.Tensor) -> torch.Tensor:
        return model.policy.get_distribution(observations).distribution.logits

    scores, _ = lesson.evaluate(policy, *held_out(), greedy=True)
    return {
        "seed": LIBRARY_SEED,
        "steps": model.num_timesteps,
        "seconds": round(seconds, 1),
        **greedy_figures(scores),
    }


def library_with_the_lessons_settings() -> dict:
    """Every setting of the lesson that the library has too, by its name there."""
    rows = lesson.NUM_ENVS * lesson.ROLLOUT_STEPS
    width = [lesson.HIDDEN_UNITS] * 2

    def rate(steps_left: float) -> float:
        falls = (1 - lesson.FINAL_RATE) * steps_left
        return lesson.LEARNING_RATE * (lesson.FINAL_RATE + falls)

    envs = make_vec_env(
        lesson.ENV_ID,
        n_envs=lesson.NUM_ENVS,
        seed=LIBRARY_SEED,
        wrapper_class=gymnasium.wrappers.TransformReward,
        wrapper_kwargs={"func": lambda reward: reward * lesson.REWARD_SCALE},
    )
    return train_library(
        envs,
        lesson.TOTAL_STEPS // rows * rows,
        n_steps=lesson.ROLLOUT_STEPS,
        batch_size=lesson.MINIBATCH_SIZE,
        n_epochs=lesson.EPOCHS,
        learning_rate=rate,
        gamma=lesson.GAMMA,
        gae_lambda=lesson.GAE_LAMBDA,
        clip_range=lesson.CLIP_EPS,
        ent_coef=lesson.ENTROPY_BONUS,
        vf_coef=lesson.VALUE_WEIGHT,
        max_grad_norm=lesson.MAX_GRAD_NORM,
        policy_kwargs={
            "activation_fn": nn.ReLU,
            "net_arch": {"pi": width, "vf": width},
        },
    )


def library_with_rl_zoos_settings() -> dict:
    """RL Zoo's settings for LunarLander-v3."""
    return train_library(
        make_vec_env(lesson.ENV_ID, n_envs=16, seed=LIBRARY_SEED),
        ZOO_STEPS,
        n_steps=1024,
        batch_size=64,
        n_epochs=4,
        gamma=0.999,
        gae_lambda=0.98,
        ent_coef=0.01,
    )


def first_time_at(recorder: Recorder, score: float) -> float | None:
    """Seconds of training after which the greedy score first reached this, if ever."""
    for seconds, actor in recorder.snapshots:
        scores, _ = lesson.evaluate(actor, *held_out(), greedy=True)
        if scores.mean() >= score:
            return round(seconds, 1)
    return None


def curve(history: list) -> str:
    """The mean of the last 100 returns after each CURVE_EVERY steps, as one line."""
    steps, returns, _ = np.array(history).reshape(-1, 3).T
    grid = range(CURVE_EVERY, int(steps.max(initial=0)) + 1, CURVE_EVERY)
    ended = [np.searchsorted(steps, end, side="right") for end in grid]
    last_100 = [returns[max(0, n - 100) : n] for n in ended]
    return " ".join(f"{part.mean():.0f}" if len(part) else "nan" for part in last_100)


def draw(report: dict) -> None:
    """Write a picture of all learning curves, and of the frontier."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for run in report.get("runs", []):
        returns = [float(number) for number in run.get("curve", "").split()]
        steps = CURVE_EVERY * np.arange(1, len(returns) + 1)
        axes.plot(steps, returns, color="C0", alpha=0.5)
    for color, rate in zip(("C1", "C3"), FRONTIER_RATES, strict=True):
        frontier = [p for p in frontier_of(report) if p["FINAL_RATE"] == rate]
        for kind, marker in [("mean", "o"), ("worst", "v")]:
            points = [(p["steps"], p[kind]) for p in frontier]
            label = f"trained for so many steps, FINAL_RATE = {rate:g}: {kind}"
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, label=label)
    axes.axhline(
        lesson.SOLVED_SCORE, color="green", linestyle="--", label="solved: 200"
    )
    axes.set(
        title=f"PPO on {lesson.ENV_ID}, seeds 0-{len(SEEDS) - 1}",
        xlabel="steps",
        ylabel="return, mean of 100 episodes",
    )
    axes.legend(loc="lower right")
    CURVES.parent.mkdir(exist_ok=True)
    figure.savefig(CURVES, dpi=120)


def frontier_of(report: dict) -> list[dict]:
    """The points of the frontier, and today's settings as the last one."""
    points, runs = report.get("frontier", []), report.get("runs")
    if points and runs:
        scores = [run["greedy mean"] for run in runs]
        mean = round(statistics.mean(scores), 1)
        last = {"FINAL_RATE": lesson.FINAL_RATE, "steps": runs[0]["steps"]}
        last |= {"mean": mean, "worst": min(scores), "scores": scores}
        points = [*points, last]
    return points


def ratios(name: str, runs: list[dict], part: str) -> dict:
    """Median and worst of how many times as long the runs took as this part."""
    times = [run["seconds"] / run[part] for run in runs]
    return {
        f"{name}, median": round(statistics.median(times), 2),
        f"{name}, worst": round(max(times), 2),
    }


def summarise(report: dict) -> dict:
    """The figures that the README quotes, of the parts that have been run."""
    summary = {}
    if runs := report.get("runs"):
        means = [run["greedy mean"] for run in runs]
        episodes = len(runs) * lesson.HELD_OUT_EPISODES
        solved = sum(run["greedy episodes >= 200"] for run in runs)
        summary |= {
            "mean of the seeds": round(statistics.mean(means), 1),
            "worst seed": min(means),
            "share of all episodes >= 200": round(solved / episodes, 4),
            "steps": runs[0]["steps"],
            "median seconds": statistics.median(run["seconds"] for run in runs),
            "slowest seconds": max(run["seconds"] for run in runs),
            **ratios("times random stepping", runs, "seconds of stepping alone"),
            **ratios("times its own stepping", runs, "seconds inside env.step"),
        }
    if own := report.get("own"):
        summary |= {
            "same settings: lesson's score": own["lesson"]["greedy mean"],
            "same settings: lesson's seconds": own["lesson"]["seconds"],
            "same settings: stable-baselines3's score": own["library"]["greedy mean"],
            "same settings: stable-baselines3's seconds": own["library"]["seconds"],
            "same settings: times as fast": own["times as fast"],
        }
    if zoo := report.get("zoo"):
        summary |= {
            "RL Zoo's settings: stable-baselines3's score": zoo["library"][
                "greedy mean"
            ],
            "RL Zoo's settings: stable-baselines3's seconds": zoo["library"]["seconds"],
            "lesson's seconds to that score": zoo["lesson's seconds to that score"],
            "times as fast to that score": zoo["times as fast"],
        }
    for point in frontier_of(report):
        for kind in ("mean", "worst"):
            name = f"{kind} of {len(point['scores'])} seeds, {point['steps']:,} steps"
            if point["FINAL_RATE"] != lesson.FINAL_RATE:
                name += f", FINAL_RATE = {point['FINAL_RATE']:g}"
            summary[name] = point[kind]
    return {name: value for name, value in summary.items() if value is not None}


def measure_seed(seed: int) -> dict:
    """One run, between two looks at stepping alone."""
    alone = stepping_seconds(STEPPING_STEPS, seed)
    figures, recorder = train(seed)
    alone += stepping_seconds(STEPPING_STEPS, seed)
    alone *= figures["steps"] / (2 * STEPPING_STEPS)
    figures["seconds of stepping alone"] = round(alone, 2)
    figures["curve"] = curve(recorder.history)
    print(
        f"{seed:4}{figures['greedy mean']:13.1f} +-{figures['greedy std']:5.1f}"
        f"{figures['greedy minimum']:9.1f}{figures['greedy episodes >= 200']:7}"
        f"{figures['sampled mean']:9.1f}{figures['seconds']:9.1f}"
        f"{figures['seconds'] / alone:18.2f}"
        f"{figures['seconds'] / figures['seconds inside env.step']:13.2f}",
        flush=True,
    )
    return figures


def seeds(runs: list[dict], only: list[int]) -> list[dict]:
    """Train these seeds, or all; give the old runs with the new in their places."""
    print(
        "seed  greedy mean +-  std  minimum  >=200  sampled  seconds  / random stepping"
        "  / its own"
    )
    new = {seed: measure_seed(seed) for seed in only or SEEDS}
    merged = {run["seed"]: run for run in runs if only} | new
    return [merged[seed] for seed in sorted(merged)]


def own() -> dict:
    """The library and the lesson with the same settings, one after the other."""
    library, (figures, _) = library_with_the_lessons_settings(), train(LIBRARY_SEED)
    times = round(library["seconds"] / figures["seconds"], 2)
    return {"library": library, "lesson": figures, "times as fast": times}


def zoo() -> dict:
    """The library with RL Zoo's settings; when was the lesson as good?"""
    library, (_, recorder) = library_with_rl_zoos_settings(), train(LIBRARY_SEED)
    seconds = first_time_at(recorder, library["greedy mean"])
    return {
        "library": library,
        "lesson's seconds to that score": seconds,
        "times as fast": seconds and round(library["seconds"] / seconds, 2),
    }


def frontier() -> list[dict]:
    """Today's settings with each number of steps, and with each end of the rate."""
    points = []
    for rate, steps in itertools.product(FRONTIER_RATES, FRONTIER):
        changes = {"FINAL_RATE": rate, "TOTAL_STEPS": steps}
        runs = [train(seed, **changes)[0] for seed in SEEDS]
        scores = [run["greedy mean"] for run in runs]
        solved = sum(run["greedy episodes >= 200"] for run in runs)
        point = {
            "FINAL_RATE": rate,
            "steps": steps,
            "mean": round(statistics.mean(scores), 1),
            "worst": min(scores),
            "share of episodes >= 200": solved / len(runs) / lesson.HELD_OUT_EPISODES,
        }
        print(point, flush=True)
        times = [run["seconds"] for run in runs]
        points.append({**point, "scores": scores, "seconds": times})
    return points


def main() -> None:
    """Run the parts named after the command, or all; write JSON and picture."""
    torch.set_num_threads(1)
    only = [int(word) for word in sys.argv[1:] if word.isdigit()]
    parts = [word for word in sys.argv[1:] if not word.isdigit()]
    parts = parts or (["seeds"] if only else PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"No such part: {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report["command"] = "taskset -c 0 python tests/benchmarks/lunarlander.py"
    for part in [part for part in PARTS if part in parts]:
        if part == "seeds":
            report["runs"] = seeds(report.get("runs", []), only)
        elif part == "own":
            report["own"] = own()
        elif part == "zoo":
            report["zoo"] = zoo()
        else:
            report["frontier"] = frontier()
        report |= {"machine": machine(), "versions": versions()}
        report["summary"] = summarise(report)
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        draw(report)
    for name, value in report["summary"].items():
        print(f"{name:50}{value:g}")


if __name__ == "__main__":
    main()
