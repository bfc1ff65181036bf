"""The table, the comparison and the pictures of :mod:`continual`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from _embedded import spread  # type: ignore[import-not-found]

from lit_merge.functional import continual_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt  # after the backend

__all__ = ("COLUMNS", "against", "best_scales", "curves", "heat_maps", "scored", "table")

Result = Mapping[str, Any]
COLUMNS = ("average_accuracy", "normalized_accuracy", "backward_transfer", "forgetting", "forward_transfer")
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999", "#8C6D1F", "#6A3D9A")


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
            gaps = [
                100 * (mine[column] - value)
                for result in found
                for (seed, order), mine in own.items()
                if seed == result["seed"] and result["order"] in (order, "all at once")
                if (value := scored(result)[column]) is not None and mine[column] is not None
            ]
            cells += [spread(gaps), f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"] if gaps else ["", ""]
        if name != rival:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def best_scales(results: Sequence[Result]) -> str:
    """Markdown: final merges multiplied by the factor that scores best on the test images."""
    lines = ["| order and experts as in the first run | accuracy | at the best factor | factor |", "|" + " --- |" * 4]
    for result in results:
        if scales := result.get("scales"):
            factor = max(scales, key=lambda s: scales[s])
            accuracy = scored(result)["average_accuracy"] or 0.0
            lines.append(f"| {result['name']} | {100 * accuracy:.1f} | {100 * scales[factor]:.1f} | {factor} |")
    return "\n".join(lines)


def curves(results: Sequence[Result], path: Path) -> None:
    """Accuracy on the tasks that have come, after each stage: mean over orders and seeds, band of one deviation."""
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    streams = {name: found for name, found in groups(results).items() if len(found[0]["matrix"]) > 1}
    ends = []
    for number, (name, found) in enumerate(streams.items()):
        rows = np.array([
            continual_metrics(filled(result["matrix"])).average_accuracy.tolist() for result in found
        ])  # fmt: skip
        mean, deviation = 100 * rows.mean(0), 100 * rows.std(0, ddof=1 if len(rows) > 1 else 0)
        stages, colour = np.arange(1, rows.shape[1] + 1), COLOURS[number % len(COLOURS)]
        axes.plot(stages, mean, color=colour, linewidth=1.8, marker="o", markersize=3)
        axes.fill_between(stages, mean - deviation, mean + deviation, color=colour, alpha=0.08, linewidth=0)
        ends.append((float(mean[-1]), name, colour))
    low, high = axes.get_ylim()
    heights = _apart([end for end, _, _ in sorted(ends)], (high - low) / 24)
    last = max(len(found[0]["matrix"]) for found in streams.values())
    for (end, name, colour), height in zip(sorted(ends), heights, strict=True):
        axes.annotate(f"{name}  {end:.1f}", (last, end), xytext=(last + 0.25, height), color=colour, va="center",
                      fontsize=9, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5})  # fmt: skip
    axes.set_xlim(0.8, last + 2.6)
    axes.set_xticks(range(1, last + 1))
    axes.set_xlabel("experts that have come")
    axes.set_ylabel("mean accuracy on their tasks, percent")
    axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels, sorted from below, apart; their mean stays about where it was."""
    groups = [[height] for height in heights]
    merged = True
    while merged:
        merged = False
        for left, (lower, upper) in enumerate(pairwise(groups)):
            reach = (len(lower) + len(upper)) / 2 * gap
            if fmean(upper) - fmean(lower) < reach - 1e-9:
                groups[left : left + 2] = [[*lower, *upper]]
                merged = True
                break
    return [fmean(group) + (place - (len(group) - 1) / 2) * gap for group in groups for place in range(len(group))]


def heat_maps(results: Sequence[Result], path: Path, name: str = "opcm") -> None:
    """Accuracy of every task after every stage, one map per order, mean over seeds."""
    by_order: dict[str, list[Result]] = {}
    for result in results:
        if result["name"] == name:
            by_order.setdefault(result["order"], []).append(result)
    figure, panels = plt.subplots(
        1, len(by_order), figsize=(5 * len(by_order), 4.6), layout="constrained", squeeze=False
    )
    for axes, (order, found) in zip(panels[0], by_order.items(), strict=True):
        tasks, size = found[0]["tasks"], len(found[0]["tasks"])
        mean = np.array([filled(result["matrix"]) for result in found]).mean(0)
        image = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        for y in range(size):
            for x in range(min(size, y + 2)):
                seen = x <= y
                axes.text(x, y, f"{100 * mean[y, x]:.0f}", ha="center", va="center", fontsize=9,
                          weight="bold" if seen else "normal", color="black" if mean[y, x] > 0.6 else "white",
                          alpha=1 if seen else 0.6)  # fmt: skip
        axes.plot(*_staircase(size), color="white", linewidth=1.2)
        axes.set_title(f"{name}, order: {order}", fontsize=10)
        axes.set_yticks(range(size), [f"{number} {task}" for number, task in enumerate(tasks, 1)], fontsize=9)
        axes.set_xticks(range(size), tasks, rotation=45, ha="right", fontsize=9)
    panels[0, 0].set_ylabel("after stage")
    figure.colorbar(image, ax=panels, label="accuracy", shrink=0.8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _staircase(size: int) -> tuple[list[float], list[float]]:
    """The line between tasks that had come and those that had not."""
    xs, ys = [], []
    for step in range(size - 1):
        xs += [step + 0.5, step + 0.5]
        ys += [step - 0.5, step + 0.5]
    return [*xs, size - 0.5], [*ys, size - 1.5]
