"""The Pareto picture of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _catalogue import Result, by_tasks, label_places, mean_rows, pareto_front  # type: ignore[import-not-found]

matplotlib.use("agg")
from matplotlib import pyplot as plt  # after the backend
from matplotlib.lines import Line2D

KINDS = {  # what a merge sees: name, colour (Okabe and Ito's), marker
    "weights": ("sees weights only", "#0072B2", "o"),
    "training labels": ("one value tuned on training labels", "#E69F00", "s"),
    "training images": ("sees training images", "#CC79A7", "D"),
    "test images": ("adapts on unlabelled test images", "#D55E00", "^"),
    "": ("base and experts", "#000000", "*"),
}
LEAST = 0.1  # seconds: below, they are those of making a module


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against bytes and against seconds, with the rows that no other beats joined and named."""
    rows = mean_rows(by_tasks(results)[0])
    known = {row["name"]: row for row in rows}
    one, experts = known["base"]["stored_bytes"], known["experts"]["accuracy"][0]
    figure, (by_bytes, by_seconds) = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    low = min(row["accuracy"][0] for row in rows)
    by_bytes.set_ylim(low - 3, experts + 6)
    by_bytes.set_ylabel("mean accuracy over tasks, percent")
    _panel(by_bytes, [(row["stored_bytes"] / one, row) for row in rows], "stored to serve all tasks, in networks")
    ticks = range(1, 1 + known["experts"]["stored_bytes"] // one)
    by_bytes.set_xticks(ticks, [str(tick) for tick in ticks])
    by_bytes.set_xticks([], minor=True)
    _annotate(by_bytes, "base", (1, known["base"]["accuracy"][0]))
    timed = [(max(row["seconds"], LEAST), row) for row in rows if row["seconds"] and row["networks"] == 1]
    _panel(by_seconds, timed, f"CPU seconds to make one network for all tasks, one thread ({LEAST}: or less)")
    by_seconds.axhline(experts, color="black", linewidth=0.8, linestyle=":")
    _annotate(by_seconds, "experts", (by_seconds.get_xlim()[0], experts))
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, c, m in KINDS.values()]
    handles.append(Line2D([], [], color="grey", linewidth=1, label="Pareto front"))
    by_bytes.legend(handles=handles, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Any, points: Sequence[tuple[float, dict[str, Any]]], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(alpha=0.25, linewidth=0.6)
    places = {row["name"]: (cost, row["accuracy"][0]) for cost, row in points}
    front = pareto_front(places)
    for cost, row in points:
        mean, deviation = row["accuracy"]
        _, colour, marker = KINDS[row["sees"]]
        best = row["name"] in front
        axes.errorbar(cost, mean, deviation if best else None, color=colour, marker=marker, alpha=1 if best else 0.55,
                      markersize=8 if best else 6, linestyle="", elinewidth=1, zorder=3 if best else 2)  # fmt: skip
    axes.step(*zip(*(places[name] for name in front), strict=True), where="post", color="grey", linewidth=1, zorder=1)
    axes.set_xlim(axes.get_xlim())
    low, high = axes.get_ylim()
    to_fraction = axes.transScale + axes.transLimits
    fractions = [to_fraction.transform(places[name])[0] for name in front]
    heights = [places[name][1] for name in front]
    where = label_places(
        list(zip(fractions, heights, strict=True)), [0.02 + 0.013 * len(n) for n in front], (high - low) / 28
    )
    for name, (left, height) in zip(front, where, strict=True):
        x = to_fraction.inverted().transform((left, 0))[0]
        axes.annotate(name, places[name], xytext=(x, height), va="center", fontsize=9,
                      arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 4})  # fmt: skip


def _annotate(axes: Any, text: str, place: tuple[float, float]) -> None:
    axes.annotate(text, place, xytext=(8, 4), textcoords="offset points", fontsize=9)
