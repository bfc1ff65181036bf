"""What is in the table of :mod:`continual`, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import yaml

from lit_merge import configs
from lit_merge.functional import continual_metrics

__all__ = (
    "AT_ONCE",
    "COLUMNS",
    "ORDERS",
    "ROWS",
    "Result",
    "Row",
    "against",
    "best_scales",
    "content_of",
    "filled",
    "groups",
    "scored",
    "table",
)

Result = Mapping[str, Any]
SCALES = tuple(s / 10 for s in range(1, 11))
COLUMNS = ("average_accuracy", "normalized_accuracy", "backward_transfer", "forgetting", "forward_transfer")
ORDERS = {"given": ("given", 0), "shuffle 1": ("shuffle", 1), "shuffle 2": ("shuffle", 2)}
AT_ONCE = "all at once"
TRAINER = {
    "logger": False, "accelerator": "cpu", "limit_val_batches": 0, "enable_progress_bar": False,
    "enable_checkpointing": False, "enable_model_summary": False,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row: a config, arguments of the method that differ from it, and whether all experts are seen at once."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    at_once: bool = False
    grid: tuple[float, ...] = ()


ROWS = (
    Row("opcm", "opcm"),
    Row("opcm, diagonal kept", "opcm", {"diagonal": False}),
    Row("dop", "dop"),
    Row("sequential-average", "sequential-average"),
    Row("sequential-task-arithmetic", "sequential-task-arithmetic"),
    Row("sequential-ties, add", "sequential-ties"),
    Row("sequential-ties, replace", "sequential-ties", {"reduce": "mean", "scale": 1.0, "sequential": "replace"}),
    Row("sequential-magmax", "sequential-magmax"),
    Row("last-k, k = 1", "last-k", {"k": 1}),
    Row("last-k, k = 3", "last-k"),
    Row("sequential-adamerging", "sequential-adamerging"),
    Row("simple-average, all at once", "simple-average", at_once=True),
    Row("task-arithmetic, all at once, best scale", "task-arithmetic", at_once=True, grid=SCALES),
)


def content_of(row: Row, seed: int, order: str) -> dict[str, Any]:
    """The row's config as it is run."""
    path = configs.find(row.config)
    if path is None:
        raise SystemExit(f"there is no bundled config {row.config}")
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["seed_everything"] = seed
    content["suite"].setdefault("init_args", {})["seed"] = seed
    content["model"].setdefault("init_args", {}).update(row.options)
    callbacks = [each for each in content["trainer"]["callbacks"] if each["class_path"].endswith("SequentialMerging")]
    for callback in callbacks:
        kind, number = ORDERS[order]
        callback["init_args"] |= {"order": kind, "seed": number, "evaluate": "none"}
    content["trainer"] = {**content["trainer"], **TRAINER, "callbacks": callbacks}
    return content


def filled(matrix: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """The matrix with NaN where a task was not scored."""
    return [[math.nan if value is None else value for value in row] for row in matrix]


def scored(result: Result) -> dict[str, float | None]:
    """Metrics after the last stage; of a merge of all at once no more than its accuracies."""
    last = result["matrix"][-1]
    if len(result["matrix"]) > 1:
        found = continual_metrics(filled(result["matrix"]), result["base"], result["experts"])
        final: dict[str, float | None] = found.final()
        return final
    normalized = fmean(a / e for a, e in zip(last, result["experts"], strict=True))
    return dict.fromkeys(COLUMNS) | {"average_accuracy": fmean(last), "normalized_accuracy": normalized}


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by name, in the order in which the names come."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["name"], []).append(result)
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: mean ± standard deviation over orders and seeds, in percent; seconds are the least of all runs."""
    titles = (
        "| method | accuracy | normalized | backward transfer | forgetting | forward transfer | s per stage | runs |"
    )
    lines = [titles, "|" + " --- |" * 8]
    for name, found in groups(results).items():
        rows = [scored(result) for result in found]
        cells = []
        for column in COLUMNS:
            values = [100 * value for row in rows if (value := row[column]) is not None]
            cells.append(spread(values) if values else "")
        seconds = min(fmean(result["seconds"][1:] or [0.0]) for result in found)
        chosen = sorted({result["chosen"] for result in found if result.get("chosen") is not None})
        label = f"{name}: {' or '.join(f'{value:g}' for value in chosen)}" if chosen else name
        lines.append(f"| {label} | {' | '.join(cells)} | {f'{seconds:.2g}' if seconds else ''} | {len(found)} |")
    return "\n".join(lines)


def against(results: Sequence[Result], rival: str = "opcm") -> str:
    """Markdown: one method against the others, run by run: same experts, same order, or same experts if all at once."""
    by_name = groups(results)
    own = {(result["seed"], result["order"]): scored(result) for result in by_name.get(rival, ())}
    lines = [f"| {rival} minus | accuracy | better in | backward transfer | better in |", "|" + " --- |" * 5]
    for name, found in by_name.items():
        cells = []
        for column in ("average_accuracy", "backward_transfer"):
            gaps = []
            for result in found:
                value = scored(result)[column]
                for (seed, order), metrics in own.items():
                    mine, alike = metrics[column], seed == result["seed"] and result["order"] in (order, AT_ONCE)
                    if alike and value is not None and mine is not None:
                        gaps.append(100 * (mine - value))
            cells += [spread(gaps), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"] if gaps else ["", ""]
        if name != rival:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_scales(results: Sequence[Result]) -> str:
    """Markdown: final merges multiplied by the factor that scores best on the test images."""
    lines = ["| order and experts as in the first run | accuracy | at the best factor | factor |", "|" + " --- |" * 4]
    for result in results:
        if scales := result.get("scales"):
            accuracy = scored(result)["average_accuracy"] or 0.0
            scales = {"1": accuracy, **scales}
            factor = max(scales, key=lambda s: scales[s])
            lines.append(f"| {result['name']} | {100 * accuracy:.1f} | {100 * scales[factor]:.1f} | {factor} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, the latter only of several values."""
    return f"{fmean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"
