"""Isotropic merging in the common subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.functional.isotropic import iso_c
from lit_merge.methods._on_matrices import OnMatrices

__all__ = ("IsoC",)


class IsoC(OnMatrices):
    """Iso-C: the sum of the task matrices with all singular values replaced by their mean: θ = θ0 + α σ̄ U Vᵀ.

    One expert alone does not come back: its spectrum is flattened too.

    Args:
        scale: The coefficient α of everything. Published for 8 tasks: 1.0 (ViT-B/32), 1.4 (B/16), 1.5 (L/14).
        tolerance: Directions of the sum with σ below it, relative to σ_1, stay zero.
        **kwargs: ``others``, ``convolutions``, ``exclude``: see :class:`~lit_merge.functional.MatrixPolicy`; the rest:
            see :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Marczak et al., No Task Left Behind, algorithm 1, arXiv 2502.04959.
    """

    def __init__(self, scale: Coefficient = 1.0, tolerance: float = 1e-6, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(scale=scale, **kwargs)
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector."""
        return iso_c(deltas, policy=self.policy, tolerance=self.tolerance)
