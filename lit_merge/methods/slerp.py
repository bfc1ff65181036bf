"""Spherical interpolation of two experts' weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import Scope, network_gram, share
from lit_merge.functional.spherical import Lengths, slerp
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Slerp",)


class Slerp(MergeModule):
    """Interpolate the weights of two experts along the arc between them.

    The weights of experts of one base are often so nearly parallel (cosine above ``threshold``) that this is their
    linear interpolation; :class:`~lit_merge.methods.NuSlerp` interpolates the task vectors, which are not.

    Args:
        t: Where between the first expert (0) and the second (1), in [0, 1].
        per: What has an angle: a ``row``, a ``tensor`` or the ``network``.
        lengths: ``blend`` as in mergekit, or ``linear``, see :func:`lit_merge.functional.spherical.slerp`.
        threshold: Largest absolute cosine with an arc; mergekit's value is the default.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: The suite does not have two tasks, or a value is out of range.

    Source: Shoemake, SIGGRAPH 1985; mergekit's ``slerp``.
    """

    def __init__(
        self,
        t: float = 0.5,
        per: Scope = "tensor",
        lengths: Lengths = "blend",
        threshold: float = 0.9995,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.t = share("Slerp.t", t, zero=True)
        self.per: Scope = per
        self.lengths: Lengths = lengths
        self.threshold = share("Slerp.threshold", threshold, zero=True)

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself: once the network has been seen."""
        return self.per == "network"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the point on the arc; every tensor is interpolated."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the inner products over the network."""
        return partial(self._merge, products=network_gram(pieces.pairs(base=True)) if self.per == "network" else None)

    def _merge(self, bank: TaskVectors, products: Tensor | None = None) -> dict[str, Tensor]:
        if len(bank.tasks) != 2:
            raise MergeError(f"Slerp: expected two experts, found {len(bank.tasks)}; KarcherMean takes any number")
        merged = slerp(
            bank.deltas,
            self.t,
            base=bank.base,
            per=self.per,
            lengths=self.lengths,
            threshold=self.threshold,
            products=products,
        )
        return bank.offset(merged)
