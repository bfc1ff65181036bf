"""Experts that arrive one by one, on the embedded suite: accuracy, transfer and forgetting of every continual method.

    python tests/benchmarks/continual.py --output runs/continual --picture
    python tests/benchmarks/continual.py --methods opcm "last-*" --seeds 0 --orders given

A row is a bundled config with its shipped settings in a stream of all experts. After every stage the tasks that have
come and the next one are scored on their test images. There are three orders (as given, and shuffled with seeds 1 and
2) times three seeds of the suite. Rows that say "all at once" see all experts together; a scale that is "best" is the
one of ten with the highest accuracy on every fourth *training* image. With ``--scales``, final merges of the first
order and seed are also multiplied by several factors, and the best one is chosen on the *test* images, to tell length
from direction.

Seconds are CPU seconds of reading and absorbing an expert, training included, from the second stage on. Results are
kept in ``OUTPUT/rows``; a second call makes only what is missing, or older than its config.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from _continual import (  # type: ignore[import-not-found]
    AT_ONCE,
    ORDERS,
    ROWS,
    Row,
    against,
    best_scales,
    content_of,
    scored,
    table,
)
from _continual_picture import curves, heat_maps  # type: ignore[import-not-found]
from _embedded import accuracies  # type: ignore[import-not-found]
from torch import Tensor

from lit_merge import MergeModule, MiniSuite
from lit_merge.checkpoints import write_json
from lit_merge.checkpoints.digests import state_digest
from lit_merge.cli import MergeCLI
from lit_merge.cli import main as command

FACTORS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 2.0, 3.0)


def made(content: dict[str, Any], folder: str) -> MergeCLI:
    """Trainer, method and data of a config."""
    content["trainer"]["default_root_dir"] = folder
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    cli = command(["--config", str(path)], run=False)
    assert isinstance(cli, MergeCLI)
    return cli


def stream(cli: MergeCLI, factors: tuple[float, ...], folder: Path) -> dict[str, Any]:
    """Merge a stream of experts; after each stage score the tasks that have come, and the next one."""
    model: MergeModule = cli.model
    began, seconds, matrix = 0.0, [], []
    open_stage, close_stage = model.open_stage, model.close_stage

    def opened(*args: Any, **kwargs: Any) -> None:
        nonlocal began
        began = time.process_time()
        open_stage(*args, **kwargs)

    def closed(number: int) -> dict[str, Tensor]:
        result = close_stage(number)
        seconds.append(time.process_time() - began)
        assert model.progress is not None
        order = model.progress.order
        found = accuracies(model, model.merged_state(), "test", order[: number + 1])
        matrix.append([found.get(task) for task in order])
        return result

    model.open_stage, model.close_stage = opened, closed  # type: ignore[method-assign]
    cli.trainer.fit(model, datamodule=cli.datamodule)
    assert model.progress is not None
    found = {"matrix": matrix, "seconds": seconds} | references(model, list(model.progress.history), folder)
    if factors:
        base, merged = model.bank.base, model.merged_state()
        found["scales"] = {factor: _scaled(model, base, merged, factor) for factor in factors}
    return found


def references(model: MergeModule, tasks: list[str], folder: Path) -> dict[str, Any]:
    """Accuracies of base and experts, kept per suite."""
    assert isinstance(model.suite, MiniSuite)
    path = folder / f"references-{model.suite.seed}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("digest") != (digest := state_digest(model.suite.base())):
        experts = {task: accuracies(model, model.suite.expert(task), "test", (task,))[task] for task in tasks}
        known = {"digest": digest, "base": accuracies(model, model.suite.base(), "test"), "experts": experts}
        write_json(path, known)
    return {"tasks": tasks, **{name: [known[name][task] for task in tasks] for name in ("base", "experts")}}


def _scaled(model: MergeModule, base: Mapping[str, Tensor], merged: Mapping[str, Tensor], factor: float) -> float:
    state = {
        name: base[name] + factor * (value - base[name]) if value.is_floating_point() else value
        for name, value in merged.items()
    }
    return fmean(accuracies(model, state, "test").values())


def at_once(row: Row, seed: int, folder: str, rows: Path) -> dict[str, Any]:
    """Merge all experts together."""
    options, chosen = dict(row.options), None
    if row.grid:
        scores = {}
        for scale in row.grid:
            model = _at_once(row, {"scale": scale}, seed, folder)
            scores[scale] = fmean(accuracies(model, model.merged_state(), "train", every=4).values())
        chosen = max(scores, key=lambda scale: (scores[scale], -scale))
        options["scale"] = chosen
    model = _at_once(row, options, seed, folder)
    last = accuracies(model, model.merged_state(), "test")
    found = references(model, list(model.suite.tasks), rows)
    return found | {"matrix": [[last[task] for task in found["tasks"]]], "seconds": [], "chosen": chosen}


def _at_once(row: Row, options: dict[str, Any], seed: int, folder: str) -> MergeModule:
    content = content_of(row, seed, "given")
    content["model"]["init_args"] |= options
    model: MergeModule = made(content, folder).model
    model.configure_model()
    return model


def result_of(row: Row, seed: int, order: str, factors: tuple[float, ...], folder: Path) -> dict[str, Any]:
    """Result of a row; it is read if it is there."""
    content = content_of(row, seed, "given" if row.at_once else order)
    facts = json.dumps([content, asdict(row)], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    path = folder / (re.sub(r"\W+", "-", f"{row.name} {order} {seed}") + ".json")
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if result.get("digest") != digest or (factors and "scales" not in result):
        MiniSuite(seed=seed).prepare()
        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                if row.at_once:
                    found = at_once(row, seed, temporary, folder)
                else:
                    found = stream(made(content, temporary), factors, folder)
            except SystemExit:
                raise SystemExit(f"{row.name}: {said.getvalue()}") from None
        result = json.loads(json.dumps(
            {"name": row.name, "seed": seed, "order": order, "digest": digest, **found}
        ))  # fmt: skip
        write_json(path, result)
        shown = "  ".join(f"{name} {100 * v:.1f}" for name, v in scored(result).items() if v is not None)
        print(f"{row.name}, {order}, seed {seed}: {shown}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--methods", nargs="+", default=["*"], help="names of rows, with wildcards")
    parser.add_argument("--output", type=Path, default=Path("runs/continual"))
    parser.add_argument("--scales", action="store_true", help="multiply final merges of the first order and seed")
    parser.add_argument("--markdown", action="store_true", help="write the tables to OUTPUT/continual.md, too")
    parser.add_argument("--picture", action="store_true", help="draw OUTPUT/accuracy.png and OUTPUT/opcm.png")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = []
    for row in (row for row in ROWS if any(fnmatchcase(row.name, pattern) for pattern in args.methods)):
        for seed in args.seeds:
            for order in (AT_ONCE,) if row.at_once else args.orders:
                first = args.scales and seed == args.seeds[0] and order == args.orders[0]
                results.append(result_of(row, seed, order, FACTORS if first else (), args.output / "rows"))
    parts = [table(results)]
    with_opcm = any(result["name"] == "opcm" for result in results)
    if with_opcm:
        parts.append(against(results))
    if args.scales:
        parts.append(best_scales(results))
    print("\n\n".join(parts))
    if args.markdown:
        (args.output / "continual.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if args.picture:
        curves(results, args.output / "accuracy.png")
    if args.picture and with_opcm:
        heat_maps(results, args.output / "opcm.png")


if __name__ == "__main__":
    main()
