"""Time and memory of one adaptation step, beside what no step can do without and beside the naive way.

    python tests/benchmarks/adaptation_step.py --tasks 8 --images 16 --output step.json
    python tests/benchmarks/adaptation_step.py --sweep tasks --layers 3 --total 80
    python tests/benchmarks/adaptation_step.py --quick

Rows, each in a process of its own, on networks of random weights and images that are in memory:

* ``ours``: training step, backward and optimizer step of ``AdaMerging`` in a real ``MergeTrainer.fit``;
* ``floor``: encoder and heads forward, the objective, and backward, with ordinary leaf weights, all images at once;
* ``naive``: the merged weights are computed by autograd, and the tasks go through the network one by one, each with
  a backward pass of its own through the retained graph of the merge.

The processes take turns step by step, so that all rows see the same noise of the machine; ratios are medians over
turns. So is that of the time of all threads of a process, which tells more on a machine that others use (with
``--threads 1``: waiting threads spin). Memory is measured in further processes, one after the other: on a CPU the
largest resident set during a step beyond that before the networks were read, with an allocator that gives freed memory
back (glibc's, told to map every tensor); on CUDA what the allocator says. It is in units of one network in float32: the
whole peak, and the peak less the floor's activations, which are the floor's peak less its weights and gradients.
Bandwidth is that of the two products with the bank (bytes of task vectors, base, merged weights or gradients over the
time), and its share of that of a copy in the same memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _adaptation_rows import OBJECTIVES, ROWS, Pipe, Plan, run  # type: ignore[import-not-found]

SWEEP = (2, 4, 8, 16, 20)


class Worker:
    """One row in a process of its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.times, self.cpu = plan, list[float](), list[float]()
        settings = os.environ | {"OMP_NUM_THREADS": str(plan.threads)}
        if plan.memory:
            settings["MALLOC_MMAP_THRESHOLD_"] = "65536"
        command = [sys.executable, __file__, "--plan", json.dumps(plan._asdict())]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=settings, text=True, **pipes)

    def step(self) -> None:
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        found = self._answer()
        self.times.append(found["seconds"])
        self.cpu.append(found["cpu"])

    def finish(self) -> dict[str, Any]:
        found = self._answer()
        self._process.wait()
        return found

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.plan.row}: the process ended with status {self._process.wait()}")
        return dict(json.loads(line))


def together(plans: dict[str, Plan]) -> dict[str, dict[str, Any]]:
    """Run several rows in turns; the first step of each is a warm-up."""
    workers = {name: Worker(plan) for name, plan in plans.items()}
    for _ in range(next(iter(plans.values())).steps):
        for name, worker in workers.items():
            worker.step()
            print(f"{name} {worker.times[-1]:.2f} s, CPU {worker.cpu[-1]:.2f} s;", end=" ", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return {
        name: {"seconds": worker.times[1:], "cpu": worker.cpu[1:], **worker.finish()}
        for name, worker in workers.items()
    }


def measure(plan: Plan, rows: tuple[str, ...], memory: bool = True) -> dict[str, dict[str, Any]]:
    """Time of some rows in turns, then their memory one after the other."""
    found = together({row: plan._replace(row=row) for row in rows})
    if memory and plan.device == "cpu":
        for row in rows:
            found[row]["peak"] = together({row: plan._replace(row=row, memory=True, steps=2)})[row]["peak"]
    return found


def ratio(of: dict[str, Any], to: dict[str, Any], what: str = "seconds") -> float:
    """Median of the ratios of the turns."""
    return float(median(a / b for a, b in zip(of[what], to[what], strict=True)))


def table(found: dict[str, dict[str, Any]], plan: Plan) -> str:
    """Markdown of all rows."""
    floor = found["floor"]
    network = floor["network"]
    activations = floor["peak"] - 2 * network
    lines = [
        "| row | median, s | least, s | × floor | CPU × floor | peak, networks | without the floor's activations |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, of in found.items():
        peak, rest = (of["peak"] / network, (of["peak"] - activations) / network)
        seconds = of["seconds"]
        lines.append(
            f"| {row} | {median(seconds):.3f} | {min(seconds):.3f} | {ratio(of, floor):.3f} | "
            f"{ratio(of, floor, 'cpu'):.3f} | {peak:.2f} | {rest:.2f} |"
        )
    bytes_ = 2 if plan.storage_dtype != "float32" else 4
    bound = plan.tasks + 1 + 2.5 if bytes_ == 4 else (plan.tasks + 1) / 2 + 2.5
    lines += ["", f"bound of ours without activations: {bound:g} networks of {network / 2**20:.1f} MiB"]
    if "naive" in found:
        lines.append(f"naive / ours: {ratio(found['naive'], found['ours']):.2f}")
    if (speed := found["ours"].get("bandwidth")) is not None:
        ways = (f"{way} {speed[way] / 1e9:.1f} GB/s = {speed[f'{way}_share']:.0%}" for way in ("forward", "backward"))
        lines.append(f"contraction: {', '.join(ways)} of a copy's {speed['copy'] / 1e9:.1f} GB/s")
    return "\n".join(lines)


def sweep(plan: Plan, total: int) -> tuple[str, dict[str, Any]]:
    """Steps of several numbers of tasks with the same number of images in all."""
    plans = {str(t): plan._replace(tasks=t, images=max(1, round(total / t))) for t in SWEEP}
    found = together({**plans, "floor": plans["8"]._replace(row="floor")})
    lines = ["| tasks | images each | step, s | × floor | × half as many tasks |", "| --- | --- | --- | --- | --- |"]
    for name, one in plans.items():
        half = found.get(str(one.tasks // 2))
        growth = "" if half is None else f"{ratio(found[name], half):.3f}"
        step = median(found[name]["seconds"])
        lines.append(f"| {name} | {one.images} | {step:.3f} | {ratio(found[name], found['floor']):.3f} | {growth} |")
    return "\n".join(lines), found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="architecture of open_clip, or `tiny`")
    parser.add_argument("--layers", type=int, help="blocks of the image tower, to cut it down")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task and step")
    parser.add_argument("--granularity", default="tensor")
    parser.add_argument("--storage-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--max-images", help="images per encoder pass: a number, or `auto`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--objective", choices=list(OBJECTIVES), default="entropy")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--sweep", choices=("tasks",), help="steps for several numbers of tasks")
    parser.add_argument("--total", type=int, default=80, help="images of all tasks together in a sweep")
    parser.add_argument("--quick", action="store_true", help="a tiny network, 2 tasks, 2 images")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.plan:
        warnings.filterwarnings("ignore")
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        pipe, plan = Pipe(), Plan(**json.loads(given.plan))
        torch.set_num_threads(plan.threads)
        pipe.say(run(plan, pipe))
        return
    most = given.max_images if given.max_images in (None, "auto") else int(given.max_images)
    plan = Plan(
        "ours", given.model, given.layers, given.tasks, given.images, given.granularity, given.storage_dtype,
        given.precision, most, given.device, given.threads, given.objective, given.steps + 1,
    )  # fmt: skip
    if given.quick:
        plan = plan._replace(model="tiny", tasks=2, images=2, steps=2, threads=1)
    print(", ".join(f"{key} {value}" for key, value in plan._asdict().items() if key not in ("row", "memory", "steps")))
    if given.sweep:
        text, found = sweep(plan, 4 if given.quick else given.total)
    else:
        rows = tuple(row for row in ROWS if row in {*given.rows, "ours", "floor"})
        found = measure(plan, rows, memory=not given.no_memory)
        text = table(found, plan)
    print(text)
    if given.output:
        given.output.write_text(json.dumps({"plan": plan._asdict(), "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
