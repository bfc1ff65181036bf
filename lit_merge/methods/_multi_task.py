"""The merged vector that other rules start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import wide
from lit_merge.functional.ties import TiesFacts, disjoint_mean_merge, ties, ties_facts

__all__ = ("MultiTask", "check_multi_task", "multi_task_facts", "multi_task_vector")

MultiTask = Literal["sum", "ties"]


def check_multi_task(rule: str) -> None:
    """Refuse an unknown rule.

    Raises:
        MergeError: It is neither ``sum`` nor ``ties``.
    """
    if rule not in get_args(MultiTask):
        raise MergeError(f"multi_task: expected sum or ties, found {rule!r}")


def multi_task_vector(
    deltas: Mapping[str, Tensor], rule: MultiTask, density: float, facts: TiesFacts | None = None
) -> dict[str, Tensor]:
    """Return τ_MTL, ``(*shape)`` each: the sum of the task vectors, or their TIES merge with the disjoint mean.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        rule: Which of the two.
        density: Share of entries that TIES keeps.
        facts: What :func:`multi_task_facts` said, where ``deltas`` is a piece of the network.
    """
    if rule == "ties":
        return disjoint_mean_merge(ties(deltas, density, facts=facts))
    return {name: wide(delta).sum(0) for name, delta in deltas.items()}


def multi_task_facts(pieces: Iterable[Mapping[str, Tensor]], rule: MultiTask, density: float) -> TiesFacts | None:
    """Return what the rule has to know of a network that is read piece by piece; of a sum nothing."""
    return ties_facts(pieces, density) if rule == "ties" else None
