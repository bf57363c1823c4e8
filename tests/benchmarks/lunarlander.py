"""Benchmark of lesson 3: lunarlander_ppo.py with seeds 0-9, against a tuned library.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    taskset -c 0 python tests/benchmarks/lunarlander.py     on one core, 50 minutes

Each run calls the lesson's own main(). Seconds are those of this process: what other
programs do meanwhile does not count. Prints a line for each run and writes
results/lunarlander.json beside this file, and the learning curves with the frontier to
assets/lunarlander_learning_curves.png. common.py lists the words that may follow the
command. The parts:

    seeds     Seeds 0-9: the score, and what part of the time the environments take,
              measured in two ways: inside the run, around each call of their step; and
              before and after it, by stepping as many of them with random actions and
              nothing else (such flights crash soon; the simulation of a lander on the
              ground takes longer).
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
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import stable_baselines3
import torch
from common import ASSETS, read_results, run_main, run_parts
from matplotlib.figure import Figure
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

import lunarlander_ppo as lesson

SEEDS = range(10)
STEPPING_STEPS = 100_000  # random steps before and as many after each run
SNAPSHOT_EVERY = 4  # updates between two looks at how good the agent was by then
CURVE_EVERY = 10_000  # steps between two points of a learning curve
LIBRARY_SEED = 0
ZOO_STEPS = 1_000_000
FRONTIER = (200_000, 300_000, 400_000)  # steps, below those of the settings
FRONTIER_RATES = (0.0, 1.0)  # FINAL_RATE: the learning rate falls to 0, or never
SCRIPTS = ["lunarlander_ppo.py"]
PACKAGES = ["torch", "gymnasium", "numpy", "stable-baselines3"]


def stepping_seconds(steps: int, seed: int) -> float:
    """Seconds that stepping alone takes: random actions drawn beforehand, no network.

    Random flights are short (about 95 steps), so that this has its share of resets.
    """
    envs = lesson.make_envs(lesson.NUM_ENVS)
    envs.reset(seed=seed)
    rows = steps // lesson.NUM_ENVS
    actions = np.random.default_rng(seed).integers(4, size=(rows, lesson.NUM_ENVS))
    start = time.process_time()
    for row in actions:
        envs.step(row)
    return time.process_time() - start


class Recorder:
    """Watches a run of the lesson's main() from outside, and times its parts."""

    def __init__(self) -> None:
        self.in_step, self.updates, self.snapshots = 0.0, 0, []
        self.start, self.seconds, self.scores = time.process_time(), None, None

    def make_envs(self, copies: int):
        """The lesson's environments, with the time that is spent in step added up."""
        envs = originals["make_envs"](copies)
        step = envs.step

        def timed_step(actions):
            start = time.process_time()
            result = step(actions)
            self.in_step += time.process_time() - start
            return result

        envs.step = timed_step
        return envs

    def collect(self, envs, actor, *others):
        """Keep a copy of the actor, and when it was, every so many updates."""
        if self.updates % SNAPSHOT_EVERY == 0:
            seconds = time.process_time() - self.start
            self.snapshots.append((seconds, copy.deepcopy(actor)))
        self.updates += 1
        return originals["collect"](envs, actor, *others)

    def evaluate(self, policy, episodes, first_seed, greedy):
        """The training is over when the lesson evaluates."""
        self.seconds = time.process_time() - self.start
        self.scores = originals["evaluate"](policy, episodes, first_seed, greedy)
        return self.scores


originals = {
    name: getattr(lesson, name) for name in ("make_envs", "collect", "evaluate")
}


def train(seed: int, **changes) -> tuple[dict, Recorder, list, list]:
    """One run of the lesson's main(), with `changes` of the lesson's names.

    Gives the figures for the table, the recorder, the history of the episodes and what
    was printed. The fingerprint is that of the weights: whoever trains the same seed on
    the same machine gets the same one.
    """
    torch.set_num_threads(1)
    recorder = Recorder()
    watched = {name: getattr(recorder, name) for name in originals}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "WEIGHTS_PATH": Path(folder, "w.pt"),
            "CURVE_PATH": Path(folder, "c.png"),
        }
        history, _, printed = run_main(
            lesson, SEED=seed, **{**files, **watched, **changes}
        )
        weights = torch.load(next(Path(folder).glob("w*.pt")), weights_only=True)
    agent = changes.get("ActorCritic", lesson.ActorCritic)(weights["hidden_units"])
    agent.load_state_dict(weights["weights"])
    sampled, _ = lesson.evaluate(agent.actor, *held_out(), greedy=False)
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
    return figures, recorder, history, printed


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
    start = time.process_time()
    model.learn(steps)
    seconds = time.process_time() - start

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
    axes.axhline(
        lesson.SOLVED_SCORE, color="green", linestyle="--", label="solved: 200"
    )
    axes.set(
        title=f"PPO on {lesson.ENV_ID}, seeds 0-{len(runs) - 1}",
        xlabel="steps",
        ylabel="return, mean of 100 episodes",
    )
    axes.legend(loc="lower right")
    figure.savefig(ASSETS / "lunarlander_learning_curves.png", dpi=120)


def measure_seed(seed: int) -> dict:
    """One run, between two looks at stepping alone."""
    alone = stepping_seconds(STEPPING_STEPS, seed)
    figures, _, history, printed = train(seed)
    alone += stepping_seconds(STEPPING_STEPS, seed)
    alone *= figures["steps"] / (2 * STEPPING_STEPS)
    figures |= {
        "seconds of stepping alone": round(alone, 2),
        "times stepping alone": round(figures["seconds"] / alone, 2),
        "times its own stepping": round(
            figures["seconds"] / figures["seconds inside env.step"], 2
        ),
    }
    print(figures, flush=True)
    return figures | {"curve": curve(history), "printed": printed}


def seeds() -> dict:
    """Every seed with today's settings."""
    runs = [measure_seed(seed) for seed in SEEDS]
    solved = sum(run["greedy episodes >= 200"] for run in runs)
    summary = {
        "seeds": len(runs),
        "mean of the seeds": round(statistics.mean(r["greedy mean"] for r in runs), 1),
        "share of all episodes >= 200": solved / len(runs) / lesson.HELD_OUT_EPISODES,
    }
    printed = [run.pop("printed") for run in runs]
    return {"summary": summary, "runs": runs, "printed by seed 0": printed[0]}


def own() -> dict:
    """The library and the lesson with the same settings, one after the other."""
    library, (figures, *_) = library_with_the_lessons_settings(), train(LIBRARY_SEED)
    summary = {"times as fast": round(library["seconds"] / figures["seconds"], 2)}
    runs = {"stable-baselines3": library, "this repository": figures}
    return {
        "summary": summary,
        "runs": [{"trainer": name} | run for name, run in runs.items()],
    }


def zoo() -> dict:
    """The library with RL Zoo's settings; when was the lesson as good?"""
    library, (_, recorder, *_) = library_with_rl_zoos_settings(), train(LIBRARY_SEED)
    seconds = first_time_at(recorder, library["greedy mean"])
    summary = {
        "lesson's seconds to that score": seconds,
        "times as fast": seconds and round(library["seconds"] / seconds, 2),
    }
    return {"summary": summary, "runs": [{"trainer": "stable-baselines3"} | library]}


def frontier() -> dict:
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
            "scores": scores,
            "seconds": [run["seconds"] for run in runs],
        }
        print(point, flush=True)
        points.append(point)
    return {"points": points}


if __name__ == "__main__":
    parts = {"seeds": seeds, "own": own, "zoo": zoo, "frontier": frontier}
    run_parts(SCRIPTS, PACKAGES, parts)
    draw()
