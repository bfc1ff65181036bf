"""Task singular vector merging."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.decomposition_cache import DecompositionCache
from lit_merge.functional.decompositions import SvdMethod, truncated_svd
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import share
from lit_merge.functional.tsv import Decompose, TsvFacts, tsv_merge
from lit_merge.methods._on_matrices import OnMatrices

__all__ = ("TsvMerge",)


class TsvMerge(OnMatrices):
    """TSV-M: the leading singular triplets of all tasks, orthogonalised and added: θ = θ0 + α U⊥ Σ V⊥ᵀ.

    The report says per matrix how much the tasks interfere, and how far their subspaces coincide; where they nearly
    do, there is a warning, and ``ridge`` helps.

    Args:
        scale: The coefficient α of everything; 1 is the published default.
        fraction: Share of min(m, n) that is kept of each task, in (0, 1]; null for 1/T.
        ridge: Keeps small directions of the concatenation small; 0 as published, about 0.1 for experts that are alike.
        tolerance: Directions below it are dropped, relative to the longest.
        decomposition: ``auto``, ``svd``, ``gram`` or ``randomized``; ``randomized`` changes the result, see
            :mod:`lit_merge.functional.decompositions`.
        cache_dir: Folder where the decompositions of the task vectors are kept, for runs to come.
        **kwargs: ``others``, ``convolutions``, ``exclude``: see :class:`~lit_merge.functional.MatrixPolicy`; the rest:
            see :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Gargiulo et al., Task Singular Vectors, algorithm 1, arXiv 2412.00081.
    """

    def __init__(
        self,
        scale: Coefficient = 1.0,
        fraction: float | None = None,
        ridge: float = 0.0,
        tolerance: float = 1e-6,
        decomposition: SvdMethod = "auto",
        cache_dir: str | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        self.fraction = None if fraction is None else share(f"{type(self).__name__}.fraction", fraction)
        check_finite(f"{type(self).__name__}.ridge", ridge, least=0)
        self.ridge = ridge
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance
        self.decomposition = decomposition
        self.cache_dir = cache_dir
        self.facts: dict[str, TsvFacts] = {}

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector."""
        self.facts = {}
        return tsv_merge(
            deltas,
            fraction=self.fraction,
            policy=self.policy,
            ridge=self.ridge,
            tolerance=self.tolerance,
            decompose=decomposer(self.decomposition, self.tolerance, self.cache_dir),
            observe=self.facts.__setitem__,
        )

    def report_extra(self) -> dict[str, Any]:
        """Return per matrix the rank per task, the singular task interference and the overlap, and their means."""
        self.merge(self.bank)
        means = {
            "interference": fmean(fact.interference for fact in self.facts.values()),
            "overlap": fmean(fact.overlap for fact in self.facts.values()),
        } if self.facts else {}  # fmt: skip
        return {"tsv": {**means, "tensors": {name: fact._asdict() for name, fact in self.facts.items()}}}


def decomposer(method: SvdMethod, tolerance: float, folder: str | None) -> Decompose | None:
    """Return what decomposes one matrix ``(m, n)`` to a rank, with a cache on disk if there is a folder.

    Nothing stands for the default, which takes the tasks together.
    """
    if folder is not None:
        return DecompositionCache(folder, method=method, tolerance=tolerance)
    if (method, tolerance) == ("auto", 1e-6):
        return None
    return lambda matrix, rank: truncated_svd(matrix, rank, method, tolerance=tolerance)
