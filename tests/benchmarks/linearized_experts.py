"""Experts fine-tuned in the tangent space beside ordinary ones, on the embedded suite.

    python tests/benchmarks/linearized_experts.py --seeds 0 1 2 --output runs/linearized-experts

Both kinds share base, heads, images, batches, number of steps and schedule. Linearised experts are run and merged in
the tangent of the base (arXiv 2305.12827). The best scale of ten, 0.05 to 0.5, is chosen by accuracy on *training*
images. Where the tangent is exact nothing but the sum of the task vectors counts; "additivity" says how far from that
a network is: the mean over test images of ‖f(θ0 + Σ τ) − f(θ0) − Σ (f(θ0 + τ_t) − f(θ0))‖ / ‖f(θ0 + Σ τ) − f(θ0)‖.

The learning rate of linearised experts is that with the best mean accuracy on training images;
``--rates 1e-4 4e-4 1e-3 2e-3 --tasks mnist`` prints these accuracies instead of the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from statistics import fmean

import torch
from embedded_suite import Row, accuracies, row, table  # type: ignore[import-not-found]

from lit_merge import MergeModule, MiniSuite, SimpleAverage, TaskArithmetic
from lit_merge.checkpoints import write_json
from lit_merge.suites import _mini_build as build

SCALES = tuple(s / 20 for s in range(1, 11))


def train_accuracy(module: MergeModule, scale: float) -> float:
    return fmean(accuracies(module, module.complete(module.bank.contract(scale)), "train").values())


def merges(suite: MiniSuite, label: str = "") -> dict[str, Row]:
    start = time.monotonic()
    suite.prepare()
    built = time.monotonic() - start
    module = TaskArithmetic(suite=suite)
    module.configure_model()
    experts = {task: accuracies(module, suite.expert(task), "test")[task] for task in suite.tasks}
    rows: dict[str, Row] = {} if label else {"base": row(module, suite.base(), experts, 0.0)}
    average = SimpleAverage(suite=suite).merge(module.bank)
    rows[f"{label}simple average"] = row(module, module.complete(average), experts, 0.0)
    rows[f"{label}task arithmetic, 0.3"] = row(module, module.complete(module.bank.contract(0.3)), experts, 0.0)
    start = time.monotonic()
    scale = max(SCALES, key=lambda s: train_accuracy(module, s))
    seconds = time.monotonic() - start
    best = row(module, module.complete(module.bank.contract(scale)), experts, seconds)
    rows[f"{label}task arithmetic, best scale"] = best | {"scale": scale}
    top: Row = {"accuracy": fmean(experts.values()), "normalized": 1.0, "seconds": built, "tasks": experts}
    return rows | {f"{label}experts": top | {"additivity": additivity(module)}}


@torch.inference_mode()
def additivity(module: MergeModule, images_per_task: int = 32) -> float:
    """Relative distance of the sum of all task vectors' effects from the effect of their sum; 0 in a linear model."""
    suite, result = module.suite, []
    for task in suite.tasks:
        data = suite.dataset(task, "test")
        images = torch.stack([data[i][0] for i in range(images_per_task)])
        start = module.skeleton(dict(suite.base()), images)
        together = module.skeleton(module.complete(module.bank.contract(1.0)), images) - start
        apart = sum(module.skeleton(dict(suite.expert(t)), images) - start for t in suite.tasks)
        result.append(((together - apart).norm(dim=-1) / together.norm(dim=-1)).mean().item())
    return fmean(result)


def sweep(rates: list[float], tasks: list[str], seed: int) -> None:
    """Print the mean accuracy on training images per learning rate."""
    for rate in rates:
        build.LINEARIZED_RATE = rate
        suite = MiniSuite(seed=seed, finetuning="linearized")
        module = TaskArithmetic(suite=suite)
        module.configure_model()
        scores = {task: accuracies(module, suite.expert(task), "train")[task] for task in tasks}
        print(f"{rate:g}: {100 * fmean(scores.values()):.2f}", {task: round(100 * a, 1) for task, a in scores.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/linearized-experts"))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--tasks", nargs="+", default=list(MiniSuite().tasks), help="of --rates")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if arguments.rates:
        sweep(arguments.rates, arguments.tasks, arguments.seeds[0])
        return
    store = arguments.output / "results.json"
    results: dict[str, dict[str, Row]] = json.loads(store.read_text()) if store.is_file() else {}
    for seed in arguments.seeds:
        if str(seed) not in results:
            linear = merges(MiniSuite(seed=seed, finetuning="linearized"), "linearised: ")
            results[str(seed)] = merges(MiniSuite(seed=seed)) | linear
            write_json(store, results)
    chosen = {str(seed): results[str(seed)] for seed in arguments.seeds}
    print(table(chosen))
    for label in ("", "linearised: "):
        distances = [found[f"{label}experts"]["additivity"] for found in chosen.values()]
        scales = [found[f"{label}task arithmetic, best scale"]["scale"] for found in chosen.values()]
        print(f"{label or 'ordinary: '}additivity {fmean(distances):.2g}, best scales {scales}")


if __name__ == "__main__":
    main()
