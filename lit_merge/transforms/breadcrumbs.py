"""Model Breadcrumbs as a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from lit_merge.functional.breadcrumbs import breadcrumbs, breadcrumbs_bounds, kept_share
from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform

__all__ = ("Breadcrumbs",)


class Breadcrumbs(Transform):
    """Zero the smallest and the largest changes of each task.

    Args:
        bottom: Share of entries of smallest magnitude that are dropped.
        top: Share of entries of largest magnitude that are dropped.
        per: Ranks within a ``tensor`` or over the ``network``.

    Raises:
        MergeError: A value is out of range.

    Source: Davari and Belilovsky, arXiv 2312.06795; see :func:`lit_merge.functional.breadcrumbs.breadcrumbs`.

    >>> Breadcrumbs()
    Breadcrumbs(bottom=0.85, per='tensor', top=0.007)
    """

    def __init__(self, bottom: float = 0.85, top: float = 0.007, per: Literal["tensor", "network"] = "tensor") -> None:
        kept_share(bottom, top)
        self.bottom = bottom
        self.top = top
        self.per: Literal["tensor", "network"] = per

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: what is ranked together."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is ranked among all of the network."""
        return self.per == "network"

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        return breadcrumbs(deltas, self.bottom, self.top, per=self.per)

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms piece by piece, with the ranks of the whole network if these count."""
        if self.per != "network":
            return self.__call__
        bounds = breadcrumbs_bounds(pieces, self.bottom, self.top)
        return lambda deltas: breadcrumbs(deltas, self.bottom, self.top, per="network", bounds=bounds)
