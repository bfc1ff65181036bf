"""The pictures of :mod:`continual`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from _continual import Result, filled, groups  # type: ignore[import-not-found]

from lit_merge.functional import continual_metrics

matplotlib.use("agg")
from matplotlib import pyplot as plt  # after the backend

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999", "#8C6D1F", "#6A3D9A",
           "#4D4D4D")  # fmt: skip


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
    ends.sort()
    floor = ends[min(1, len(ends) - 1)][0] - 6  # one method that breaks down would leave no room for the others
    low, high = max(axes.get_ylim()[0], floor), axes.get_ylim()[1]
    axes.set_ylim(low, high)
    places = [max(end, low + (high - low) / 40) for end, _, _ in ends]
    last = max(len(found[0]["matrix"]) for found in streams.values())
    for (end, name, colour), place, height in zip(ends, places, _apart(places, (high - low) / 24), strict=True):
        axes.annotate(f"{name}  {end:.1f}", (last, place), xytext=(last + 0.35, height), color=colour, va="center",
                      fontsize=9, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5,
                                              "relpos": (0, 0.5), "shrinkA": 0})  # fmt: skip
    axes.set_xlim(0.8, last + 2.9)
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
