"""DOGE: adaptive projective gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_merge.data_free_module import DataFreeModule
from lit_merge.functional.doge import DogeProblem, Offsets, masked_vectors, task_aware_coefficients
from lit_merge.functional.finite import check_finite
from lit_merge.functional.layer_problem import LayerChoice, Others, merge_other
from lit_merge.functional.scopes import share
from lit_merge.task_vectors import TaskVectors

__all__ = ("Doge",)


class Doge(DataFreeModule):
    """Learn an offset of the task vectors without data, and merge the largest entries: θ0 + Σ_t λ_t (τ_t + δ) ⊙ m_t.

    The defaults are the published ones for CLIP's vision transformers: 400 steps of Adam with learning rate 1e-4 on one
    offset per matrix inside of the blocks; gradients outside of the subspace of ``min(m, n) // 6`` directions that the
    tasks share; λ_t = 0.07 / ‖τ_t‖ per matrix; the mask keeps the largest 30 % of each task vector over all these
    matrices. Everything else stays at the base: biases, normalisation, embeddings, convolutions.

    The gradient is cubic in the entries of the task vectors, so where these are small Adam's ``eps`` counts and slows
    the layers down that moved least. The published scale and learning rate go with task vectors as long as CLIP's;
    for other networks ``relative: true`` takes a scale such as that of task arithmetic.

    As a transform before another rule, such as :class:`~lit_merge.AdaMerging`, see
    :class:`lit_merge.transforms.Doge`.

    Args:
        scale: Length of a scaled task vector in each matrix.
        relative: ``scale`` is in units of the mean length over tasks; ours.
        density: Share of entries of a task vector that are merged, in (0, 1].
        subspace: The shared subspace has ``min(m, n) // subspace`` directions; null for the number of tasks; 0 for
            none.
        offsets: ``shared`` by the tasks, or one ``per_task``, which takes the memory of T networks and their optimizer.
        layers: ``blocks``: matrices in numbered blocks; or all ``matrices``.
        exclude: Names, with wildcards, that are left out of them.
        others: All other tensors: ``base``, ``mean`` or ``sum``.
        **kwargs: See :class:`~lit_merge.data_free_module.DataFreeModule`.

    Raises:
        MergeError: A value is out of range, or there is no such layer.

    Source: Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, arXiv 2501.01230.
    """

    def __init__(
        self,
        scale: float = 0.07,
        relative: bool = False,
        density: float = 0.3,
        subspace: int | None = 6,
        offsets: Offsets = "shared",
        layers: LayerChoice = "blocks",
        exclude: Sequence[str] = (),
        others: Others = "base",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(layers=layers, exclude=exclude, others=others, **kwargs)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.relative = relative
        self.density = share("Doge.density", density)
        self.subspace = subspace
        self.offsets: Offsets = offsets

    def problem(self, deltas: Tensor) -> DogeProblem:
        """Return the objective on the offsets of some layers."""
        return DogeProblem(deltas, self.scale, self.relative, self.subspace, self.offsets)

    def weights(self, bank: TaskVectors) -> dict[str, Tensor]:
        """λ by the name of the matrix, ``(T,)`` each."""
        deltas, chosen = bank.deltas, [name for names in self.groups.values() for name in names]
        return {name: task_aware_coefficients(deltas[name], self.scale, self.relative) for name in chosen}

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + Σ_t λ_t (τ_t + δ) ⊙ m_t, and for all other tensors what ``others`` says."""
        learned, weights = self.learned(), self.weights(bank)
        merged = {n: merge_other(d, "base" if n in learned else self.others) for n, d in bank.deltas.items()}
        for task, vectors in enumerate(masked_vectors(bank.deltas, learned, self.density)):
            for name, vector in vectors.items():
                merged[name] = torch.addcmul(merged[name], weights[name][task], vector)
        return bank.offset(merged)

    def coefficient_table(self) -> Tensor:
        """λ, ``(T, L)``; those of tensors that are not learned are what ``others`` makes of them."""
        weights = self.weights(self.bank)
        other = {"base": 0.0, "mean": 1 / len(self.bank.tasks), "sum": 1.0}[self.others]
        plain = torch.full((len(self.bank.tasks),), other, device=self.device, dtype=self.bank.compute_dtype)
        return torch.stack([weights.get(name, plain) for name in self.bank.names], 1)
