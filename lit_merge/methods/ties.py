"""TIES merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lit_merge import functional
from lit_merge.coefficients import Coefficient, per_tensor
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import check_scope, share
from lit_merge.functional.ties import TiesScope
from lit_merge.module import MergeModule
from lit_merge.stages import Stage
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Ties",)


class Ties(MergeModule):
    """Trim, elect signs, merge what agrees: θ = θ0 + λ · TIES(τ_1 … τ_T).

    Args:
        density: Share of entries per task that stay in trimming, in (0, 1].
        reduce: ``mean``: over the tasks that kept an entry, as in the paper; ``sum``: as in the AdaMerging code and
            FusionBench, which go with ``scale=0.3``.
        scale: The coefficient λ; 1 is the published value for ``mean``.
        sequential: What an expert does that arrives later. ``replace``: the merge M becomes λ · TIES(M, τ), the rule
            for two; the first expert is taken as it is. ``add``: M + λ · TIES(M, τ), and λ τ for the first, as the
            continual baseline of FusionBench does with ``reduce=sum`` and ``scale=0.5``; M grows with every expert.
        per: Trimming, and the sign of entries that cancel, are those of the ``network``, as published, or of each
            ``tensor``, as in mergekit.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: ``reduce``, ``per`` or ``sequential`` is unknown.

    Source: Yadav et al., TIES-Merging, algorithm 1, arXiv 2306.01708.
    """

    def __init__(
        self,
        density: float = 0.2,
        reduce: Literal["mean", "sum"] = "mean",
        scale: Coefficient = 1.0,
        sequential: Literal["replace", "add"] = "replace",
        per: TiesScope = "network",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if reduce not in ("mean", "sum"):
            raise MergeError(f"Ties.reduce: expected mean or sum, found {reduce!r}")
        if sequential not in ("replace", "add"):
            raise MergeError(f"Ties.sequential: expected replace or add, found {sequential!r}")
        self.density = share("Ties.density", density)
        self.reduce = reduce
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.sequential = sequential
        check_scope(per, ("network", "tensor"))
        self.per: TiesScope = per

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · TIES; all tensors are trimmed together, unless ``per`` says otherwise."""
        return self._merge(bank)

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: thresholds, and the majority of all signs."""
        return "statistics" if self.per == "network" else "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is trimmed among all of the network."""
        return self.per == "network"

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the thresholds of the network if these count."""
        if self.per == "tensor":
            return self._merge
        return partial(self._merge, facts=functional.ties_facts(pieces, self.density))

    def _merge(self, bank: TaskVectors, facts: functional.TiesFacts | None = None) -> dict[str, Tensor]:
        return bank.offset(self._combine(bank.deltas, facts), self.scale)

    def _combine(self, deltas: Mapping[str, Tensor], facts: functional.TiesFacts | None = None) -> dict[str, Tensor]:
        return functional.ties_merge(deltas, self.density, self.reduce, per=self.per, facts=facts)

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the merge of M and τ as ``sequential`` says; earlier experts are trimmed again and again."""
        factors = per_tensor(self.scale, tuple(merged))
        add = self.sequential == "add"
        if stage.number == 1:
            return {name: factors[name] * value if add else value.clone() for name, value in incoming.items()}
        pair = {name: torch.stack([value, incoming[name].to(value)]) for name, value in merged.items()}
        result = {name: value * factors[name] for name, value in self._combine(pair).items()}
        return {name: merged[name] + value for name, value in result.items()} if add else result
