"""Which weights autocast casts: they can be made in that type at once, instead of being cast layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ("AutocastWeights", "autocast_type")

_LAYER = ("weight", "bias")
_ATTENTION = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_CAST: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: _LAYER,
    nn.Conv1d: _LAYER,
    nn.Conv2d: _LAYER,
    nn.Conv3d: _LAYER,
    nn.ConvTranspose1d: _LAYER,
    nn.ConvTranspose2d: _LAYER,
    nn.ConvTranspose3d: _LAYER,
    nn.MultiheadAttention: (*_ATTENTION, "out_proj.weight", "out_proj.bias"),
}


class AutocastWeights:
    """Learns from one pass of a network under autocast which of its weights autocast casts, whole and always.

    These are the weights and biases of linear and convolution layers and of ``nn.MultiheadAttention`` that are called
    as modules and compute what PyTorch's own class computes. Not among them, and left to autocast or to nobody:
    weights of norms and embeddings; those that a network reads without calling the layer, or that are called outside
    of autocast (a region that is switched off); those of subclasses with a ``forward`` of their own; those that are
    tied to one of these.

    A weight that is called as a layer and also read in another place is taken for cast; there it would be rounded.

    Attributes:
        names: Names of these weights, or ``None`` before the first pass.
    """

    def __init__(self) -> None:
        self.names: frozenset[str] | None = None

    @contextmanager
    def watching(self, network: nn.Module, tied: Mapping[str, str], device: torch.device) -> Iterator[None]:
        """Look on while the network runs, if it is for the first time under autocast and with gradients.

        Without them, layers of PyTorch's own may go a way of their own past the modules that they are made of.

        Args:
            network: What runs.
            tied: Second names of tied weights.
            device: Of the images.
        """
        if self.names is not None or autocast_type(device) is None or not torch.is_grad_enabled():
            yield
            return
        within: dict[nn.Module, bool] = {}

        def note(module: nn.Module, *_: Any) -> None:  # noqa: ANN401 - a hook's arguments
            within[module] = within.get(module, True) and torch.is_autocast_enabled(device.type)

        owners = {path: m for path, m in network.named_modules(remove_duplicate=False) if _cast_leaves(m)}
        hooks = [module.register_forward_pre_hook(note) for module in set(owners.values())]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        found = {
            f"{path}.{leaf}" if path else leaf
            for path, module in owners.items()
            if within.get(module, False)
            for leaf in _cast_leaves(module)
        }
        found -= {name for alias, name in tied.items() if alias not in found}
        self.names = frozenset(found)

    def types(self, device: torch.device) -> dict[str, torch.dtype]:
        """Return the type that each of these weights is cast to; nothing outside of autocast or before the first pass.

        Args:
            device: Where the network runs.
        """
        dtype = autocast_type(device)
        return {} if self.names is None or dtype is None else dict.fromkeys(self.names, dtype)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type that autocast casts to on a device; nothing where it is switched off.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     autocast_type(torch.device("cpu"))
    torch.bfloat16
    """
    kind = device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def _cast_leaves(module: nn.Module) -> tuple[str, ...]:
    """Names of the weights that this module hands to an operation that casts them."""
    for kind, leaves in _CAST.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return leaves
    return ()
