"""DARE followed by task arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge import functional
from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Dare as DareTransform
from lit_merge.transforms import DeltaMap, Needs, Pieces

__all__ = ("Dare",)


class Dare(MergeModule):
    """Task arithmetic on randomly dropped and rescaled task vectors: θ = θ0 + λ Σ_t DARE(τ_t).

    Other rules after DARE are compositions, such as ``Ties(transforms=[lit_merge.transforms.Dare()])``.

    Args:
        drop: Probability of dropping an entry, in [0, 1).
        scale: The coefficient λ.
        mask_seed: Seed of the mask.
        rescale: Divide what stays by ``1 - drop``.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Yu et al., arXiv 2311.03099, equation 3 and section 3.3.
    """

    def __init__(
        self,
        drop: float = 0.5,
        scale: Coefficient = 0.3,
        mask_seed: int = 0,
        rescale: bool = True,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.transform = DareTransform(drop, mask_seed, rescale)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: what the transform needs."""
        return self.transform.needs

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ Σ DARE(τ_t); every tensor is dropped from alike."""
        return self._merge(bank, self.transform)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with one sequence of random numbers."""
        return partial(self._merge, transform=self.transform.streamed(pieces))

    def _merge(self, bank: TaskVectors, transform: DeltaMap) -> dict[str, Tensor]:
        return bank.offset(functional.sum_merge(transform(bank.deltas), 1.0), self.scale)
