"""Write the evidence page, tests/benchmarks/README.md, from page.md and results/.

    python tests/benchmarks/report.py            write the page
    python tests/benchmarks/report.py --check    list figures that no result has

page.md holds the words, and these marks take their figures from results/NAME.json:

    {NAME PART: FIGURE}                     an entry of the part's `summary`; or lowest
                                            of A, median of A, highest of A: its `runs`
    {rows NAME PART LIST: A, B}             a table with one row for each run
    {seeds NAME PART LIST: A | B, C}        one row for each A, the seeds side by side
    {spread NAME PART LIST: A, B}           lowest, median and highest of each column
    {summary NAME PART}                     a table of the part's whole `summary`
    {texts NAME PART ENTRY}                 the responses of a language model
    {measured}                              what was measured, when, where and with what

A line with a figure, or a table, of a part that was measured with other code than
today's says so. `--check` reads README.md and the docstrings of the lessons. It is made
for a release: it lists every figure that is neither in the results nor a constant of
the lesson. Figures in code blocks, small whole numbers and numbers of equations and
sections are not looked at.
"""

import ast
import re
import statistics
import sys
from pathlib import Path

from common import RESULTS, ROOT, is_stale, read_results

FOLDER = Path(__file__).resolve().parent
MISSING, STALE = "not in the results", "measured with other code"


def show(value: object) -> str:
    """A value as it stands on the page."""
    if value is None or isinstance(value, bool):
        return {None: "never", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def table(columns: list[str], lines: list[list]) -> str:
    """A Markdown table; columns of numbers are aligned on the right."""
    texts = [[show(cell) for cell in line] for line in lines]
    number = re.compile(r"-?[\d.,]+(e[-+]\d+)?|never|\?")
    columns_of_texts = zip(*texts, strict=True)
    right = [all(map(number.fullmatch, column)) for column in columns_of_texts]
    ruler = ["---:" if each else "---" for each in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ruler, *texts])


def rows(runs: list[dict], columns: list[str]) -> str:
    """One row for each run."""
    return table(columns, [[run.get(column, "") for column in columns] for run in runs])


def seeds(runs: list[dict], columns: list[str]) -> str:
    """One row for each value of the first column, all its seeds in one cell."""
    lines = {}
    for run in runs:
        cells = lines.setdefault(run[columns[0]], [[] for _ in columns[1:]])
        for cell, column in zip(cells, columns[1:], strict=True):
            cell.append(show(run.get(column, "")))
    groups = [[name, *map("; ".join, cells)] for name, cells in lines.items()]
    return table(columns, groups)


def spread(runs: list[dict], columns: list[str]) -> str:
    """One row for each column of the runs: lowest, median and highest."""
    lines = []
    for column in columns:
        values = [run[column] for run in runs if run.get(column) is not None]
        lines.append([column, min(values), statistics.median(values), max(values)])
    return table(["", "lowest", "median", "highest"], lines)


def texts(entry: dict) -> str:
    """Responses: those of a group by their rewards, others as they come."""
    responses, rewards = entry["texts"], entry.get("rewards")
    if not rewards:
        return "\n".join(f"1. {text}" for text in responses)
    order = sorted(range(len(responses)), key=lambda i: -rewards[i])
    lines = [f"* Reward {show(rewards[i])}: {responses[i]}" for i in order]
    return "\n".join([*lines[:2], lines[-1]])


def measured(results: dict[str, dict]) -> str:
    """When each part was measured, and whether the lesson has changed since."""
    lines, places = [], {}
    for name, parts in results.items():
        for part, data in parts.items():
            origin = data["origin"]
            code = f"**{STALE}**" if is_stale(origin) else "today's code"
            minutes = origin["minutes"] or "?"
            lines.append([f"`{name}.py {part}`", origin["date"], minutes, code])
            processor, cores, system = origin["machine"].values()
            cores = "1 core" if cores == 1 else f"{cores} cores"
            packages = ", ".join(map(" ".join, origin["versions"].items()))
            place = f"{packages}, on {cores} of {processor} ({system})"
            places.setdefault(place, {})[f"`{name}.py`"] = True
    where = [f"* {', '.join(names)}: {place}." for place, names in places.items()]
    head = ["Measured", "Day", "Minutes", "The lesson's code"]
    return table(head, lines) + "\n\nVersions and machines:\n\n" + "\n".join(where)


def block(kind: str, words: str, results: dict[str, dict]) -> str:
    """What stands in the place of a mark that has a line of its own."""
    address, _, columns = words.partition(":")
    name, part, *entry = address.strip().split(" ", 2)
    columns = [column.strip() for column in re.split(r"[,|]", columns)]
    data = results.get(name, {}).get(part)
    if data is None or entry and entry[0] not in data:
        return f"*{words}: {MISSING}.*"
    if kind == "summary":
        text = table(["", "figure"], [list(item) for item in data["summary"].items()])
    elif kind == "texts":
        text = texts(data[entry[0]])
    else:
        draw = {"rows": rows, "seeds": seeds, "spread": spread}[kind]
        text = draw(data[entry[0]], columns)
    return f"{text}\n\n*This was {STALE}.*" if is_stale(data["origin"]) else text


def figure_of(data: dict, name: str) -> object:
    """A figure of a part: an entry of its summary, or the `lowest of` its runs."""
    kinds = {"lowest": min, "median": statistics.median, "highest": max}
    kind, _, column = name.partition(" of ")
    values = [r[column] for r in data.get("runs", []) if r.get(column) is not None]
    if kind in kinds and values:
        return kinds[kind](values)
    return data.get("summary", {}).get(name, MISSING)


def line_of_page(line: str, results: dict[str, dict]) -> str:
    """A line of page.md with its figures, and a note if one of them is stale."""
    stale = []

    def figure(match: re.Match) -> str:
        data = results.get(match[1], {}).get(match[2], {})
        stale.append(data and is_stale(data["origin"]))
        return show(figure_of(data, match[3]))

    if match := re.fullmatch(r"\{(rows|seeds|spread|summary|texts) (.+)\}", line):
        return block(*match.groups(), results)
    if line == "{measured}":
        return measured(results)
    line = re.sub(r"\{(\w+) (\w+): ([^{}]+)\}", figure, line)
    return re.sub(r"( \|)?$", rf" ({STALE})\1", line, count=1) if any(stale) else line


def page() -> str:
    """The whole page, from the words in page.md and the files in results/."""
    words = (FOLDER / "page.md").read_text("utf-8")
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    names.sort(key=lambda name: words.find(f"{{{name} "))  # in the order of the page
    results = {name: read_results(name) for name in names}
    note = "<!-- Written by report.py from page.md and results/: edit those. -->"
    lines = [line_of_page(line, results) for line in words.splitlines()]
    return "\n".join([note, "", *lines, ""])


FIGURE = re.compile(r"(?<![\w.,/#:-])[-−+]?\d[\d,]*(?:\.\d+)?(?![\w/]|\.\d)")
# What stands before a number that is no measured figure:
WORDS = r"arXiv|[Ss]ections?|eqs?\.|[Cc]hapter|Python|[Ll]essons?|[Ss]eeds?|al\."
NO_FIGURE = re.compile(rf"({WORDS}|[A-Z_]+ =) \(?$")


def value_of(figure: str) -> float:
    """The size of a figure as it is printed."""
    return abs(float(figure.replace(",", "").replace("−", "-")))


def numbers_in(value: object) -> list[float]:
    """All numbers in a part of the results, and mean and median of its runs."""
    if isinstance(value, dict):
        left_out = "origin", "curve", "texts"
        return numbers_in([x for key, x in value.items() if key not in left_out])
    if isinstance(value, list):
        return [number for x in value for number in numbers_in(x)] + middles(value)
    if isinstance(value, str):  # a line that the lesson printed
        return [value_of(figure) for figure in FIGURE.findall(value)]
    return [abs(float(value))] if type(value) in (int, float) else []


def middles(runs: list) -> list[float]:
    """Mean and median of each column, over the runs of one edit, variation, ..."""
    columns = {}
    for run in (run for run in runs if isinstance(run, dict)):
        first = next(iter(run.values()))
        name = first if isinstance(first, str) else ""
        for column, cell in run.items():
            if type(cell) in (int, float):
                columns.setdefault((name, column), []).append(cell)
    kinds = statistics.mean, statistics.median
    return [abs(kind(cells)) for cells in columns.values() for kind in kinds]


def figures_in(text: str) -> list[tuple[int, str]]:
    """The figures of a text, each with its line."""
    fences = re.compile("```.*?```", re.DOTALL)
    text = fences.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|\$[^$]*\$", " ", line)
        for match in FIGURE.finditer(line):
            small = "." not in match[0] and value_of(match[0]) <= 12
            if not small and not NO_FIGURE.search(line[: match.start()]):
                found.append((number, match[0]))
    return found


def is_known(figure: str, known: list[float]) -> bool:
    """Is this one of the numbers, rounded as the figure is, or a share in percent?"""
    decimals, value = len(figure.partition(".")[2]), value_of(figure)
    shares = [100 * x for x in known if x <= 1]
    return any(abs(x - value) <= 0.5001 * 10**-decimals for x in known + shares)


def check() -> int:
    """Print the figures that no result has, and what is stale; gives their number."""
    texts, known = {"README.md": (ROOT / "README.md").read_text("utf-8")}, {}
    for path in RESULTS.glob("*.json"):
        for part, data in read_results(path.stem).items():
            if is_stale(data["origin"]):
                print(f"{path.stem}.py {part}: {STALE}")
            for name in ("README.md", *data["origin"]["code"]):
                known.setdefault(name, []).extend(numbers_in(data))
    for script in known.keys() - {"README.md"}:
        tree = ast.parse((ROOT / script).read_text("utf-8"))
        texts[script] = ast.get_docstring(tree, clean=False) or ""
        values = [node.value for node in ast.walk(tree) if type(node) is ast.Constant]
        constants = [float(x) for x in values if type(x) in (int, float)]
        known[script] += constants
        known["README.md"] += constants
    count = 0
    for name, text in texts.items():
        for line, figure in figures_in(text):
            if not is_known(figure, known.get(name, [])):
                print(f"{name}:{line}: {figure}")
                count += 1
    print(f"{count} figures are not in the results.")
    return count


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        (FOLDER / "README.md").write_text(page(), "utf-8")
        print(f"Written: {FOLDER / 'README.md'}")
