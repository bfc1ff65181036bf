"""DOP: a new expert joins what was merged, seen through the subspaces of both.

Source: Yang et al., Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity,
NeurIPS 2025 (openreview zD5cUX67b9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import truncated_svd
from lit_merge.functional.layer_problem import LayerProblem, descend, layer_batches, layer_shapes
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.opcm import EMBEDDINGS
from lit_merge.functional.scopes import share as checked_share
from lit_merge.functional.scopes import wide

__all__ = ("DopProblem", "Space", "dop", "dop_step")

Space = Literal["uv", "u", "v"]


class DopProblem(LayerProblem):
    """DOP's two objectives on the merged task vector W of a layer, for what was merged (m) and what is new (n).

    loss_i = ‖diag(σ_i) U_iᵀ (W − τ_i)‖² + ‖(W − τ_i) V_i diag(σ_i)‖² with τ_i = U_i diag(σ_i) V_iᵀ, and the step
    follows the gradient of c_m loss_m + c_n loss_n. Both losses are quadratic: with L = U σ² Uᵀ and R = V σ² Vᵀ the
    gradient is 2 (L D + D R) at D = W − τ_i, and the loss is half its inner product with D. A long side (more than
    twice the short one) is not squared: there L D is U σ (σ Uᵀ D).

    c moves with the steps: each call of :meth:`gradient` finds the convex combination of the two gradients, each
    divided by its loss, that is shortest (MGDA), and goes the share 1 − ``momentum`` of the way there. So one problem
    is for one descent.

    Args:
        deltas: Task vectors ``(L, 2, m, n)``: what was merged, and what is new.
        space: Which of the two terms count: ``uv``, ``u`` (the first) or ``v`` (the second).
        share: Singular values count until their cumulative share reaches this; 1 for all, without a decomposition.
            (The released code leaves the last of these out, and so a task vector of rank 1 altogether.)
        stability: c_m at the beginning, in [0, 1]; c_n is the rest.
        momentum: In [0, 1]; with 1 the weights stay.

    Attributes:
        weights: c, ``(L, 2)``.

    Raises:
        MergeError: A value is out of range, or there are not two task vectors.

    >>> problem = DopProblem(torch.tensor([[[[2.0]], [[1.0]]]]), share=1.0, momentum=1.0)
    >>> problem.gradient(problem.start())  # W = 1.5: 0.8 · 2 · 4 · 0.25 + 0.2 · 2 · 1 · 0.25; 0.8 · 4 · 4 · -0.5 + …
    (tensor([1.7000]), tensor([[[-6.]]]))
    """

    weights: Tensor

    def __init__(
        self,
        deltas: Tensor,
        space: Space = "uv",
        share: float = 0.99999,
        stability: float = 0.8,
        momentum: float = 0.999,
    ) -> None:
        super().__init__(deltas)
        if deltas.ndim != 4 or deltas.shape[1] != 2:
            raise MergeError(f"DopProblem: expected task vectors (L, 2, m, n), found shape {tuple(deltas.shape)}")
        if space not in get_args(Space):
            raise MergeError(f"space: expected uv, u or v, found {space!r}")
        self.space = space
        self.share = checked_share("share", share)
        self.momentum = checked_share("momentum", momentum, zero=True)
        first = checked_share("stability", stability, zero=True)
        self.weights = torch.tensor([first, 1 - first], dtype=self.dtype, device=deltas.device).repeat(len(deltas), 1)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """U σ ``(L, 2, m, k)`` and V σ ``(L, 2, n, k)``; τ and τᵀ, whose Gram matrices are the same, for all of σ."""
        deltas = self.deltas.to(self.dtype)
        if self.share == 1:
            return deltas, deltas.mT
        u, s, vh = truncated_svd(deltas)
        shares = s.double().cumsum(-1)
        s = s * (shares - s < self.share * shares[..., -1:])
        return u * s.unsqueeze(-2), vh.mT * s.unsqueeze(-2)

    @cached_property
    def _sides(self) -> tuple[tuple[Tensor, bool], tuple[Tensor, bool]]:
        """L and R, or their factors where these are cheaper, and which of it."""
        found = []
        for factor in self._factors:
            long = 2 * min(self.deltas.shape[2:]) < factor.shape[-2]
            found.append((factor if long else factor @ factor.mT, long))
        return found[0], found[1]

    def start(self) -> Tensor:
        """Return the mean of the two, ``(L, m, n)``."""
        return self.deltas.mean(1, dtype=self.dtype)

    def losses(self, value: Tensor) -> Tensor:
        """Return c_m loss_m + c_n loss_n of each layer, ``(L,)``, as it is written."""
        offset = value.unsqueeze(1) - self.deltas
        left, right = self._factors
        both = torch.zeros_like(self.weights)
        if "u" in self.space:
            both = both + (left.mT @ offset).square().sum((-2, -1))
        if "v" in self.space:
            both = both + (offset @ right).square().sum((-2, -1))
        return (self.weights * both).sum(1)

    @torch.no_grad()
    def gradient(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Move the weights, and return the weighted loss ``(L,)`` and its gradient ``(L, m, n)``, in closed form."""
        offset = value.unsqueeze(1) - self.deltas
        (left, tall), (right, broad) = self._sides
        slope = torch.zeros_like(offset)
        if "u" in self.space:
            slope += left @ (left.mT @ offset) if tall else left @ offset
        if "v" in self.space:
            slope += (offset @ right) @ right.mT if broad else offset @ right
        losses = torch.linalg.vecdot(slope.flatten(2), offset.flatten(2))
        slope *= 2
        if self.momentum < 1:
            first = self._balance(slope, losses)
            target = torch.stack([first, 1 - first], dim=1)
            self.weights = self.momentum * self.weights + (1 - self.momentum) * target
        return (self.weights * losses).sum(1), torch.einsum("li,limn->lmn", self.weights, slope)

    @staticmethod
    def _balance(slope: Tensor, losses: Tensor) -> Tensor:
        """Share of the first in the shortest convex combination of two gradients that are divided by their losses."""
        tiny = torch.finfo(losses.dtype).tiny
        first, second = (slope.flatten(2) / losses.clamp(min=tiny).unsqueeze(-1)).unbind(1)
        gap = second - first
        square = torch.linalg.vecdot(gap, gap)
        found = torch.linalg.vecdot(gap, second) / square
        return torch.where(square > 0, found, 0.5).clamp(0, 1)  # both at their optimum, or the same: no preference


def dop_step(
    merged: Mapping[str, Tensor],
    task_vector: Mapping[str, Tensor],
    *,
    steps: int = 200,
    rate: float = 1e-4,
    space: Space = "uv",
    share: float = 0.99999,
    stability: float = 0.8,
    momentum: float = 0.999,
    policy: MatrixPolicy | None = None,
) -> dict[str, Tensor]:
    """Merge a new expert into what was merged before: each matrix by Adam on the two losses of :class:`DopProblem`.

    Small layers of one shape go together. For ViT-B/32 a stage takes 1.4e14 operations, nearly an hour on one core, and
    there is one for every expert but the first: put the task vectors on an accelerator.

    Args:
        merged: Merged task vector so far, ``(*shape)`` each.
        task_vector: Task vector of the expert, alike.
        steps: Steps of Adam from the mean of the two, at least 0.
        rate: Its learning rate.
        space: See :class:`DopProblem`, as the next three.
        share: Of the singular values.
        stability: Weight of what was merged, at the beginning.
        momentum: Of the weights; 1 for fixed ones.
        policy: Which tensors are matrices, and what becomes of the others. By default every matrix except those named
            as in :data:`~lit_merge.functional.opcm.EMBEDDINGS`, and the mean of the two for all others, as published
            (an early expert's share in them halves with every stage; the class token, which the released code leaves
            at the base, is averaged too).

    Returns:
        Merged task vector, ``(*shape)`` each, at least in float32.

    Raises:
        MergeError: A value is out of range, or the names differ.

    >>> merged = {"w": torch.tensor([[2.0, 0.0]]), "b": torch.ones(1)}
    >>> new = {"w": torch.ones(1, 2), "b": torch.zeros(1)}
    >>> dop_step(merged, new, steps=0)
    {'w': tensor([[1.5000, 0.5000]]), 'b': tensor([0.5000])}
    >>> dop_step(merged, new, steps=400, rate=0.01, momentum=1.0)["w"].round(decimals=2)  # stability is 0.8
    tensor([[1.9400, 0.1100]])
    """
    policy = policy or MatrixPolicy("mean", exclude=EMBEDDINGS)
    if merged.keys() != task_vector.keys():
        missing = ", ".join(sorted(merged.keys() ^ task_vector.keys())[:4])
        raise MergeError(f"dop_step: expected two task vectors of the same names; only one of them has {missing}")
    pairs = _Pairs(merged, task_vector)
    names = [name for name, value in merged.items() if policy.covers(name, value.unsqueeze(0))]
    learned: dict[str, Tensor] = {}
    for own in layer_shapes(pairs, names).values():
        for part, batch in layer_batches(pairs, own):
            found = descend(DopProblem(batch, space, share, stability, momentum), steps, rate)
            learned |= zip(own[part], found, strict=True)
    return {
        name: learned[name].reshape(value.shape)
        if name in learned
        else policy.merge_other(torch.stack([wide(value), wide(task_vector[name])]))
        for name, value in merged.items()
    }


class _Pairs(Mapping[str, Tensor]):
    """Two task vectors as ``(2, m, n)``, stacked when they are asked for."""

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self.both = first, second

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack([wide(vector[name]) for vector in self.both]).flatten(2)

    def __iter__(self) -> Iterator[str]:
        return iter(self.both[0])

    def __len__(self) -> int:
        return len(self.both[0])


def dop(
    deltas: Mapping[str, Tensor],
    *,
    steps: int = 200,
    rate: float = 1e-4,
    space: Space = "uv",
    share: float = 0.99999,
    stability: float = 0.8,
    momentum: float = 0.999,
    policy: MatrixPolicy | None = None,
) -> dict[str, Tensor]:
    """Merge experts by DOP in the order of their rows, which matters; the first one is taken as it is.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        steps: See :func:`dop_step`, as all others.
        rate: Learning rate.
        space: Terms of the losses.
        share: Of the singular values.
        stability: Weight of what was merged, at the beginning.
        momentum: Of the weights.
        policy: Which tensors are matrices.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    >>> dop({"w": torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])})
    {'w': tensor([[2., 0.]])}
    """
    merged = {name: wide(delta[0]).clone() for name, delta in deltas.items()}
    for row in range(1, min((len(delta) for delta in deltas.values()), default=0)):
        vector = {name: delta[row] for name, delta in deltas.items()}
        merged = dop_step(merged, vector, steps=steps, rate=rate, space=space, share=share, stability=stability,
                          momentum=momentum, policy=policy)  # fmt: skip
    return merged
