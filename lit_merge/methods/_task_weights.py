"""Weights of tasks as a config gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite

__all__ = ("TaskWeights", "task_weights")

TaskWeights = list[float] | dict[str, float] | None


def task_weights(weights: Sequence[float] | Mapping[str, float] | None, tasks: Sequence[str]) -> list[float]:
    """Return one weight per task, in the order of the tasks.

    Args:
        weights: In the order of the tasks, or by name; ``None`` for equal weights.
        tasks: Names of the tasks.

    Raises:
        MergeError: There is not exactly one weight per task, or one is not finite.

    >>> task_weights({"b": 3.0, "a": 1.0}, ("a", "b")), task_weights(None, ("a", "b"))
    ([1.0, 3.0], [1.0, 1.0])
    """
    check_finite("weights", weights)
    if weights is None:
        return [1.0] * len(tasks)
    if isinstance(weights, Mapping):
        if set(weights) != set(tasks):
            found = ", ".join(weights) or "none"
            raise MergeError(f"weights: expected one for each of {', '.join(tasks)}; found {found}")
        return [float(weights[task]) for task in tasks]
    if len(weights) != len(tasks):
        raise MergeError(f"weights: expected {len(tasks)}, one for each of {', '.join(tasks)}; found {len(weights)}")
    return [float(weight) for weight in weights]
