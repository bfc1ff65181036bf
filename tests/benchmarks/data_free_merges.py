"""TIES, TSV-M, isotropic merging, DOGE, WUDI and RegMean's solve beside plain textbook implementations.

    python tests/benchmarks/data_free_merges.py --output runs/data-free-merges    # ViT-B/32, 8 experts
    python tests/benchmarks/data_free_merges.py --shapes medium                   # one block of it
    python tests/benchmarks/data_free_merges.py --shapes small --double           # seconds

Task vectors are random: of rank 16, plus noise. After the signal the spectrum is flat, which is the hard case, as the
cut of a truncation lies there. The textbook, in ``data_free_textbook.py`` beside this file, is what a paper's formulas
say, written in whole tensors with economy decompositions in float32. Both are given the same tensors.

Every run is a process of its own. The two take turns, and each has the fastest of its repeats, as other programs can
only make it slower. The peak is the largest resident set beyond that when the inputs were made. The difference is that
of the results, relative, in the Frobenius norm of all tensors; it passes if it is below the tolerance of the method.
DOGE and WUDI take ``--steps`` steps of Adam, whatever is computed once included, and the difference is relative to how
far they came from their start. ``--double`` also compares both with the textbook in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from data_free_textbook import RULES as TEXTBOOK  # type: ignore[import-not-found]
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.checkpoints import write_json
from lit_merge.functional.doge import DogeProblem
from lit_merge.functional.isotropic import iso_c, iso_cts
from lit_merge.functional.layer_problem import descend, layer_batches, layer_shapes
from lit_merge.functional.regmean import regmean
from lit_merge.functional.ties import ties_merge
from lit_merge.functional.tsv import tsv_merge
from lit_merge.functional.wudi import wudi

Tensors = dict[str, Tensor]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # glibc returns what is freed: the peak is what is in use
BLOCK = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "out": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
SHAPES = {"vit-b-32": (768, 12, 50), "medium": (768, 1, 50), "small": (320, 1, 17)}
TOLERANCES = {"ties": 1e-6, "tsv": 2e-4, "iso-c": 2e-5, "iso-cts": 2e-4, "doge": 1e-3, "wudi": 1e-3, "regmean": 1e-4}
NAMES = {"ties": "TIES", "tsv": "TSV-M", "iso-c": "Iso-C", "iso-cts": "Iso-CTS", "doge": "DOGE", "wudi": "WUDI",
         "regmean": "RegMean"}  # fmt: skip

CELLS = ("method", "textbook, s", "ours, s", "× faster", "× less CPU", "textbook, MB", "ours, MB", "difference")
HEAD = [f"| {' | '.join(CELLS)} |", "| --- " * len(CELLS) + "|"]


def shapes(which: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name; ``vit-b-32`` has those of the vision tower of CLIP."""
    width, blocks, tokens = SHAPES[which]
    found: dict[str, tuple[int, ...]] = {"patch.weight": (width, 3, 32, 32), "position.weight": (tokens, width)}
    for block in range(blocks):
        for name, (rows, columns) in BLOCK.items():
            found[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            found[f"blocks.{block}.{name}.bias"] = (rows * width,)
    return found


def task_vectors(which: str, experts: int, noise: float) -> Tensors:
    """Rank 16 plus noise, ``(T, *shape)`` each, as views of one bank; about 3e-4 in size."""
    layout = shapes(which)
    bank = torch.empty(experts, sum(torch.Size(shape).numel() for shape in layout.values()))
    generator, result, start = torch.Generator().manual_seed(0), {}, 0
    for name, shape in layout.items():
        size = torch.Size(shape).numel()
        result[name] = bank[:, start : start + size].unflatten(1, shape)
        start += size
        for task in result[name]:
            task.normal_(0, 3e-4 * noise, generator=generator)
            if len(shape) == 2:
                left, right = (torch.randn(size, 16, generator=generator) for size in shape)
                task.addmm_(left, right.mT, alpha=3e-4 / 4)
    return result


def inputs(deltas: Tensors, method: str) -> tuple[Tensors, Tensors]:
    """What a method acts on, and RegMean's Gram matrices ``(T, n, n)``: of 64 inputs, with a spectrum of 1 / k²."""
    inside = {name: delta for name, delta in deltas.items() if name.startswith("blocks.") and delta.ndim == 3}
    if method in ("doge", "wudi"):
        return inside, {}
    if method != "regmean":
        return deltas, {}
    generator, grams = torch.Generator().manual_seed(1), {}
    for name, delta in inside.items():
        spectrum = torch.arange(1, delta.shape[2] + 1).pow(-2.0)
        grams[name] = spectrum.diag().repeat(len(delta), 1, 1)
        for gram in grams[name]:
            rows = torch.randn(64, len(spectrum), generator=generator) * spectrum.sqrt()
            gram.addmm_(rows.mT, rows)
    return inside, grams


def ours(method: str, deltas: Tensors, grams: Tensors, steps: int) -> Tensors:
    """What the package does."""
    if method == "regmean":
        return regmean(deltas, grams, ridge=0)
    if method == "wudi":
        return wudi(deltas, steps=steps)
    if method == "doge":
        learned: Tensors = {}
        for names in layer_shapes(deltas, tuple(deltas)).values():
            for part, batch in layer_batches(deltas, names):
                problem = DogeProblem(batch)
                learned |= zip(names[part], descend(problem, steps, 1e-4), strict=True)
        return learned
    everything = partial(iso_c, tolerance=0)  # the textbook keeps a direction of 1e-6, too, and so does this
    rule: Any = {"ties": ties_merge, "tsv": tsv_merge, "iso-c": everything, "iso-cts": iso_cts}[method]
    found: Tensors = rule(deltas)
    return found


def measure(method: str, implementation: str, given: argparse.Namespace) -> dict[str, float]:
    """Run in this process."""
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(implementation != "ours")

    def run(deltas: Tensors, grams: Tensors) -> Tensors:
        if implementation == "ours":
            return ours(method, deltas, grams, given.steps)
        dtype = torch.float64 if implementation == "double" else torch.float32
        found: Tensors = TEXTBOOK[method](deltas, grams, given.steps, dtype)
        return found

    run(*inputs(task_vectors("small", 2, given.noise), method))  # libraries are loaded, and do not count
    deltas, grams = inputs(task_vectors(given.shapes, given.experts, given.noise), method)
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    merged = run(deltas, grams)
    row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    row["peak_bytes"] = resident() - before
    start = {name: delta.sum(0) if method == "wudi" else torch.zeros(()) for name, delta in deltas.items()}
    save_file({n: (value.detach().double() - start[n]).contiguous() for n, value in merged.items()}, given.result)
    return row


def resident() -> int:
    """Largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def distance(found: Path, expected: Path) -> float:
    """Relative difference of two results."""
    a, b = load_file(found), load_file(expected)
    squares = [(float((a[name] - b[name]).square().sum()), float(b[name].square().sum())) for name in b]
    return float((sum(x for x, _ in squares) / sum(y for _, y in squares)) ** 0.5)


def compare(method: str, given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Run all implementations of a method in turn, ``--repeats`` times."""
    rows: dict[str, dict[str, float]] = {}
    results = {name: folder / f"{name}.safetensors" for name in ("double", "textbook", "ours")}
    for name in [*(["double"] if given.double else []), *["textbook", "ours"] * given.repeats]:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", method, name, "--result", str(results[name])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVE_BACK)
        row: dict[str, float] = json.loads(done.stdout)
        rows[name] = {key: min(value, rows.get(name, row)[key]) for key, value in row.items()}
    for name in rows:
        reference = "double" if given.double else "textbook"
        rows[name]["difference"] = distance(results[name], results[reference])
    return rows


def line(method: str, rows: dict[str, dict[str, float]]) -> str:
    """A row of the table."""
    found, plain = rows["ours"], rows["textbook"]
    cells = [NAMES[method], f"{plain['seconds']:.1f}", f"{found['seconds']:.1f}",
             f"{plain['seconds'] / found['seconds']:.1f}", f"{plain['cpu_seconds'] / found['cpu_seconds']:.1f}",
             f"{plain['peak_bytes'] / 1e6:.0f}", f"{found['peak_bytes'] / 1e6:.0f}",
             f"{found['difference']:.0e} (≤ {TOLERANCES[method]:.0e})"]  # fmt: skip
    if "double" in rows:
        cells[-1] += f"; textbook {plain['difference']:.0e}"
    return "| " + " | ".join(cells) + " |"


def write(given: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Add rows to ``results.json`` and ``table.md``, so that methods can be run one by one."""
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / "results.json"
    options = {key: getattr(given, key) for key in ("shapes", "experts", "noise", "steps", "repeats", "threads")}
    before = json.loads(path.read_text()) if path.is_file() else {}
    every = {**before.get("rows", {}), **{method: {"options": options, **row} for method, row in rows.items()}}
    every = {method: every[method] for method in NAMES if method in every}
    write_json(path, {"rows": every})
    (given.output / "table.md").write_text("\n".join([*HEAD, *(line(m, row) for m, row in every.items())]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="vit-b-32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation; that of the signal is 1")
    parser.add_argument("--steps", type=int, default=20, help="of DOGE and WUDI")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--double", action="store_true", help="compare with the textbook in float64")
    parser.add_argument("--output", type=Path, help="folder for results.json and table.md, which are added to")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure[0], given.measure[1], given)))
        return
    print("\n".join(HEAD), flush=True)
    every: dict[str, Any] = {}
    for method in given.methods:
        with tempfile.TemporaryDirectory() as folder:
            every[method] = compare(method, given, Path(folder))
        print(line(method, every[method]), flush=True)
        if given.output is not None:
            write(given, every)
    if bad := [m for m, rows in every.items() if rows["ours"]["difference"] > TOLERANCES[m]]:
        sys.exit(f"beyond the tolerance: {', '.join(bad)}")


if __name__ == "__main__":
    main()
