"""Weighted average of the experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_merge.functional.finite import check_finite
from lit_merge.functional.weighted_average import normalized
from lit_merge.methods._task_weights import TaskWeights, task_weights
from lit_merge.module import MergeModule
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

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + Σ w_t τ_t; every tensor has the same weights."""
        weights = task_weights(self.weights, bank.tasks)
        weights = normalized(weights) if self.normalize else weights
        return bank.contract(torch.tensor(weights, dtype=bank.compute_dtype))
