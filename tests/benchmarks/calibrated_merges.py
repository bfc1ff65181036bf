"""RegMean's normal equations beside the textbook form, at the shapes of CLIP ViT-B/32.

    python tests/benchmarks/calibrated_merges.py --experts 8 --output runs/calibrated-merges
    python tests/benchmarks/calibrated_merges.py --shapes small

The matrices G_t are those of 64 random inputs plus a diagonal, with entries that fall as 1 / k², so that layers are as
badly conditioned as those of a network. Task vectors are random. Each run is a process of its own: seconds are those of
the solutions alone, and the peak is the largest resident set beyond that of a process that only makes the matrices.

The textbook is (Σ_t G_t)⁻¹ Σ_t G_t W_tᵀ with ``torch.inverse``, all tasks' matrices of a layer in memory, in float32 as
published, and in float64. The differences are to float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.checkpoints import write_json
from lit_merge.functional.regmean import NormalEquations

ROWS = ("ours", "textbook float32", "textbook float64", "nothing")
SHAPES = {"vit-b-32": (768, 12), "medium": (768, 1), "small": (96, 2)}
BLOCK = {"in_proj": (3, 1), "out": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}


def layers(which: str) -> dict[str, tuple[int, int]]:
    width, blocks = SHAPES[which]
    return {f"{b}.{name}": (m * width, n * width) for b in range(blocks) for name, (m, n) in BLOCK.items()}


def drawn(name: str, task: int, *shape: int) -> Tensor:
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) + 7919 * task
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram(name: str, task: int, n: int) -> Tensor:
    spectrum = torch.arange(1, n + 1).pow(-2.0)
    inputs = drawn(name, task, 64, n) * spectrum.sqrt()
    return torch.addmm(spectrum.diag(), inputs.mT, inputs)


def shrunk(matrix: Tensor) -> Tensor:
    return 0.95 * matrix + 0.05 * matrix.diagonal().diag()


def solve(row: str, grams: list[Tensor], deltas: list[Tensor]) -> Tensor:
    if row == "ours":
        layer = NormalEquations()
        for matrix, delta in zip(grams, deltas, strict=True):
            layer.add(matrix, delta)
        return layer.solve(ridge=0)
    dtype = torch.float64 if row.endswith("64") else torch.float32
    matrices = [shrunk(matrix.to(dtype)) for matrix in grams]
    right = torch.stack([m @ d.to(dtype).mT for m, d in zip(matrices, deltas, strict=True)]).sum(0)
    return (torch.inverse(torch.stack(matrices).sum(0)) @ right).mT


def child(row: str, which: str, experts: int, folder: Path) -> None:
    found, seconds = {}, 0.0
    for name, (m, n) in layers(which).items():
        grams = [gram(name, task, n) for task in range(experts)]
        deltas = [0.01 * drawn(f"{name}/d", task, m, n) for task in range(experts)]
        begin = time.perf_counter()
        if row != "nothing":
            found[name] = solve(row, grams, deltas).double().contiguous()
        seconds += time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file(found, folder / f"{row}.safetensors")
    print(json.dumps({"seconds": seconds, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="vit-b-32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.shapes, args.experts, Path(args.child[1]))
        return
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for row in ROWS:
            command = [sys.executable, __file__, "--shapes", args.shapes, "--experts", str(args.experts)]
            done = subprocess.run([*command, "--child", row, temporary], check=True, capture_output=True, text=True)
            table[row] = json.loads(done.stdout.splitlines()[-1])
        exact = load_file(Path(temporary, "textbook float64.safetensors"))
        for row in ROWS[:-1]:
            own = load_file(Path(temporary, f"{row}.safetensors"))
            errors = [float((own[name] - value).norm() / value.norm()) for name, value in exact.items()]
            table[row] |= {"difference": max(errors), "peak": table[row]["peak"] - table["nothing"]["peak"]}
    print(f"RegMean, {args.shapes}, {args.experts} experts, {torch.get_num_threads()} threads")
    print(f"{'':20}{'seconds':>10}{'peak MiB':>10}{'difference':>12}")
    for row in ROWS[:-1]:
        facts = table[row]
        print(f"{row:20}{facts['seconds']:10.2f}{facts['peak'] / 2**20:10.0f}{facts['difference']:12.1e}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "calibrated_merges.json", table)


if __name__ == "__main__":
    main()
