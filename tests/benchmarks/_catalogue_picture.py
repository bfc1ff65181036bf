"""The Pareto picture of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _catalogue import Result, by_tasks, mean_rows, pareto_front, spread_out  # type: ignore[import-not-found]

matplotlib.use("agg")
from matplotlib import pyplot as plt  # after the backend

KINDS = {  # what a merge sees: name, colour (Okabe and Ito's), marker
    "weights": ("sees weights only", "#0072B2", "o"),
    "training labels": ("one value tuned on training labels", "#E69F00", "s"),
    "training images": ("sees training images", "#CC79A7", "D"),
    "test images": ("adapts on unlabelled test images", "#D55E00", "^"),
    "": ("base and experts", "#000000", "*"),
}


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against bytes and against seconds, with the rows that no other beats joined and named."""
    rows = mean_rows(by_tasks(results)[0])
    one = next(row["stored_bytes"] for row in rows if row["name"] == "base")
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    bytes_panel, seconds_panel = panels
    _panel(bytes_panel, [(row["stored_bytes"] / one, row) for row in rows], "stored to serve all tasks, in networks")
    timed = [(row["seconds"], row) for row in rows if row["seconds"] and row["networks"] == 1]
    _panel(seconds_panel, timed, "CPU seconds to make one network for all tasks, one thread")
    bytes_panel.set_xticks([1, 2, 3, 5, 7], ["1", "2", "3", "5", "7"])
    bytes_panel.set_xticks([], minor=True)
    bytes_panel.set_ylabel("mean accuracy over tasks, percent")
    experts = next(row["accuracy"][0] for row in rows if row["name"] == "experts")
    seconds_panel.axhline(experts, color="black", linewidth=0.8, linestyle=":")
    seconds_panel.annotate("experts", (1, experts), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                           textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    handles = [plt.Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, c, m in KINDS.values()]
    handles.append(plt.Line2D([], [], color="grey", linewidth=1, label="no other is cheaper and as accurate"))
    seconds_panel.legend(handles=handles, loc="lower right", fontsize=9)
    figure.savefig(path, dpi=130)
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
    named = front if "base" not in places else [*front, "base"]
    low, high = axes.get_ylim()
    axes.set_ylim(low, high := high + 0.08 * (high - low))  # room for names
    gap = (high - low) / 26
    heights = spread_out([places[name][1] + 0.6 * gap for name in named], gap)
    for name, height in zip(named, heights, strict=True):
        axes.annotate(
            name, places[name], xytext=(places[name][0] * 1.04, height), textcoords="data", ha="left", va="center",
            fontsize=9, arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkB": 4},
        )  # fmt: skip
