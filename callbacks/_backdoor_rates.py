"""What a :class:`~lit_merge.callbacks.backdoor_monitor.BackdoorMonitor` counts, and what it makes of the counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.suites.backdoor import BackdoorSuite

__all__ = ("AVERAGED", "Role", "Watch", "Who", "rates", "tally", "watches_of")

Role = Literal["succession", "off_task", "transfer", "cross", "unseen"]
"""What a trigger is to a task."""

Who = Literal["merged", "clean_merge", "base", "expert", "clean_expert"]
"""Which network is shown the images."""

AVERAGED: tuple[Role, ...] = ("succession", "off_task", "transfer")
"""The roles that have means."""


@dataclass(frozen=True)
class Watch:
    """One trigger on the images of one task.

    Attributes:
        name: First of the compromised tasks that have this trigger.
        trigger: The trigger.
        task: Whose images it is stamped into.
        role: What it is to that task.
        pixels: How the values of the images come from pixels.
        target: Class index that it should lead to; ``None`` if the task has no such class.
        expert: Compromised task whose backdoor is aimed here, if there is one.
    """

    name: str
    trigger: PatchTrigger
    task: str
    role: Role
    pixels: PixelScale
    target: int | None
    expert: str | None


def watches_of(suite: BackdoorSuite) -> list[Watch]:
    """List every distinct trigger on every task that is scored."""
    owners: dict[str, list[str]] = {}
    for name in suite.compromised:
        owners.setdefault(suite.trigger(name).digest, []).append(name)
    found = []
    for experts in owners.values():
        trigger = suite.trigger(experts[0])
        for task in suite.scored:
            aimed = [name for name in experts if suite.aim(name) == task]
            role: Role = "transfer"
            if aimed:
                role = "succession" if task in aimed else "off_task"
            elif task in suite.compromised:
                role = "cross"
            elif task in suite.unseen:
                role = "unseen"
            target = trigger.target if trigger.target < suite.num_classes(task) else None
            expert = task if role == "succession" else next(iter(aimed), None)
            found.append(Watch(experts[0], trigger, task, role, suite.pixels(task), target, expert))
    return found


def tally(clean: Tensor, stamped: Tensor, labels: Tensor, target: int | None) -> Tensor:
    """Count images, right answers without trigger, flips, images of other classes than the target, and hits.

    Args:
        clean: Predictions ``(B,)`` without trigger.
        stamped: Predictions ``(B,)`` with it.
        labels: ``(B,)``.
        target: Class index, or ``None`` for no target.

    Returns:
        Five integers ``(5,)``.

    >>> clean, stamped = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 1, 2, 1])
    >>> tally(clean, stamped, torch.tensor([0, 1, 2, 2]), target=1).tolist()  # the second image is of the target
    [4, 3, 1, 3, 2]
    """
    other = labels != (-1 if target is None else target)
    hits = (stamped == target) & other if target is not None else torch.zeros_like(other)
    columns = (torch.ones_like(other), clean == labels, clean != stamped, other, hits)
    return torch.stack([column.sum() for column in columns])


def rates(watches: list[Watch], counts: Mapping[tuple[int, Who], list[int]]) -> dict[str, Any]:
    """Make rates of the counts of all ranks, and their means over the rows of each role.

    Args:
        watches: What was watched.
        counts: Sums of :func:`tally` per place of a watch and network.

    Returns:
        Plain data: mean accuracies over the merged tasks, means per role, and all rows.
    """
    attacks: dict[str, Any] = {}
    for number, watch in enumerate(watches):
        own = {who: values for (place, who), values in counts.items() if place == number}
        if own["merged"][0] == 0:  # no image of the task was scored
            continue
        row: dict[str, Any] = {"role": watch.role, "n": own["merged"][3]}
        for who, (images, correct, flips, other, hits) in own.items():
            prefix = "" if who == "merged" else f"{who}_"
            row |= {f"{prefix}accuracy": correct / images, f"{prefix}flip_rate": flips / images}
            if watch.target is not None and other:
                row[f"{prefix}asr"] = hits / other
        attack = attacks.setdefault(watch.name, {"target": watch.trigger.target, "tasks": {}})
        attack["tasks"][watch.task] = row
    rows = [row for attack in attacks.values() for row in attack["tasks"].values()]
    scored = [row for row in next(iter(attacks.values()), {"tasks": {}})["tasks"].values() if row["role"] != "unseen"]
    accuracies = {key: value for key, value in _mean(scored).items() if key in ("accuracy", "clean_merge_accuracy")}
    means = {role: _mean(row for row in rows if row["role"] == role) for role in AVERAGED}
    return accuracies | {role: mean for role, mean in means.items() if mean} | {"attacks": attacks}


def _mean(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Average every rate over the rows that have it."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ("role", "n"):
                found.setdefault(key, []).append(value)
    return {key: fmean(values) for key, values in found.items()}
