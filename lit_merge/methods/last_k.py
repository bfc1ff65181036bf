"""The last experts of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.coefficients import Coefficient, per_tensor
from lit_merge.functional.finite import check_finite
from lit_merge.methods._removal import others_of
from lit_merge.sequential_module import SequentialModule
from lit_merge.stages import Removal, Stage

__all__ = ("LastK",)


class LastK(SequentialModule):
    """The last k experts of a stream and no others: θ = θ0 + λ Σ τ over them, by default their mean.

    A reference for continual methods: what is older is forgotten altogether. Each stage reads its k experts again,
    one at a time, so they have to be kept; memory is that of two models.

    Args:
        k: How many experts, at least 1. With 1 the newest expert is the merge.
        scale: The coefficient λ; null for the mean.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: k is less than 1, or the scale is not finite.

    Source: a baseline of continual learning, the sliding window.
    """

    def __init__(self, k: int = 3, scale: Coefficient | None = None, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(**kwargs)
        check_finite("LastK.k", k, least=1)
        check_finite("LastK.scale", scale)
        self.k = k
        self.scale = scale

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the merge of the last k experts."""
        older = self._window(stage.history, self.k - 1)
        total = {name: value.clone() for name, value in incoming.items()}
        for task in reversed(older):  # newest first
            for name, value in stage.expert(task).items():
                total[name] += value.to(total[name])
        if self.scale is None:
            return {name: value.div_(len(older) + 1) for name, value in total.items()}
        factors = per_tensor(self.scale, tuple(total))
        return {name: value.mul_(factors[name]) for name, value in total.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say whether the expert is still in the merge, and which ones would be in it instead."""
        others = others_of(task, history)
        if task not in self._window(history, self.k):
            return Removal(True, (), f"{task} is not among the last {self.k}: nothing changes")
        needs = self._window(others, self.k)
        return Removal(False, needs, f"merge the last {len(needs)} of the others")

    def remove(
        self,
        merged: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        task: str,
        history: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the merge as it is, if the expert is not in it.

        Raises:
            MergeError: It is.
        """
        if not self.removal(task, history, numbers).exact:
            return super().remove(merged, expert, task, history, numbers)
        return dict(merged)

    @staticmethod
    def _window(history: Sequence[str], k: int) -> tuple[str, ...]:
        return tuple(history[max(0, len(history) - k) :])
