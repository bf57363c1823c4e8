"""Rerun every benchmark, one after the other, then write the evidence page.

    pip install -r requirements.txt -r tests/benchmarks/requirements.txt
    python tests/benchmarks/all.py

Takes hours. Each command is a process of its own, pinned to one core where `taskset`
exists. After an interruption or a failure, the same command continues: what this round
has finished is skipped. The time that each takes is kept in results/times.json.

The commands of lesson 4 need a pretrained model in the folder REAL_MODEL, by default
SmolLM2-135M-Instruct; grpo.py says how to get it from a package.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = [
    "tests/benchmarks/cartpole.py",  # lesson 1, seeds and edits
    "tests/benchmarks/tictactoe.py",  # lesson 2, seeds and edits
    "tests/benchmarks/lunarlander.py",  # lesson 3, seeds and peers
    "tests/benchmarks/lunarlander_ablations.py",  # lesson 3, without each detail
    "tests/benchmarks/grpo.py",  # lesson 4: cost against its peer, growth, default pair
    "tests/benchmarks/grpo.py train",  # lesson 4 on a pretrained model
    "tests/benchmarks/grpo_tiny.py",  # lesson 4 on the bundled models
]
REPORT = "tests/benchmarks/report.py"

ROOT = Path(__file__).resolve().parents[2]
TIMES = ROOT / "tests/benchmarks/results/times.json"
REAL_MODEL = os.environ.get("REAL_MODEL", "SmolLM2-135M-Instruct")


def run(command: str) -> bool:
    """Run one of the commands; True if it succeeded."""
    pinned = []
    if shutil.which("taskset"):
        pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
    env = os.environ | {"REAL_MODEL": REAL_MODEL}
    done = subprocess.run(
        [*pinned, sys.executable, *command.split()], cwd=ROOT, env=env
    )
    return done.returncode == 0


def clock(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds."""
    if seconds is None:
        return "never run"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def save(seconds: dict[str, float], finished: list[str]) -> None:
    """Keep the times, and what this round has finished, whatever happens next."""
    temporary = TIMES.with_name(TIMES.name + ".tmp")
    seconds = {each: seconds[each] for each in COMMANDS if each in seconds}
    kept = {"seconds": seconds, "finished in this round": finished}
    temporary.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(temporary, TIMES)


def main() -> None:
    """Run what this round still lacks; then write the page, and the round is over."""
    if not Path(ROOT, REAL_MODEL).is_dir():
        sys.exit(f"There is no folder {REAL_MODEL}: grpo.py says how to get it.")
    kept = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    seconds, finished = kept.get("seconds", {}), kept.get("finished in this round", [])
    failed = []
    for command in COMMANDS:
        if command in finished:
            print(f"{command}: finished in this round, skipped", flush=True)
            continue
        last = clock(seconds.get(command))
        print(f"{command}: starts; last time {last}", flush=True)
        start = time.time()
        try:
            succeeded = run(command)
        except KeyboardInterrupt:
            sys.exit("Interrupted; the same command continues with this benchmark.")
        took = time.time() - start
        if not succeeded:
            failed.append(command)
            print(f"{command}: failed after {clock(took)}", flush=True)
            continue
        print(f"{command}: {clock(took)}; last time {last}", flush=True)
        seconds[command] = round(took, 1)
        finished.append(command)
        save(seconds, finished)
    run(REPORT)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. The same command tries these again.")
    save(seconds, [])


if __name__ == "__main__":
    main()
