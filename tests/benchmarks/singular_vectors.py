"""Merges by singular vectors beside plain textbook implementations, at the shapes of CLIP ViT-B/32.

    python tests/benchmarks/singular_vectors.py --experts 8 --output runs/singular-vectors
    python tests/benchmarks/singular_vectors.py --shapes small

Task vectors are random, of rank 16 plus noise: after the signal the spectrum is flat, which is the hard case, as the
cut lies there. Every run is a process of its own: seconds, largest resident set beyond that of the task vectors, and
the result, which is compared with the textbook's. The textbook is what the formula says, with ``torch.linalg.svd`` in
float32. Differences between both are rounding, amplified by the inverse of the smallest singular value of the
concatenation; ``--double`` runs the textbook in float64 as well, and compares both with that.

``tsv-randomized`` is TSV-M over randomised decompositions: within a percent of the best approximation of every task,
and yet another merge.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.checkpoints import write_json
from lit_merge.functional.decompositions import truncated_svd
from lit_merge.functional.isotropic import common_rank, iso_c, iso_cts
from lit_merge.functional.tsv import tsv_merge

Rule = Callable[[dict[str, Tensor]], dict[str, Tensor]]
METHODS = ("tsv", "iso-c", "iso-cts", "tsv-randomized")
BLOCK = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "out": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}


def shapes(which: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name; ``vit-b-32`` has those of the vision tower of CLIP."""
    width, blocks, tokens = {"vit-b-32": (768, 12, 50), "medium": (768, 1, 50), "small": (192, 2, 17)}[which]
    found: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 32, 32), "position.weight": (tokens, width)}
    for block in range(blocks):
        for name, (rows, columns) in BLOCK.items():
            found[f"{block}.{name}.weight"] = (rows * width, columns * width)
            found[f"{block}.{name}.bias"] = (rows * width,)
    return found


def task_vectors(which: str, experts: int, noise: float) -> dict[str, Tensor]:
    """Rank 16 plus noise, ``(T, *shape)`` each."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for name, shape in shapes(which).items():
        value = torch.empty(experts, *shape)
        for task in value:
            task.normal_(0, noise, generator=generator)
            if len(shape) == 2:
                left, right = (torch.randn(size, 16, generator=generator) for size in shape)
                task.addmm_(left, right.mT, alpha=0.25)
        result[name] = value
    return result


def whiten(vectors: Tensor) -> Tensor:
    p, _, q = torch.linalg.svd(vectors, full_matrices=False)
    found: Tensor = p @ q
    return found


def textbook_tsv(matrices: Tensor) -> Tensor:
    k = min(matrices.shape[1:]) // len(matrices)
    u, s, v = zip(*(torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices), strict=True)
    middle = torch.cat([x[:k] for x in s]).diag()
    return whiten(torch.cat([x[:, :k] for x in u], 1)) @ middle @ whiten(torch.cat([x[:k] for x in v]))


def textbook_iso_c(matrices: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    found: Tensor = u @ s.mean().expand(len(s)).diag() @ v
    return found


def textbook_iso_cts(matrices: Tensor) -> Tensor:
    shared, specific = common_rank(matrices.shape[1], matrices.shape[2], len(matrices))
    u, s, v = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    lefts, values, rights = [], [], []
    for matrix in matrices:
        x, y, z = torch.linalg.svd(matrix - u @ u.mT @ matrix, full_matrices=False)
        lefts.append(x[:, :specific])
        values.append(y[:specific])
        rights.append(z[:specific])
    mean = torch.cat([*values, s]).mean()
    return (
        whiten(torch.cat([*lefts, u], 1))
        @ (mean * torch.eye(len(s) + specific * len(matrices)).to(u))
        @ whiten(torch.cat([*rights, v]))
    )


def textbook(rule: Callable[[Tensor], Tensor], dtype: torch.dtype, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: rule(d.to(dtype)).float() if d.ndim == 3 else d.mean(0) for n, d in deltas.items()}


def rules(method: str) -> dict[str, Rule]:
    """Implementations by name."""
    plain = {"tsv": textbook_tsv, "tsv-randomized": textbook_tsv, "iso-c": textbook_iso_c, "iso-cts": textbook_iso_cts}
    ours: dict[str, Rule] = {
        "tsv": tsv_merge,
        "iso-c": iso_c,
        "iso-cts": iso_cts,
        "tsv-randomized": partial(tsv_merge, decompose=lambda matrix, k: truncated_svd(matrix, k, "randomized")),
    }
    return {
        "ours": ours[method],
        "textbook": partial(textbook, plain[method], torch.float32),
        "double": partial(textbook, plain[method], torch.float64),
    }


def measure(method: str, implementation: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run in this process."""
    torch.set_num_threads(given.threads)
    deltas = task_vectors(given.shapes, given.experts, given.noise)
    rule = rules(method)[implementation]
    rule({"warm.weight": torch.randn(2, 8, 8)})
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    merged = rule(deltas)
    row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    row["peak_bytes"] = resident() - before
    save_file({name: value.contiguous() for name, value in merged.items()}, given.result)
    return row


def resident() -> int:
    """Largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def distance(found: Path, expected: Path) -> float:
    """Largest relative difference of a tensor, in the Frobenius norm."""
    a, b = load_file(found), load_file(expected)
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["vit-b-32", "medium", "small"], default="vit-b-32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation; that of the signal is 1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--double", action="store_true", help="compare with the textbook in float64")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], given.measure[1], given)))
        return
    table: dict[str, dict[str, dict[str, Any]]] = {}
    print(
        "| method | implementation | seconds | CPU seconds | peak, MB | × faster | difference |\n" + "| --- " * 7 + "|"
    )
    for method in given.methods:
        names = [*(["double"] if given.double else []), "textbook", "ours"]
        with tempfile.TemporaryDirectory() as folder:
            rows = {}
            for name in names:
                result = Path(folder, f"{name}.safetensors")
                command = [sys.executable, __file__, *sys.argv[1:], "--measure", method, name, "--result", str(result)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows[name] = json.loads(done.stdout)
                rows[name]["difference"] = distance(result, Path(folder, f"{names[0]}.safetensors"))
                rows[name]["faster"] = rows.get("textbook", rows[name])["seconds"] / rows[name]["seconds"]
                line = "| {} | {} | {seconds:.2f} | {cpu_seconds:.2f} | {:.0f} | {faster:.1f} | {difference:.1e} |"
                print(line.format(method, name, rows[name]["peak_bytes"] / 1e6, **rows[name]), flush=True)
        table[method] = rows
    if given.output is not None:
        write_json(given.output / "results.json", {"shapes": given.shapes, "experts": given.experts, "rows": table})


if __name__ == "__main__":
    main()
