"""Model Stock."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_merge.functional.model_stock import AngleMean, model_stock
from lit_merge.functional.scopes import Scope
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("ModelStock",)


class ModelStock(MergeModule):
    """Between base and average, by the angle between experts: θ = t · mean_t θ_t + (1 − t) θ0.

    Meant for experts of one task. Those of different tasks are nearly orthogonal, and t is then near 0.

    Args:
        per: What has an angle: a ``tensor``, as published, a ``row`` (mergekit's ``filter_wise``) or the ``network``.
        average: Mean over pairs of experts of the ``cosine`` or of the ``angle``.
        clamp: No negative t, see :func:`lit_merge.functional.model_stock.model_stock`.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: There is one expert only, or a value is unknown.

    Source: Jang et al., Model Stock, equation 3, arXiv 2403.19522.
    """

    def __init__(
        self,
        per: Scope = "tensor",
        average: AngleMean = "cosine",
        clamp: bool = True,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.per: Scope = per
        self.average: AngleMean = average
        self.clamp = clamp

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "network" if self.per == "network" else "tensor"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the shrunken average; every tensor has its own t."""
        return bank.offset(model_stock(bank.deltas, per=self.per, average=self.average, clamp=self.clamp))
