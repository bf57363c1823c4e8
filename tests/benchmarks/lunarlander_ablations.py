"""What each detail of lunarlander_ppo.py is worth: the same training without it.

    taskset -c 0 python tests/benchmarks/lunarlander_ablations.py

The runs are shortened to 400,000 steps (one to 160,000), learning rate and all, and so
is the run that they are compared with. Prints a line for each run and writes
results/lunarlander_ablations.json beside this file, after 27 minutes on one core. Needs
tests/benchmarks/requirements.txt, as lunarlander.py does.
"""

import statistics

from common import run_parts
from lunarlander import PACKAGES, SCRIPTS, lesson, train
from torch import nn

SEEDS = range(3)
STEPS = 400_000

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
    "PyTorch's own initial weights": {"linear": lambda n, m, gain: nn.Linear(n, m)},
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


def ablations() -> dict:
    """Every variation with every seed."""
    runs, summary = [], {}
    for name, changes in VARIATIONS.items():
        for seed in SEEDS:
            figures, *_ = train(seed, **{"TOTAL_STEPS": STEPS, **changes})
            runs.append({"variation": name, **figures})
            print(f"{name:34}{seed:4}{figures['greedy mean']:9.1f}", flush=True)
        scores = [run["greedy mean"] for run in runs if run["variation"] == name]
        summary[name] = round(statistics.mean(scores), 1)
    return {"summary": summary, "runs": runs}


if __name__ == "__main__":
    run_parts(SCRIPTS, PACKAGES, {"ablations": ablations})
