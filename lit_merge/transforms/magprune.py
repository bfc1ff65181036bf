"""The dropping of DELLA as a transform."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_merge.functional.dare import check_drop
from lit_merge.functional.della import magprune
from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform

__all__ = ("MagPrune",)


class MagPrune(Transform):
    """Drop entries at random, small ones rather than large ones, and rescale the rest.

    All tensors are treated alike, vectors and scalars as one row. The mask depends on the seed only, so all ranks and
    all runs agree.

    Args:
        drop: Mean probability of dropping an entry.
        window: Width of the probabilities around it.
        seed: Seed of the mask.
        per: Ranks within a ``row`` or a ``tensor``.
        rescale: Divide what stays by its 1 − p.

    Raises:
        MergeError: A value is out of range.

    Source: Deep, Bhardwaj and Poria, arXiv 2406.11617; see :func:`lit_merge.functional.della.magprune`.

    >>> MagPrune(0.7, 0.2)
    MagPrune(drop=0.7, per='row', rescale=True, seed=0, window=0.2)
    """

    def __init__(
        self,
        drop: float = 0.5,
        window: float = 0.3,
        seed: int = 0,
        per: Literal["row", "tensor"] = "row",
        rescale: bool = True,
    ) -> None:
        check_drop(drop, window)
        self.drop = drop
        self.window = window
        self.seed = seed
        self.per: Literal["row", "tensor"] = per
        self.rescale = rescale

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor."""
        return "tensor"

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        generator = torch.Generator().manual_seed(self.seed)
        return magprune(deltas, self.drop, self.window, generator, per=self.per, rescale=self.rescale)

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms piece by piece, with one sequence of random numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return lambda deltas: magprune(deltas, self.drop, self.window, generator, per=self.per, rescale=self.rescale)
