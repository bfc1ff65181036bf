"""KnOTS merging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.knots import align, knots
from lit_merge.functional.scopes import share
from lit_merge.functional.ties import TiesFacts, ties_facts, ties_merge
from lit_merge.methods._on_matrices import OnMatrices
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

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
        """What the rule has to see at once: thresholds over the aligned parts of all matrices."""
        return "statistics"

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector."""
        return self._combine(deltas)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece; every reading decomposes the matrices again, as nothing is kept."""
        facts = ties_facts(_Parts(pieces, self), self.density)
        return lambda bank: bank.offset(self._combine(bank.deltas, facts), self.scale)

    def _combine(self, deltas: Mapping[str, Tensor], facts: TiesFacts | None = None) -> dict[str, Tensor]:
        def rule(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return ties_merge(parts, self.density, self.reduce, facts=facts)

        return knots(
            deltas,
            1.0,
            density=self.density,
            weighted=self.weighted,
            rule=rule,
            policy=self.policy,
            tolerance=self.tolerance,
        )


class _Parts:
    """Aligned parts of the matrices of pieces, ``(T, r, n)`` each, every time they are read."""

    def __init__(self, pieces: Pieces, rule: Knots) -> None:
        self._pieces, self._rule = pieces, rule

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        rule = self._rule
        for piece in self._pieces:
            matrices = {name: delta.flatten(2) for name, delta in piece.items() if rule.policy.covers(name, delta)}
            del piece
            parts = {
                name: align(matrix, weighted=rule.weighted, tolerance=rule.tolerance).parts
                for name, matrix in matrices.items()
            }
            del matrices
            yield {name: value for name, value in parts.items() if value.numel()}
            del parts
