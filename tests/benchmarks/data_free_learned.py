"""A step of DOGE and WUDI beside the plain textbook form: seconds, peak memory, and the difference of the results.

    python tests/benchmarks/data_free_learned.py                  # ViT-B/32, 8 experts; about 8 GB, minutes a method
    python tests/benchmarks/data_free_learned.py --shapes block   # one block of it, below a minute
    python tests/benchmarks/data_free_learned.py --shapes small   # seconds

Task vectors are random: of low rank, plus noise. ``plain`` is autograd through T products a layer, one layer after the
other, a full projector, and Adam as it is by default; ``closed form`` is what a fit of ``Doge`` and ``Wudi`` does. Each
runs in a process of its own. Memory is the peak beside the task vectors, which are there in both. The difference is in
the norm of what was learned over all layers, relative to how far it came from its start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.functional.doge import DogeProblem
from lit_merge.functional.layer_problem import layer_batches, layer_shapes
from lit_merge.functional.wudi import WudiProblem

WIDTHS = {"vit-b-32": (768, 12), "block": (768, 1), "small": (96, 4)}
RATES = {"doge": 1e-4, "wudi": 1e-5}
Step = Callable[[], None]


def experts(shapes: str, tasks: int, seed: int = 0) -> dict[str, Tensor]:
    """Task vectors ``(T, m, n)`` of every matrix in a vision transformer's blocks, as views of one bank."""
    width, blocks = WIDTHS[shapes]
    layout = {
        f"blocks.{block}.{name}": shape
        for block in range(blocks)
        for name, shape in {
            **dict.fromkeys(("q.weight", "k.weight", "v.weight", "out.weight"), (width, width)),
            "fc1.weight": (4 * width, width),
            "fc2.weight": (width, 4 * width),
        }.items()
    }
    bank = torch.empty(tasks, sum(m * n for m, n in layout.values()))
    generator, views, start = torch.Generator().manual_seed(seed), {}, 0
    for name, (m, n) in layout.items():
        view = views[name] = bank[:, start : (start := start + m * n)].unflatten(1, (m, n))
        for one in view:
            left, right = torch.randn(m, 16, generator=generator), torch.randn(16, n, generator=generator)
            one.copy_(2e-4 * (left @ right) / 4 + 2e-4 * torch.randn(m, n, generator=generator))
    return views


def plain(method: str, deltas: dict[str, Tensor]) -> tuple[Step, dict[str, Tensor]]:
    """The formulas as they are written."""
    start: dict[str, Tensor] = {}
    losses: dict[str, Callable[[Tensor], Tensor]] = {}
    projectors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        if method == "doge":
            weights = [0.07 / one.norm() for one in delta]
            rank = min(delta.shape[1:])
            own = [torch.linalg.svd(one, full_matrices=False)[0][:, : rank // len(delta)] for one in delta]
            basis = torch.linalg.svd(torch.cat(own, 1), full_matrices=False)[0][:, : rank // 6]
            projectors[name] = basis @ basis.T

            def loss(x: Tensor, delta: Tensor = delta, weights: list[Tensor] = weights) -> Tensor:
                merged = torch.stack([w * (one + x) for w, one in zip(weights, delta, strict=True)]).sum(0)
                return torch.stack([((one * (one - merged)).sum(1) ** 2).sum() for one in delta]).sum()

            start[name] = torch.zeros_like(delta[0])
        else:

            def loss(x: Tensor, delta: Tensor = delta) -> Tensor:  # type: ignore[misc]
                return torch.stack([((x - d) @ d.T).square().sum() / d.square().sum() for d in delta]).sum()

            start[name] = delta.sum(0)
        losses[name] = loss
    values = {name: value.requires_grad_() for name, value in start.items()}
    adam = torch.optim.Adam(values.values(), lr=RATES[method])

    def step() -> None:
        adam.zero_grad()
        for name, value in values.items():
            losses[name](value).backward()
            if name in projectors and value.grad is not None:
                value.grad -= projectors[name] @ value.grad
        adam.step()

    return step, values


@torch.no_grad()
def closed_form(method: str, deltas: dict[str, Tensor]) -> tuple[Step, dict[str, Tensor]]:
    """What :class:`lit_merge.data_free_module.DataFreeModule` does, without a Trainer around it."""
    make = {"doge": DogeProblem, "wudi": WudiProblem}[method]
    groups = layer_shapes(deltas, tuple(deltas))
    problems = [[(part, make(batch)) for part, batch in layer_batches(deltas, names)] for names in groups.values()]
    values = [torch.cat([problem.start() for _, problem in group]) for group in problems]
    adam = torch.optim.Adam(values, lr=RATES[method], fused=True)

    @torch.no_grad()
    def step() -> None:
        for value, group in zip(values, problems, strict=True):
            gradient = torch.empty_like(value)
            for part, problem in group:
                gradient[part] = problem.gradient(value[part])[1]
            value.grad = gradient
            adam.step()
            value.grad = None

    named = [(name, one) for names, value in zip(groups.values(), values, strict=True)
             for name, one in zip(names, value, strict=True)]  # fmt: skip
    return step, dict(named)


def memory(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure(args: argparse.Namespace, form: str, method: str, output: Path) -> None:
    """Run one form of one method in this process."""
    torch.set_num_threads(args.threads)
    deltas = experts(args.shapes, args.tasks)
    for options in ({"fused": True}, {}):  # libraries are loaded, and do not count
        value = torch.ones(8, 8, requires_grad=True)
        (value @ torch.linalg.svd(value.detach())[0]).sum().backward()
        torch.linalg.eigh(value.detach().double())
        torch.optim.Adam([value], **options).step()  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the experts
    before, started = memory("VmRSS"), time.perf_counter()
    step, values = {"plain": plain, "closed form": closed_form}[form](method, deltas)
    step()  # whatever is computed once, is computed here
    first, seconds = time.perf_counter() - started, []
    for _ in range(args.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = memory("VmHWM") - before
    start = {name: delta.sum(0) if method == "wudi" else 0 for name, delta in deltas.items()}
    torch.save({name: value.detach() - start[name] for name, value in values.items()}, output)
    print(json.dumps({"once": first, "step": statistics.median(seconds), "bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=WIDTHS, default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--only", nargs=3, metavar=("FORM", "METHOD", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        measure(args, args.only[0], args.only[1], Path(args.only[2]))
        return
    print(f"{args.shapes}, {args.tasks} experts, {args.threads} threads, {args.steps} steps after the first")
    print(f"{'method':8}{'form':14}{'first step':>12}{'s / step':>12}{'peak MiB':>12}{'faster':>10}{'difference':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            report(args, method, Path(folder))


def report(args: argparse.Namespace, method: str, folder: Path) -> None:
    """Print the two lines of a method."""
    found: dict[str, dict[str, float]] = {}
    for form in ("plain", "closed form"):
        options = [f"--{name}={getattr(args, name)}" for name in ("shapes", "tasks", "steps", "threads")]
        command = [sys.executable, __file__, *options, "--only", form, method, str(folder / f"{form}.pt")]
        found[form] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    expected, got = (torch.load(folder / f"{form}.pt") for form in found)
    error = sum(float((got[name] - value).square().sum()) for name, value in expected.items())
    apart = (error / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
    for form, row in found.items():
        faster = "" if form == "plain" else f"{found['plain']['step'] / row['step']:.1f} x"
        apart_ = "" if form == "plain" else f"{apart:.1e}"
        print(f"{method:8}{form:14}{row['once']:12.3f}{row['step']:12.4f}{row['bytes'] / 2**20:12.1f}"
              f"{faster:>10}{apart_:>12}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
