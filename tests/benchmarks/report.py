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

# ------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------


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
    right = [
        all(number.fullmatch(line[i]) for line in texts) for i in range(len(columns))
    ]
    ruler = ["---:" if each else "---" for each in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ruler, *texts])


def rows(runs: list[dict], columns: list[str]) -> str:
    """One row for each run."""
    return table(columns, [[run.get(column, "") for column in columns] for run in runs])


def seeds(runs: list[dict], columns: list[str]) -> str:
    """One row for each value of the first column, all its seeds in one cell."""
    first, *others = columns
    lines = []
    for name in dict.fromkeys(run[first] for run in runs):
        group = [run for run in runs if run[first] == name]
        cells = [
            "; ".join(show(run.get(column, "")) for run in group) for column in others
        ]
        lines.append([name, *cells])
    return table(columns, lines)


def spread(runs: list[dict], columns: list[str]) -> str:
    """One row for each column of the runs: lowest, median and highest."""
    lines = []
    for column in columns:
        values = [run[column] for run in runs if run.get(column) is not None]
        lines.append([column, min(values), statistics.median(values), max(values)])
    return table(["", "lowest", "median", "highest"], lines)


def summary(part: dict) -> str:
    """All figures of a part."""
    return table(["", "figure"], [list(item) for item in part["summary"].items()])


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
        text = summary(data)
    elif kind == "texts":
        text = texts(data[entry[0]])
    else:
        text = {"rows": rows, "seeds": seeds, "spread": spread}[kind](
            data[entry[0]], columns
        )
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
    return "\n".join(
        [note, "", *(line_of_page(line, results) for line in words.splitlines()), ""]
    )


# ------------------------------------------------------------------------------------
# Figures that no result has
# ------------------------------------------------------------------------------------


def numbers_in(value: object) -> list[float]:
    """All numbers of a result, and mean, median and ends of each column of its runs."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, str):
        return []
    if isinstance(value, dict):
        return [
            x
            for key, each in value.items()
            if key != "origin"
            for x in numbers_in(each)
        ]
    found = [x for each in value for x in numbers_in(each)]
    kinds = ("edit", "variation", "trainer")
    if all(isinstance(run, dict) for run in value):
        groups = {tuple(run.get(kind) for kind in kinds) for run in value}
        for group in groups:
            runs = [r for r in value if tuple(r.get(kind) for kind in kinds) == group]
            for column in runs[0]:
                cells = [x for run in runs for x in numbers_in(run.get(column))]
                if cells:
                    found += statistics.mean(cells), statistics.median(cells)
    return found


def constants_of(script: str) -> list[float]:
    """The numbers in the code of a lesson."""
    nodes = ast.walk(ast.parse(Path(ROOT, script).read_text("utf-8")))
    values = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return [float(x) for x in values if type(x) in (int, float)]


def figures_of(text: str) -> list[tuple[int, str, str]]:
    """The figures of a text: line, figure, and the words around it."""
    fenced = re.sub(
        r"```.*?```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL
    )
    pattern = re.compile(r"(?<![\w.,/#-])[-−+]?\d[\d,]*(?:\.\d+)?(?![\w/]|\.\d)")
    not_figures = (
        r"(arXiv|[Ss]ections?|eqs?\.|[Cc]hapter|Python|[Ll]essons?|[Ss]eeds?|step) \(?$"
    )
    found = []
    for number, line in enumerate(fenced.splitlines(), 1):
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|\$[^$]*\$", lambda m: " " * len(m[0]), line)
        for match in pattern.finditer(line):
            figure = match[0].replace(",", "").replace("−", "-")
            small = figure.lstrip("-+").isdigit() and abs(int(figure)) <= 12
            if not small and not re.search(not_figures, line[: match.start()]):
                around = line[max(0, match.start() - 30) : match.end() + 30].strip()
                found.append((number, figure, around))
    return found


def is_known(figure: str, known: list[float]) -> bool:
    """Is this one of the numbers, rounded as the figure is, or a share as percent?"""
    decimals, value = len(figure.partition(".")[2]), abs(float(figure))
    return any(
        abs(round(scale * abs(x), decimals) - value) < 1e-9
        for x in known
        for scale in (1, 100)
    )


def check() -> int:
    """Print the figures that no result has; gives their number."""
    results = {path.stem: read_results(path.stem) for path in RESULTS.glob("*.json")}
    by_script, everything = {}, []
    for parts in results.values():
        everything += numbers_in(parts)
        for script in {s for data in parts.values() for s in data["origin"]["code"]}:
            by_script.setdefault(script, []).extend(numbers_in(parts))
    scripts = {script: constants_of(script) for script in sorted(by_script)}
    pages = {"README.md": ((ROOT / "README.md").read_text("utf-8"), everything)}
    pages["README.md"][1].extend(x for found in scripts.values() for x in found)
    for script, constants in scripts.items():
        docstring = ast.get_docstring(
            ast.parse((ROOT / script).read_text("utf-8")), clean=False
        )
        pages[script] = (docstring, by_script[script] + constants)
    missing = 0
    for name, (text, known) in pages.items():
        for line, figure, around in figures_of(text):
            if not is_known(figure, known):
                missing += 1
                print(f"{name}:{line}: {figure:>10}   {around}")
    for name, parts in results.items():
        for part in (part for part, data in parts.items() if is_stale(data["origin"])):
            print(f"{name}.py {part}: {STALE}")
    print(f"{missing} figures are not in the results.")
    return missing


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        (FOLDER / "README.md").write_text(page(), "utf-8")
        print(f"Written: {FOLDER / 'README.md'}")
