"""Simple average of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.stages import Removal, Stage
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("SimpleAverage",)


class SimpleAverage(MergeModule):
    """Mean of the experts' weights: θ = θ0 + (1/T) Σ_t τ_t.

    Args:
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Wortsman et al., Model soups (uniform soup), arXiv 2203.05482.
    """

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the mean of the experts; every tensor is averaged."""
        return bank.contract(1 / len(bank.tasks))

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the running mean: after the last expert the mean of all."""
        return {name: value + (incoming[name].to(value) - value) / stage.number for name, value in merged.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say that the expert alone is needed: it is a term of a mean over a known number."""
        return Removal(True, (task,), f"take {task} out of the mean of {len(history)}")

    def remove(
        self,
        merged: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        task: str,
        history: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the mean of the others, (n M − τ) / (n − 1); of none, zeros.

        Raises:
            MergeError: The expert is not among those that were absorbed.
        """
        number = len(history)
        if task not in history:
            raise MergeError(f"remove: expected one of {', '.join(history) or 'no expert'}, found {task!r}")
        if number == 1:
            return {name: value.new_zeros(value.shape) for name, value in merged.items()}
        return {name: value + (value - expert[name].to(value)) / (number - 1) for name, value in merged.items()}
