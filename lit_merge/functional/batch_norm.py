"""Statistics of batch normalisation after a merge, measured on unlabelled images.

Averaged running statistics do not belong to the merged weights. Source: Jordan et al., REPAIR, section 4,
arXiv 2211.08403 (its reset of batch statistics).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ("recalibrate_batch_norm",)


@torch.no_grad()
def recalibrate_batch_norm(
    network: nn.Module, state: Mapping[str, Tensor], images: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Measure the running mean and variance of every batch normalisation layer under the given weights.

    Each batch counts the same (cumulative average). A network without such layers gives an empty result.

    Args:
        network: The architecture; its own values are not used or changed.
        state: Complete state dict to run it with; not changed.
        images: Batches ``(B, C, H, W)``, at least one; mix the tasks within a batch.

    Returns:
        New values of ``running_mean`` and ``running_var`` by name.

    >>> network = nn.BatchNorm1d(1, affine=False)
    >>> new = recalibrate_batch_norm(network, network.state_dict(), [torch.tensor([[1.0], [3.0]])])
    >>> new["running_mean"].item(), new["running_var"].item()
    (2.0, 2.0)
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}
    if not layers:
        return {}
    state = dict(state)
    measured = {}
    for name in layers:
        prefix = f"{name}." if name else ""
        for statistic in ("running_mean", "running_var"):
            measured[prefix + statistic] = torch.zeros_like(state[prefix + statistic])
        state[f"{prefix}num_batches_tracked"] = torch.zeros_like(state[f"{prefix}num_batches_tracked"])
    state |= measured
    before = [(layer, layer.training, layer.momentum) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.train().momentum = None  # None: cumulative average
        for batch in images:
            functional_call(network, state, (batch,), tie_weights=False)
    finally:
        for layer, training, momentum in before:
            layer.train(training).momentum = momentum
    return measured
