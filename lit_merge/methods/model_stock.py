"""Model Stock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge.functional.model_stock import AngleMean, model_stock
from lit_merge.functional.scopes import Scope, network_gram
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

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
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself: once the network has been seen."""
        return self.per == "network"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the shrunken average; every tensor has its own t."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the inner products over the network."""
        return partial(self._merge, products=network_gram(pieces.pairs(base=False)) if self.per == "network" else None)

    def _merge(self, bank: TaskVectors, products: Tensor | None = None) -> dict[str, Tensor]:
        return bank.offset(
            model_stock(bank.deltas, per=self.per, average=self.average, clamp=self.clamp, products=products)
        )
