"""Writes README.md, the museum's page, and its pictures, from catalogue and results."""

import json
import statistics
from pathlib import Path

import museum
import numpy as np
import symptoms
from catalogue import BUGS, CARTPOLE, GRPO, LANDER, TICTACTOE
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
MUTATIONS = HERE / "results" / "mutations.json"

LESSONS = {
    CARTPOLE: "Lesson 1: REINFORCE",
    TICTACTOE: "Lesson 2: actor-critic and self-play",
    LANDER: "Lesson 3: PPO",
    GRPO: "Lesson 4: GRPO",
}
SHORT_TITLES = dict(
    zip(LESSONS, ("REINFORCE", "Self-play", "PPO", "GRPO"), strict=True)
)
# The columns of a lesson's table: figure, heading, format.
COLUMNS = {
    CARTPOLE: [
        ("end", "last 100", ".0f"),
        ("best", "best", ".0f"),
        ("budget used", "episodes", ".0f"),
        ("entropy early", "entropy early", ".2f"),
        ("entropy", "entropy at the end", ".2f"),
        ("greedy", "greedy score", ".0f"),
        ("sampled", "sampled score", ".0f"),
    ],
    TICTACTOE: [
        ("wins 1st", "wins 1st, %", ".1f"),
        ("wins 2nd", "wins 2nd, %", ".1f"),
        ("lines lost", "lines lost", ".0f"),
        ("entropy early", "entropy early", ".2f"),
        ("entropy", "entropy at the end", ".2f"),
        ("loss", "loss", ".2f"),
        ("critic error", "critic's squared error", ".2f"),
        ("illegal moves", "illegal moves", ".1%"),
    ],
    LANDER: [
        ("end", "return", ".0f"),
        ("greedy", "greedy score", ".0f"),
        ("length", "length", ".0f"),
        ("KL", "KL", ".4f"),
        ("clipped", "clipped", ".0%"),
        ("entropy early", "entropy early", ".2f"),
        ("entropy", "entropy at the end", ".2f"),
        ("explained", "explained", ".2f"),
    ],
    GRPO: [
        ("end", "reward", ".2f"),
        ("greedy", "fresh reward", ".2f"),
        ("first gradient", "first gradient", ".2f"),
        ("KL", "KL", ".3f"),
        ("clipped", "clipped, most", ".1%"),
        ("entropy", "entropy at the end", ".2f"),
        ("length", "length", ".0f"),
        ("cut off", "cut off", ".0%"),
        ("weights moved", "weights moved", ".0%"),
    ],
}

HEAD = """\
# The museum of bugs: how to debug an agent

Code that runs, a curve that rises a little, and one wrong line. Below are {count} such
lines, planted one at a time in the four lessons and trained with three seeds each,
beside healthy runs: what each looks like, and what would have caught it. **{hidden} of
them cannot be seen in the learning curve**: a curve that rises proves little. No
symptom here is hearsay: each is a rule on measured figures
([`symptoms.py`](symptoms.py)), and where a reported symptom did not show, the page says
so.

```bash
python tests/bugs/museum.py                # lists the bugs
python tests/bugs/museum.py cartpole-sign  # trains with one, beside a healthy run
python tests/bugs/museum.py exercise       # writes a lesson with a bug drawn at random
python tests/bugs/museum.py solution       # shows which one it was
```

## How to debug

Nothing crashes, so look for what *must* hold, the cheapest first. Each of these is a
line of code in your own agent:

1. **Data.** Print one batch. Do observation, action and reward of one row belong
   together? Is every step of an episode there once, and none after its end? Collect
   with a policy that plays a fixed pattern, and read the rows.
2. **Entropy** starts near its maximum, ln(number of legal actions), and falls slowly.
   At 0 at once: learning rate, normalisation, a wrong sign. At its maximum for ever: no
   gradient arrives, or the actions in the loss are not those that were taken.
3. **The ratio is exactly 1** in the first gradient step from a batch (PPO, GRPO) and
   not 1 in the later ones. GRPO's first loss is 0.
4. **Gradients.** After one `backward()`, every weight of each network has one, and no
   other network. The optimizer changes them all.
5. **Sign.** One gradient step on one action with advantage +1 makes exactly that action
   likelier; with -1, rarer.
6. **Padding.** Write nonsense into everything that is masked: no loss may change, none
   may become NaN.
7. **By hand.** Each equation on two or three numbers, and once more as a slow double
   loop without tensors; ends of episodes everywhere.
8. **One batch.** A batch split into parts leaves the gradient of the whole. The same
   seed leaves the same weights.
9. **A task that must work.** One step, two actions; then the real one, *three seeds*,
   beside a run of code that is known to be right.
10. **Evaluate twice,** greedy and sampled, in another process, from the saved file.
    Compare with the training score, and with a random policy.

Only then look at curves, and change one thing at a time.

## What you see, and which bug it may be

A bug is listed where more than half of its seeds show the symptom, compared with the
healthy runs of the same lesson. Take the row with the fewest bugs among those that you
see, then strike every bug that is missing from your other rows; if none is left, keep
those that miss one row. Compare the rest with the lesson's table, then read their lines
(comments are those of the right code). Not all is printed by a lesson: the error of the
critic, illegal moves and the share of weights that moved were measured beside it; in
your own agent, print them. That a lesson says "solved" or "perfect" is no check.

"""

AXES = {
    CARTPOLE: "score of an episode over episodes",
    TICTACTOE: "wins against random play (%, mean of both seats) over updates",
    LANDER: "return over steps",
    GRPO: "mean reward of a group over steps",
}
SETTINGS = {
    CARTPOLE: "at most 1,600 episodes",
    TICTACTOE: "400 updates",
    LANDER: "300,000 steps",
    GRPO: "the bundled models, 50 steps",
}


# How to find a table's figures in what is printed.
NOTES = {
    CARTPOLE: "*Best* is the best of 50 equal parts of the run. The scores, greedy and "
    "sampled, are of 100 held-out episodes.",
    TICTACTOE: "*Wins* and *lines lost* are those at the end, *loss* the median of the "
    "printed lines. The critic's error and illegal moves are not printed.",
    LANDER: "*Return* and *length* are those of the last printed line, *KL* and "
    "*clipped* medians over the first half of the lines (later both fall to 0, healthy "
    "or not), *explained* the median of all lines.",
    GRPO: "*Reward* is the mean of the last 5 steps, *KL* that of all, *clipped* the "
    "largest of all; *fresh reward*, *length* and *cut off* are of 64 new responses.",
}


def spread(runs: list, name: str, form: str) -> str:
    """The median of a figure over the seeds, with the range if there is one."""
    values = [round(x[name], 6) + 0.0 for x in runs if x.get(name) is not None]
    if not values:
        return "-"
    middle, *ends = (
        format(x, form) for x in (statistics.median(values), min(values), max(values))
    )
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"


def untrained(results: dict, lesson: str) -> str:
    """The training score at the start of the healthy runs: the picture's axis."""
    return spread(results["healthy"][lesson], "start", ".1f")


def link(name: str) -> str:
    """A link to the section of a bug."""
    return f"[{name}](#{name})"


def one_seed(results: dict, bug: dict) -> str:
    """What only some runs with a bug show, in brackets."""
    healthy = results["healthy"][museum.group_of(bug)]
    runs = results["bugs"][bug["name"]]
    keys = {key for run in runs for key in symptoms.shown([run], healthy)}
    some = [key for key in symptoms.SYMPTOMS if key in keys - {"hidden"}]
    some = [key for key in some if key not in museum.seen(results, bug)]
    return f" (in some runs {'; '.join(map(symptoms.words, some))})" if some else ""


def index(results: dict) -> str:
    """The table from symptoms to bugs."""
    rows = ["| What you see | Bugs |", "|---|---|"]
    for key, (words, _) in symptoms.SYMPTOMS.items():
        groups = []
        for lesson, short in SHORT_TITLES.items():
            found = [
                f"[{bug['name'].split('-', 1)[1]}](#{bug['name']})"
                + (one_seed(results, bug) if key == "seeds differ" else "")
                for bug in BUGS
                if museum.lesson_of(bug) == lesson and key in museum.seen(results, bug)
            ]
            groups += [f"**{short}:** {', '.join(found)}"] if found else []
        if groups:
            rows.append(f"| {words} | {'<br>'.join(groups)} |")
    return "\n".join(rows)


def not_as_reported(results: dict) -> str:
    """The bugs whose reported symptom did not show."""
    lines = []
    for bug in BUGS:
        keys = museum.seen(results, bug)
        if bug["reported"] and bug["reported"] not in keys:
            said = symptoms.words(bug["reported"])
            got = "; ".join(map(symptoms.words, keys))
            lines.append(f"* {link(bug['name'])}: reported *{said}*. Here: {got}.")
    return "\n".join(lines)


def table(results: dict, lesson: str) -> str:
    """All bugs of a lesson and their healthy runs, figure by figure."""
    columns = COLUMNS[lesson]
    rows = [
        f"| | {' | '.join(heading for _, heading, _ in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    groups = {}
    for bug in BUGS:
        if museum.lesson_of(bug) == lesson:
            groups.setdefault(museum.group_of(bug), []).append(bug)
    for group, bugs in groups.items():
        healthy = results["healthy"][group]
        label = group.replace(lesson, "").strip(" ()")
        label = f"**healthy**, `{label}`" if label else "**healthy**"
        for name, runs in [
            (label, healthy),
            *((link(bug["name"]), results["bugs"][bug["name"]]) for bug in bugs),
        ]:
            cells = [spread(runs, figure, form) for figure, _, form in columns]
            rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def apart(results: dict, bug: dict) -> str:
    """The figures of which no run with the bug comes near a healthy one."""
    healthy = results["healthy"][museum.group_of(bug)]
    runs, found = results["bugs"][bug["name"]], []
    for figure, heading, form in COLUMNS[museum.lesson_of(bug)]:
        here = [run[figure] for run in runs if run.get(figure) is not None]
        there = [run[figure] for run in healthy]
        if here and (min(here) > max(there) or max(here) < min(there)):
            values = [spread(each, figure, form) for each in (runs, healthy)]
            if values[0] != values[1]:
                found.append(f"{heading} {values[0]}, healthy {values[1]}")
    return "; ".join(found) or "no figure is out of the range of the healthy runs"


def section(results: dict, bug: dict) -> str:
    """One bug: the lines, what was seen, what catches it."""
    keys = museum.seen(results, bug)
    runs = results["bugs"][bug["name"]]
    words = "; ".join(map(symptoms.words, keys)) or "nothing"
    ended = {run["ended by"] for run in runs if "not a finite" in run["ended by"]}
    lines = [line.rstrip() for line in museum.diff(bug)[2:]]
    lines = [line for line in lines if line and not line.startswith("@@")]
    settings = ", ".join(f"`{k} = {v}`" for k, v in bug.get("settings", {}).items())
    parts = [
        f"#### {bug['name']}",
        bug["why"] + (f" (Measured with {settings}.)" if settings else ""),
        "```diff\n" + "\n".join(lines) + "\n```",
        f"**Seen:** {words}."
        + (f" The program stops: *{ended.pop()}*" if ended else ""),
        f"**Measured:** {apart(results, bug)}.",
        f"**Caught by** `{bug['test']}`. **Source:** {bug['source']}.",
    ]
    return "\n\n".join(parts)


def draw(results: dict, lesson: str) -> str:
    """Write the curves of a lesson's bugs beside the healthy band; give the name."""
    bugs = [bug for bug in BUGS if museum.lesson_of(bug) == lesson]
    rows = -(-len(bugs) // 4)
    figure = Figure(figsize=(11, 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, sharex=True, sharey=True).flatten()
    for axis, bug in zip(axes, bugs, strict=False):
        healthy = results["healthy"][museum.group_of(bug)]
        runs = results["bugs"][bug["name"]]
        grid = np.linspace(0, max(run["x"][-1] for run in healthy + runs), 60)

        def on_grid(runs, grid=grid):
            return np.array([np.interp(grid, run["x"], run["y"]) for run in runs])

        band, lines = on_grid(healthy), on_grid(runs)
        axis.fill_between(grid, band.min(0), band.max(0), color="0.8")
        axis.plot(grid, lines.T, color="tab:red", linewidth=0.8)
        name = bug["name"].split("-", 1)[1]
        axis.set_title(name.replace("-", " "), fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes[len(bugs) :]:
        axis.axis("off")
    path = HERE / f"{Path(lesson).stem}.png"
    figure.savefig(path, dpi=90)
    return path.name


def mutations() -> str:
    """What a tool that changes the equations found."""
    if not MUTATIONS.exists():
        return ""
    kept = json.loads(MUTATIONS.read_text())
    rows = ["| Script | mutants | killed |", "|---|---|---|"]
    for script, facts in kept["scripts"].items():
        share = facts["killed"] / facts["mutants"]
        rows.append(f"| {script} | {facts['mutants']} | {share:.1%} |")
    total = sum(facts["mutants"] for facts in kept["scripts"].values())
    killed = sum(facts["killed"] for facts in kept["scripts"].values())
    rows.append(f"| all | {total} | {killed / total:.1%} |")
    survivors = [
        f"* `{script}`, `{each['function']}`: {each['change']}. {each['because']}"
        for script, facts in kept["scripts"].items()
        for each in facts["survivors"]
    ]
    return (
        "## Every other wrong line: mutations of the equations\n\n"
        "`python tests/bugs/mutations.py` changes the functions under *The equations* "
        "one operator, comparison, sign, constant or index at a time, and runs the "
        "lesson's tests. What survives, and why:\n\n"
        + "\n".join(rows)
        + "\n\n"
        + "\n".join(survivors)
        + "\n"
    )


def text() -> str:
    """The page."""
    results = json.loads(museum.RESULTS.read_text())
    hidden = sum("hidden" in museum.seen(results, bug) for bug in BUGS)
    machine = results["machine"]
    parts = [
        HEAD.format(count=len(BUGS), hidden=hidden) + index(results),
        "### Reported, but not seen here\n\n" + not_as_reported(results),
    ]
    for lesson, title in LESSONS.items():
        bugs = [bug for bug in BUGS if museum.lesson_of(bug) == lesson]
        picture = f"{Path(lesson).stem}.png"
        parts.append(
            f"## {title}\n\n`{lesson}`, {SETTINGS[lesson]}, seeds 0 to 2: the median, "
            f"and the range over the seeds. Picture: the {AXES[lesson]}; grey the "
            "range of the healthy runs, red the three runs with the bug. "
            f"{NOTES[lesson]} *Entropy early* is that after a fifth of the lines. "
            f"Untrained, the agent scores {untrained(results, lesson)}.\n\n"
            f"![Curves of {title}]({picture})\n\n" + table(results, lesson)
        )
        parts += [section(results, bug) for bug in bugs]
    parts.append(mutations())
    parts.append(
        "## How this was measured\n\n"
        "`python tests/bugs/museum.py measure`, then `page`. "
        f"{machine['cores']} cores, Python {machine['python']}, torch "
        f"{machine['torch']}, gymnasium {machine['gymnasium']}. *Score*, *greedy* and "
        "*sampled* are measured by the healthy lesson on held-out episodes or fresh "
        "responses; the critic's error, illegal moves and moved weights by the museum; "
        "everything else is what the planted lesson printed. "
        "`python tests/bugs/museum.py check` plants every bug and runs its test."
    )
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def write() -> None:
    """Write the page and its pictures."""
    results = json.loads(museum.RESULTS.read_text())
    for lesson in LESSONS:
        draw(results, lesson)
    PAGE.write_text(text())
    print(f"Written: {PAGE.name} and {len(LESSONS)} pictures.")
