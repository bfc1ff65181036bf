"""What is in the catalogue's table, how the table is written, and which of its rows no other row beats."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean, stdev
from typing import Any

import yaml

from lit_merge import configs

__all__ = ("EXCLUDED", "Entry", "Result", "by_tasks", "entries", "label_places", "mean_rows", "pareto_front", "table")

EXCLUDED = {
    "finetune*": "makes experts",
    "sequential-*": "merges experts as they arrive: see continual.py",
    "awm": "defends a merge that another method made: see backdoor_laboratory.py",
    "sau": "defends a merge that another method made: see backdoor_laboratory.py",
    "dam*": "merges a laboratory with a poisoned expert; scored on clean experts too in backdoor_laboratory.py",
}
SCALES = tuple(s / 10 for s in range(1, 11))
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One row: a config, what is set differently, and a grid of one option that the training labels choose from.

    Without a config it is a reference, and the options are its tasks.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    option: str = ""
    grid: tuple[float, ...] = ()

    @property
    def file(self) -> str:
        """Name of its results, without the seed."""
        return re.sub(r"\W+", "-", self.name if self.config else "-".join([self.name, *self.options]))

    @property
    def digest(self) -> str:
        """Hash of all that it says, for results that are older than their config."""
        path = configs.find(self.config)
        text = path.read_text(encoding="utf-8") if path else ""
        return hashlib.sha256(json.dumps([text, *self.options, self.option, *self.grid]).encode()).hexdigest()[:16]


TUNED = (
    Entry("task-arithmetic, best scale", "task-arithmetic", (), "scale", SCALES),
    Entry("ties, best scale", "ties", (), "scale", SCALES),
    Entry("tsv-merge, best scale", "tsv-merge", (), "scale", SCALES),
    Entry("iso-c, best scale", "iso-c", (), "scale", SCALES),
    Entry("iso-cts, best scale", "iso-cts", (), "scale", SCALES),
    Entry("doge, others: mean, best scale", "doge", ("--model.others=mean",), "scale", (0.05, 0.07, 0.1, 0.14, 0.2)),
    Entry(
        "wudi, best learning rate", "wudi", (), "optimizer.init_args.lr", (1e-5, 3e-5, 1e-4, 3e-4)
    ),
    Entry("simple-average of two", "simple-average", ("--suite.tasks=[mnist,symbols]",)),
)  # fmt: skip


def entries() -> list[Entry]:
    """Every bundled config that merges the suite's experts, as shipped; then what was tuned for this suite."""
    found = []
    for name in configs.names():
        path = configs.find(name)
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
        bare = name.removesuffix(".yaml")
        if "/" in name or "model" not in content or any(fnmatchcase(bare, pattern) for pattern in EXCLUDED):
            continue
        found.append(Entry(bare, bare))
    return [*found, *TUNED]


def mean_rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row per name out of the results of all seeds on one set of tasks, most accurate first.

    Accuracies are mean and deviation over seeds of means over tasks, in percent, normalised ones relative to the row
    ``experts`` of the seed; seconds and memory are the least of all seeds, whatever else the machine did.
    """
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    experts = {result["seed"]: result["tasks"] for result in by_name["experts"]}
    rows, seeds = [], sorted(experts)
    for name, found in by_name.items():
        chosen = sorted({result["chosen"] for result in found if result.get("chosen") is not None})
        norms = [fmean(a / experts[result["seed"]][t] for t, a in result["tasks"].items()) for result in found]
        own = sorted(result["seed"] for result in found)
        row = {
            "name": f"{name}: {' or '.join(f'{value:g}' for value in chosen)}" if chosen else name,
            "seeds": "" if own == seeds else f"seed {', '.join(map(str, own))} only",
            "accuracy": _moments([fmean(result["tasks"].values()) for result in found]),
            "normalized": _moments(norms),
            "seconds": min(result["seconds"] for result in found),
            "peak_bytes": min(result["peak_bytes"] for result in found),
        }
        rows.append(row | {key: found[0][key] for key in ("sees", "networks", "stored_bytes")})
    return sorted(rows, key=lambda row: (-row["accuracy"][0], row["name"]))


def _moments(values: Sequence[float]) -> tuple[float, float]:
    return 100 * fmean(values), 100 * stdev(values) if len(values) > 1 else 0.0


def by_tasks(results: Iterable[Result]) -> list[list[Result]]:
    """Results that have the same tasks; most tasks first."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        if "failed" not in result:
            groups.setdefault(tuple(result["tasks"]), []).append(result)
    return [groups[tasks] for tasks in sorted(groups, key=len, reverse=True)]


def table(results: Sequence[Result]) -> str:
    """Markdown: a table per set of tasks; then what failed."""
    lines = []
    for group in by_tasks(results):
        lines += [f"| {len(group[0]['tasks'])} tasks | sees | accuracy | normalized | seconds | peak MiB | stored MB |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [*map(_line, mean_rows(group)), ""]
    for result in results:
        if "failed" in result:
            lines.append(f"**{result['name']}, seed {result['seed']}, failed:** {result['failed']}")
    return "\n".join(lines).rstrip()


def _line(row: Mapping[str, Any]) -> str:
    notes = [
        *([f"{row['networks']} networks"] if row["networks"] > 1 else []),
        *([row["seeds"]] if row["seeds"] else []),
    ]
    name = f"{row['name']} ({', '.join(notes)})" if notes else row["name"]
    accuracy, normalized = (f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in (row["accuracy"], row["normalized"]))
    costs = ["", ""]  # of base and experts
    if seconds := row["seconds"]:
        costs = [_short(seconds), _short(row["peak_bytes"] / 2**20)]
    stored = f"{row['stored_bytes'] / 1e6:.2f}"
    return f"| {' | '.join((name, row['sees'], accuracy, normalized, *costs, stored))} |"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of points ``(cost, gain)`` that no other beats in one without losing in the other, cheapest first.

    >>> pareto_front({"a": (1, 70), "b": (1, 60), "c": (2, 65), "d": (3, 80), "e": (4, 80)})
    ['a', 'd']
    """
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1], name)):
        if not front or points[name][1] > points[front[-1]][1] or points[name] == points[front[-1]]:
            front.append(name)
    return front


def label_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], gap: float
) -> list[tuple[float, float]]:
    """Left end and height of the labels of a front that rises from left to right.

    A label ends at its point, or begins there if the left margin is too near. It lies above every point that it passes,
    and labels that share a piece of the abscissa are at least ``gap`` apart.

    Args:
        points: Abscissa in [0, 1] and height, from left to right.
        widths: Of the labels, in units of the abscissa.
        gap: Height of a label, in units of the height.

    >>> label_places([(0.1, 5.0), (0.5, 5.5), (0.6, 9.0)], [0.2, 0.2, 0.2], 1.0)
    [(0.1, 6.0), (0.3, 6.5), (0.4, 10.0)]
    """
    placed: list[tuple[float, float]] = []
    for (x, height), width in zip(points, widths, strict=True):
        left = x - width if x > width else x
        top = max([height, *(y for at, y in points if left <= at <= left + width)]) + gap
        others = [(start, span, at) for (start, at), span in zip(placed, widths, strict=False)]
        for start, span, at in sorted(others, key=lambda other: other[2]):
            if start < left + width and left < start + span and abs(at - top) < gap:
                top = at + gap
        placed.append((left, top))
    return placed
