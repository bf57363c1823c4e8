"""What a bug looks like: figures of a run, and the symptoms that are read off them.

A symptom is a rule on the figures of one run beside those of the healthy runs, so that
no symptom on the page is hearsay. A bug shows it if most of its seeds do.
"""

import math
import statistics
from collections.abc import Callable

Run = dict[str, float | list]  # the figures of one run, see museum.py


def middle(runs: list[Run], name: str) -> float:
    """The median of a figure over the seeds (NaN if a run did not get so far)."""
    values = [run[name] for run in runs if name in run]
    return statistics.median(values) if values else math.nan


def level(value: float, healthy: list[Run]) -> float:
    """A training score on a scale from 0, a healthy start, to 1, a healthy end."""
    first, last = middle(healthy, "start"), middle(healthy, "end")
    return (value - first) / (last - first)


# Each rule gets the run and the healthy runs beside it.
Rule = Callable[[Run, list[Run]], bool]


def falls(run: Run, healthy: list[Run]) -> bool:
    starts = [each["start"] for each in healthy]
    return run["end"] < min(starts) - (max(starts) - min(starts))


def flat(run: Run, healthy: list[Run]) -> bool:
    constant = max(run["y"]) == min(run["y"])
    return constant or level(run["best"], healthy) < 0.2 and not falls(run, healthy)


def rises_and_falls_back(run: Run, healthy: list[Run]) -> bool:
    best, last = level(run["best"], healthy), level(run["end"], healthy)
    return best > 0.25 and last < best - 0.25


def below(run: Run, healthy: list[Run]) -> bool:
    if flat(run, healthy) or falls(run, healthy) or rises_and_falls_back(run, healthy):
        return False
    return not good(run, healthy)


def good(run: Run, healthy: list[Run]) -> bool:
    """No worse than the worst healthy run, but for 3 % of what there is to learn."""
    worst = min(each["end"] for each in healthy)
    scale = abs(middle(healthy, "end") - middle(healthy, "start"))
    return run["end"] >= worst - 0.03 * scale


def slow(run: Run, healthy: list[Run]) -> bool:
    usual = max(each["budget used"] for each in healthy)
    return good(run, healthy) and run["budget used"] > 1.5 * usual


def hidden(run: Run, healthy: list[Run]) -> bool:
    solved = good(run, healthy) and run.get("lines lost", 0) == 0
    return solved and not slow(run, healthy)


def bad_in_evaluation(run: Run, healthy: list[Run]) -> bool:
    if "greedy" not in run:
        return False
    scale = middle(healthy, "end") - middle(healthy, "start")
    usual = middle(healthy, "greedy") - middle(healthy, "end")
    return (run["greedy"] - run["end"] - usual) / scale < -0.25


def better_in_evaluation(run: Run, healthy: list[Run]) -> bool:
    if "greedy" not in run:
        return False
    scale = middle(healthy, "end") - middle(healthy, "start")
    usual = middle(healthy, "greedy") - middle(healthy, "end")
    return (run["greedy"] - run["end"] - usual) / scale > 0.25


def report_is_wrong(run: Run, healthy: list[Run]) -> bool:
    if "printed score" not in run or "greedy" not in run:
        return False
    scale = abs(middle(healthy, "end") - middle(healthy, "start"))
    return abs(run["printed score"] - run["greedy"]) > 0.05 * scale


def learned_nothing(run: Run) -> bool:
    """All steps were skipped: there is no figure of a step."""
    return run.get("steps skipped", 0) == 1


def entropy_gone(run: Run, healthy: list[Run]) -> bool:
    early = run["entropy early"] < 0.4 * middle(healthy, "entropy early")
    late = run["entropy"] < 0.2 * middle(healthy, "entropy")
    return (early or late) and not learned_nothing(run)


def entropy_high(run: Run, healthy: list[Run]) -> bool:
    return run["entropy first"] > 1.5 * middle(healthy, "entropy first")


def halfway(run: Run, healthy: list[Run]) -> float:
    """Where on its axis a run has half of what there is to learn; infinite: never."""
    points = zip(run["x"], run["y"], strict=True)
    return min((x for x, y in points if level(y, healthy) > 0.5), default=math.inf)


def later(run: Run, healthy: list[Run]) -> bool:
    latest = max(halfway(each, healthy) for each in healthy)
    return 1.3 * latest < halfway(run, healthy) < math.inf


def entropy_slow(run: Run, healthy: list[Run]) -> bool:
    return run["entropy early"] > 1.15 * max(each["entropy early"] for each in healthy)


def entropy_stays(run: Run, healthy: list[Run]) -> bool:
    first, last = middle(healthy, "entropy first"), middle(healthy, "entropy")
    return run["entropy"] > last + 0.75 * abs(first - last)


def nothing_moves(run: Run, healthy: list[Run]) -> bool:
    return run["weights moved"] < 0.5 * middle(healthy, "weights moved")


def ratio_1(run: Run, healthy: list[Run]) -> bool:
    return run.get("clipped", 1) == 0 and middle(healthy, "clipped") > 0


def clipped_much(run: Run, healthy: list[Run]) -> bool:
    usual = middle(healthy, "clipped")
    return run.get("clipped", 0) > max(1.5 * usual, usual + 0.03)


def critic_blind(run: Run, healthy: list[Run]) -> bool:
    return run.get("explained", 1) < 0.3


def loss_away(run: Run, healthy: list[Run]) -> bool:
    usual = max(abs(each.get("loss", 0)) for each in healthy)
    return abs(run.get("loss", 0)) > 2 * usual > 0


def critic_worse(run: Run, healthy: list[Run]) -> bool:
    usual = middle(healthy, "critic error")
    return run.get("critic error", 0) > 1.5 * usual


def kl_0(run: Run, healthy: list[Run]) -> bool:
    return run.get("KL", 1) == 0 and middle(healthy, "KL") > 0


def kl_large(run: Run, healthy: list[Run]) -> bool:
    return run.get("KL", 0) > 2 * middle(healthy, "KL") > 0


def loses_lines(run: Run, healthy: list[Run]) -> bool:
    return run.get("lines lost", 0) > 0


def one_seat(run: Run, healthy: list[Run]) -> bool:
    if "wins 1st" not in run:
        return False
    gaps = [middle(healthy, name) - run[name] for name in ("wins 1st", "wins 2nd")]
    return max(gaps) > 2 and max(gaps) > 3 * min(gaps)


def illegal(run: Run, healthy: list[Run]) -> bool:
    return run.get("illegal moves", 0) > 0


def never_ends(run: Run, healthy: list[Run]) -> bool:
    return run.get("cut off", 0) > middle(healthy, "cut off") + 0.25


def shorter(run: Run, healthy: list[Run]) -> bool:
    return run.get("length", math.inf) < 0.8 * middle(healthy, "length")


def skipped(run: Run, healthy: list[Run]) -> bool:
    return run.get("steps skipped", 0) > 0.5


def loss_not_0(run: Run, healthy: list[Run]) -> bool:
    first = abs(run.get("first loss", 0.0))
    return not first < 0.01 and abs(middle(healthy, "first loss")) < 0.01


def gradient_other(run: Run, healthy: list[Run]) -> bool:
    usual = middle(healthy, "first gradient")
    if learned_nothing(run):
        return False
    return usual > 0 and not 0.6 < run.get("first gradient", usual) / usual < 1.67


def not_a_number(run: Run, healthy: list[Run]) -> bool:
    return "not a finite" in run.get("ended by", "") or math.isnan(run["end"])


def never(run: Run, healthy: list[Run]) -> bool:
    return False  # no single run shows this: see `shown`


# In the order of the page: what one sees first comes first.
SYMPTOMS: dict[str, tuple[str, Rule]] = {
    "falls": ("The score falls below that of an untrained agent", falls),
    "flat": ("The score stays where it was", flat),
    "rises and falls back": ("The score rises and falls back", rises_and_falls_back),
    "below": ("The score rises, but not to where it should", below),
    "later": ("It learns, but clearly later", later),
    "slow": ("It gets there, but takes half as long again or more", slow),
    "hidden": ("The curve shows nothing: as good as the healthy runs", hidden),
    "seeds differ": ("Some seeds work, others do not", never),
    "bad in evaluation": (
        "Evaluated, it scores far worse than in training",
        bad_in_evaluation,
    ),
    "better in evaluation": (
        "Evaluated, it scores far better than in training",
        better_in_evaluation,
    ),
    "report wrong": ("The printed final score is not the real one", report_is_wrong),
    "entropy 0": ("Entropy falls far too soon, or to almost nothing", entropy_gone),
    "entropy high": ("Entropy is far too high from the first step", entropy_high),
    "entropy slow": ("Entropy falls more slowly than usual", entropy_slow),
    "entropy stays": ("Entropy ends far above the usual", entropy_stays),
    "nothing moves": ("Few weights move, or none", nothing_moves),
    "ratio 1": (
        "The ratio never leaves 1: nothing is ever clipped (GRPO: INNER_STEPS above 1)",
        ratio_1,
    ),
    "clipped": ("Far more is clipped than usual", clipped_much),
    "KL 0": ("KL is 0 for ever (GRPO: with KL_COEF above 0)", kl_0),
    "KL large": ("KL is more than twice as large as usual", kl_large),
    "critic blind": ("Explained variance near 0, or below", critic_blind),
    "loss": ("The actor's loss stays far from 0", loss_away),
    "critic worse": ("The critic's error is larger than usual", critic_worse),
    "loses lines": ("It wins, but some lines of play are lost", loses_lines),
    "one seat": ("It plays worse from one seat only", one_seat),
    "illegal": ("Illegal moves are made", illegal),
    "never ends": ("Responses do not learn to end", never_ends),
    "shorter": ("Episodes or responses are shorter than usual", shorter),
    "skipped": ("Most steps are skipped: all rewards are equal", skipped),
    "first loss": ("The loss of the first step is not 0", loss_not_0),
    "gradient": ("The first gradient is much longer or shorter", gradient_other),
    "NaN": ("NaN", not_a_number),
}


def words(key: str) -> str:
    """A symptom as a part of a sentence."""
    text = SYMPTOMS[key][0]
    return text if text.startswith(("KL", "NaN")) else text[0].lower() + text[1:]


def shown(runs: list[Run], healthy: list[Run]) -> list[str]:
    """The symptoms that more than half of the runs show."""
    levels = [level(run["end"], healthy) for run in runs]
    differ = max(levels) > 0.85 and min(levels) < 0.5
    found = [
        name
        for name, (_, rule) in SYMPTOMS.items()
        if 2 * sum(rule(run, healthy) for run in runs) > len(runs)
        or (name == "seeds differ" and differ)
    ]
    # What is learned clearly later can be seen in the curve, whatever its end.
    return [name for name in found if name != "hidden" or "later" not in found]
