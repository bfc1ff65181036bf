"""MagMax merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.coefficients import Coefficient, per_tensor
from lit_merge.functional.finite import check_finite
from lit_merge.functional.magmax import magmax
from lit_merge.methods._removal import others_of
from lit_merge.module import MergeModule
from lit_merge.stages import Removal, Stage
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("MagMax",)


class MagMax(MergeModule):
    """Of every entry the change of largest magnitude: θ = θ0 + λ · τ_{t*}, t* = argmax_t abs(τ_t).

    Args:
        scale: The coefficient λ; 0.5 is the published value.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Marczak et al., MagMax, section 4, arXiv 2407.06322.
    """

    def __init__(self, scale: Coefficient = 0.5, **kwargs: Any) -> None:  # noqa: ANN401 - passed on to the base class
        super().__init__(**kwargs)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · the largest changes; every tensor is treated alike."""
        return bank.offset(magmax(bank.deltas), self.scale)

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the largest of M and λ τ: after the last expert the merge of all at once."""
        factors = per_tensor(self.scale, tuple(merged))
        result: dict[str, Tensor] = {}
        for name, value in merged.items():  # scaled alike on both sides, so the larger one stays the larger one
            pair = torch.stack([value, incoming[name].to(value) * factors[name]])
            result |= magmax({name: pair})
        return result

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say that all others are needed: of each entry that it won nobody knows who was second."""
        return Removal(False, others_of(task, history), "MagMax keeps the largest change only: merge the others again")
