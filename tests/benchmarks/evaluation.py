"""Images per second of ``trainer.test`` beside a plain loop of forward passes over the same batches.

    python tests/benchmarks/evaluation.py --model vit-b-32 --tasks 8 --batch_size 64 --batches 2 --output runs/eval.json

Base, experts and images are random, the images in memory. The floor is what nobody can do without: read the same
loaders, move each batch to the device, and run three networks on it under ``inference_mode``, as modules that hold
their weights; no head, no merge, no counting, no report. Each of the two is a process of its own and measured when it
is warm: the fastest evaluation after the first counts, and that of ``trainer.test`` has the merge in it. ``images/s``
counts an image once though three networks see it. Memory is the largest resident set beyond that of imports and
images, and on a GPU the most that was allocated there. The floor holds base, merge and experts as they are;
``trainer.test`` has base and task vectors, the merge, and one expert at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from dam_step import SHAPES, Images, RandomSuite  # type: ignore[import-not-found]

from lit_merge import MergeTrainer, TaskDataModule, methods
from lit_merge.module import MergeModule

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
}  # fmt: skip
UNIT = 1 if sys.platform == "darwin" else 1024


class Evaluated(RandomSuite):  # type: ignore[misc]
    """Random networks, and as many images as are asked for."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given.model, given.tasks, 1)
        count, size = given.batches * given.batch_size, self.options["image_size"]
        self._data = {task: Images(count, size, number) for number, task in enumerate(self.tasks)}


def by_the_trainer(model: MergeModule, data: TaskDataModule, device: str, times: int) -> list[float]:
    """Seconds of several evaluations; the first one reads the networks."""
    trainer = MergeTrainer(accelerator=device, devices=1, **QUIET)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        trainer.test(model, datamodule=data, verbose=False)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    rows = model.results["tasks"]
    assert all({"accuracy", "base_accuracy", "expert_accuracy"} <= rows[task].keys() for task in model.suite.tasks)
    return seconds


def by_hand(model: MergeModule, data: TaskDataModule, device: str, times: int) -> list[float]:
    """Seconds of several passes of the plain loop."""
    suite = model.suite
    networks = {}
    for name in ("merged", "base", *suite.tasks):
        networks[name] = suite.network()
        state = dict(suite.expert(name) if name in suite.tasks else suite.base())  # what the values are does not matter
        networks[name].load_state_dict(state, assign=True)
        networks[name].to(device).eval()
    data.setup("test")
    loaders = data.test_dataloader()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        with torch.inference_mode():
            for task, loader in loaders.items():
                for batch in loader:
                    images = batch.images.to(device)
                    for name in ("merged", "base", task):
                        networks[name](images)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(given: argparse.Namespace, what: str) -> dict[str, Any]:
    """Measure one of the two in this process."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision(given.matmul)
    suite = Evaluated(given)
    model = getattr(methods, given.method)(suite=suite)
    data = TaskDataModule(suite, eval_batch_size=given.batch_size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = by_the_trainer if what == "trainer" else by_hand
    first, *others = work(model, data, given.device, 1 + given.repeats)
    found: dict[str, Any] = {"first": first, "others": others, "seconds": min(others)}
    found["images_per_second"] = given.tasks * given.batches * given.batch_size / min(others)
    found["resident"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * UNIT
    if given.device == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    """Measure both, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="vit-b-32")
    parser.add_argument("--method", default="TaskArithmetic", help="One that learns nothing.")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="Per task.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--matmul", choices=["highest", "high", "medium"], default="highest", help="On a GPU.")
    parser.add_argument("--output", type=Path, help="File for all that was measured, as JSON.")
    parser.add_argument("--measure", choices=["trainer", "plain"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given, given.measure)))
        return
    found: dict[str, Any] = {}
    for what in ("plain", "trainer"):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", what]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        found[what] = json.loads(output.splitlines()[-1])
    floor = found["plain"]["images_per_second"]
    print(f"{given.model}, {given.tasks} tasks of {given.batches} batches of {given.batch_size}, {given.method}, "
          f"{given.device}, {torch.get_num_threads()} threads")  # fmt: skip
    print("| | seconds | images/s | of the floor | resident, MB | on the GPU, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in (("plain loop", found["plain"]), ("trainer.test", found["trainer"])):
        share, allocated = row["images_per_second"] / floor, row.get("allocated")
        shown = "–" if allocated is None else f"{allocated / 1e6:.0f}"
        print(f"| {name} | {row['seconds']:.2f} | {row['images_per_second']:.1f} | {share:.0%} | "
              f"{row['resident'] / 1e6:.0f} | {shown} |")  # fmt: skip
    if given.output is not None:
        options = {key: value for key, value in vars(given).items() if key not in ("output", "measure")}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"options": options, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
