"""Isotropic merging in common and task-specific subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.decompositions import SvdMethod
from lit_merge.functional.finite import check_finite
from lit_merge.functional.isotropic import iso_cts
from lit_merge.functional.scopes import share
from lit_merge.methods._on_matrices import OnMatrices

__all__ = ("IsoCts",)


class IsoCts(OnMatrices):
    """Iso-CTS: the leading subspace of the summed task matrices, filled up by directions of single tasks, all alike.

    Args:
        scale: The coefficient α of everything.
        common: Share of the common subspace, in [0, 1]; 0.8 is the published value.
        tolerance: Directions below it are dropped, relative to the longest.
        decomposition: ``auto``, ``svd``, ``gram`` or ``randomized``.
        **kwargs: ``others``, ``convolutions``, ``exclude``: see :class:`~lit_merge.functional.MatrixPolicy`; the rest:
            see :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Marczak et al., No Task Left Behind, algorithm 2, arXiv 2502.04959.
    """

    def __init__(
        self,
        scale: Coefficient = 1.0,
        common: float = 0.8,
        tolerance: float = 1e-6,
        decomposition: SvdMethod = "auto",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        self.common = share("IsoCts.common", common, zero=True)
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance
        self.decomposition = decomposition

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector."""
        return iso_cts(
            deltas, common=self.common, policy=self.policy, tolerance=self.tolerance, method=self.decomposition
        )
