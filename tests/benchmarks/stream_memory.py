"""Peak memory and seconds of a stream of 2, 8 and 32 experts at the shapes of CLIP ViT-B/32.

    python tests/benchmarks/stream_memory.py
    python tests/benchmarks/stream_memory.py --methods Opcm --experts 2 8 32 --layers 3

Every count of experts is a process of its own, which merges them with ``SequentialMerging`` and ``ResumePoint``, stage
files and checkpoints included, without scoring. An expert is made tensor by tensor when it is read (the base plus a
share of itself, shifted by another number of entries each), so nothing is left of it but what the stream keeps. The
base is in memory, as that of a suite is; it counts.

The peak is of resident memory beyond that of the imports; a network is one in float32. glibc keeps freed blocks of up
to 32 MiB for later, in an order that differs from run to run: half a network more or less. So MALLOC_MMAP_THRESHOLD_
is set for blocks to go back to the system at once, and the peak is what is in use; ``--keep_blocks`` leaves that out.

Seconds are CPU seconds of one thread per stage, from the second one on: of the method, and of everything else, which
is making, checking and hashing the expert, and the stage file. Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from dam_step import SHAPES, RandomSuite  # type: ignore[import-not-found]
from torch import Tensor

from lit_merge import MergeTrainer, methods
from lit_merge.callbacks import ResumePoint, SequentialMerging

RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}
COLUMNS = ("method", "experts", "peak MiB", "networks", "method s per stage", "other s per stage", "on disk MiB")


class Shifted(Mapping[str, Tensor]):
    """An expert that exists only while it is read."""

    def __init__(self, base: Mapping[str, Tensor], number: int) -> None:
        self.base, self.number = base, number

    def __getitem__(self, name: str) -> Tensor:
        value = self.base[name]
        return value.flatten().roll(1009 * self.number).mul_(0.05).view_as(value).add_(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


class Stream(RandomSuite):  # type: ignore[misc]
    """Experts at the shapes of CLIP."""

    def __init__(self, layers: int, experts: int) -> None:
        SHAPES["stream"] = {**SHAPES["vit-b-32"], "layers": layers}
        super().__init__("stream", experts, 0)
        self._base = dict(super().base())

    def base(self) -> Mapping[str, Tensor]:
        return self._base

    def expert(self, task: str) -> Mapping[str, Tensor]:
        return Shifted(self._base, 1 + self.tasks.index(task))


def memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def load_libraries() -> None:
    """Load what torch loads at the first use."""
    value = torch.randn(64, 64)
    torch.linalg.eigh((value @ value.mT).double())
    torch.linalg.svd(value)


def measure(method: str, experts: int, layers: int) -> dict[str, Any]:
    """Merge a stream in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    load_libraries()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory("VmRSS")
    suite = Stream(layers, experts)
    size = 4 * sum(shape.numel() for shape in suite.shapes.values())
    model = getattr(methods, method)(suite=suite)
    in_method, ends = [], []
    absorb = model.absorb

    def timed(*args: Any) -> dict[str, Tensor]:
        start = time.process_time()
        merged: dict[str, Tensor] = absorb(*args)
        in_method.append(time.process_time() - start)
        ends.append(time.process_time())
        return merged

    model.absorb = timed
    with tempfile.TemporaryDirectory() as folder:
        trainer = MergeTrainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[SequentialMerging(evaluate="none"), ResumePoint()], default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model)
        peak = memory("VmHWM") - before
        disk = sum(path.stat().st_size for path in Path(folder).iterdir())
    whole = (ends[-1] - ends[0]) / (experts - 1)
    own = fmean(in_method[1:])
    return {"peak": peak, "networks": peak / size, "own": own, "other": whole - own, "disk": disk}


def line(method: str, experts: int, found: Mapping[str, Any]) -> str:
    """One row of the table."""
    numbers = (f"{found['peak'] / 2**20:.0f}", f"{found['networks']:.2f}", f"{found['own']:.2g}",
               f"{found['other']:.2g}", f"{found['disk'] / 2**20:.0f}")  # fmt: skip
    return f"| {method} | {experts} | {' | '.join(numbers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["SimpleAverage", "Opcm"])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 32], help="at least 2")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the vision tower")
    parser.add_argument("--keep_blocks", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.methods[0], args.experts[0], args.layers)))
        return
    environment = {**os.environ, **({} if args.keep_blocks else RETURN)}
    print(f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), sep="\n")
    for method in args.methods:
        peaks = []
        for experts in args.experts:
            command = [sys.executable, __file__, "--here", "--methods", method, "--experts", str(experts)]
            command += ["--layers", str(args.layers)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            found = json.loads(said.stdout.splitlines()[-1])
            peaks.append(found["peak"])
            print(line(method, experts, found), flush=True)
        spread = 100 * (max(peaks) / min(peaks) - 1)
        print(f"| {method} | {min(args.experts)} to {max(args.experts)} | {spread:+.1f} % |  |  |  |  |", flush=True)


if __name__ == "__main__":
    main()
