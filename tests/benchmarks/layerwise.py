"""Memory and time of a step of adaptation with ``merge_by: network`` and ``block``, beside ordinary training.

    python tests/benchmarks/layerwise.py --shape vit-b-32 --tasks 8 --images 16
    python tests/benchmarks/layerwise.py --layers 3 --method ConcreteMerging --max-images 16

Rows: ``network`` and ``block`` are whole training steps in a fit, optimizer included. ``plain`` and ``checkpointed``
are the encoder's own forward and backward passes on the same images, of ordinary parameters that collect a gradient,
without and with activation checkpointing of its blocks.

``peak`` is the largest resident set of a step beyond what was resident before: for the merges beside the bank and what
is learned, for the encoder's own passes beside nothing, so their weights count as the merged weights do. It is measured
in a process of its own, with an allocator that gives freed memory back (glibc's, told to map every tensor), and given
in MB and in networks of float32. ``weights`` is the same with one image per task and one task per pass, so that
activations hardly count. Seconds are from further processes without that setting, ``--rounds`` times in turn: the
median of all steps, and the quickest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from dam_step import SHAPES, RandomSuite, resident  # type: ignore[import-not-found]
from torch import Tensor, nn

from lit_merge import MergeTrainer, TaskDataModule, methods

ROWS = ("network", "block", "plain", "checkpointed")


class Watch(L.Callback):
    """Times steps, and looks at their memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[int] = []

    def begin(self) -> None:
        self._before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        self._start = time.perf_counter()

    def end(self, besides: int = 0) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.peaks.append(resident("VmHWM") - self._before + besides)

    def on_train_batch_start(self, *_: Any) -> None:
        self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.end()


def adapt(given: argparse.Namespace, suite: Any, row: str, watch: Watch) -> None:
    """Steps of the merge."""
    options = {"mask_steps": 1000} if given.method == "ConcreteMerging" else {}
    model = getattr(methods, given.method)(
        suite=suite, merge_by=row, max_images=given.max_images, storage_dtype=given.storage_dtype, **options
    )
    trainer = MergeTrainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, precision=given.precision, callbacks=[watch],
    )  # fmt: skip
    trainer.fit(model, datamodule=TaskDataModule(suite, batch_size=given.images, steps_per_epoch=given.steps + 1))


def train(given: argparse.Namespace, suite: Any, row: str, watch: Watch) -> None:
    """Passes of the encoder by itself."""
    stack = [torch.stack([suite.dataset(t, "test")[i][0] for i in range(given.images)]) for t in suite.tasks]
    before = resident("VmRSS")
    network: nn.Module = suite.network()
    network.load_state_dict(dict(suite.base()), assign=True)
    network.eval().set_grad_checkpointing(row == "checkpointed")  # type: ignore[operator]
    besides = resident("VmRSS") - before
    for _ in range(given.steps + 1):
        watch.begin()
        for images in passes(stack, given.max_images):
            with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16-mixed"):
                network(images).square().mean().backward()
        watch.end(besides)
        network.zero_grad()


def passes(stack: list[Tensor], most: int | None) -> Iterator[Tensor]:
    """Images of several tasks at once, up to a number."""
    together = len(stack) if most is None else max(1, most // len(stack[0]))
    for start in range(0, len(stack), together):
        yield torch.cat(stack[start : start + together])


def measure(given: argparse.Namespace) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if given.what == "weights":
        given.images = given.max_images = 1
    SHAPES["asked"] = {**SHAPES[given.shape], **({} if given.layers is None else {"layers": given.layers})}
    suite, watch = RandomSuite("asked", given.tasks, given.images), Watch()
    (adapt if given.row in ROWS[:2] else train)(given, suite, given.row, watch)
    size = 4 * sum(shape.numel() for shape in suite.shapes.values())
    return {"seconds": watch.seconds[1:], "peak": max(watch.peaks[1:]), "network": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="vit-b-32")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task")
    parser.add_argument("--max-images", type=int, help="per encoder pass; by default all together")
    parser.add_argument("--method", choices=["AdaMerging", "ConcreteMerging"], default="AdaMerging")
    parser.add_argument("--storage-dtype", choices=["float32", "bfloat16"], help="of the task vectors")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(given)))
        return

    def run(row: str, what: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row, "--what", what]
        settings = os.environ | ({} if what == "seconds" else {"MALLOC_MMAP_THRESHOLD_": "65536"})
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=settings).stdout
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found

    seconds: dict[str, list[float]] = {row: [] for row in given.rows}
    for _ in range(given.rounds):
        for row in given.rows:
            seconds[row] += run(row, "seconds")["seconds"]
    found = {}
    for row in given.rows:
        peak, weights = run(row, "peak"), run(row, "weights")
        found[row] = {
            "median_s": median(seconds[row]), "least_s": min(seconds[row]), "peak_bytes": peak["peak"],
            "weights_bytes": weights["peak"], "network_bytes": peak["network"],
        }  # fmt: skip
    print(
        f"{given.method}, {given.shape}, {given.layers or SHAPES[given.shape]['layers']} layers, "
        f"{given.tasks} tasks x {given.images} images, {given.max_images or 'all'} per pass, {given.precision}, "
        f"{torch.get_num_threads()} threads"
    )
    print("| row | median, s | least, s | peak, MB | peak, networks | weights, networks |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row, one in found.items():
        size = one["network_bytes"]
        print(
            f"| {row} | {one['median_s']:.2f} | {one['least_s']:.2f} | {one['peak_bytes'] / 1e6:.0f} | "
            f"{one['peak_bytes'] / size:.2f} | {one['weights_bytes'] / size:.2f} |"
        )
    if given.output is not None:
        options = {key: value for key, value in vars(given).items() if key not in ("row", "what", "output")}
        given.output.write_text(json.dumps({"options": options, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
