"""TIES merging."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_merge import functional
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("Ties",)


class Ties(MergeModule):
    """Trim, elect signs, merge what agrees: θ = θ0 + λ · TIES(τ_1 … τ_T).

    Args:
        density: Share of entries per task that stay in trimming, in (0, 1]; global over all tensors.
        reduce: ``mean``: over the tasks that kept an entry, as in the paper; ``sum``: as in the AdaMerging code and
            FusionBench, which go with ``scale=0.3``.
        scale: The coefficient λ; 1 is the published value for ``mean``.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: ``reduce`` is unknown.

    Source: Yadav et al., TIES-Merging, algorithm 1, arXiv 2306.01708.
    """

    def __init__(
        self,
        density: float = 0.2,
        reduce: Literal["mean", "sum"] = "mean",
        scale: float = 1.0,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if reduce not in ("mean", "sum"):
            raise MergeError(f"Ties.reduce: expected mean or sum, found {reduce!r}")
        self.density = density
        self.reduce = reduce
        self.scale = scale

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · TIES; all tensors are trimmed together."""
        kept = functional.ties(bank.deltas, self.density)
        if self.reduce == "sum":
            return bank.offset(functional.sum_merge(kept, self.scale))
        return bank.offset(functional.disjoint_mean_merge(kept), self.scale)
