"""EMR merging: a network per task out of one unified vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.emr import EmrBalance, emr_rescalers, emr_unified
from lit_merge.functional.finite import check_finite
from lit_merge.methods._per_task import PerTaskModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("Emr",)


class Emr(PerTaskModule):
    """Elect, mask and rescale: θ_t = θ0 + λ_t · mask_t ⊙ τ_uni.

    One vector, a bit per entry and task and a number per task are stored, but this runs as T networks, and the task
    must be known: a compression of the experts, not one network. The stored network is θ0 + scale · τ_uni ("elect"
    alone, the ablation of the paper).

    Args:
        scale: Factor of τ_uni in the stored network; the networks of the tasks do not depend on it.
        balance: How the rescalers weigh tensors: by ``entries``, as in the paper, or ``tensors``, as in the released
            code, see :func:`lit_merge.functional.emr.emr_rescalers`.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: ``balance`` is unknown.

    Source: Huang et al., EMR-Merging, section 3, arXiv 2405.17461.
    """

    def __init__(
        self,
        scale: Coefficient = 1.0,
        balance: EmrBalance = "entries",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.balance: EmrBalance = balance

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return what is stored once, θ0 + scale · τ_uni; every tensor is treated alike."""
        return bank.offset(emr_unified(bank.deltas), self.scale)

    def task_vector(self, bank: TaskVectors, task: int) -> dict[str, Tensor]:
        """Return λ_t · mask_t ⊙ τ_uni, ``(*shape)`` each."""
        unified = emr_unified(bank.deltas)
        own = {name: delta[task : task + 1] for name, delta in bank.deltas.items()}
        factor = float(emr_rescalers(own, unified, self.balance)[0])
        return {name: torch.where(own[name][0] * value > 0, factor * value, 0) for name, value in unified.items()}
