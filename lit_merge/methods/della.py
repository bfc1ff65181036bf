"""DELLA merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.errors import MergeError
from lit_merge.functional.della import elected_mean_merge
from lit_merge.functional.finite import check_finite
from lit_merge.functional.sums import sum_merge
from lit_merge.functional.ties import majority_sign
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import DeltaMap, Needs, Pieces
from lit_merge.transforms.magprune import MagPrune

__all__ = ("Della",)


class Della(MergeModule):
    """Drop by magnitude and chance, elect signs, average what agrees: θ = θ0 + λ · δ_avg.

    Args:
        drop: Mean probability p of dropping an entry; the paper tunes it per pair of experts.
        window: Width ε of the probabilities around it; mergekit's default, 0.15, is half of the default here.
        scale: The coefficient λ.
        reduce: ``elect``: signs are elected and the tasks that agree averaged, as in the paper; ``sum``: neither, the
            dropped vectors are summed, mergekit's ``della_linear``.
        mask_seed: Seed of the masks.
        per: Ranks within a ``row`` (output neuron), as in the paper, or a ``tensor``.
        rescale: Divide what stays by its 1 − p.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: ``reduce`` is unknown.

    Source: Deep, Bhardwaj and Poria, DELLA-Merging, section 3, arXiv 2406.11617.
    """

    def __init__(
        self,
        drop: float = 0.5,
        window: float = 0.3,
        scale: Coefficient = 1.0,
        reduce: Literal["elect", "sum"] = "elect",
        mask_seed: int = 0,
        per: Literal["row", "tensor"] = "row",
        rescale: bool = True,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if reduce not in ("elect", "sum"):
            raise MergeError(f"Della.reduce: expected elect or sum, found {reduce!r}")
        self.transform = MagPrune(drop, window, mask_seed, per, rescale)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.reduce = reduce

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · DELLA; every tensor is dropped from, vectors and scalars as one row."""
        return self._merge(bank, self.transform)

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: for the election the majority of all signs, which settles ties."""
        return "statistics" if self.reduce == "elect" else "tensor"

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with one sequence of random numbers and the majority of the network."""
        majority = None
        if self.reduce == "elect":
            majority = majority_sign(map(self.transform.streamed(pieces), pieces))
        return partial(self._merge, transform=self.transform.streamed(pieces), majority=majority)

    def _merge(self, bank: TaskVectors, transform: DeltaMap, majority: float | None = None) -> dict[str, Tensor]:
        kept = transform(bank.deltas)
        if self.reduce == "sum":
            return bank.offset(sum_merge(kept, 1.0), self.scale)
        return bank.offset(elected_mean_merge(kept, majority=majority), self.scale)
