"""DOGE: adaptive projective gradient descent on task vectors.

An offset δ is added to the task vectors of every layer so that each of them finds itself in the merged one,
along the directions that its own rows span. The gradient is followed outside of a subspace that the tasks share, and
only the largest entries of the result are merged, with coefficients that give every task vector the same length.

Source: Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, arXiv 2501.01230.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import truncated_svd
from lit_merge.functional.layer_problem import (
    LayerChoice,
    LayerProblem,
    choose_layers,
    descend,
    layer_batches,
    layer_shapes,
)
from lit_merge.functional.ties import trim

__all__ = ("DogeProblem", "Offsets", "doge", "masked_vectors", "shared_basis", "task_aware_coefficients")

Offsets = Literal["shared", "per_task"]


def task_aware_coefficients(deltas: Tensor, scale: float = 0.07, relative: bool = False) -> Tensor:
    """Coefficients that give the task vectors of a layer one length: λ_t = scale / ‖τ_t‖.

    Args:
        deltas: Task vectors ``(..., T, m, n)`` of one layer or several.
        scale: Length of a scaled task vector; 0.07 is the published value, for CLIP's vision transformers.
        relative: ``scale`` is in units of the mean length over tasks, λ_t = scale · mean_s ‖τ_s‖ / ‖τ_t‖, so that it
            is to networks of any size what the coefficient of task arithmetic is; ours.

    Returns:
        ``(..., T)``; 0 for a task vector of zeros.

    Source: arXiv 2501.01230.

    >>> task_aware_coefficients(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[0.0, 0.0]]]), scale=1.0)
    tensor([0.2000, 1.0000, 0.0000])
    """
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    norms = torch.linalg.vector_norm(deltas, dim=(-2, -1), dtype=dtype)
    length = scale * norms.mean(-1, keepdim=True) if relative else torch.full_like(norms, scale)
    return torch.where(norms > 0, length / norms, 0)


def shared_basis(deltas: Tensor, subspace: int | None = 6) -> Tensor:
    """Orthonormal basis of the output directions that the tasks share, layer by layer.

    The leading ``min(m, n) // T`` left singular vectors of every task vector are put side by side; the leading left
    singular vectors of that are the basis.

    Args:
        deltas: Task vectors ``(..., T, m, n)``.
        subspace: The basis has ``min(m, n) // subspace`` vectors; null for the number of tasks, as DOGE before
            AdaMerging has it; 0 for no vector at all.

    Returns:
        ``(..., m, k)``; columns of zeros where the task vectors have fewer directions.

    Raises:
        MergeError: ``subspace`` is negative.

    Source: arXiv 2501.01230.

    >>> shared_basis(torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[5.0, 5.0], [0.0, 0.1]]]), subspace=2).abs().round()
    tensor([[1.],
            [0.]])
    """
    tasks, height, width = deltas.shape[-3:]
    divisor = tasks if subspace is None else subspace
    if divisor < 0:
        raise MergeError(f"subspace: expected at least 0, found {subspace}")
    rank = min(height, width)
    own, kept = max(1, rank // tasks), rank // divisor if divisor else 0
    if kept == 0:
        return deltas.new_zeros(*deltas.shape[:-3], height, 0, dtype=torch.promote_types(deltas.dtype, torch.float32))
    leading = truncated_svd(deltas, own).u.transpose(-3, -2).flatten(-2)
    return truncated_svd(leading, kept).u


class DogeProblem(LayerProblem):
    """DOGE's objective on the offset of a layer.

    With D = Σ_i λ_i (τ_i + δ_i), the sum over tasks j and rows r of ⟨τ_{j,r}, τ_{j,r} − D_r⟩². Its gradient by D is
    −2 Σ_j s_{j,r} τ_{j,r} with s_{j,r} the inner product, and s is affine in δ: a step reads the task vectors twice,
    and keeps nothing of their size. What is followed is g − B Bᵀ g, with B the basis that the tasks share.

    Args:
        deltas: Task vectors ``(L, T, m, n)``.
        scale: See :func:`task_aware_coefficients`.
        relative: See :func:`task_aware_coefficients`.
        subspace: See :func:`shared_basis`.
        offsets: ``shared``: one for all tasks, ``(L, m, n)``; ``per_task``: ``(L, T, m, n)``.

    Raises:
        MergeError: ``offsets`` is unknown.

    Source: arXiv 2501.01230; the sum over a row, not over a matrix, before the square is that of the released code.

    >>> problem = DogeProblem(torch.tensor([[[[3.0, 4.0]], [[0.0, 2.0]]]]), scale=1.0, subspace=0)
    >>> value = torch.zeros(1, 1, 2)  # D = (0.6, 0.8) + (0, 1); s = 25 − 9, 4 − 3.6; λ = 0.2, 0.5
    >>> problem.losses(value)
    tensor([256.1600])
    >>> problem.gradient(value)[1]  # −2 · 0.7 · (16 · (3, 4) + 0.4 · (0, 2))
    tensor([[[-67.2000, -90.7200]]])
    """

    def __init__(
        self,
        deltas: Tensor,
        scale: float = 0.07,
        relative: bool = False,
        subspace: int | None = 6,
        offsets: Offsets = "shared",
    ) -> None:
        super().__init__(deltas)
        if offsets not in get_args(Offsets):
            raise MergeError(f"offsets: expected shared or per_task, found {offsets!r}")
        self.scale = scale
        self.relative = relative
        self.subspace = subspace
        self.per_task = offsets == "per_task"

    @cached_property
    def coefficients(self) -> Tensor:
        """λ, ``(L, T)``."""
        return task_aware_coefficients(self.deltas, self.scale, self.relative)

    @cached_property
    def basis(self) -> Tensor:
        """B, ``(L, m, k)``."""
        return shared_basis(self.deltas, self.subspace)

    @cached_property
    def _constant(self) -> Tensor:
        """S at δ = 0, ``(L · m, T)``: a Gram matrix of the tasks per row."""
        rows = self._rows()
        layers, tasks, height, _ = self.deltas.shape
        gram = torch.bmm(rows, rows.mT).view(layers, height, tasks, tasks)
        mixed = torch.einsum("lrts,ls->lrt", gram, self.coefficients.to(gram))
        return (gram.diagonal(dim1=-2, dim2=-1) - mixed).flatten(0, 1)

    def _rows(self) -> Tensor:
        """Task vectors by row, ``(L · m, T, n)``: a view, unless they are stored in half precision."""
        return self.deltas.transpose(1, 2).flatten(0, 1).to(self.dtype)

    def start(self) -> Tensor:
        """Return zeros, ``(L, m, n)`` or ``(L, T, m, n)``."""
        if not self.per_task:
            return super().start()
        return torch.zeros(self.deltas.shape, dtype=self.dtype, device=self.deltas.device)

    def losses(self, value: Tensor) -> Tensor:
        """Return the objective of each layer ``(L,)``, as it is written: through T products."""
        weights = self.coefficients.to(self.dtype)[..., None, None]
        merged = (weights * (self.deltas + (value if self.per_task else value.unsqueeze(1)))).sum(1, keepdim=True)
        return (self.deltas * (self.deltas - merged)).sum(-1).square().sum((1, 2))

    def project(self, gradient: Tensor) -> Tensor:
        """Return g − B Bᵀ g, for ``(L, m, n)``."""
        if self.basis.shape[-1] == 0:
            return gradient
        return torch.baddbmm(gradient, self.basis, self.basis.mT @ gradient, alpha=-1)

    @torch.no_grad()
    def gradient(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses ``(L,)`` and the projected gradient, in closed form."""
        layers, _, height, width = self.deltas.shape
        rows, weights = self._rows(), self.coefficients.to(self.dtype)
        total = weights.sum(1)
        moved = torch.einsum("lt,ltmn->lmn", weights, value) if self.per_task else value
        found = torch.bmm(rows, moved.reshape(-1, width, 1)).squeeze(-1)
        if not self.per_task:
            found = found * total.repeat_interleave(height).unsqueeze(-1)
        found = self._constant - found
        gradient = self.project(torch.bmm(found.unsqueeze(1), rows).view(layers, height, width)).mul_(-2)
        losses = found.square().view(layers, -1).sum(1)
        if self.per_task:
            return losses, weights[..., None, None] * gradient.unsqueeze(1)
        return losses, gradient.mul_(total[:, None, None])


def masked_vectors(
    deltas: Mapping[str, Tensor], offsets: Mapping[str, Tensor], density: float = 0.3
) -> Iterator[dict[str, Tensor]]:
    """Yield (τ_t + δ_t) ⊙ mask_t of one task after the other.

    Args:
        deltas: Task vectors, ``(T, m, n)`` each.
        offsets: δ of some of them, ``(m, n)`` or ``(T, m, n)``; the others are left out.
        density: Share of entries of a task that stay, in (0, 1]: those where |τ_t| is largest over all these tensors
            together. An entry that fine-tuning has not moved never stays.

    Yields:
        Matrices ``(m, n)`` by name.

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> tau = torch.tensor([[[3.0, -1.0]], [[0.5, 2.0]]])
    >>> [found["w"].tolist() for found in masked_vectors({"w": tau}, {"w": torch.tensor([[0.1, 0.2]])}, density=0.5)]
    [[[3.0999999046325684, 0.0]], [[0.0, 2.200000047683716]]]
    """
    tasks = len(next(iter(deltas.values()))) if deltas else 0
    for task in range(tasks):  # one task at a time: the trimmed copy is one model, not T
        kept = trim({name: deltas[name][task : task + 1] for name in offsets}, density)
        yield {
            name: torch.where(kept[name][0] != 0, deltas[name][task] + (o[task] if o.ndim == 3 else o), 0)
            for name, o in offsets.items()
        }


def doge(
    deltas: Mapping[str, Tensor],
    steps: int = 400,
    rate: float = 1e-4,
    scale: float = 0.07,
    relative: bool = False,
    density: float = 0.3,
    subspace: int | None = None,
    offsets: Offsets = "per_task",
    layers: LayerChoice = "blocks",
    exclude: Sequence[str] = (),
    others: Literal["base", "keep"] = "base",
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Modify task vectors so that they lose less when they are summed: (τ_t + δ_t) ⊙ mask_t.

    The defaults are those of DOGE before AdaMerging. Layers are done one batch after the other, so memory beside
    the result is that of one layer.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        steps: Steps of Adam, at least 0.
        rate: Its learning rate.
        scale: See :func:`task_aware_coefficients`.
        relative: See :func:`task_aware_coefficients`.
        density: See :func:`masked_vectors`.
        subspace: See :func:`shared_basis`.
        offsets: One for all tasks, or one per task.
        layers: Which matrices, see :func:`~lit_merge.functional.layer_problem.choose_layers`.
        exclude: Names that are left out of them.
        others: Tensors that are not among them ``keep`` their task vectors, or stay at the ``base``, as published.
        device: Where to compute; by default where the task vectors are.

    Returns:
        Task vectors, ``(T, *shape)`` each.

    Raises:
        MergeError: A value is out of range, or there is no such layer.
    """
    if others not in ("base", "keep"):
        raise MergeError(f"others: expected base or keep, found {others!r}")
    learned: dict[str, Tensor] = {}
    for names in layer_shapes(deltas, choose_layers(deltas, layers, exclude)).values():
        for part, batch in layer_batches(deltas, names):
            problem = DogeProblem(batch.to(device or batch.device), scale, relative, subspace, offsets)
            learned |= zip(names[part], descend(problem, steps, rate).to(batch.device), strict=True)
    result = {n: d.clone() if others == "keep" else torch.zeros_like(d) for n, d in deltas.items() if n not in learned}
    result |= {name: torch.empty_like(deltas[name]) for name in learned}
    for task, vectors in enumerate(masked_vectors(deltas, learned, density)):
        for name, vector in vectors.items():
            result[name][task] = vector.to(result[name].dtype)
    return {name: result[name] for name in deltas}
