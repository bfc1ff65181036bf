"""WUDI: the merged task vector that interferes least with every task's, seen through the task's own rows.

Source: Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors,
arXiv 2503.08099.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lit_merge.functional.layer_problem import (
    LayerChoice,
    LayerProblem,
    Others,
    check_others,
    choose_layers,
    descend,
    layer_batches,
    layer_shapes,
    merge_other,
)

__all__ = ("WudiProblem", "wudi")


class WudiProblem(LayerProblem):
    """WUDI's objective on the merged task vector M of a layer: Σ_t ‖(M − τ_t) τ_tᵀ‖² / ‖τ_t‖².

    It is quadratic: with K = Σ_t τ_tᵀ τ_t / ‖τ_t‖² and C = Σ_t τ_t τ_tᵀ τ_t / ‖τ_t‖² its gradient is 2 (M K − C), one
    product of matrices however many tasks. A task vector of zeros has no weight.

    Args:
        deltas: Task vectors ``(L, T, m, n)`` as a linear layer has them: n inputs.

    Source: arXiv 2503.08099.

    >>> problem = WudiProblem(torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]]))
    >>> problem.losses(problem.start())  # M = (2, 2): (1, 2) · (1, 0) = 1, squared, / 1; (1, 0) · (1, 2) = 1, / 5
    tensor([1.2000])
    >>> problem.gradient(problem.start())[1]  # 2 · (1 · (1, 0) + 1 · (1, 2) / 5)
    tensor([[[2.4000, 0.8000]]])
    """

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """K ``(L, n, n)``, C ``(L, m, n)`` and the objective at M = 0, ``(L,)``."""
        gram = target = constant = torch.zeros((), dtype=self.dtype, device=self.deltas.device)
        for task in self.deltas.unbind(1):
            vector = task.to(self.dtype)
            own = (vector.mT @ vector).mul_(self._weight(vector))
            image = vector @ own
            constant = constant + (vector * image).sum((-2, -1), dtype=torch.float64)
            gram, target = own.add_(gram), image.add_(target)
        return gram, target, constant

    @staticmethod
    def _weight(vector: Tensor) -> Tensor:
        """1 / ‖τ‖², ``(..., 1, 1)``."""
        square = vector.square().sum((-2, -1), keepdim=True)
        return torch.where(square > 0, 1 / square, 0)

    def start(self) -> Tensor:
        """Return the sum of the task vectors, ``(L, m, n)``."""
        return self.deltas.sum(1, dtype=self.dtype)

    def losses(self, value: Tensor) -> Tensor:
        """Return the objective of each layer ``(L,)``, as it is written: through T products."""
        deltas = self.deltas.to(self.dtype)
        interference = (value.unsqueeze(1) - deltas) @ deltas.mT
        return (interference.square() * self._weight(deltas)).sum((1, 2, 3))

    @torch.no_grad()
    def gradient(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses ``(L,)`` and the gradient, in closed form.

        The losses are a difference of large numbers: their error is about 1e-6 of the objective at M = 0.
        """
        gram, target, constant = self._moments
        residual = torch.baddbmm(target, value, gram, beta=-1)
        products = (value * (residual - target)).sum((-2, -1), dtype=torch.float64)
        return (constant + products).to(self.dtype), residual.mul_(2)


def wudi(
    deltas: Mapping[str, Tensor],
    steps: int = 400,
    rate: float = 1e-5,
    layers: LayerChoice = "matrices",
    exclude: Sequence[str] = (),
    others: Others = "mean",
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Merge by minimising the interference between the merged task vector and each task's.

    Layers are done one batch after the other, so memory beside the result is that of one layer.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        steps: Steps of Adam from the sum of the task vectors, at least 0; published: 300 to 400.
        rate: Its learning rate.
        layers: Which matrices, see :func:`~lit_merge.functional.layer_problem.choose_layers`.
        exclude: Names that are left out of them.
        others: What is done with all other tensors.
        device: Where to compute; by default where the task vectors are.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range, or there is no such layer.

    Orthogonal task vectors do not interfere, so their sum is the merge:

    >>> wudi({"w": torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), "b": torch.tensor([[1.0], [3.0]])})
    {'w': tensor([[1., 2.]]), 'b': tensor([2.])}
    """
    check_others(others)
    learned: dict[str, Tensor] = {}
    for names in layer_shapes(deltas, choose_layers(deltas, layers, exclude)).values():
        for part, batch in layer_batches(deltas, names):
            problem = WudiProblem(batch.to(device or batch.device))
            learned |= zip(names[part], descend(problem, steps, rate).to(batch.device), strict=True)
    return {name: learned[name] if name in learned else merge_other(delta, others) for name, delta in deltas.items()}
