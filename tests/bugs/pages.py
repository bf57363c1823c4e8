"""Writes the museum's pages and pictures, from catalogue and results."""

import json
import re
from collections.abc import Callable
from statistics import median

import numpy as np
import symptoms
from catalogue import BUGS, CHECKS, Bug
from matplotlib.figure import Figure
from museum import ME, results_of, runs_of, seen
from plant import FACTS, HERE, LESSONS, bugs_of, code_of, diff, trouble


def figure(runs: list, name: str, form: str, of: Callable = median) -> str:
    """The median of a figure over the seeds, or another number of it."""
    return format(round(of([run[name] for run in runs]), 6) + 0.0, form)  # never -0


def title(bug: Bug) -> str:
    """1.3 cartpole-softmax-twice: the third bug of lesson 1."""
    number = bugs_of(bug.lesson).index(bug) + 1
    return f"{LESSONS.index(bug.lesson) + 1}.{number} {bug.name}"


def short(bug: Bug) -> str:
    """A link to the section of a bug, with its name in the lesson."""
    anchor = title(bug).replace(".", "").replace(" ", "-")
    return f"[{bug.name.split('-', 1)[1]}](#{anchor})"


def table(*rows: tuple) -> str:
    """A table of Markdown with a head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def by_symptom(bugs: list[Bug]) -> str:
    """Which bugs show a symptom; for those that show none, which check finds them."""
    loud, quiet = [], []
    for key, (words, _) in symptoms.SYMPTOMS.items():
        found = [short(bug) for bug in bugs if key in seen(bug) and key != "hidden"]
        loud.append((words, ", ".join(found)))
    for number, check in enumerate(CHECKS, 1):
        found = [bug for bug in bugs if bug.check == check and "hidden" in seen(bug)]
        link = f"[{number}, {check}](README.md#how-to-debug)"
        quiet.append((link, ", ".join(map(short, found))))
    return (
        table(("What you see", "Bugs"), *filter(all, loud))
        + "\n\n**The curve shows nothing** of the following ones: they end as good as "
        "the healthy runs. What finds them is a check:\n\n"
        + table(("Check", "Bugs that it finds"), *filter(all, quiet))
    )


def hidden(bugs: list[Bug]) -> int:
    """How many of them the curve does not show."""
    return sum("hidden" in seen(bug) for bug in bugs)


def apart(bug: Bug) -> str:
    """The figures of which no run with the bug comes near a healthy one."""
    rows, both = [], runs_of(bug)
    for name, words, form, _ in FACTS[bug.lesson]["figures"]:
        here, there = ([run[name] for run in runs] for runs in both)
        wrong, right = (figure(runs, name, form) for runs in both)
        if wrong != right and (min(here) > max(there) or max(here) < min(there)):
            rows.append((words, f"**{wrong}**", right))
    return table(("", "with the bug", "healthy"), *rows[:5]) if rows else ""


def section(bug: Bug) -> str:
    """One bug: the lines, what was seen, what finds it, who met it."""
    number = CHECKS.index(bug.check) + 1
    settings = ", ".join(f"`{name} = {value}`" for name, value in bug.settings.items())
    caught = results_of(bug.lesson)["caught"].get(bug.name)
    test = f", `{caught[0].split('::')[-1]}`" if caught else ""
    parts = [
        f"### {title(bug)}",
        bug.why + (f" (Measured with {settings}.)" if settings else ""),
        "```diff\n" + (trouble(bug) or "\n".join(diff(bug))) + "\n```",
        f"![{bug.name}](pictures/{bug.name}.png)",
        f"**Seen:** {'; '.join(map(symptoms.words, seen(bug))) or 'nothing'}.",
        apart(bug),
        f"**Found by** check {number}, {bug.check}{test}. **Source:** {bug.source}.",
    ]
    return "\n\n".join(part for part in parts if part)


def not_as_reported(bugs: list[Bug]) -> str:
    """The bugs whose reported symptom did not show."""
    lines = ["## Reported, but not seen here\n"]
    for bug in bugs:
        if bug.reported and bug.reported not in seen(bug):
            said, *got = map(symptoms.words, [bug.reported, *seen(bug)])
            lines.append(f"* {short(bug)}: reported *{said}*. Here: {'; '.join(got)}.")
    return "\n".join(lines) if lines[1:] else ""


def draw(bug: Bug) -> None:
    """Write the curves of a bug, red, beside the healthy band, grey."""
    runs, healthy = runs_of(bug)
    figure = Figure(figsize=(3.4, 1.6), layout="constrained")
    axes = figure.subplots()
    grid = np.linspace(0, max(run["x"][-1] for run in healthy + runs), 60)
    band, lines = (
        np.array([np.interp(grid, run["x"], run["y"]) for run in part])
        for part in (healthy, runs)
    )
    axes.fill_between(grid, band.min(0), band.max(0), color="0.8")
    axes.plot(grid, lines.T, color="tab:red", linewidth=0.8)
    axes.tick_params(labelsize=7)
    path = HERE / "pictures" / f"{bug.name}.png"
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})


def measured(lesson: str) -> str:
    """When and with what a lesson was measured, and whether its code is the same."""
    results = results_of(lesson)
    groups = [*results["healthy"].values(), *results["bugs"].values()]
    runs = [run for group in groups for run in group]
    dates = [end(run["date"] for run in runs) for end in (min, max)]
    stale = sum(run["code"] != code_of(lesson) for run in runs)
    machine = ", ".join(f"{name} {what}" for name, what in results["machine"].items())
    changed = (
        f" {stale} of {len(runs)} runs were measured with other code: `{lesson}` has "
        "changed since. It still holds if your healthy run lies in its ranges. To "
        f"measure them again: `{ME} measure {LESSONS.index(lesson) + 1}`."
    )
    days = " to ".join(dict.fromkeys(dates))
    return f"Measured {days} ({machine}).{changed if stale else ''}"


def page(lesson: str) -> str:
    """The page of a lesson."""
    bugs = bugs_of(lesson)
    groups = results_of(lesson)["healthy"]
    healthy, figures = groups[""], []
    for name, words, form, where in FACTS[lesson]["figures"]:
        number = figure(healthy, name, form)
        ranges = []
        for group in groups.values():
            ends = [figure(group, name, form, of) for of in (min, max)]
            ranges.append(" to ".join(dict.fromkeys(ends)))
        figures.append((words, number, *ranges, where))
    settings = [f"`{name}`" for name in groups if name]
    parts = [
        f"# {FACTS[lesson]['title']}",
        f"[How to debug](README.md) · {len(bugs)} bugs in `{lesson}`, "
        f"{hidden(bugs)} of which the learning curve does not show. "
        + measured(lesson),
        "## What you see, and which bug it may be",
        "Take the row with the fewest bugs among those that you see, then strike every "
        "bug that is missing from your other rows; if none is left, keep those that "
        "miss one row. Then read their lines. That a lesson says *solved* or *perfect* "
        "is no check.",
        by_symptom(bugs),
        "## Healthy figures",
        f"Of three runs, seeds 0 to 2 ({FACTS[lesson]['about']}). In the pictures, "
        "grey is the range of the healthy runs, red the three with the bug. Untrained, "
        f"the agent scores {figure(healthy, 'start', '.1f')}.",
        table(("Figure", "Median", "Seeds", *settings, "Where"), *figures),
        "## The bugs",
        "Lines with - are those of the lesson, with + those of the bug. Only figures "
        "that no healthy run comes near are told, five at most.",
        *map(section, bugs),
        not_as_reported(bugs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def overview() -> str:
    """How many bugs each lesson has, and how many its curve does not show."""
    parts = {f"[{x['title']}]({x['page']})": bugs_of(key) for key, x in FACTS.items()}
    parts["all"] = BUGS
    rows = [(name, str(len(x)), str(hidden(x))) for name, x in parts.items()]
    return table(("Page", "Bugs", "Not in the curve"), *rows)


def mutations() -> str:
    """What the changes of single operators found."""
    results = json.loads((HERE / "results" / "mutations.json").read_text())
    rows = [
        (f"`{script}`", str(each["mutants"]), f"{each['killed'] / each['mutants']:.1%}")
        for script, each in results["scripts"].items()
    ]
    return table(("Script", "Changes", "Caught"), *rows)


def write() -> None:
    """Write all pages and pictures."""
    for lesson in LESSONS:
        (HERE / FACTS[lesson]["page"]).write_text(page(lesson))
    for bug in BUGS:
        draw(bug)
    first = HERE / "README.md"
    text = first.read_text()
    for name, made in {"bugs": overview(), "mutations": mutations()}.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        text = re.sub(f"(?s){start}.*{end}", f"{start}\n{made}\n{end}", text)
    first.write_text(text)
    print(f"Written: README.md, {len(LESSONS)} pages and {len(BUGS)} pictures.")
