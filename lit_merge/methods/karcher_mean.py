"""Karcher mean of the experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import Scope, network_gram
from lit_merge.functional.spherical import karcher_mean
from lit_merge.methods._task_weights import TaskWeights, task_weights
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("KarcherMean",)


class KarcherMean(MergeModule):
    """Mean of the experts on the sphere: their mean direction, with their mean length.

    Args:
        of: What has direction and length: the experts' ``weights``, as in mergekit, or the ``task_vectors``. The
            weights of experts of one base are nearly parallel, and their Karcher mean is close to the average.
        weights: One per task, not negative, in the order of the suite or by name; null for equal weights.
        per: What has a direction: a ``row``, a ``tensor`` (as in mergekit) or the ``network``.
        tolerance: Length of the last step, in radians.
        max_steps: Most steps.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range, or there is not one weight per task.

    Source: Karcher, Comm. Pure Appl. Math. 30, 1977; mergekit's ``karcher``.
    """

    def __init__(
        self,
        of: Literal["weights", "task_vectors"] = "weights",
        weights: TaskWeights = None,
        per: Scope = "tensor",
        tolerance: float = 1e-9,
        max_steps: int = 100,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if of not in ("weights", "task_vectors"):
            raise MergeError(f"KarcherMean.of: expected weights or task_vectors, found {of!r}")
        self.of = of
        check_finite(f"{type(self).__name__}.weights", weights, least=0)
        self.weights = weights
        self.per: Scope = per
        check_finite(f"{type(self).__name__}.tolerance", tolerance, above=0)
        self.tolerance = tolerance
        self.max_steps = max_steps

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself: once the network has been seen."""
        return self.per == "network"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the mean; every tensor is averaged on its own sphere."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the inner products over the network."""
        return partial(
            self._merge,
            products=network_gram(pieces.pairs(base=self.of == "weights")) if self.per == "network" else None,
        )

    def _merge(self, bank: TaskVectors, products: Tensor | None = None) -> dict[str, Tensor]:
        merged = karcher_mean(
            bank.deltas,
            task_weights(self.weights, bank.tasks),
            base=bank.base if self.of == "weights" else None,
            per=self.per,
            tolerance=self.tolerance,
            max_steps=self.max_steps,
            products=products,
        )
        return bank.offset(merged)
