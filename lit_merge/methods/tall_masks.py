"""TALL masks: a network per task out of one multi-task vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.consensus import tall_masks
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import share
from lit_merge.functional.ties import TiesFacts
from lit_merge.methods._multi_task import MultiTask, check_multi_task, multi_task_facts, multi_task_vector
from lit_merge.methods._per_task import PerTaskModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("TallMasks",)


class TallMasks(PerTaskModule):
    """Cut each task's part out of the multi-task vector: θ_t = θ0 + mask_t ⊙ τ_MTL.

    One vector and a bit per entry and task are stored, but this runs as T networks, and the task must be known: a
    compression of the experts, not one network. :class:`~lit_merge.methods.Consensus` makes one network of the masks.
    The stored network, θ0 + τ_MTL, is not meant to be used without a mask.

    Args:
        threshold: λ_t, one for all tasks or one per task; tuned per task in 0.2 … 0.6 in the paper.
        multi_task: τ_MTL: ``sum``, or ``ties`` with the disjoint mean.
        density: Share of entries that TIES keeps.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Wang et al., Localizing Task Information, equation 5, arXiv 2405.07813.
    """

    def __init__(
        self,
        threshold: float | list[float] = 0.4,
        multi_task: MultiTask = "sum",
        density: float = 0.2,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_multi_task(multi_task)
        check_finite("TallMasks.threshold", threshold, least=0)
        self.threshold = threshold
        self.multi_task: MultiTask = multi_task
        self.density = share("TallMasks.density", density)

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: one tensor, but for the thresholds of TIES."""
        return "tensor" if self.multi_task == "sum" else "statistics"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return what is stored once, θ0 + τ_MTL; every tensor is treated alike."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the thresholds of the network if TIES has some."""
        return partial(self._merge, facts=multi_task_facts(pieces, self.multi_task, self.density))

    def _merge(self, bank: TaskVectors, facts: TiesFacts | None = None) -> dict[str, Tensor]:
        return bank.offset(multi_task_vector(bank.deltas, self.multi_task, self.density, facts))

    def task_vector(self, bank: TaskVectors, task: int) -> dict[str, Tensor]:
        """Return mask_t ⊙ τ_MTL, ``(*shape)`` each."""
        vector = multi_task_vector(bank.deltas, self.multi_task, self.density)
        given = [self.threshold] * len(bank.tasks) if isinstance(self.threshold, int | float) else self.threshold
        if len(given) != len(bank.tasks):
            raise MergeError(f"TallMasks.threshold: expected {len(bank.tasks)}, one per task, found {len(given)}")
        own = {name: delta[task : task + 1] for name, delta in bank.deltas.items()}
        masks = tall_masks(own, given[task], multi_task=vector)
        return {name: torch.where(masks[name][0], value, 0) for name, value in vector.items()}
