"""What all benchmarks share: other Settings for a lesson, and results with an origin.

Each benchmark is a script that ends with `run_parts(...)`. Its parts can be run apart:

    python tests/benchmarks/cartpole.py               all parts, one after the other
    python tests/benchmarks/cartpole.py seeds         only the part of this name
    python tests/benchmarks/cartpole.py stale         parts measured with other code
    python tests/benchmarks/cartpole.py 2026-11-28    parts not measured since this day

Every part is stored in results/ as soon as it is there, together with the day, the
minutes, the versions, the machine and a hash of the lesson's code (its *origin*). The
page that report.py writes marks each result whose hash is no longer that of the lesson.
"""

import ast
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
ASSETS = ROOT / "assets"
DAY = re.compile(r"\d{4}-\d\d-\d\d")
sys.path.insert(0, str(ROOT))  # where the benchmarks find the lessons


def patched(lesson: ModuleType, **settings) -> contextlib.AbstractContextManager:
    """Inside `with patched(lesson, SEED=1):` these names of the lesson are others."""
    return mock.patch.multiple(lesson, **settings)  # an unknown name is an error


@contextlib.contextmanager
def run_main(lesson: ModuleType, **settings) -> Iterator[SimpleNamespace]:
    """Run the lesson's own main() without a word on the screen; the `with` has its run.

    That is the `history` from which the lesson would draw its learning curve, the
    `seconds` of this process (other programs do not count), the lines that were
    `printed`, without the names of temporary files, and the `folder` with what it
    wrote, until the `with` ends. A run that misses its aim counts like any other. One
    that was stopped, or was refused, ends the benchmark.
    """
    history, printed = [], io.StringIO()
    edits = {"draw_learning_curve": lambda curve, _: history.extend(curve)}
    if hasattr(lesson, "WATCH_EVERY"):
        edits["WATCH_EVERY"] = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, value in vars(lesson).items():
            if name.endswith(("_PATH", "_DIR")):
                edits[name] = Path(folder, Path(value).name)
        start = time.process_time()
        with patched(lesson, **edits | settings), contextlib.redirect_stdout(printed):
            try:
                lesson.main()
            except SystemExit:
                if not [*Path(folder).glob("*_unsolved*")]:
                    raise
        run = SimpleNamespace(history=history, folder=Path(folder))
        run.seconds = time.process_time() - start
        lines = printed.getvalue().splitlines()
        run.printed = [x for x in lines if tempfile.gettempdir() not in x]
        yield run


def real_model() -> str:
    """The folder of the pretrained model, which a variable of the shell must name."""
    folder = Path(os.environ.get("REAL_MODEL", "no folder")).absolute()
    if not folder.is_dir():
        sys.exit("REAL_MODEL must name a folder: the first lines of grpo.py say how.")
    return str(folder)


def in_own_process(function: Callable, *arguments: object) -> dict:
    """Call a function of the running script in a new process: nothing is left over."""
    words = ["row", function.__name__, json.dumps(arguments)]
    command = [sys.executable, sys.argv[0], *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def code_hash(source: str) -> str:
    """Twelve digits that change with the code, and not with comments and docstrings."""

    def shape(node: object) -> object:
        if isinstance(node, list):
            return [shape(entry) for entry in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        # Like ast.dump(), whose text is another one in every version of Python.
        fields = [(name, x) for name, x in ast.iter_fields(node) if x not in (None, [])]
        return type(node).__name__, [(name, shape(x)) for name, x in fields]

    tree = ast.parse(source)
    for node in ast.walk(tree):
        may_have_one = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, may_have_one) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(str(shape(tree)).encode()).hexdigest()[:12]


def code_of(scripts: list[str]) -> dict[str, str]:
    """The hash of each of these scripts, as they are now."""
    return {name: code_hash(Path(ROOT, name).read_text("utf-8")) for name in scripts}


def is_stale(origin: dict | None) -> bool:
    """Has the lesson's code changed since, or was this never measured?"""
    return origin is None or code_of(list(origin["code"])) != origin["code"]


def machine() -> dict:
    """What ran it: processor or GPU, and the cores that this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()).group(1)
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        model = torch.cuda.get_device_name()
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return {"processor": model, "cores used": len(cores), "system": platform.system()}


def versions(packages: list[str]) -> dict:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_results(name: str) -> dict:
    """The parts in results/NAME.json; none if it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_results(name: str, part: str, data: dict, origin: dict) -> None:
    """Store one part with its origin, and leave the other parts as they are."""
    results = read_results(name) | {part: {"origin": origin, **data}}
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f"{name}.json.tmp"
    temporary.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    os.replace(temporary, RESULTS / f"{name}.json")


def is_due(origin: dict | None, word: str) -> bool:
    """Does this word, "stale" or a day such as 2026-11-28, ask for the part?"""
    if word == "stale":
        return is_stale(origin)
    return bool(DAY.fullmatch(word)) and (origin is None or origin["date"] < word)


def run_parts(
    scripts: list[str], packages: list[str], parts: dict[str, Callable[[], dict]]
) -> None:
    """Run the parts that the command names, or all, and store what each returns.

    `scripts` are the lesson's files that the results depend on, relative to the top.
    """
    name, words = Path(sys.argv[0]).stem, sys.argv[1:]
    if words[:1] == ["row"]:  # this is the new process of in_own_process()
        function = getattr(sys.modules["__main__"], words[1])
        print("\n" + json.dumps(function(*json.loads(words[2]))))
        return
    if unknown := [w for w in words if w not in {*parts, "stale"} and not DAY.match(w)]:
        known = ", ".join([*parts, "stale", "a day such as 2026-11-28"])
        sys.exit(f"No such part: {', '.join(unknown)}; there are {known}.")
    for part, measure in parts.items():
        origin = read_results(name).get(part, {}).get("origin")
        if words and part not in words and not any(is_due(origin, w) for w in words):
            continue
        last = (origin or {}).get("minutes") or "?"
        print(f"{name}.py {part}: {last} minutes last time", flush=True)
        # Taken before the measurement: the file may be edited while it runs.
        code, day, start = code_of(scripts), date.today().isoformat(), time.time()
        data = measure()
        minutes = round((time.time() - start) / 60, 1)
        origin = {"date": day, "minutes": minutes}
        origin["command"] = f"python tests/benchmarks/{name}.py {part}"
        origin |= {"machine": machine(), "versions": versions(packages), "code": code}
        write_results(name, part, data, origin)
