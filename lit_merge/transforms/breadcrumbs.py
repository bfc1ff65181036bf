"""Model Breadcrumbs as a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lit_merge.functional.breadcrumbs import breadcrumbs, kept_share
from lit_merge.transforms.base import Needs, Transform

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
        return "tensor" if self.per == "tensor" else "network"

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        return breadcrumbs(deltas, self.bottom, self.top, per=self.per)
