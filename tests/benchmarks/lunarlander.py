"""Benchmark of lesson 3: lunarlander_ppo.py with seeds 0-9, against a tuned library.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    taskset -c 0 python tests/benchmarks/lunarlander.py     on one core, 50 minutes

Each run calls the lesson's own main(). Seconds are those of this process: what other
programs do meanwhile does not count. Prints a line for each run and writes
results/lunarlander.json beside this file, and the learning curves with the frontier to
assets/lunarlander_learning_curves.png. common.py lists the words that may follow the
command. The parts:

    seeds     Seeds 0-9: the score, and what part of the time the environments take,
              measured around each call of their step.
    own       stable-baselines3's PPO with the lesson's own settings, read from its
              constants: this compares the two implementations.
    zoo       stable-baselines3's PPO with RL Zoo's settings for this environment, and
              when the lesson's run of the same seed first had its score: this compares
              settings more than implementations.
    frontier  Today's settings with fewer steps, the learning rate falling to 0 within
              them as always, or never falling: mean and worst of ten seeds. (Today's
              number of steps is the part "seeds".)
"""

import copy
import hashlib
import itertools
import statistics
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import stable_baselines3
import torch
from common import ASSETS, patched, read_results, run_main, run_parts
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

import lunarlander_ppo as lesson

SEEDS = range(10)
HELD_OUT = lesson.HELD_OUT_EPISODES, lesson.HELD_OUT_SEED
SNAPSHOT_EVERY = 4  # updates between two looks at how good the agent was by then
CURVE_EVERY = 10_000  # steps between two points of a learning curve
LIBRARY_SEED = 0
ZOO_STEPS = 1_000_000
ZOO = {"n_steps": 1024, "batch_size": 64, "n_epochs": 4}
ZOO |= {"gamma": 0.999, "gae_lambda": 0.98, "ent_coef": 0.01}
FRONTIER = (200_000, 300_000, 400_000)  # steps, below those of the settings
FRONTIER_RATES = (0.0, 1.0)  # FINAL_RATE: the learning rate falls to 0, or never
SCRIPTS = ["lunarlander_ppo.py"]
PACKAGES = ["torch", "gymnasium", "numpy", "stable-baselines3"]


def watched(snapshots: list):
    """The lesson's train() with a stopwatch, and with a snapshot after each update.

    That is the seconds of training so far, those inside env.step, and the actor.
    """
    whole_train = lesson.train

    def train(agent, envs):
        start, step, in_step = time.process_time(), envs.step, 0.0

        def timed_step(actions):
            nonlocal in_step
            began = time.process_time()
            result = step(actions)
            in_step += time.process_time() - began
            return result

        envs.step = timed_step
        for results in whole_train(agent, envs):
            yield results
            seconds = time.process_time() - start
            snapshots.append((seconds, in_step, copy.deepcopy(agent.actor)))

    return train


def train(seed: int, **changes) -> tuple[dict, list, SimpleNamespace]:
    """One run of the lesson's main(), with `changes` of the lesson's names.

    Gives the figures for the table, the snapshots of `watched` and what run_main()
    gives. The fingerprint is that of the weights: whoever trains the same seed on the
    same machine gets the same one.
    """
    snapshots, edits = [], {"SEED": seed} | changes
    with run_main(lesson, train=watched(snapshots), **edits) as run:
        (path,) = run.folder.iterdir()
        checkpoint = torch.load(path, weights_only=True)
        with patched(lesson, **edits):
            agent = lesson.load_agent(path)
    scores, crashed = lesson.evaluate(agent.actor, *HELD_OUT, greedy=True)
    sampled, _ = lesson.evaluate(agent.actor, *HELD_OUT, greedy=False)
    seconds, in_step, _ = snapshots[-1]
    numbers = torch.cat([x.flatten() for x in checkpoint["weights"].values()])
    digest = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
    figures = {
        "seed": seed,
        "steps": checkpoint["steps"],
        "seconds": round(seconds, 2),
        "seconds inside env.step": round(in_step, 2),
        **greedy_figures(scores),
        "greedy crashes": int(crashed.sum()),
        "sampled mean": round(float(sampled.mean()), 2),
        "fingerprint": digest[:16],
    }
    return figures, snapshots, run


def greedy_figures(scores: np.ndarray) -> dict:
    """What the table says of the scores of the greedy episodes."""
    return {
        "greedy mean": round(float(scores.mean()), 2),
        "greedy std": round(float(scores.std()), 2),
        "greedy minimum": round(float(scores.min()), 2),
        "greedy episodes >= 200": int((scores >= lesson.SOLVED_SCORE).sum()),
    }


def train_library(envs, steps: int, **settings) -> dict:
    """stable-baselines3's PPO with these settings; its figures."""
    settings |= {"seed": LIBRARY_SEED, "device": "cpu"}
    model = stable_baselines3.PPO("MlpPolicy", envs, **settings)
    start = time.process_time()
    model.learn(steps)
    seconds = time.process_time() - start

    def policy(observations: torch.Tensor) -> torch.Tensor:
        return model.policy.get_distribution(observations).distribution.logits

    scores, _ = lesson.evaluate(policy, *HELD_OUT, greedy=True)
    figures = {"trainer": "stable-baselines3", "seed": LIBRARY_SEED}
    figures |= {"steps": model.num_timesteps, "seconds": round(seconds, 1)}
    return figures | greedy_figures(scores)


def library_with_the_lessons_settings() -> dict:
    """Every setting of the lesson that the library has too, by its name there."""
    rows = lesson.NUM_ENVS * lesson.ROLLOUT_STEPS
    layers = {"pi": [lesson.HIDDEN_UNITS] * 2, "vf": [lesson.HIDDEN_UNITS] * 2}

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
        policy_kwargs={"activation_fn": nn.ReLU, "net_arch": layers},
    )


def first_time_at(snapshots: list, score: float) -> float | None:
    """Seconds of training after which the greedy score first reached this, if ever."""
    for seconds, _, actor in snapshots[::SNAPSHOT_EVERY]:
        scores, _ = lesson.evaluate(actor, *HELD_OUT, greedy=True)
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


def draw() -> None:
    """Write a picture of all learning curves, and of the frontier."""
    results = read_results("lunarlander")
    runs = results.get("seeds", {}).get("runs", [])
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        returns = [float(number) for number in run["curve"].split()]
        steps = CURVE_EVERY * np.arange(1, len(returns) + 1)
        axes.plot(steps, returns, color="C0", alpha=0.5)
    points = results.get("frontier", {}).get("points", [])
    for color, rate in zip(("C1", "C3"), FRONTIER_RATES, strict=True):
        for kind, marker in [("mean", "o"), ("worst", "v")]:
            marks = [(p["steps"], p[kind]) for p in points if p["FINAL_RATE"] == rate]
            label = f"trained for so many steps, FINAL_RATE = {rate:g}: {kind}"
            if marks:
                axes.plot(*zip(*marks, strict=True), marker, color=color, label=label)
    axes.axhline(lesson.SOLVED_SCORE, color="green", ls="--", label="solved: 200")
    axes.set_title(f"PPO on {lesson.ENV_ID}, seeds 0-{len(runs) - 1}")
    axes.set(xlabel="steps", ylabel="return, mean of 100 episodes")
    axes.legend(loc="lower right")
    figure.savefig(ASSETS / "lunarlander_learning_curves.png", dpi=120)


def summary_of(runs: list[dict], mean: str, share: str) -> dict:
    """The mean score of several runs, and the share of all episodes that are solved."""
    solved = sum(run["greedy episodes >= 200"] for run in runs)
    return {
        mean: round(statistics.mean(run["greedy mean"] for run in runs), 1),
        share: solved / len(runs) / lesson.HELD_OUT_EPISODES,
    }


def seeds() -> dict:
    """Every seed with today's settings."""
    runs, printed = [], []
    for seed in SEEDS:
        figures, _, run = train(seed)
        times = figures["seconds"] / figures["seconds inside env.step"]
        figures["times its own stepping"] = round(times, 2)
        print(figures, flush=True)
        runs.append(figures | {"curve": curve(run.history)})
        printed.append(run.printed)
    names = "mean of the seeds", "share of all episodes >= 200"
    summary = {"seeds": len(runs)} | summary_of(runs, *names)
    return {"summary": summary, "runs": runs, "printed by seed 0": printed[0]}


def own() -> dict:
    """The library and the lesson with the same settings, one after the other."""
    library, (figures, *_) = library_with_the_lessons_settings(), train(LIBRARY_SEED)
    summary = {"times as fast": round(library["seconds"] / figures["seconds"], 2)}
    ours = {"trainer": "this repository"} | figures
    return {"summary": summary, "runs": [library, ours]}


def zoo() -> dict:
    """The library with RL Zoo's settings; when was the lesson as good?"""
    envs = make_vec_env(lesson.ENV_ID, n_envs=16, seed=LIBRARY_SEED)
    library = train_library(envs, ZOO_STEPS, **ZOO)
    _, snapshots, _ = train(LIBRARY_SEED)
    seconds = first_time_at(snapshots, library["greedy mean"])
    summary = {
        "lesson's seconds to that score": seconds,
        "times as fast": seconds and round(library["seconds"] / seconds, 2),
    }
    return {"summary": summary, "runs": [library]}


def frontier() -> dict:
    """Today's settings with each number of steps, and with each end of the rate."""
    points = []
    for rate, steps in itertools.product(FRONTIER_RATES, FRONTIER):
        changes = {"FINAL_RATE": rate, "TOTAL_STEPS": steps}
        runs = [train(seed, **changes)[0] for seed in SEEDS]
        scores = [run["greedy mean"] for run in runs]
        point = {"FINAL_RATE": rate, "steps": steps, "worst": min(scores)}
        point |= summary_of(runs, "mean", "share of episodes >= 200")
        point |= {"scores": scores, "seconds": [run["seconds"] for run in runs]}
        print(point, flush=True)
        points.append(point)
    return {"points": points}


if __name__ == "__main__":
    parts = {"seeds": seeds, "own": own, "zoo": zoo, "frontier": frontier}
    run_parts(SCRIPTS, PACKAGES, parts)
    draw()
