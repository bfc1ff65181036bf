"""The tangent of a network at its base: linear in its parameters, so that task vectors add exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lit_merge.functional.linearize import first_order
from lit_merge.reparametrized import Reparametrized, plant, tensor_at

__all__ = ("LinearizedNetwork",)


class LinearizedNetwork(Reparametrized):
    """First-order Taylor expansion of a network in its parameters (Ortiz-Jimenez et al. 2023, arXiv 2305.12827).

    ``f_lin(x; θ) = f(x; θ0) + ∇f(x; θ0) · (θ − θ0)``, by one forward-mode pass (eq. 4 of the paper). The parameters of
    this module are θ, under the names of the network, and start at θ0; θ0 itself is inside and fixed. So a state dict
    of this module looks like one of the network, and experts that are fine-tuned as this module merge like any other:
    the suite's ``network`` is this module, with the suite's base inside (:class:`~lit_merge.suites.LinearizedSuite`).

    As θ enters linearly, what task vectors do adds up: ``f_lin(θ0 + Σ τ_t) − f = Σ (f_lin(θ0 + τ_t) − f)``.

    The network always runs in evaluation mode. Its running statistics and other buffers are constants. Attention runs
    by plain matrix products, since fused kernels have no forward derivative; a step costs two to three times one of
    the network.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is copied, not changed.
        base: θ0: a state dict, or a file with one; by default the values of ``network``.

    Raises:
        MergeError: ``base`` does not fit the network, or its file is not usable.

    >>> w = nn.init.ones_(nn.Linear(1, 1, bias=False).weight)
    >>> cube = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3)))
    >>> cube[0].weight = cube[1].weight = cube[2].weight = w
    >>> tangent = LinearizedNetwork(cube)
    >>> list(tangent.state_dict())
    ['0.weight', '1.weight', '2.weight']
    >>> _ = nn.init.constant_(tangent.get_parameter("0.weight"), 3.0)  # w³ is 27 there, its tangent 1 + 3 · (3 − 1)
    >>> tangent(Tensor([[1.0]])).item()
    7.0
    """

    def __init__(self, network: nn.Module, base: Mapping[str, Tensor] | str | Path | None = None) -> None:
        super().__init__(network, base)
        moving = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self._moving = tuple(n for n in self.names if n in moving and tensor_at(self.frozen, n).is_floating_point())
        planted: dict[int, Tensor] = {}  # tied parameters stay tied
        for name in self.names:
            start = tensor_at(self.frozen, name)
            own = start.detach().clone()
            plant(self, name, planted.setdefault(id(start), nn.Parameter(own) if name in self._moving else own))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to features ``(B, D)``.

        Raises:
            MergeError: An operation of the network has no forward-mode derivative.
        """
        start = {name: tensor_at(self.frozen, name) for name in self._moving}
        direction = {name: tensor_at(self, name) - value for name, value in start.items()}
        constants = {name: tensor_at(self, name) for name in self.names if name not in start}
        return first_order(lambda tensors: self.run(constants | tensors, images), start, direction)
