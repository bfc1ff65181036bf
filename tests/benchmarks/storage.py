"""What each storage of the bank costs: time and throughput of a contraction, memory, and time of an adaptation step.

    python tests/benchmarks/storage.py --model vit-b-32 --tasks 8 --dtype float32 --device cpu
    python tests/benchmarks/storage.py --device cuda --json storage.json

Networks have random weights. ``forward`` merges (one pass over the bank), ``backward`` brings the gradient of the
merged weights back to the coefficients (another one); ``GB/s`` is bytes of the bank over the forward time. ``step`` is
forward, encoder with ``--images`` images per task, backward. Times are medians. ``private`` is by how much the memory
of the process grew that no file is behind, when the bank was made, ``device`` what of the GPU is in use then; in the
JSON ``peak_resident`` is by how much the resident set had grown at most until then, pages of files included. Every
storage has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge import TaskVectors
from lit_merge.encoders.vit import small_vit
from lit_merge.functional.leaf_gradient import leaf_loss, leaves
from lit_merge.skeleton import Skeleton
from lit_merge.storage import StorageChoice

STORAGES = ("device", "host", "mmap", "low_rank")
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 2, "output_dim": 32},
    "vit-s-32": {"image_size": 224, "patch_size": 32, "width": 384, "layers": 12, "heads": 6, "output_dim": 384},
    "vit-b-32": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "heads": 12, "output_dim": 512},
}


class Nearby(Mapping[str, Tensor]):
    """An expert that is made as it is read."""

    def __init__(self, base: Mapping[str, Tensor], seed: int) -> None:
        self.base, self.seed = base, seed

    def __getitem__(self, name: str) -> Tensor:
        value = self.base[name]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(self.seed))
        return value + 1e-3 * noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def measure(storage: str, options: argparse.Namespace) -> dict[str, Any]:
    """One storage, in this process."""
    device, shape = torch.device(options.device), MODELS[options.model]
    torch.manual_seed(0)
    network = small_vit(mlp_ratio=4.0, **shape).eval()
    base = network.state_dict()
    before, resident = private(), private("VmRSS")
    started = time.perf_counter()
    tv = TaskVectors.from_state_dicts(
        base,
        {f"t{t}": Nearby(base, t) for t in range(options.tasks)},
        dtype=getattr(torch, options.dtype),
        storage=StorageChoice(storage, rank=options.rank, folder=options.folder, device=device),  # type: ignore[arg-type]
    ).to(device)
    made = time.perf_counter() - started
    kept, peak = private() - before, private("VmHWM") - resident
    skeleton = Skeleton(network).to(device)
    images = torch.randn(options.images * options.tasks, 3, shape["image_size"], shape["image_size"], device=device)
    coefficients = torch.full((options.tasks, len(tv.names)), 0.3, device=device, requires_grad=True)
    merged = tv.contract(coefficients)
    gradients = [torch.randn_like(value) for value in merged.values()]

    def step() -> None:
        weights = leaves(made := tv.contract(coefficients))
        loss = leaf_loss(made, weights, (skeleton(tv.complete(weights), images).square().mean() for _ in range(1)))
        torch.autograd.grad(loss, coefficients)

    def forward() -> None:
        with torch.no_grad():
            tv.contract(coefficients)

    def backward() -> None:
        torch.autograd.grad(list(merged.values()), coefficients, gradients, retain_graph=True)

    size = sum(tv.sizes) * (4 + options.tasks * getattr(torch, options.dtype).itemsize)
    found: dict[str, Any] = {"storage": storage, "made": made, "bank": size, "private": kept, "peak_resident": peak}
    if device.type == "cuda":
        found["device"] = torch.cuda.memory_allocated(device)
    for name, work in (("forward", forward), ("backward", backward), ("step", step)):
        found[name] = seconds(work, device, options.repeats)
    found["gigabytes_per_second"] = size / found["forward"] / 1e9
    return found | ({"lost": lost["relative_error"]} if (lost := tv.storage_report()) else {})


def seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median time of some work."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def private(key: str = "RssAnon") -> int:
    """Bytes of memory in use that no file is behind, or another line of the status; 0 where the system does not say."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=4, help="per task")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=float, default=0.25, help="share of directions of low_rank")
    parser.add_argument("--folder", help="of mmap")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given)))
        return
    rows = []
    print(f"{given.model}, {given.tasks} tasks, {given.dtype}, {given.device}, {given.images} images per task")
    print(f"{'storage':>8} {'bank MB':>8} {'private':>8} {'device':>8} {'made s':>7} "
          f"{'forward ms':>10} {'backward ms':>11} {'GB/s':>6} {'step ms':>8}  lost")  # fmt: skip
    for storage in given.storages:
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={storage}"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        rows.append(row)
        lost = f"{row['lost']:.2f}" if "lost" in row else "-"
        print(f"{storage:>8} {row['bank'] / 1e6:8.1f} {row['private'] / 1e6:8.1f} {row.get('device', 0) / 1e6:8.1f} "
              f"{row['made']:7.2f} {1e3 * row['forward']:10.2f} {1e3 * row['backward']:11.2f} "
              f"{row['gigabytes_per_second']:6.1f} {1e3 * row['step']:8.1f}  {lost}")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"options": vars(given) | {"json": str(given.json)}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
