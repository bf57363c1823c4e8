"""Measure again what was measured with other code, then write the evidence page.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/run_all.py               what is stale: other code, or never
    python tests/benchmarks/run_all.py 2026-11-28    all not measured since this day

All of it takes about two and a half hours. Each benchmark is a process of its own, on
one core where `taskset` exists. After an interruption or a failure, the same command
goes on where it stopped, because a part is stored as soon as it has been measured.

Lesson 4 also needs a pretrained model in the folder REAL_MODEL, by default
SmolLM2-135M-Instruct; grpo.py says how to get it from a package.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from common import ROOT

FOLDER = Path(__file__).parent


def run(script: Path, *words: str) -> bool:
    """Run a script on one core; True if it succeeded."""
    pinned = []
    if shutil.which("taskset"):
        pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    environment = {"REAL_MODEL": "SmolLM2-135M-Instruct"} | os.environ
    command = [*pinned, sys.executable, script, *words]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> None:
    """Run each benchmark with the words of the command, then write the page."""
    words, failed = sys.argv[1:] or ["stale"], []
    try:
        for script in sorted(FOLDER.glob("*.py")):
            if "\n    run_parts(" not in script.read_text("utf-8"):
                continue  # it is no benchmark
            print(f"{script.name}:", flush=True)
            if not run(script, *words):
                failed.append(script.name)
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on with this benchmark.")
    if not run(FOLDER / "report.py"):
        failed.append("report.py")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. The same command tries these again.")


if __name__ == "__main__":
    main()
