"""RegMean: linear layers that answer the tasks' inputs as the experts do, in closed form.

Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.layer_problem import Others, check_others, merge_other

__all__ = ("NormalEquations", "regmean")

_SINGLE = 0.98  # largest factor of off-diagonal entries for which float32 is good enough


class NormalEquations:
    """The normal equations of one layer, summed task by task, so that no two tasks' matrices are in memory at once.

    With G_t = Σ x xᵀ over the inputs of task t the merge minimises Σ_t Σ_x ‖(W − W_t) x‖², so
    W Σ_t G_t = Σ_t W_t G_t. It is stated for the task vectors, which changes nothing, as W0 solves it for W_t = W0.

    With a factor c of the off-diagonal entries, no eigenvalue of a G_t whose diagonal is scaled to 1 is below 1 − c. So
    for c ≤ 0.98 float32 is good enough, with an error of about 1e-7 / (1 − c); above it all is in float64, since the
    condition number of inner products is the square of the inputs'.

    Args:
        off_diagonal: Factor of the off-diagonal entries of every G_t, in [0, 1]; published: 0.9 for most
            language models and 0.1 for T5; 0.95 in the tables for CLIP; 1 for least squares as it is.

    Raises:
        MergeError: ``off_diagonal`` is out of range.

    >>> layer = NormalEquations(off_diagonal=0.5)
    >>> layer.add(torch.tensor([[2.0, 2.0], [2.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
    >>> layer.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0]]))
    >>> layer.solve(ridge=0)  # W · ((3, 1), (1, 4)) = (2, 1) + (0, 4), so W = (3 / 11, 13 / 11)
    tensor([[0.2727, 1.1818]])
    """

    def __init__(self, off_diagonal: float = 0.95) -> None:
        if not 0 <= off_diagonal <= 1:
            raise MergeError(f"off_diagonal: expected a factor in [0, 1], found {off_diagonal}")
        self.off_diagonal = off_diagonal
        self.tasks = 0
        self._left = self._right = self._sum = torch.empty(0)

    @torch.no_grad()
    def add(self, gram: Tensor, delta: Tensor) -> None:
        """Add a task.

        Args:
            gram: G_t, ``(n, n)``; or ``(k, n, n)`` for k blocks of rows that have inputs of their own.
            delta: Task vector ``(m, n)``.

        Raises:
            MergeError: The shapes do not fit.
        """
        blocks = gram.unsqueeze(0) if gram.ndim == 2 else gram
        if delta.ndim != 2 or blocks.shape[1:] != delta.shape[1:] * 2 or len(delta) % len(blocks):
            raise MergeError(
                f"grams: expected (n, n), or (k, n, n) with k blocks of rows, for a task vector (m, n); found "
                f"{tuple(gram.shape)} for {tuple(delta.shape)}"
            )
        if not self.tasks:
            dtype = torch.promote_types(torch.promote_types(gram.dtype, delta.dtype), torch.float32)
            dtype = dtype if self.off_diagonal <= _SINGLE else torch.float64
            self._left = torch.zeros_like(blocks, dtype=dtype)
            self._right, self._sum = (torch.zeros_like(delta, dtype=dtype) for _ in range(2))
        blocks, delta = blocks.to(self._left), delta.to(self._left)
        rest = (1 - self.off_diagonal) * blocks.diagonal(dim1=1, dim2=2)
        if len(blocks) > len(self._left):  # one matrix is broadcast over k blocks
            self._left = self._left.repeat(len(blocks), 1, 1)
        self._left.add_(blocks, alpha=self.off_diagonal).diagonal(dim1=1, dim2=2).add_(rest)
        rows, right = (value.unflatten(0, (len(blocks), -1)) for value in (delta, self._right))
        right.baddbmm_(rows, blocks, alpha=self.off_diagonal).addcmul_(rows, rest.unsqueeze(1))
        self._sum += delta
        self.tasks += 1

    @torch.no_grad()
    def solve(self, ridge: float = 1e-6) -> Tensor:
        """Solve them.

        Args:
            ridge: Multiple of the mean diagonal entry of Σ_t G_t, at least 0, that is added to the diagonal together
                with the mean of the task vectors on the other side: directions that no task's inputs have take the
                mean. 0 is as published, and needs inputs in all directions.

        Returns:
            Merged task vector ``(m, n)``, at least in float32.

        Raises:
            MergeError: ``ridge`` is negative, no task was added, or the matrix is singular.
        """
        if not ridge >= 0:
            raise MergeError(f"ridge: expected at least 0, found {ridge}")
        if not self.tasks:
            raise MergeError("grams: expected at least one task, found none")
        left, right = self._left.clone(), self._right
        shift = ridge * left.diagonal(dim1=1, dim2=2).mean(1)
        if ridge:
            shift = torch.where(shift > 0, shift, 1.0)  # no inputs but zeros: the mean
        left.diagonal(dim1=1, dim2=2).add_(shift[:, None])
        failed = torch.empty(len(left), dtype=torch.int32, device=left.device)
        torch.linalg.cholesky_ex(left, out=(left, failed))
        if bool(failed.any()):
            raise MergeError(
                f"grams: their sum {tuple(left.shape[1:])} is not positive definite: the inputs do not have all "
                f"directions, or are not finite; give more images, or a ridge above {ridge}"
            )
        if ridge:
            right = right.addcmul(shift.repeat_interleave(len(right) // len(shift))[:, None], self._sum / self.tasks)
        solved = torch.cholesky_solve(right.unflatten(0, (len(left), -1)).mT, left)
        return solved.mT.flatten(0, 1)


def regmean(
    deltas: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    off_diagonal: float = 0.95,
    ridge: float = 1e-6,
    others: Others = "mean",
) -> dict[str, Tensor]:
    """Merge linear layers by least squares on the tasks' inputs, and everything else by ``others``.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        grams: Of linear layers ``(m, n)`` by the name of the weight: ``(T, n, n)``, or ``(T, k, n, n)`` where k blocks
            of rows have inputs of their own; see :class:`~lit_merge.functional.linear_inputs.LinearInputs`. Their scale
            weighs the tasks: means over tokens, as in the tables for CLIP, make all tasks count alike, while sums give
            more weight to tasks with more inputs.
        off_diagonal: Factor of their off-diagonal entries, see :class:`NormalEquations`.
        ridge: See :meth:`NormalEquations.solve`.
        others: What is done with all other tensors; published: the mean.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range, a name is unknown, shapes do not fit, or there is no unique solution.

    Source: arXiv 2212.09849, section 3.

    Inputs along one axis only: each task decides on the column that it uses.

    >>> deltas = {"w": torch.tensor([[[1.0, 7.0]], [[5.0, 2.0]]]), "b": torch.tensor([[1.0], [3.0]])}
    >>> grams = {"w": torch.stack([torch.tensor([3.0, 0.0]).diag(), torch.tensor([0.0, 1.0]).diag()])}
    >>> merged = regmean(deltas, grams, ridge=0)
    >>> merged["w"].round(decimals=4), merged["b"]
    (tensor([[1., 2.]]), tensor([2.]))
    """
    check_others(others)
    if unknown := sorted(set(grams) - set(deltas)):
        raise MergeError(f"grams: {unknown[0]}: expected the name of a tensor, such as {next(iter(deltas), '-')}")
    merged = {}
    for name, delta in deltas.items():
        if name not in grams:
            merged[name] = merge_other(delta, others)
            continue
        if len(grams[name]) != len(delta):
            raise MergeError(f"grams: {name}: expected one for each of {len(delta)} tasks, found {len(grams[name])}")
        layer = NormalEquations(off_diagonal)
        for gram, task in zip(grams[name], delta, strict=True):
            layer.add(gram, task)
        merged[name] = layer.solve(ridge).to(torch.promote_types(delta.dtype, torch.float32))
    return merged
