"""Peak memory and time of opening a base and its experts at the shapes of CLIP ViT-B/32, from files of random weights.

    python tests/benchmarks/opening_experts.py --experts 8 --storage_dtype bfloat16 --threads 1 2 4

Everything that a fit does before its first step is measured in a process of its own: reading, checking and hashing
base and experts, the bank, the skeleton. Heads come from files. Memory is the largest resident set beyond that of the
imports, pages of files included, in units of one model in float32. ``--threads``: how many experts are read at the same
time, and no more than there are cores; ``busy`` is CPU time over seconds. The bound on memory has a tensor per thread
in it, which is small.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lit_merge.suites.task_files import load_task

TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd", "pcam", "fer2013", "stl10",
         "cifar100", "cifar10", "food101", "kmnist")  # fmt: skip
SHAPE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 32, "projection_dim": 512, "hidden_act": "quick_gelu"}  # fmt: skip


def write(folder: Path, experts: int) -> int:
    """Write base, experts and heads; return the bytes of one model in float32."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    base = CLIPVisionModelWithProjection(CLIPVisionConfig(**SHAPE))
    base.save_pretrained(folder / "base")
    state = dict(base.vision_model.state_dict())
    size = 4 * sum(int(value.numel()) for value in state.values())
    for number, task in enumerate(TASKS[:experts]):
        generator = torch.Generator().manual_seed(number)
        shift = 1e-3 * torch.randn(768, generator=generator)
        expert = {f"vision_model.{name}": value + shift[: value.shape[-1]].mean() for name, value in state.items()}
        (folder / task).mkdir()
        save_file(expert, folder / task / "model.safetensors", metadata={"format": "pt"})
        save_file(
            {"weight": torch.randn(len(load_task(task).classes or range(10)), 512)}, folder / task / "head.safetensors"
        )
    return size


def measure(folder: Path, experts: int, storage_dtype: str, most: int) -> dict[str, Any]:
    """Open everything in this process."""
    from lit_merge import AdaMerging
    from lit_merge.checkpoints import threads
    from lit_merge.encoders.hugging_face_encoder import HuggingFaceEncoder
    from lit_merge.suites import ClipSuite

    class Opened(ClipSuite):
        def prepare(self) -> None:
            """Leave the images alone."""

    HuggingFaceEncoder({"model_type": "clip_vision_model", **SHAPE, "num_hidden_layers": 1})  # imports transformers
    suite = Opened(str(folder / "base"), str(folder / "{task}"), list(TASKS[:experts]),
                   heads=str(folder / "{task}/head.safetensors"))  # fmt: skip
    threads.MOST_THREADS = most
    before, start, busy = resident(), time.perf_counter(), time.process_time()
    model = AdaMerging(suite=suite, storage_dtype=storage_dtype)
    model.configure_model()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"peak": resident() - before, "seconds": seconds, "busy": busy / seconds}


def resident() -> int:
    """Largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--storage_dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, help="File for the rows, as JSON.")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.experts[0], given.storage_dtype[0], given.threads[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder, max(given.experts))
        print(f"one model: {size / 1e6:.0f} MB in float32, its projection not counted")
        print("experts   storage  threads      peak  models   bound  seconds  busy")
        rows = []
        for experts, dtype, threads in product(given.experts, given.storage_dtype, given.threads):
            command = [sys.executable, __file__, f"--measure={folder}", f"--experts={experts}"]
            command += [f"--storage_dtype={dtype}", f"--threads={threads}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            found = json.loads(output.splitlines()[-1])
            bytes_each = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}[dtype]
            bound = (experts + 1) * bytes_each + 1.5
            peak = found["peak"]
            row = (
                f"{peak / 1e6:5.0f} MB  {peak / size:6.2f}  {bound:6.2f}  {found['seconds']:7.1f}  {found['busy']:4.1f}"
            )
            print(f"{experts:7}  {dtype:>8}  {threads:7}  {row}", flush=True)
            rows.append({"experts": experts, "storage_dtype": dtype, "threads": threads, "bound": bound, **found})
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"model_bytes": size, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
