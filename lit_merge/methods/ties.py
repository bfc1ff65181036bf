"""TIES merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge import functional
from lit_merge.coefficients import Coefficient
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import share
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

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
        scale: Coefficient = 1.0,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if reduce not in ("mean", "sum"):
            raise MergeError(f"Ties.reduce: expected mean or sum, found {reduce!r}")
        self.density = share("Ties.density", density)
        self.reduce = reduce
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · TIES; all tensors are trimmed together."""
        return self._merge(bank)

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: thresholds, and the majority of all signs."""
        return "statistics"

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the thresholds of the network."""
        return partial(self._merge, facts=functional.ties_facts(pieces, self.density))

    def _merge(self, bank: TaskVectors, facts: functional.TiesFacts | None = None) -> dict[str, Tensor]:
        kept = functional.ties(bank.deltas, self.density, facts=facts)
        merged = functional.sum_merge(kept, 1.0) if self.reduce == "sum" else functional.disjoint_mean_merge(kept)
        del kept  # as large as the bank
        return bank.offset(merged, self.scale)
