"""What a bug looks like: figures of a run, and the symptoms that are read off them.

A symptom is a rule on the figures of one run beside those of the healthy runs, so that
no symptom on the pages is hearsay. A bug shows it if most of its seeds do.
"""

import math
import statistics
from collections.abc import Callable

Run = dict  # the figures of one run, see runs.py


def middle(runs: list[Run], name: str) -> float:
    """The median of a figure over the seeds (NaN if a run did not get so far)."""
    values = [run[name] for run in runs if name in run]
    return statistics.median(values) if values else math.nan


def level(value: float, healthy: list[Run]) -> float:
    """A training score on a scale from 0, a healthy start, to 1, a healthy end."""
    first, last = middle(healthy, "start"), middle(healthy, "end")
    return (value - first) / (last - first)


def falls(run: Run, healthy: list[Run]) -> bool:
    starts = [each["start"] for each in healthy]
    return run["end"] < min(starts) - (max(starts) - min(starts))


def flat(run: Run, healthy: list[Run]) -> bool:
    constant = max(run["y"]) == min(run["y"])
    return constant or level(run["best"], healthy) < 0.2 and not falls(run, healthy)


def falls_back(run: Run, healthy: list[Run]) -> bool:
    best, last = level(run["best"], healthy), level(run["end"], healthy)
    return best > 0.25 and last < best - 0.25


def good(run: Run, healthy: list[Run]) -> bool:
    """No worse than the worst healthy run, but for 3 % of what there is to learn."""
    worst = min(level(each["end"], healthy) for each in healthy)
    return level(run["end"], healthy) >= worst - 0.03


def below(run: Run, healthy: list[Run]) -> bool:
    return not any(rule(run, healthy) for rule in (flat, falls, falls_back, good))


def hidden(run: Run, healthy: list[Run]) -> bool:
    latest = max(each["budget used"] for each in healthy)
    in_time = run["budget used"] <= 1.5 * latest
    return in_time and good(run, healthy) and not run.get("lines lost")


def gain(run: Run, healthy: list[Run]) -> float:
    """How much better it is evaluated than trained, if healthy runs have 0."""
    usual = middle(healthy, "greedy") - middle(healthy, "end")
    evaluated = run.get("greedy", run["end"] + usual) - usual
    return level(evaluated, healthy) - level(run["end"], healthy)


def later(run: Run, healthy: list[Run]) -> bool:
    """Is half of what there is to learn reached later than in the healthy runs?"""
    places = []
    for each in [run, *healthy]:
        points = zip(each["x"], each["y"], strict=True)
        half = [x for x, y in points if level(y, healthy) > 0.5]
        places.append(min(half, default=math.inf))
    return 1.3 * max(places[1:]) < places[0] < math.inf


def entropy_gone(run: Run, healthy: list[Run]) -> bool:
    early = run["entropy early"] < 0.4 * middle(healthy, "entropy early")
    return early or run["entropy"] < 0.2 * middle(healthy, "entropy")


def entropy_slow(run: Run, healthy: list[Run]) -> bool:
    return run["entropy early"] > 1.15 * max(each["entropy early"] for each in healthy)


def entropy_stays(run: Run, healthy: list[Run]) -> bool:
    first, last = middle(healthy, "entropy first"), middle(healthy, "entropy")
    return run["entropy"] > last + 0.75 * abs(first - last)


def clipped_much(run: Run, healthy: list[Run]) -> bool:
    usual = middle(healthy, "clipped")
    return run.get("clipped", 0) > max(1.5 * usual, usual + 0.03)


def loss_away(run: Run, healthy: list[Run]) -> bool:
    usual = max(abs(each.get("loss", 0)) for each in healthy)
    return abs(run.get("loss", 0)) > 2 * usual > 0


def one_seat(run: Run, healthy: list[Run]) -> bool:
    seats = [seat for seat in ("wins 1st", "wins 2nd") if seat in run]
    gaps = [middle(healthy, seat) - run[seat] for seat in seats]
    return bool(gaps) and max(gaps) > 2 and max(gaps) > 3 * min(gaps)


def loss_not_0(run: Run, healthy: list[Run]) -> bool:
    first = abs(run.get("first loss", 0.0))
    return not first < 0.01 and abs(middle(healthy, "first loss")) < 0.01


def never_ends(run: Run, healthy: list[Run]) -> bool:
    return run.get("cut off", 0) > middle(healthy, "cut off") + 0.25


def outside(name: str, low: float = -math.inf, high: float = math.inf) -> Callable:
    """Is a figure below `low` or above `high` times the healthy median?"""

    def rule(run: Run, healthy: list[Run]) -> bool:
        usual = middle(healthy, name)
        return usual > 0 and name in run and not low <= run[name] / usual <= high

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
    "bad in evaluation": (
        "Evaluated, it scores far worse than in training",
        lambda *runs: gain(*runs) < -0.25,
    ),
    "better in evaluation": (
        "Evaluated, it scores far better than in training",
        lambda *runs: gain(*runs) > 0.25,
    ),
    "entropy 0": ("Entropy falls far too soon, or to almost nothing", entropy_gone),
    "entropy high": (
        "Entropy is far too high from the first step",
        outside("entropy first", high=1.5),
    ),
    "entropy slow": ("Entropy falls more slowly than usual", entropy_slow),
    "entropy stays": ("Entropy ends far above the usual", entropy_stays),
    "ratio 1": (
        "The ratio never leaves 1: nothing is ever clipped",
        outside("clipped", low=1e-9),
    ),
    "clipped": ("Far more is clipped than usual", clipped_much),
    "KL 0": ("KL is 0 for ever", outside("KL", low=1e-9)),
    "KL large": ("KL is more than twice as large as usual", outside("KL", high=2)),
    "critic blind": (
        "Explained variance near 0, or below",
        lambda run, _: run.get("explained", 1) < 0.3,
    ),
    "loss": ("The actor's loss stays far from 0", loss_away),
    "loses lines": (
        "It wins, but some lines of play are lost",
        lambda run, _: run.get("lines lost", 0) > 0,
    ),
    "one seat": ("It plays worse from one seat only", one_seat),
    "never ends": ("Responses do not learn to end", never_ends),
    "shorter": ("Episodes are shorter than usual", outside("length", low=0.8)),
    "first loss": ("The loss of the first step is not 0", loss_not_0),
    "gradient": (
        "The first gradient is much longer or shorter",
        outside("first gradient", low=0.6, high=1.67),
    ),
}


def words(key: str) -> str:
    """A symptom as a part of a sentence; what is no key is said as it stands."""
    text = SYMPTOMS[key][0] if key in SYMPTOMS else key
    return text if text.startswith(("KL", "NaN")) else text[0].lower() + text[1:]


def shown(runs: list[Run], healthy: list[Run]) -> list[str]:
    """The symptoms that more than half of the runs show."""
    found = []
    for name, (_, rule) in SYMPTOMS.items():
        if 2 * sum(rule(run, healthy) for run in runs) > len(runs):
            found.append(name)
    levels = [level(run["end"], healthy) for run in runs]
    if max(levels) > 0.85 and min(levels) < 0.5:
        found.append("seeds differ")
    # What is learned clearly later can be seen in the curve, whatever its end.
    return [name for name in found if name != "hidden" or "later" not in found]
