"""TIES as a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lit_merge import functional
from lit_merge.functional.scopes import check_scope, share
from lit_merge.functional.ties import TiesScope
from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform

__all__ = ("Ties",)


class Ties(Transform):
    """Trim each task vector and zero the entries that lose the sign election.

    Before :class:`~lit_merge.AdaMerging` this is AdaMerging++ (arXiv 2310.02575, section 3.2). All tensors are
    treated alike; running statistics and integer tensors are not task vectors and stay out.

    Args:
        density: Share of entries that stay in trimming, in (0, 1].
        per: Trimming is that of the ``network``, as published, or of each ``tensor``, as in mergekit.

    Raises:
        MergeError: A value is out of range.

    Source: Yadav et al., TIES-Merging, arXiv 2306.01708; see :func:`lit_merge.functional.ties`.

    >>> Ties(0.1)
    Ties(density=0.1)
    """

    per: TiesScope = "network"

    def __init__(self, density: float = 0.2, per: TiesScope = "network") -> None:
        self.density = share("Ties.density", density)
        check_scope(per, ("network", "tensor"))
        if per != "network":  # the default is not part of ``repr``, which checkpoints without the option have
            self.per = per

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: what is trimmed together."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is trimmed among all of the network."""
        return self.per == "network"

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        return functional.ties(deltas, self.density, per=self.per)

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms piece by piece, with the thresholds of the whole network if these count."""
        if self.per == "tensor":
            return self.__call__
        facts = functional.ties_facts(pieces, self.density)
        return lambda deltas: functional.ties(deltas, self.density, facts=facts)
