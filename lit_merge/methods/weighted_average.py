"""Weighted average of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.weighted_average import normalized
from lit_merge.methods._removal import others_of
from lit_merge.methods._task_weights import TaskWeights, task_weights
from lit_merge.module import MergeModule
from lit_merge.stages import Removal, Stage
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("WeightedAverage",)


class WeightedAverage(MergeModule):
    """Mean of the experts' weights with a weight for each: θ = θ0 + Σ_t w_t τ_t.

    Args:
        weights: w, in the order of the suite's tasks or by name; null for equal weights.
        normalize: Divide the weights by their sum, so that the base plays no part. Without it this is task arithmetic
            with a coefficient per task.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: There is not one weight per task, or their sum is zero.

    Source: Wortsman et al., Model soups, arXiv 2203.05482; mergekit's ``linear``.
    """

    def __init__(
        self,
        weights: TaskWeights = None,
        normalize: bool = True,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_finite(f"{type(self).__name__}.weights", weights)
        self.weights = weights
        self.normalize = normalize

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + Σ w_t τ_t; every tensor has the same weights."""
        weights = task_weights(self.weights, bank.tasks)
        weights = normalized(weights) if self.normalize else weights
        return bank.contract(torch.tensor(weights, dtype=bank.compute_dtype))

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the running weighted mean, or the sum without ``normalize``: in the end the merge of all at once.

        Raises:
            MergeError: The weights so far sum to zero.
        """
        weight, before = self._weight(stage.task), sum(self._weight(task) for task in stage.history)
        keep, add = self._shares(before, weight)
        return {name: keep * value + add * incoming[name].to(value) for name, value in merged.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say that the expert alone is needed: it is a term of a sum with known weights."""
        others_of(task, history)
        return Removal(True, (task,), f"take {task} out of the weighted mean of {len(history)}")

    def remove(
        self,
        merged: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        task: str,
        history: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the weighted mean, or the sum, of the others; of none, zeros.

        Raises:
            MergeError: The weights of the others sum to zero, or the expert is not among those that were absorbed.
        """
        if not others_of(task, history):
            return {name: value.new_zeros(value.shape) for name, value in merged.items()}
        before, weight = sum(self._weight(name) for name in history), -self._weight(task)
        keep, add = self._shares(before, weight)
        return {name: keep * value + add * expert[name].to(value) for name, value in merged.items()}

    def _weight(self, task: str) -> float:
        if self.weights is None:
            return 1.0
        tasks = self.suite.tasks
        return task_weights(self.weights, tasks)[tasks.index(self.suite.check_task(task))]

    def _shares(self, before: float, weight: float) -> tuple[float, float]:
        """Factors of what was there with the weights ``before``, and of what comes or goes with ``weight``."""
        if not self.normalize:
            return 1.0, weight
        if (total := before + weight) == 0:
            raise MergeError("WeightedAverage.weights: those of the experts so far sum to 0; give normalize: false")
        return before / total, weight / total
