"""Spherical interpolation of two task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import Scope, network_gram, share
from lit_merge.functional.spherical import Lengths, slerp
from lit_merge.functional.weighted_average import normalized
from lit_merge.methods._task_weights import TaskWeights, task_weights
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("NuSlerp",)


class NuSlerp(MergeModule):
    """Interpolate two task vectors along the arc between them: θ = θ0 + slerp(τ_1, τ_2; t = w_2 / (w_1 + w_2)).

    Args:
        weights: w of the two tasks, not negative, in the order of the suite or by name; null for equal weights.
        per: What has an angle: a ``row`` of a matrix, a ``tensor`` or the ``network``. mergekit's
            ``nuslerp_flatten: false`` takes the columns of a matrix, with ``nuslerp_row_wise`` its rows.
        lengths: ``blend`` as in mergekit, or ``linear``, see :func:`lit_merge.functional.spherical.slerp`.
        threshold: Largest absolute cosine with an arc. mergekit has none here; at 1 only parallel vectors have no arc.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: The suite does not have two tasks, or a value is out of range.

    Source: Shoemake, SIGGRAPH 1985; mergekit's ``nuslerp`` with a base.
    """

    def __init__(
        self,
        weights: TaskWeights = None,
        per: Scope = "tensor",
        lengths: Lengths = "blend",
        threshold: float = 1.0,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_finite(f"{type(self).__name__}.weights", weights, least=0)
        self.weights = weights
        self.per: Scope = per
        self.lengths: Lengths = lengths
        self.threshold = share("NuSlerp.threshold", threshold, zero=True)

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself: once the network has been seen."""
        return self.per == "network"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + the point on the arc; every tensor is interpolated."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the inner products over the network."""
        return partial(self._merge, products=network_gram(pieces.pairs(base=False)) if self.per == "network" else None)

    def _merge(self, bank: TaskVectors, products: Tensor | None = None) -> dict[str, Tensor]:
        if len(bank.tasks) != 2:
            raise MergeError(f"NuSlerp: expected two experts, found {len(bank.tasks)}; KarcherMean takes any number")
        t = normalized(task_weights(self.weights, bank.tasks))[1]
        return bank.offset(
            slerp(bank.deltas, t, per=self.per, lengths=self.lengths, threshold=self.threshold, products=products)
        )
