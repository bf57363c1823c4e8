"""What each detail of lunarlander_ppo.py is worth: the same training without it.

    taskset -c 0 python tests/benchmarks/lunarlander_ablations.py

The runs are shortened to 400,000 steps (one to 160,000), learning rate and all, and so
is the run that they are compared with. Prints a line for each run and writes, after
each variation, results/lunarlander_ablations.json beside this file. Name some
variations to repeat only those. Needs tests/benchmarks/requirements.txt, as
lunarlander.py does.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from lunarlander import lesson, machine, train, versions
from torch import nn

SEEDS = range(3)
STEPS = 400_000
RESULTS = Path(__file__).parent / "results" / "lunarlander_ablations.json"

whole_gae = lesson.gae


class SharedLayers(lesson.ActorCritic):
    """Actor and critic with the same hidden layers, and a last layer each."""

    def __init__(self, hidden_units: int) -> None:
        super().__init__(hidden_units)
        self.critic = nn.Sequential(*self.actor[:4], *self.critic[4:])


class TanhLayers(lesson.ActorCritic):
    """Both networks with tanh where the lesson has ReLU."""

    def __init__(self, hidden_units: int) -> None:
        super().__init__(hidden_units)
        for network in (self.actor, self.critic):
            network[1], network[3] = nn.Tanh(), nn.Tanh()


def truncated_is_terminated(rewards, values, next_values, terminated, ended, *rest):
    """GAE as many scripts have it: running out of time counts as a crash."""
    return whole_gae(rewards, values, next_values, ended, ended, *rest)


def sum_runs_across_resets(rewards, values, next_values, terminated, ended, *rest):
    """GAE with `terminated` twice: advantages leak back past a time limit."""
    return whole_gae(rewards, values, next_values, terminated, terminated, *rest)


VARIATIONS = {
    "as it is": {},
    "rewards not scaled": {"REWARD_SCALE": 1.0},
    "advantages not normalised": {"normalise": lambda advantages: advantages},
    "no clipping of the ratio": {"CLIP_EPS": 1e9},
    "no clipping of the gradient": {"MAX_GRAD_NORM": 1e9},
    "learning rate not annealed": {"FINAL_RATE": 1.0},
    "learning rate annealed to 0": {"FINAL_RATE": 0.0},
    "PyTorch's own initial weights": {
        "linear": lambda inputs, outputs, gain: nn.Linear(inputs, outputs)
    },
    "tanh instead of ReLU": {"ActorCritic": TanhLayers},
    "no entropy bonus": {"ENTROPY_BONUS": 0.0},
    "ENTROPY_BONUS = 0.01": {"ENTROPY_BONUS": 0.01},
    "truncated taken for terminated": {"gae": truncated_is_terminated},
    "sum not cut by the time limit": {"gae": sum_runs_across_resets},
    "layers shared": {"ActorCritic": SharedLayers},
    "GAE_LAMBDA = 1": {"GAE_LAMBDA": 1.0},
    "GAE_LAMBDA = 0.9": {"GAE_LAMBDA": 0.9},
    "GAMMA = 0.99": {"GAMMA": 0.99},
    "EPOCHS = 1": {"EPOCHS": 1},
    "EPOCHS = 20, 160,000 steps": {"EPOCHS": 20, "TOTAL_STEPS": 160_000},
    "MINIBATCH_SIZE = 4,096": {"MINIBATCH_SIZE": 4_096},
}


def main() -> None:
    """Train every variation with every seed."""
    torch.set_num_threads(1)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    for name in sys.argv[1:] or VARIATIONS:
        runs = [run for run in runs if run["variation"] != name]
        for seed in SEEDS:
            figures, _ = train(seed, **{"TOTAL_STEPS": STEPS, **VARIATIONS[name]})
            runs.append({"variation": name, **figures})
            print(f"{name:34}{seed:4}{figures['greedy mean']:9.1f}", flush=True)
        done = [variation for variation in VARIATIONS if variation in names(runs)]
        report = {
            "machine": machine(),
            "versions": versions(),
            "command": "taskset -c 0 python tests/benchmarks/lunarlander_ablations.py",
            "runs": runs,
            "summary": {each: mean_score(runs, each) for each in done},
        }
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def names(runs: list[dict]) -> set[str]:
    """The variations that have been run."""
    return {run["variation"] for run in runs}


def mean_score(runs: list[dict], name: str) -> float:
    """Mean over the seeds of a variation's greedy mean."""
    scores = [run["greedy mean"] for run in runs if run["variation"] == name]
    return round(statistics.mean(scores), 1)


if __name__ == "__main__":
    main()
