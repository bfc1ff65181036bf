"""A run as its ``report.json`` tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_merge.errors import MergeError
from lit_merge.published.facts import METHODS
from lit_merge.published.tables import PublishedTable, find_published, published_tables

__all__ = ("Run", "read_run")

_SCORES = ("accuracy", "expert_accuracy", "base_accuracy")


@dataclass(frozen=True)
class Run:
    """What a run reported.

    Attributes:
        path: Its ``report.json``.
        method: Name of the method's class.
        suite: Name of the suite.
        protocol: ``transductive``, ``split``, ``online`` or ``custom``.
        scores: Per task ``accuracy``, and maybe ``expert_accuracy`` and ``base_accuracy``, as fractions in [0, 1].
        unseen: Those of them that were scored but not merged.
        model: Arguments of the method, if ``config.yaml`` lies beside the report.
        setting: Arguments of the suite, likewise.
    """

    path: Path
    method: str
    suite: str
    protocol: str
    scores: Mapping[str, Mapping[str, float]]
    unseen: tuple[str, ...]
    model: Mapping[str, Any]
    setting: Mapping[str, Any]

    def percent(self, task: str, score: str = "accuracy") -> float | None:
        """One score in percent, if the run has it."""
        value = self.scores.get(task, {}).get(score)
        return None if value is None else 100 * value

    def table(self, suite: str | None = None) -> PublishedTable:
        """Published rows for this run.

        Args:
            suite: Name to use instead of that in the report.

        Raises:
            MergeError: Nothing was published for it.
        """
        name = suite or self.suite
        corrupted = f"{name}-{self.setting.get('corruption') or 'clean'}"
        if suite is None and corrupted in {table.suite for table in published_tables()}:
            name = corrupted
        try:
            return find_published(name)
        except MergeError as error:
            if suite is not None:
                raise
            raise MergeError(f"{self.path}: {error}; --suite NAME compares with another one") from error

    def methods(self) -> tuple[str, ...]:
        """Ids of published methods that this run may be an instance of.

        The report names the class; whether AdaMerging was task-wise or layer-wise is only in ``config.yaml``.
        """
        name = _squashed(self.method)
        if name == "adamerging":
            wise = {"task": ("adamerging-task",), "tensor": ("adamerging",)}
            return wise.get(str(self.model.get("granularity")), ("adamerging", "adamerging-task"))
        return tuple(method for method in METHODS if _squashed(method) == name)


def read_run(path: str | Path) -> Run:
    """Read a run's report.

    Args:
        path: ``report.json``, or the folder of the run.

    Raises:
        MergeError: The file is missing, damaged or no report.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MergeError(f"{path}: no such file; expected the report.json of a run, or its folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{path}: not readable as JSON ({error}); expected the report.json of a run") from error
    if not isinstance(content, dict) or content.get("schema") != 1:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise MergeError(f"{path}: schema: expected 1, as in a report.json of lit-merge, found {found!r}")
    for key in ("method", "suite", "protocol"):
        if not isinstance(content.get(key), str):
            raise MergeError(f"{path}: {key}: expected text, found {content.get(key)!r}")
    extra = content.get("extra")
    unseen = extra.get("unseen") if isinstance(extra, dict) else None
    seen = _scores(path, "tasks", content.get("tasks"))
    others = _scores(path, "extra.unseen.tasks", unseen.get("tasks")) if isinstance(unseen, dict) else {}
    config = _config(path.parent / "config.yaml")
    return Run(
        path=path,
        method=content["method"],
        suite=content["suite"],
        protocol=content["protocol"],
        scores={**seen, **others},
        unseen=tuple(others),
        model=_arguments(config, "model"),
        setting=_arguments(config, "suite"),
    )


def _scores(path: Path, where: str, tasks: object) -> dict[str, dict[str, float]]:
    if not isinstance(tasks, dict) or not tasks or not all(isinstance(row, dict) for row in tasks.values()):
        raise MergeError(f"{path}: {where}: expected scores per task, found {str(tasks)[:40]!r}")
    for task, row in tasks.items():
        for score in _SCORES:
            value = row.get(score, None if score == "accuracy" else 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise MergeError(f"{path}: {where}: {task}: {score}: expected a fraction in [0, 1], found {value!r}")
    return {task: {score: row[score] for score in _SCORES if score in row} for task, row in tasks.items()}


def _config(path: Path) -> dict[str, Any]:
    """Content of ``config.yaml``, which a run from Python does not have."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MergeError(f"{path}: not readable as YAML; it tells the method's arguments: mend or remove it") from error
    return config if isinstance(config, dict) else {}


def _arguments(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = config.get(key)
    arguments = part.get("init_args") if isinstance(part, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _squashed(name: str) -> str:
    """Make ``TaskArithmetic`` and ``task-arithmetic`` alike."""
    return name.replace("-", "").replace("_", "").lower()
