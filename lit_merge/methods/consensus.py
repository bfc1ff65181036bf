"""Consensus merging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.consensus import consensus_merge
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import share
from lit_merge.functional.ties import TiesFacts
from lit_merge.methods._multi_task import MultiTask, check_multi_task, multi_task_facts, multi_task_vector
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Consensus",)


class Consensus(MergeModule):
    """Merge only what at least two tasks need: θ = θ0 + λ · [Σ_t mask_t ≥ k] ⊙ τ_MTL.

    Args:
        scale: The coefficient λ (α in the paper, tuned there): 0.3 goes with ``sum``, 1 with ``ties``.
        threshold: λ_t of the TALL masks, one for all tasks or one per task; tuned per task in 0.2 … 0.6 in the paper.
        least: Number k of tasks that must need an entry; 2 is the published value.
        multi_task: τ_MTL: ``sum`` (Consensus TA) or ``ties`` (Consensus TIES, disjoint mean).
        density: Share of entries that TIES keeps.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range, or there are fewer tasks than ``least``.

    Source: Wang et al., Localizing Task Information, section 4, arXiv 2405.07813.
    """

    def __init__(
        self,
        scale: Coefficient = 0.3,
        threshold: float | list[float] = 0.4,
        least: int = 2,
        multi_task: MultiTask = "sum",
        density: float = 0.2,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_multi_task(multi_task)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        check_finite("Consensus.threshold", threshold, least=0)
        check_finite("Consensus.least", least, least=1)
        self.threshold = threshold
        self.least = least
        self.multi_task: MultiTask = multi_task
        self.density = share("Consensus.density", density)

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor, but for the thresholds of TIES."""
        return "tensor" if self.multi_task == "sum" else "statistics"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · what is left of τ_MTL; every tensor is masked alike."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the thresholds of the network if TIES has some."""
        return partial(self._merge, facts=multi_task_facts(pieces, self.multi_task, self.density))

    def _merge(self, bank: TaskVectors, facts: TiesFacts | None = None) -> dict[str, Tensor]:
        vector = multi_task_vector(bank.deltas, self.multi_task, self.density, facts)
        merged = consensus_merge(bank.deltas, 1.0, self.threshold, self.least, multi_task=vector)
        return bank.offset(merged, self.scale)
