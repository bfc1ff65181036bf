"""The consensus mask as a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.functional.consensus import consensus_mask
from lit_merge.functional.finite import check_finite
from lit_merge.transforms.base import Needs, Transform

__all__ = ("Consensus",)


class Consensus(Transform):
    """Zero the entries that fewer than ``least`` tasks need, in all task vectors.

    Before :class:`~lit_merge.TaskArithmetic` this is Consensus TA; before :class:`~lit_merge.AdaMerging` its
    coefficients are learned. All tensors are treated alike.

    Args:
        threshold: λ_t of the TALL masks, one for all tasks or one per task.
        least: Number of tasks that must need an entry.

    Raises:
        MergeError: A value is out of range; or, later, there are fewer tasks than ``least``.

    Source: Wang et al., arXiv 2405.07813; see :func:`lit_merge.functional.consensus.consensus_mask`.

    >>> Consensus()
    Consensus(least=2, threshold=0.4)
    """

    def __init__(self, threshold: float | list[float] = 0.4, least: int = 2) -> None:
        check_finite("Consensus.threshold", threshold, least=0)
        check_finite("Consensus.least", least, least=1)
        self.threshold = threshold
        self.least = least

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is transformed for itself."""
        return True

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return masked task vectors, ``(T, *shape)`` each."""
        masks = consensus_mask(deltas, self.threshold, self.least)
        return {name: torch.where(masks[name], delta, 0) for name, delta in deltas.items()}
