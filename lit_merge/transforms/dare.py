"""DARE as a transform."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge import functional
from lit_merge.functional.dare import check_drop
from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform

__all__ = ("Dare",)


class Dare(Transform):
    """Drop entries of the task vectors at random and rescale the rest.

    All tensors are treated alike. The mask depends on the seed only, so all ranks and all runs agree.

    Args:
        drop: Probability of dropping an entry, in [0, 1).
        seed: Seed of the mask.
        rescale: Divide what stays by ``1 - drop``.

    Raises:
        MergeError: A value is out of range.

    Source: Yu et al., arXiv 2311.03099; see :func:`lit_merge.functional.dare`.

    >>> Dare(drop=0.9)
    Dare(drop=0.9, rescale=True, seed=0)
    """

    def __init__(self, drop: float = 0.5, seed: int = 0, rescale: bool = True) -> None:
        check_drop(drop)
        self.drop = drop
        self.seed = seed
        self.rescale = rescale

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor."""
        return "tensor"

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        generator = torch.Generator().manual_seed(self.seed)
        return functional.dare(deltas, self.drop, generator, rescale=self.rescale)

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms piece by piece, with one sequence of random numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        return lambda deltas: functional.dare(deltas, self.drop, generator, rescale=self.rescale)
