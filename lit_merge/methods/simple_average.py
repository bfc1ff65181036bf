"""Simple average of the experts."""

from __future__ import annotations

from torch import Tensor

from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("SimpleAverage",)


class SimpleAverage(MergeModule):
    """Mean of the experts' weights: θ = θ0 + (1/T) Σ_t τ_t.

    Args:
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Wortsman et al., Model soups (uniform soup), arXiv 2203.05482.
    """

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the mean of the experts; every tensor is averaged."""
        return bank.contract(1 / len(bank.tasks))
