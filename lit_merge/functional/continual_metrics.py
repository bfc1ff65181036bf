"""What a stream of merges kept, lost and gained: from one accuracy per stage and task.

Sources: Lopez-Paz and Ranzato, Gradient Episodic Memory, arXiv 1706.08840 (average accuracy, backward and forward
transfer); Chaudhry et al., Riemannian Walk for Incremental Learning, arXiv 1801.10112 (forgetting).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("ContinualMetrics", "continual_metrics")

Values = Tensor | Sequence[float]


class ContinualMetrics(NamedTuple):
    """Metrics after each stage, ``(S,)`` each, float64; NaN where there is nothing to take a mean of.

    Attributes:
        average_accuracy: Mean accuracy on the tasks seen so far. Higher is better.
        normalized_accuracy: The same of accuracies divided by the experts'. Higher is better.
        backward_transfer: Mean change on earlier tasks since the stage in which each came; negative if they suffered.
            NaN in stage 1.
        forgetting: Mean loss on earlier tasks against the best of all earlier stages. Lower is better; negative if they
            gained. NaN in stage 1.
        forward_transfer: Mean gain over the base on a task in the stage before it came. NaN in stage 1, and where a
            task was not scored before it came.
    """

    average_accuracy: Tensor
    normalized_accuracy: Tensor
    backward_transfer: Tensor
    forgetting: Tensor
    forward_transfer: Tensor

    def final(self) -> dict[str, float | None]:
        """Return the metrics after the last stage as plain data, ``None`` for NaN."""
        last = {name: float(values[-1]) for name, values in self._asdict().items()}
        return {name: None if math.isnan(value) else value for name, value in last.items()}


def continual_metrics(
    matrix: Tensor | Sequence[Sequence[float]], base: Values | None = None, experts: Values | None = None
) -> ContinualMetrics:
    """Return what became of the tasks of a stream, after each of its stages.

    With R_ij the accuracy on task j after stage i, both from 1, and after S stages

    * average accuracy: 1/S Σ_{j ≤ S} R_Sj
    * backward transfer: 1/(S−1) Σ_{j < S} (R_Sj − R_jj)
    * forgetting: 1/(S−1) Σ_{j < S} (max_{i < S} R_ij − R_Sj)
    * forward transfer: 1/(S−1) Σ_{1 < j ≤ S} (R_{j−1,j} − b_j), with b_j of the base (in GEM: of random weights)

    Args:
        matrix: R, ``(S, T)`` with S ≤ T; columns are tasks in the order in which they came. NaN where a task was not
            scored, which is allowed before it came.
        base: Accuracies of the base, ``(T,)``; without them there is no forward transfer.
        experts: Accuracies of the experts, ``(T,)``; without them nothing is normalised.

    Raises:
        MergeError: A shape is wrong, an accuracy is outside of [0, 1], or a task was not scored after it came.

    Two stages: the first task falls from 0.9 to 0.7; the second one had 0.3 before it came, 0.1 more than the base.

    >>> found = continual_metrics([[0.9, 0.3], [0.7, 0.8]], base=[0.2, 0.2], experts=[1.0, 0.8])
    >>> {name: [round(x, 4) for x in values.tolist()] for name, values in found._asdict().items()}
    {'average_accuracy': [0.9, 0.75], 'normalized_accuracy': [0.9, 0.85], 'backward_transfer': [nan, -0.2], \
'forgetting': [nan, 0.2], 'forward_transfer': [nan, 0.1]}

    Forgetting is against the best stage, backward transfer against the stage in which the task came:

    >>> found = continual_metrics([[0.6, 0.0, 0.0], [0.8, 0.5, 0.0], [0.7, 0.5, 0.9]])
    >>> round(float(found.forgetting[-1]), 4), round(float(found.backward_transfer[-1]), 4)
    (0.05, 0.05)
    >>> found.final()["forward_transfer"] is None
    True
    """
    scores = torch.as_tensor(matrix, dtype=torch.float64)
    if scores.ndim != 2 or not 0 < scores.shape[0] <= scores.shape[1]:
        raise MergeError(f"matrix: expected (S, T) with 1 ≤ S ≤ T, found shape {tuple(scores.shape)}")
    stages, tasks = scores.shape
    seen = torch.ones_like(scores, dtype=torch.bool).tril()
    if bool(scores[seen].isnan().any()):
        stage, task = (seen & scores.isnan()).nonzero()[0].tolist()
        raise MergeError(f"matrix: task {task + 1} has no accuracy after stage {stage + 1}, but it had come by then")
    start, limit = (_column(name, values, tasks) for name, values in (("base", base), ("experts", experts)))
    for name, values in (("matrix", scores), ("base", start), ("experts", limit)):
        if bool(((values < 0) | (values > 1)).any()):
            raise MergeError(f"{name}: expected accuracies in [0, 1], found {values.nan_to_num(0).aminmax()}")
    scaled = torch.where(limit > 0, scores / limit, torch.nan)
    rows: list[list[float]] = []
    for stage in range(stages):
        now, known = scores[stage], stage + 1
        best = scores[:stage, :stage].nan_to_num(-math.inf).amax(0) if stage else scores[0, :0]
        arrived = scores.diagonal()[:stage]
        foreseen = scores.diagonal(1)[:stage]  # R_{j-1, j} for j = 2 … S
        means = (now[:known], scaled[stage, :known], now[:stage] - arrived, best - now[:stage],
                 foreseen - start[1:known])  # fmt: skip
        rows.append([float(values.mean()) for values in means])  # the mean of nothing is NaN
    return ContinualMetrics(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def _column(name: str, values: Values | None, tasks: int) -> Tensor:
    column = torch.as_tensor([torch.nan] * tasks if values is None else values, dtype=torch.float64)
    if column.shape != (tasks,):
        raise MergeError(f"{name}: expected {tasks} accuracies, one for each task, found shape {tuple(column.shape)}")
    return column
