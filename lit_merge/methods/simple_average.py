"""Simple average of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.methods._removal import others_of
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

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say that every entry is merged for itself."""
        return True

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the mean of the experts; every tensor is averaged."""
        return bank.contract(1 / len(bank.tasks))

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the running mean: after the last expert the mean of all."""
        return {name: value + (incoming[name].to(value) - value) / stage.number for name, value in merged.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say that the expert alone is needed: it is a term of a mean over a known number."""
        others_of(task, history)
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
        left = len(others_of(task, history))
        if not left:
            return {name: value.new_zeros(value.shape) for name, value in merged.items()}
        return {name: value + (value - expert[name].to(value)) / left for name, value in merged.items()}
