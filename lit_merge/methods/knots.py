"""KnOTS merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.knots import knots
from lit_merge.functional.scopes import share
from lit_merge.functional.ties import ties_merge
from lit_merge.methods._on_matrices import OnMatrices
from lit_merge.transforms import Needs

__all__ = ("Knots",)


class Knots(OnMatrices):
    """KnOTS: the task matrices in one common basis, merged there by TIES: θ = θ0 + α U · TIES(Σ V_1ᵀ … Σ V_Tᵀ).

    Made for LoRA experts, whose updates are given as the matrices they amount to (an adapter is merged into its base
    when it is read); works for others too.

    Args:
        scale: The coefficient α of everything; 0.6 is the released value for LoRA of rank 16, ViT-B/32 and 8 tasks.
        density: Share of entries that stay in trimming, in (0, 1]; over the aligned parts of all matrices together.
        reduce: ``mean``: over the tasks that kept an entry, as released; ``sum``.
        weighted: Singular values go with the parts that are merged, as released, or with the basis.
        tolerance: Common directions below it are dropped, relative to the longest.
        **kwargs: ``others``, ``convolutions``, ``exclude``: see :class:`~lit_merge.functional.MatrixPolicy`; the rest:
            see :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Stoica et al., Model Merging with SVD to Tie the KnOTS, section 4, arXiv 2410.19735.
    """

    def __init__(
        self,
        scale: Coefficient = 0.6,
        density: float = 0.2,
        reduce: Literal["mean", "sum"] = "mean",
        weighted: bool = True,
        tolerance: float = 1e-6,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        if reduce not in ("mean", "sum"):
            raise MergeError(f"Knots.reduce: expected mean or sum, found {reduce!r}")
        self.density = share("Knots.density", density)
        self.reduce = reduce
        self.weighted = weighted
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: the aligned parts of all matrices."""
        return "network"

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector."""
        return knots(
            deltas,
            1.0,
            density=self.density,
            weighted=self.weighted,
            rule=self._sum if self.reduce == "sum" else None,
            policy=self.policy,
            tolerance=self.tolerance,
        )

    def _sum(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return ties_merge(parts, self.density, "sum")
