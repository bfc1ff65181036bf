"""AdaMerging and fixed scales on the embedded suite: the first table and the picture of README.

    python tests/benchmarks/embedded_suite.py --seeds 0 1 2 --output runs/embedded-suite

Each seed builds its own base, heads and experts, and draws its own order of adaptation images. All methods see the
same suites. What has a scale (task arithmetic, TIES) takes the best of ten, 0.1 to 1.0, by accuracy on *training*
images; the row "oracle" takes the best by the scored labels themselves, which no one could do in practice.
AdaMerging runs its published defaults with nothing tuned. Seconds are those of making the merge, selection included;
for the experts, those of building the suite, 0 if it was cached. They are the least over seeds. Finished seeds are
kept in results.json, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
from _embedded import SCALES, Row, accuracies, spread  # type: ignore[import-not-found]
from torch import Tensor

from lit_merge import AdaMerging, MergeModule, MergeTrainer, MiniSuite, SimpleAverage, TaskArithmetic, TaskDataModule
from lit_merge import functional as F
from lit_merge.callbacks.coefficient_monitor import draw_heat_map
from lit_merge.checkpoints import write_json
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, Objective, WeightedSum
from lit_merge.suites import Split, Suite
from lit_merge.transforms import Ties


def row(module: MergeModule, state: Mapping[str, Tensor], experts: Mapping[str, float], seconds: float) -> Row:
    scores = accuracies(module, state, "test")
    return {
        "accuracy": fmean(scores.values()),
        "normalized": fmean(scores[t] / experts[t] for t in scores),
        "seconds": seconds,
        "tasks": scores,
    }


def best_scale(module: MergeModule, merge: Callable[[float], Mapping[str, Tensor]], split: Split) -> float:
    """Scale with the highest mean accuracy on one split; the smaller one if equal."""
    scale: float = max(SCALES, key=lambda s: fmean(accuracies(module, module.complete(merge(s)), split).values()))
    return scale


def data_free(suite: Suite, experts: Mapping[str, float]) -> dict[str, Row]:
    module = TaskArithmetic(suite=suite)
    module.configure_model()
    bank, rows = module.bank, {}
    kept = F.ties(bank.deltas)
    rules: dict[str, Callable[[float], Mapping[str, Tensor]]] = {
        "task arithmetic": bank.contract,
        "TIES (disjoint mean)": lambda s: bank.offset(F.disjoint_mean_merge(kept), s),
        "TIES (disjoint sum)": lambda s: bank.offset(F.sum_merge(kept, s)),
    }
    average = SimpleAverage(suite=suite)
    rows["simple average"] = row(module, module.complete(average.merge(bank)), experts, 0.0)
    rows["task arithmetic, 0.3"] = row(module, module.complete(bank.contract(0.3)), experts, 0.0)
    for name, merge in rules.items():
        start = time.monotonic()
        scale = best_scale(module, merge, "train")
        seconds = time.monotonic() - start
        rows[f"{name}, best scale"] = row(module, module.complete(merge(scale)), experts, seconds) | {"scale": scale}
    scale = best_scale(module, bank.contract, "test")
    oracle = row(module, module.complete(bank.contract(scale)), experts, 0.0)
    return rows | {"task arithmetic, oracle scale": oracle | {"scale": scale}}


def adapted(suite: Suite, seed: int, epochs: int, experts: Mapping[str, float], picture: Path) -> dict[str, Row]:
    objectives: dict[str, Objective] = {
        "entropy": Entropy(),
        "entropy + diversity": WeightedSum([Entropy(), Diversity()]),
        "alignment": ExpertAlignment("kl"),
    }
    forms: dict[str, dict[str, Any]] = {
        "AdaMerging, task": {"granularity": "task"},
        "AdaMerging, tensor": {"granularity": "tensor"},
        "AdaMerging++, tensor": {"granularity": "tensor", "transforms": [Ties()]},
    }
    rows = {}
    for form, arguments in forms.items():
        for name, objective in objectives.items():
            L.seed_everything(seed, verbose=False)
            module = AdaMerging(suite=suite, objective=objective, **arguments)
            start = time.monotonic()
            trainer = MergeTrainer(
                max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
            )  # fmt: skip
            trainer.fit(module, datamodule=TaskDataModule(suite, batch_size=16, steps_per_epoch=100, seed=seed))
            seconds = time.monotonic() - start
            rows[f"{form}, {name}"] = row(module, module.merged_state(), experts, seconds)
            if form == "AdaMerging, tensor" and name == "alignment":
                draw_heat_map(picture, module.weights().detach(), suite.tasks, module.bank.names)
    return rows


def one_seed(seed: int, epochs: int, output: Path) -> dict[str, Row]:
    suite = MiniSuite(seed=seed)
    start = time.monotonic()
    suite.prepare()
    built = time.monotonic() - start
    module = SimpleAverage(suite=suite)
    module.configure_model()
    experts = {task: accuracies(module, suite.expert(task), "test")[task] for task in suite.tasks}
    top = {"accuracy": fmean(experts.values()), "normalized": 1.0, "seconds": built, "tasks": experts}
    base = row(module, suite.base(), experts, 0.0)
    picture = output / f"coefficients-{seed}.png"
    return {"base": base, **data_free(suite, experts), **adapted(suite, seed, epochs, experts, picture), "experts": top}


def table(results: Mapping[str, Mapping[str, Row]]) -> str:
    """Markdown table: mean ± standard deviation over seeds, in percent."""
    seeds = list(results.values())
    base, top = (fmean(s[name]["accuracy"] for s in seeds) for name in ("base", "experts"))
    lines = ["| method | accuracy | normalized | gap closed | seconds |", "| --- | --- | --- | --- | --- |"]
    for name in seeds[0]:
        cells = [f"{spread([100 * s[name][key] for s in seeds])}" for key in ("accuracy", "normalized")]
        closed = (fmean(s[name]["accuracy"] for s in seeds) - base) / (top - base)
        seconds = min(s[name]["seconds"] for s in seeds)  # whatever else the machine did
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * closed:.0f} % | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of 100 adaptation steps")
    parser.add_argument("--output", type=Path, default=Path("runs/embedded-suite"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    store = arguments.output / "results.json"
    results: dict[str, dict[str, Row]] = json.loads(store.read_text()) if store.is_file() else {}
    for seed in arguments.seeds:
        if str(seed) not in results:
            results[str(seed)] = one_seed(seed, arguments.epochs, arguments.output)
            write_json(store, results)
    print(table({str(seed): results[str(seed)] for seed in arguments.seeds}))


if __name__ == "__main__":
    main()
