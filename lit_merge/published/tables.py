"""Published accuracies of merged CLIP networks, read from the CSV files beside this module."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib import resources
from statistics import fmean
from types import MappingProxyType

from lit_merge.errors import MergeError
from lit_merge.published.facts import CHECKPOINTS, METHODS, NOTES, SOURCES

__all__ = ("PublishedRow", "PublishedTable", "find_published", "published_tables")

_FILES = ("eight_tasks.csv", "twenty_tasks.csv", "unseen_tasks.csv", "robustness.csv", "averages.csv")
_MEANS = ("mean", "seen_mean", "unseen_mean")
_PLAIN = ("suite", "method", "setting", "normalized", "checkpoints", "source", "note")
_EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
_FOURTEEN = (*_EIGHT, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100")
_TWENTY = (*_FOURTEEN, "cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2")
_UNSEEN = {"clip-vit-b-32-unseen-1": ("mnist", "eurosat"), "clip-vit-b-32-unseen-2": ("resisc45", "svhn")}
_ROBUSTNESS = ("stanford-cars", "eurosat", "resisc45", "gtsrb")
_TASKS = {"8": _EIGHT, "14": _FOURTEEN, "20": _TWENTY}


@dataclass(frozen=True)
class PublishedRow:
    """Accuracies of one method on one suite, in percent as published.

    Attributes:
        suite: The suite.
        method: Id in :data:`~lit_merge.published.facts.METHODS`.
        setting: What the source says about hyper-parameters, in short.
        accuracy: Percent per task; empty where only averages were published.
        means: Published averages in percent: ``mean``, or ``seen_mean`` and ``unseen_mean``.
        normalized: Published mean of accuracy / accuracy of the fine-tuned networks, in percent.
        checkpoints: Id in :data:`~lit_merge.published.facts.CHECKPOINTS`.
        source: Id in :data:`~lit_merge.published.facts.SOURCES`.
        note: Id in :data:`~lit_merge.published.facts.NOTES`, or nothing.
    """

    suite: str
    method: str
    setting: str
    accuracy: Mapping[str, float] = field(hash=False)
    means: Mapping[str, float] = field(hash=False)
    normalized: float | None
    checkpoints: str
    source: str
    note: str

    @property
    def label(self) -> str:
        """The method's name with its setting."""
        return METHODS[self.method].name + (f" ({self.setting})" if self.setting else "")

    def fraction(self, task: str) -> float:
        """Accuracy on a task as a fraction in [0, 1], as in ``report.json``.

        >>> find_published("clip-vit-b-32-8").rows[0].fraction("mnist")
        0.482
        """
        return round(self.accuracy[task] / 100, 6)

    def mean_over(self, tasks: Iterable[str]) -> float | None:
        """Mean percent over some tasks, computed; ``None`` if one of them was not published.

        >>> row = find_published("clip-vit-b-32-8").rows[0]
        >>> row.mean_over(["svhn", "gtsrb"])
        32.05
        """
        values = [self.accuracy.get(task) for task in tasks]
        return None if not values or None in values else round(fmean(v for v in values if v is not None), 4)


@dataclass(frozen=True)
class PublishedTable:
    """All published rows of a suite.

    Attributes:
        suite: The suite.
        tasks: Its tasks, in the order of the literature.
        unseen: Those of them that are scored but not merged.
        rows: In the order of methods.
    """

    suite: str
    tasks: tuple[str, ...]
    unseen: tuple[str, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def seen(self) -> tuple[str, ...]:
        """The tasks that are merged."""
        return tuple(task for task in self.tasks if task not in self.unseen)

    @property
    def methods(self) -> tuple[str, ...]:
        """Ids of the methods that have a row."""
        return tuple(dict.fromkeys(row.method for row in self.rows))

    def of(self, *methods: str, per_task: bool = False) -> tuple[PublishedRow, ...]:
        """Rows of some methods, in that order.

        Args:
            *methods: Their ids.
            per_task: Leave out rows of which only averages were published.
        """
        rows = [row for method in methods for row in self.rows if row.method == method]
        return tuple(row for row in rows if row.accuracy or not per_task)


def find_published(suite: str) -> PublishedTable:
    """Return the published rows of a suite.

    Args:
        suite: Such as ``clip-vit-b-32-8``, ``clip-vit-l-14-20``, ``clip-vit-b-32-robustness-motion_blur`` or
            ``clip-vit-b-32-unseen-1``.

    Raises:
        MergeError: Nothing was published for a suite of this name; the message lists what there is.

    >>> find_published("clip-vit-b-32-8").of("adamerging", per_task=True)[0].means["mean"]
    82.6
    """
    tables = {table.suite: table for table in published_tables()}
    if suite not in tables:
        close = get_close_matches(suite, tables, n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise MergeError(f"no published numbers for suite {suite!r}{meant} (there are some for {', '.join(tables)})")
    return tables[suite]


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """Return all tables, one per suite.

    >>> [table.suite for table in published_tables()][:3]
    ['clip-vit-b-32-8', 'clip-vit-b-32-14', 'clip-vit-b-32-20']
    """
    rows = [row for name in _FILES for row in _read(name)]
    rows += [derived for row in rows for derived in _elsewhere(row)]
    rows.sort(key=lambda row: list(METHODS).index(row.method))
    suites = sorted({row.suite for row in rows}, key=_place)
    return tuple(_table(suite, [row for row in rows if row.suite == suite]) for suite in suites)


def _place(suite: str) -> tuple[int, ...] | tuple[int, str]:
    """Backbone by backbone, 8, 14 and 20 tasks; then the rest."""
    backbone = ("clip-vit-b-32-", "clip-vit-b-16-", "clip-vit-l-14-").index(suite[:14])
    count = suite[14:]
    return (backbone, int(count)) if count.isdigit() else (9, suite)


def _table(suite: str, rows: list[PublishedRow]) -> PublishedTable:
    named = {task for row in rows for task in row.accuracy}
    tasks = _TASKS.get(suite.rpartition("-")[2]) if suite not in _UNSEEN else None
    return PublishedTable(
        suite=suite,
        tasks=tasks or tuple(task for task in _TWENTY if task in named),
        unseen=_UNSEEN.get(suite, ()),
        rows=tuple(rows),
    )


def _elsewhere(row: PublishedRow) -> list[PublishedRow]:
    """Base and experts do not depend on what is merged: their accuracies hold for other suites of the same tasks."""
    if row.method not in ("pretrained", "fine-tuned") or not row.accuracy:
        return []
    backbone, _, count = row.suite.rpartition("-")
    targets: dict[str, tuple[str, ...]] = {}
    if count == "20":
        targets = {f"{backbone}-14": _FOURTEEN}
    elif row.suite == "clip-vit-b-32-8":
        targets = {**dict.fromkeys(_UNSEEN, _EIGHT), "clip-vit-b-32-robustness-clean": _ROBUSTNESS}
    return [
        replace(
            row,
            suite=suite,
            setting=f"as for {count} tasks",
            accuracy=MappingProxyType({task: row.accuracy[task] for task in tasks}),
            means=MappingProxyType({}),
        )
        for suite, tasks in targets.items()
    ]


def _read(name: str) -> list[PublishedRow]:
    text = resources.files(__package__ or "lit_merge.published").joinpath(name).read_text(encoding="utf-8")
    return [_row(name, cells) for cells in csv.DictReader(text.splitlines())]


def _row(name: str, cells: Mapping[str, str]) -> PublishedRow:
    known = (
        ("method", METHODS), ("checkpoints", CHECKPOINTS), ("source", SOURCES), ("note", {"": "", **NOTES})
    )  # fmt: skip
    for column, facts in known:
        if cells.get(column, "") not in facts:
            raise MergeError(f"{name}: {column}: unknown {cells[column]!r}")
    numbers = {key: float(cell) for key, cell in cells.items() if cell and key not in _PLAIN}
    return PublishedRow(
        suite=cells["suite"],
        method=cells["method"],
        setting=cells["setting"],
        accuracy=MappingProxyType({key: value for key, value in numbers.items() if key not in _MEANS}),
        means=MappingProxyType({key: value for key, value in numbers.items() if key in _MEANS}),
        normalized=float(cells["normalized"]) if cells.get("normalized") else None,
        checkpoints=cells["checkpoints"],
        source=cells["source"],
        note=cells.get("note", ""),
    )
