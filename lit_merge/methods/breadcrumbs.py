"""Model Breadcrumbs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.functional.sums import sum_merge
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import DeltaMap, Needs, Pieces
from lit_merge.transforms.breadcrumbs import Breadcrumbs as BreadcrumbsTransform

__all__ = ("Breadcrumbs",)


class Breadcrumbs(MergeModule):
    """Task arithmetic without the smallest and largest changes: θ = θ0 + λ Σ_t m_t ⊙ τ_t.

    Other rules after it are compositions, such as ``Ties(density=1, transforms=[lit_merge.transforms.Breadcrumbs()])``,
    which is mergekit's ``breadcrumbs_ties``.

    Args:
        bottom: Share of entries of smallest magnitude that are dropped; 0.85 (β) is the published value.
        top: Share of entries of largest magnitude that are dropped; 0.007 (1 − γ) is the published value.
        scale: The coefficient λ; 0.3 is the published value.
        per: Ranks within a ``tensor``, as published, or over the ``network``.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Davari and Belilovsky, Model Breadcrumbs, section 3, arXiv 2312.06795.
    """

    def __init__(
        self,
        bottom: float = 0.85,
        top: float = 0.007,
        scale: Coefficient = 0.3,
        per: Literal["tensor", "network"] = "tensor",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.transform = BreadcrumbsTransform(bottom, top, per)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: what the transform needs."""
        return self.transform.needs

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself: once the network has been seen."""
        return self.transform.entrywise(name, shape)

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ Σ m_t ⊙ τ_t; every tensor is masked alike."""
        return self._merge(bank, self.transform)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the ranks of the network if these count."""
        return partial(self._merge, transform=self.transform.streamed(pieces))

    def _merge(self, bank: TaskVectors, transform: DeltaMap) -> dict[str, Tensor]:
        return bank.offset(sum_merge(transform(bank.deltas), 1.0), self.scale)
