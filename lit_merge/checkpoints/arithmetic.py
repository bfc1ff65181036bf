"""Task arithmetic as a state dict of its own, computed tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_state, common_layout

__all__ = ("ArithmeticState",)


class ArithmeticState(Mapping[str, Tensor]):
    """θ0 + λ Σ_t τ_t as one network; a tensor is computed when it is asked for, so there is never a bank of experts.

    Sums are in float32 or better, every operation rounded by itself, so that all machines get the same bits. Integer
    tensors are those of the base.

    Args:
        base: State dict of the base.
        experts: State dict per task, with the keys, shapes and dtypes of the base; may be lazy.
        scale: λ.
        averaged: Names that take the mean over the experts instead, as running statistics do.

    Raises:
        MergeError: There is no expert; keys, shapes or dtypes differ; or, later, a value is NaN or infinite.

    >>> experts = {"a": {"w": torch.tensor([1.0]), "v": torch.tensor([3.0])}}
    >>> experts["b"] = {"w": torch.tensor([3.0]), "v": torch.tensor([5.0])}
    >>> merged = ArithmeticState({"w": torch.zeros(1), "v": torch.ones(1)}, experts, 0.5, averaged=["v"])
    >>> merged["w"], merged["v"]
    (tensor([2.]), tensor([4.]))
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        scale: float,
        averaged: Collection[str] = (),
    ) -> None:
        common_layout(base, experts, buffers=averaged, tied={})
        self._base = base
        self._experts = dict(experts)
        self._scale = scale
        self._averaged = frozenset(averaged)

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name]
        if not base.is_floating_point():
            return base
        start = base.detach().to(torch.promote_types(base.dtype, torch.float32))
        total = torch.zeros_like(start)
        for task, state in self._experts.items():
            check_state(f"expert {task!r}", name, state[name])
            total += state[name].detach().to(start) - start
        total *= 1 / len(self._experts) if name in self._averaged else self._scale
        return (start + total).to(base.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
