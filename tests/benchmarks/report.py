"""Write the evidence page, tests/benchmarks/README.md, from the files in results/.

    python tests/benchmarks/report.py

Every figure on the page is read from the JSON that a benchmark wrote; this file holds
only the words around them. What a benchmark adds to its JSON appears on the page by
itself. A claim whose figure is gone says so; a test looks for that.
"""

import html
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS, PAGE, ASSETS = FOLDER / "results", FOLDER / "README.md", "../../assets"
MISSING = "not in the results"

INTRODUCTION = """\
# The evidence

What this repository claims, the figures behind it, and the commands that repeat them.
This page is written by `python tests/benchmarks/report.py` from the files in
[`results/`](results); do not edit it by hand.

To rerun all benchmarks, one after the other (hours; it continues where it was
interrupted):

```bash
pip install -r requirements.txt -r tests/benchmarks/requirements.txt
python tests/benchmarks/all.py
```

Seconds are those of the machine named with each result; they vary by some percent
between runs on the same machine."""

# The sections, and the results that each shows.
LESSONS = {
    "Lesson 1: REINFORCE on CartPole-v1": ["cartpole"],
    "Lesson 2: self-play actor-critic on tic-tac-toe": ["tictactoe"],
    "Lesson 3: PPO on LunarLander-v3": ["lunarlander", "lunarlander_ablations"],
    "Lesson 4: GRPO on a language model": ["grpo", "grpo_tiny"],
}

# How each result was measured.
METHODS = {
    "cartpole": """\
Each run is the lesson's own `main()`, timed with its evaluation and its picture. The
weights that it saves are then scored on held-out episodes.""",
    "tictactoe": """\
Each run is the lesson's own `main()`. Then every line of play of the saved agent is
followed: its greedy move against all that the other side can do. This is exhaustive,
so there is no held-out set. The chances against random play are exact as well; *best
possible* is the highest win rate of a player that never loses.""",
    "lunarlander": """\
Each run is the lesson's own `main()`; seconds are those of the training. Scores are
means over held-out episodes. *Random stepping* is the time that as many environments
take for as many steps with random actions and nothing else; *its own stepping* is the
part of the run spent in `env.step` (a lander on the ground takes longer to simulate
than one that falls).""",
    "lunarlander_ablations": """\
The same training, shortened, without one detail or with another value of one setting;
*summary* is the mean greedy score of the seeds. These are short runs of few seeds:
small differences mean nothing.""",
    "grpo": """\
`grpo_training.py` and TRL's `GRPOTrainer` get the same policy, prompt, reward function
and settings. Each run is a process of its own; its first step is a warm-up and left
out, and the peak memory is that of the whole process. Here, too, the lesson runs as its
own `main()`. The *default pair* is a GPT-2 and a DeBERTa of the true sizes, with random
weights, under the default settings, saving and evaluation included. *End to end* is a
pretrained model, with a reward that counts which of twelve words a response
contains.""",
    "grpo_tiny": """\
The bundled models of [`grpo_tiny/`](../../grpo_tiny/README.md). *Pairwise accuracy* is
the share of pairs, on held-out topics (no answer about them was used in training), in
which the reward model scores the teacher's answer above the one with a flaw. GRPO is
the lesson's own `main()`, compared before and after by fresh responses. *Gain* is the
rise of the mean reward in standard deviations of the rewards before; *distinct-2* the
share of pairs of neighbouring words, over all responses, that differ; *cut off* the
share of responses that reach the limit of tokens. The *judge* is the teacher's mean
log-likelihood of the responses, in nats a token. It is not independent: the teacher
wrote the texts that the reward model prefers. The learning rate was chosen with a look
at seeds below 10; the others are held out.""",
}

# What is claimed: the results (and what follows their command), the claim, its figure.
# {name} is an entry of `summary`, {key: name} one of another part of the results.
CLAIMS = [
    (
        "cartpole",
        "Every seed passes Gymnasium's threshold, then balances greedily to the end of "
        "every held-out episode",
        "{seeds with exactly 500.0 greedy} of {runs} seeds",
    ),
    (
        "cartpole",
        "Training takes seconds",
        "median {median seconds} s, slowest {slowest seconds} s",
    ),
    (
        "tictactoe",
        "Every seed: no line of play is lost, whatever the other side does",
        "{seeds that lose no line of play} of {runs} seeds",
    ),
    (
        "tictactoe",
        "Random play is beaten about as often as a player who never loses can do it",
        "first {lowest wins % moving first} of {best possible wins % moving first} %, "
        "second {lowest wins % moving second} of {best possible wins % moving second} "
        "% (worst seed)",
    ),
    (
        "tictactoe",
        "Training takes seconds",
        "median {median seconds} s, slowest {slowest seconds} s",
    ),
    (
        "lunarlander",
        "Every seed lands: mean score of greedy held-out episodes",
        "{mean of the seeds} over {runs} seeds, worst seed {worst seed}",
    ),
    (
        "lunarlander",
        "Nearly every single episode reaches the threshold",
        "{share of all episodes >= 200} of all",
    ),
    (
        "lunarlander",
        "Training takes about a minute, most of it for the simulation",
        "median {median seconds} s, slowest {slowest seconds} s; "
        "{times its own stepping, median} times its own stepping",
    ),
    (
        "lunarlander",
        "stable-baselines3 with the same settings takes longer for a score like ours",
        "{same settings: stable-baselines3's score} in "
        "{same settings: stable-baselines3's seconds} s against "
        "{same settings: lesson's score} in {same settings: lesson's seconds} s, "
        "{same settings: times as fast} times",
    ),
    (
        "lunarlander",
        "The score of stable-baselines3 with RL Zoo's settings is reached sooner (this "
        "compares settings, not implementations)",
        "{lesson's seconds to that score} s against "
        "{RL Zoo's settings: stable-baselines3's seconds} s",
    ),
    (
        "lunarlander_ablations",
        "Of PPO's details, the clip, several epochs and scaled rewards count most",
        "{as it is} as it is, {no clipping of the ratio} without the clip, "
        "{EPOCHS = 1} with one epoch, {rewards not scaled} without scaled rewards",
    ),
    (
        "grpo",
        "A step takes less time and memory than with TRL's trainer at its default: on "
        "random gpt2-small (asked: at most four fifths of the time, nine tenths of the "
        "memory), then on SmolLM2-135M-Instruct",
        "{random gpt2-small: time / TRL, all 8 at once} of the time, "
        "{random gpt2-small: peak memory / TRL, all 8 at once} of the memory; then "
        "{SmolLM2-135M-Instruct: time / TRL, all 8 at once} and "
        "{SmolLM2-135M-Instruct: peak memory / TRL, all 8 at once}",
    ),
    (
        "grpo",
        "The default pair trains in little memory (asked: 8 GB or less; models of its "
        "sizes with random weights)",
        "peak {default pair: peak GB} GB, {default pair: seconds a step} s a step",
    ),
    (
        "grpo",
        "Loss and gradient of a batch equal TRL's",
        "relative difference "
        "{SmolLM2-135M-Instruct: relative error of the loss against TRL} and "
        "{SmolLM2-135M-Instruct: relative error of the gradient against TRL}",
    ),
    (
        "grpo",
        "The time of a step grows no faster than the number of its tokens",
        "dearest / cheapest token: "
        "{cost of a token, most / least, NUM_SAMPLES 4 to 64} over sizes of the group, "
        "{cost of a token, most / least, MAX_NEW_TOKENS 16 to 256} over lengths",
    ),
    (
        "grpo train",
        "A pretrained model learns what the reward asks for (one run)",
        "mean reward {end to end: reward before} before, {end to end: reward after} "
        "after, in {end to end: seconds} s",
    ),
    (
        "grpo_tiny",
        "The bundled reward model tells good answers from flawed ones",
        "pairwise accuracy {pairwise accuracy, all flaws, %} %; the hardest flaw, "
        "scrambled: {pairwise accuracy, scrambled, %} %",
    ),
    (
        "grpo_tiny",
        "GRPO improves the bundled policy with every held-out seed, within a minute",
        "at least {seeds 10 to 14: gain on the prompt, stds, least} standard "
        "deviations on its prompt, {seeds 10 to 14: gain on held-out topics, stds, "
        "least} on held-out topics; a run takes at most {CPU seconds of a run, most} s",
    ),
    (
        "grpo_tiny",
        "It teaches the bundled policy to stop",
        "{cut off before, %} % of the responses cut off before, at most "
        "{seeds 10 to 14: cut off after, %, most} % after",
    ),
    (
        "grpo_tiny",
        "The price is that responses become more alike (distinct-2)",
        "at least {seeds 10 to 14: distinct-2 kept, %, least} % kept",
    ),
]

NOT_MEASURED = """\
## What is not measured

* What the default pair of lesson 4, `gpt2` and OpenAssistant's DeBERTa, learns with its
  pretrained weights: the Hugging Face Hub could not be reached. Only its time and
  memory are measured, with random weights.
* Anything on a GPU, on several GPUs or on several machines: speed, memory, or whether
  a seed repeats there. That several processes compute the same update as one is a test
  on a CPU.
* Windows, macOS, and processors other than the one named with each result.
* Whether people prefer the responses that GRPO teaches: all preferences here are made
  by rule. Whether what the bundled policy writes is true.
* How much the bundled models would differ with another seed of `make_tiny.py`: they
  come from one run of it.
* Peers of lessons 1 and 2; peers of lessons 3 and 4 with more seeds than are listed;
  TRL with an inference engine of its own.
* Lesson 3 on episodes that played no part in choosing its settings: they were chosen
  with a look at some of these seeds and episodes."""

TITLES = {
    "runs": "Every run",
    "try_this": 'The edits of "Try this"',
    "library": "Peers beside us",
    "peers": "Peers beside us",
    "growth runs": "Growth",
    "default pair runs": "The default pair",
    "policy runs": "Other policies",
    "before": "Before the training",
}
PEERS = ["library", "peers"]  # our runs of the same seeds are shown with these
ORIGIN = ["command", "machine", "versions"]
NO_FIGURE = ["fingerprint"]  # not shown
FOLDED = 25  # tables with more rows are folded


def show(value: object) -> str:
    """A value as it stands in the tables."""
    if value is None or isinstance(value, bool):
        return {None: "never", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def figures(entry: dict) -> dict:
    """The entries of a JSON object that fit into the cells of one row."""
    return {
        name: value
        for name, value in entry.items()
        if not isinstance(value, dict | list) and name not in NO_FIGURE
    }


def rows(value: object, name: str = "") -> list[dict]:
    """Runs, in a list or by name, as rows of one table; the name is the first cell."""
    if isinstance(value, list):
        return [row for entry in value for row in rows(entry, name)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("settings"), dict):  # the name of the runs beside them
        name = ", ".join(f"{key} = {x}" for key, x in value["settings"].items())
        return rows(value.get("runs"), name)
    if figures(value):
        return [({"what": name} if name else {}) | figures(value)]
    return [row for key, entry in value.items() for row in rows(entry, key)]


def table(entries: list[dict]) -> str:
    """A Markdown table; its columns are all names that occur in the rows."""
    if len(entries) == 1:  # one row reads better as two columns
        entries = [{"what": name, "figure": x} for name, x in entries[0].items()]
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    text = [c for c in columns if any(type(e.get(c)) in (str, bool) for e in entries)]
    lines = [columns, ["---" if column in text else "---:" for column in columns]]
    for entry in entries:
        lines.append([show(entry[c]) if c in entry else "" for c in columns])
    result = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return fold(f"{len(entries)} rows", result) if len(entries) > FOLDED else result


def fold(title: str, text: str) -> str:
    """A text that shows only its title until it is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def with_ours(peers: list[dict], result: dict) -> list[dict]:
    """The peers' rows, then our runs of the same seeds in the same columns."""
    seeds = {peer.get("seed") for peer in peers}
    columns = {name for peer in peers for name in peer}
    peers = [{"what": "stable-baselines3"} | peer for peer in peers]
    ours = [run for run in rows(result.get("runs")) if run.get("seed") in seeds]
    return peers + [
        {"what": "this repository"} | {k: x for k, x in run.items() if k in columns}
        for run in ours
    ]


def quotes(name: str, value: object) -> list[str]:
    """The responses in a part of the results; of a list, only those of the first run.

    With rewards, they are one group: the best two and the worst are shown.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return quotes(f"Run of seed {value[0].get('seed')}", value[0])
    if not isinstance(value, dict):
        return []
    parts = []
    texts = [html.escape(" ".join(t.split()), False) for t in value.get("texts", [])]
    texts = [re.sub(r"([*_`\[\]])", r"\\\1", text) or "(empty)" for text in texts]
    rewards = value.get("rewards", [])
    if texts and len(rewards) == len(texts):
        order = sorted(range(len(texts)), key=lambda i: -rewards[i])
        lines = [f"* Reward {show(rewards[i])}: {texts[i]}" for i in order]
        title = f"{name}: the best two responses of the group, and the worst"
        parts = [fold(title, "\n".join([*lines[:2], lines[-1]]))]
    elif texts:
        lines = [f"{n}. {text}" for n, text in enumerate(texts, 1)]
        parts = [fold(f"{name}: responses, not selected", "\n".join(lines))]
    for key, entry in value.items():
        parts += quotes(f"{name}, {key}", entry) if isinstance(entry, dict) else []
    return parts


def figure_of(claim: str, result: dict) -> str:
    """The text of a claim's figure, every {name} replaced by what was measured."""
    found = {"runs": len(result["runs"])} if "runs" in result else {}
    found |= result.get("summary", {})
    for key, part in result.items():
        if isinstance(part, dict):
            found |= {f"{key}: {name}": value for name, value in part.items()}
    if not set(re.findall(r"\{(.+?)\}", claim)) <= set(found):
        return MISSING
    return re.sub(r"\{(.+?)\}", lambda match: show(found[match[1]]), claim)


def origin(result: dict) -> str:
    """Command, machine and versions of a result, as a list."""
    lines = [f"* Command: `{result.get('command', MISSING)}`"]
    for key in ("machine", "versions"):
        facts = figures(result.get(key, {}))
        text = ", ".join(f"{name} {show(value)}" for name, value in facts.items())
        lines.append(f"* {key.capitalize()}: {text or MISSING}")
    return "\n".join(lines)


def glance(results: dict[str, dict]) -> str:
    """The table of all claims."""
    entries = []
    for name, claim, figure in CLAIMS:
        name, *argument = name.split()
        result = results.get(name, {})
        heading = next(each for each, names in LESSONS.items() if name in names)
        anchor = re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
        command = " ".join([result.get("command", MISSING), *argument])
        entries.append(
            {
                "Lesson": f"[{heading.split()[1][:-1]}](#{anchor})",
                "Claim": claim,
                "Figure": figure_of(figure, result),
                "Command": f"`{command}`",
            }
        )
    return table(entries)


def part_of_page(name: str, result: dict) -> list[str]:
    """One result: how and where it was measured, its claims, tables, curves, texts."""
    parts = [f"### `{name}.py`", METHODS.get(name, ""), origin(result)]
    claims = [claim for claim in CLAIMS if claim[0].split()[0] == name]
    lines = [f"* {claim}: **{figure_of(f, result)}**" for _, claim, f in claims]
    parts += ["Claimed:", "\n".join(lines)] if lines else []
    for picture in sorted((FOLDER / ASSETS).glob(f"{name}_learning_curve*.png")):
        label = picture.stem.replace("_", " ").capitalize()
        parts.append(f"![{label}]({ASSETS}/{picture.name})")
    texts = []
    for key in sorted(result, key=lambda key: key != "summary"):  # summary first
        if key in ORIGIN:
            continue
        title = TITLES.get(key, key.capitalize())
        entries = rows(result[key])
        entries = with_ours(entries, result) if key in PEERS else entries
        parts += [f"#### {title}", table(entries)] if entries else []
        texts += quotes(title, result[key])
    return [part for part in parts + texts if part]


def page(folder: Path = RESULTS) -> str:
    """The whole page, from the JSON files in a folder."""
    results = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    times = results.pop("times", {}).get("seconds", {})
    parts = [INTRODUCTION, "## At a glance", glance(results)]
    shown = [name for names in LESSONS.values() for name in names]
    others = [name for name in results if name not in shown]
    for heading, names in (LESSONS | {"Other benchmarks": others}).items():
        parts += [f"## {heading}"] if names else []
        for name in names:
            parts += part_of_page(name, results.get(name, {}))
    parts.append(NOT_MEASURED)
    if times:
        minutes = [{"Command": f"`{c}`", "Minutes": s / 60} for c, s in times.items()]
        parts += ["## How long each benchmark takes", table(minutes)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Written: {PAGE}")
