"""Task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient, per_tensor
from lit_merge.functional.finite import check_finite
from lit_merge.methods._removal import others_of
from lit_merge.module import MergeModule
from lit_merge.stages import Removal, Stage
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("TaskArithmetic",)


class TaskArithmetic(MergeModule):
    """Scaled sum of task vectors: θ = θ0 + λ Σ_t τ_t.

    Args:
        scale: The coefficient λ, a number, a list over depth or by name, see :mod:`lit_merge.coefficients`; 0.3 is the
            published choice for eight vision tasks.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Ilharco et al., Editing Models with Task Arithmetic, section 4, arXiv 2212.04089.
    """

    def __init__(self, scale: Coefficient = 0.3, **kwargs: Any) -> None:  # noqa: ANN401 - passed on to the base class
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
        """Return θ0 + λ Σ τ_t; every tensor is summed."""
        return bank.contract(bank.columns(self.scale))

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return M + λ τ: after the last expert the merge of all at once."""
        factors = per_tensor(self.scale, tuple(merged))
        return {name: value + factors[name] * incoming[name].to(value) for name, value in merged.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say that the expert alone is needed: it is a term of a sum."""
        others_of(task, history)
        return Removal(True, (task,), f"subtract scale times the task vector of {task}")

    def remove(
        self,
        merged: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        task: str,
        history: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return M − λ τ; exact up to rounding.

        Raises:
            MergeError: The expert is not among those that were absorbed.
        """
        others_of(task, history)
        factors = per_tensor(self.scale, tuple(merged))
        return {name: value - factors[name] * expert[name].to(value) for name, value in merged.items()}
