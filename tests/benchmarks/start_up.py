"""How long the command line takes before it does anything, beside importing torch and Lightning alone.

    python tests/benchmarks/start_up.py --repeats 5 --output runs/start-up.json

Every command is a process of its own with one thread, from this checkout; the commands take turns, and the least of
each counts: other work on the machine only ever adds. CPU time is user and system time of the process and its children
as the kernel counts it (``wait4``); ``peak`` is the largest resident set. The floor cannot be left out by anything that
is built on Lightning, which imports torchmetrics and, where they are installed, scipy, matplotlib, torchvision and
transformers with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FLOOR = "import torch, lightning"
COMMANDS: dict[str, list[str]] = {
    FLOOR: ["-c", FLOOR],
    **{
        text: ["-m", "lit_merge", *text.split()]
        for text in (
            "--version", "--help", "fit --help", "merge --help", "merge --base DIR --help",
            "fit --config adamerging.yaml --print_config",
        )
    },
}  # fmt: skip


def measure(arguments: list[str]) -> dict[str, float]:
    """Run Python once; seconds and bytes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.read()  # until it ends
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: status {process.returncode}\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"cpu": used.ru_utime + used.ru_stime, "wall": wall, "peak": used.ru_maxrss * unit}


def main() -> None:
    """Measure, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS)[1:], default=list(COMMANDS)[1:])
    parser.add_argument("--output", type=Path, help="File for all that was measured, as JSON.")
    given = parser.parse_args()
    chosen = [FLOOR, *given.commands]
    measure(COMMANDS[FLOOR])  # from now on files are in the page cache, and compiled
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(given.repeats):
        for name in chosen:
            runs[name].append(measure(COMMANDS[name]))
    best: dict[str, Any] = {name: {key: min(run[key] for run in runs[name]) for key in runs[name][0]} for name in runs}
    print("| command | CPU, s | wall, s | CPU / floor | peak, MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, row in best.items():
        row["ratio"] = row["cpu"] / best[FLOOR]["cpu"]
        print(f"| `{name}` | {row['cpu']:.2f} | {row['wall']:.2f} | {row['ratio']:.2f} | {row['peak'] / 1e6:.0f} |")
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"best": best, "runs": runs}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
