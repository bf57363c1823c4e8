"""What a bug looks like: figures of a run, and the symptoms that are read off them.

A symptom is a rule on the figures of one run, as runs.py has them, beside those of the
healthy runs, so that no symptom on the pages is hearsay. A bug shows it if most of its
seeds do.
"""

import math
import statistics
from collections.abc import Callable


def middle(runs: list[dict], name: str) -> float:
    """The median of a figure over the seeds."""
    return statistics.median(run[name] for run in runs)


def level(value: float, healthy: list[dict]) -> float:
    """A training score on a scale from 0, a healthy start, to 1, a healthy end."""
    first, last = middle(healthy, "start"), middle(healthy, "end")
    return (value - first) / (last - first)


def falls(run: dict, healthy: list[dict]) -> bool:
    starts = [each["start"] for each in healthy]
    return run["end"] < min(starts) - (max(starts) - min(starts))


def flat(run: dict, healthy: list[dict]) -> bool:
    return level(run["best"], healthy) < 0.2 and not falls(run, healthy)


def falls_back(run: dict, healthy: list[dict]) -> bool:
    best, last = level(run["best"], healthy), level(run["end"], healthy)
    return best > 0.25 and last < best - 0.25


def good(run: dict, healthy: list[dict]) -> bool:
    """No worse than the worst healthy run, but for 3 % of what there is to learn."""
    worst = min(level(each["end"], healthy) for each in healthy)
    return level(run["end"], healthy) >= worst - 0.03


def below(run: dict, healthy: list[dict]) -> bool:
    return not any(rule(run, healthy) for rule in (flat, falls, falls_back, good))


def later(run: dict, healthy: list[dict]) -> bool:
    """Is half of what there is to learn reached later than in the healthy runs?"""
    places = []
    for each in [run, *healthy]:
        points = zip(each["x"], each["y"], strict=True)
        half = [x for x, y in points if level(y, healthy) > 0.5]
        places.append(min(half, default=math.inf))
    return 1.3 * max(places[1:]) < places[0] < math.inf


def hidden(run: dict, healthy: list[dict]) -> bool:
    in_time = good(run, healthy) and not later(run, healthy)
    return in_time and not run.get("lines lost")


def gain(run: dict, healthy: list[dict]) -> float:
    """How much better it is evaluated than trained, if healthy runs have 0."""
    usual = middle(healthy, "greedy") - middle(healthy, "end")
    return level(run["greedy"] - usual, healthy) - level(run["end"], healthy)


def entropy_stays(run: dict, healthy: list[dict]) -> bool:
    first, last = middle(healthy, "entropy first"), middle(healthy, "entropy")
    return run["entropy"] > last + 0.75 * abs(first - last)


def one_seat(run: dict, healthy: list[dict]) -> bool:
    seats = [seat for seat in ("wins 1st", "wins 2nd") if seat in run]
    gaps = [middle(healthy, seat) - run[seat] for seat in seats]
    return bool(gaps) and max(gaps) > 2 and max(gaps) > 3 * min(gaps)


def critic_blind(run: dict, _: list[dict]) -> bool:
    return run.get("explained", 1) < 0.3


def far(name: str, low: float = 0.0, high: float = 1e9) -> Callable:
    """Is a figure, without its sign, that far from those of all healthy runs?"""

    def rule(run: dict, healthy: list[dict]) -> bool:
        usual = [abs(each[name]) for each in healthy if name in each]
        if name not in run or not usual:
            return False
        return not low * min(usual) <= abs(run[name]) <= high * max(usual)

    return rule


# In the order of the pages: what one sees first comes first.
SYMPTOMS: dict[str, tuple[str, Callable]] = {
    "falls": ("The score falls below that of an untrained agent", falls),
    "flat": ("The score stays where it was", flat),
    "rises and falls back": ("The score rises and falls back", falls_back),
    "below": ("The score rises, but not to where it should", below),
    "later": ("It learns, but clearly later", later),
    "hidden": ("The curve shows nothing: as good as the healthy runs", hidden),
    "seeds differ": ("Some seeds work, others do not", lambda *_: False),
    "bad": (
        "Evaluated, it scores far worse than in training",
        lambda *runs: gain(*runs) < -0.25,
    ),
    "better": (
        "Evaluated, it scores far better than in training",
        lambda *runs: gain(*runs) > 0.25,
    ),
    "entropy 0": ("Entropy falls far too soon", far("entropy early", 0.5)),
    "entropy high": (
        "Entropy is far too high from the first step: 1.5 times the usual, or more",
        far("entropy first", 0, 1.5),
    ),
    "entropy slow": (
        "Entropy falls more slowly than usual",
        far("entropy early", 0, 1.15),
    ),
    "entropy stays": ("Entropy ends far above the usual", entropy_stays),
    "ratio 1": (
        "The ratio never leaves 1: nothing is ever clipped",
        far("clipped", 1e-9),
    ),
    "clipped": ("Far more is clipped than usual", far("clipped", 0, 1.5)),
    "KL 0": ("KL is 0 for ever", far("KL", 1e-9)),
    "KL large": ("KL is more than twice as large as usual", far("KL", 0, 2)),
    "critic blind": ("Explained variance near 0, or below", critic_blind),
    "loss": ("The actor's loss stays far from 0", far("loss", 0, 2)),
    "loses lines": (
        "It wins, but some lines of play are lost",
        far("lines lost", 0, 1),
    ),
    "one seat": ("It plays worse from one seat only", one_seat),
    "never ends": (
        "Responses do not learn to end: 2.5 times as many as usual are cut off",
        far("cut off", 0, 2.5),
    ),
    "shorter": ("Episodes are shorter than usual", far("length", 0.8)),
    "first loss": ("The loss of the first step is not 0", far("first loss", 0, 2)),
    "gradient": (
        "The first gradient is much longer or shorter",
        far("first gradient", 0.6, 1.67),
    ),
}


def words(key: str) -> str:
    """A symptom as a part of a sentence; what is no key is said as it stands."""
    text = SYMPTOMS[key][0] if key in SYMPTOMS else key
    return text if text.startswith(("KL", "NaN")) else text[0].lower() + text[1:]


def shown(runs: list[dict], healthy: list[dict]) -> list[str]:
    """The symptoms that more than half of the runs show."""
    found = []
    for name, (_, rule) in SYMPTOMS.items():
        if 2 * sum(rule(run, healthy) for run in runs) > len(runs):
            found.append(name)
    levels = [level(run["end"], healthy) for run in runs]
    if max(levels) > 0.85 and min(levels) < 0.5:
        found.append("seeds differ")
    return found
