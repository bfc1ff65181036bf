"""What data-free methods on task matrices share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.functional.matrices import MatrixPolicy, Others
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("OnMatrices",)


class OnMatrices(MergeModule):
    """θ = θ0 + α τ, where τ comes from decompositions of the task matrices.

    τ is made once per bank and kept (one model in float32), because evaluation, report and export all ask for it.

    Args:
        scale: The coefficient α of everything, matrices or not.
        others: How tensors that are not matrices are merged: ``mean``, ``sum`` or ``base``.
        convolutions: Kernels are matrices ``(out, in · k · k)`` too.
        exclude: Names or patterns of matrices that are treated as others.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.
    """

    def __init__(
        self,
        scale: Coefficient = 1.0,
        others: Others = "mean",
        convolutions: bool = False,
        exclude: Sequence[str] = (),
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.policy = MatrixPolicy(others, convolutions, tuple(exclude) if not isinstance(exclude, str) else exclude)
        self._made: tuple[TaskVectors, torch.device, dict[str, Tensor]] | None = None

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: one tensor."""
        return "tensor"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say which tensors are no matrices, and merged entry by entry."""
        return not self.policy.covers(name, torch.empty(1, *shape, device="meta"))

    @abstractmethod
    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the merged task vector, ``(*shape)`` each, for task vectors ``(T, *shape)``, without α."""

    @torch.no_grad()
    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + α τ."""
        device = next(iter(bank.base.values())).device
        if bank is not getattr(self, "bank", None):  # such as a piece of a network, of which nothing is kept
            return bank.offset(self.combine(bank.deltas), self.scale)
        if self._made is None or self._made[0] is not bank or self._made[1] != device:
            with torch.autocast(device.type, enabled=False):
                self._made = (bank, device, self.combine(bank.deltas))
        return bank.offset(self._made[2], self.scale)
