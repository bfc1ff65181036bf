"""LiNeS as a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lit_merge.functional.finite import check_finite
from lit_merge.functional.lines import lines
from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform

__all__ = ("Lines",)


class Lines(Transform):
    """Scale every task vector up with depth; before a linear rule this scales the merged vector.

    Args:
        alpha: Factor of the first block, and of tensors outside of all blocks.
        beta: What the last block has more.
        outside: Factor of tensors outside of all blocks; by default ``alpha``.

    Raises:
        MergeError: A factor is not finite.

    Source: Wang et al., arXiv 2410.17146; see :func:`lit_merge.functional.lines.lines`.

    >>> Lines(0.125, 0.5)
    Lines(alpha=0.125, beta=0.5, outside=None)
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5, outside: float | None = None) -> None:
        for name, value in (("alpha", alpha), ("beta", beta), ("outside", outside)):
            check_finite(f"Lines.{name}", value)
        self.alpha = alpha
        self.beta = beta
        self.outside = outside

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor, and the names of all."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is transformed for itself."""
        return True

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scaled task vectors, ``(T, *shape)`` each."""
        return lines(deltas, self.alpha, self.beta, outside=self.outside)

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms piece by piece, with the depth in the whole network."""
        names = pieces.names
        return lambda deltas: lines(deltas, self.alpha, self.beta, outside=self.outside, network=names)
