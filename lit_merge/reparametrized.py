"""Networks whose tensors are functions of other parameters: a frozen copy inside, what is trained around it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.func import functional_call

from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.reading import read_state
from lit_merge.errors import MergeError
from lit_merge.skeleton import freeze_to_buffers

__all__ = ("Reparametrized", "load_base", "plant", "tensor_at")


class Reparametrized(nn.Module):
    """Holds a frozen copy of a network, which is run with tensors that a subclass computes.

    The values of the copy are non-persistent buffers: they move with the module, are never trained and never part of
    a state dict. The copy stays in evaluation mode: dropout does nothing and running statistics do not change.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is copied, not changed.
        base: Values of the copy: a state dict, or a file with one; by default those of ``network``.

    Attributes:
        frozen: The copy.
        names: Names of the network's state dict, in its order.

    Raises:
        MergeError: ``base`` does not fit the network, or its file is not usable.
    """

    def __init__(self, network: nn.Module, base: Mapping[str, Tensor] | str | Path | None = None) -> None:
        super().__init__()
        copy = deepcopy(network)
        if base is not None:
            load_base(copy, base)
        self.names = tuple(copy.state_dict())
        self.frozen = freeze_to_buffers(copy)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of everything but the frozen copy."""
        super().train(mode)
        self.frozen.eval()
        return self

    def run(self, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Run the copy with some of its tensors replaced: images ``(B, C, H, W)`` to features ``(B, D)``."""
        features = functional_call(self.frozen, dict(tensors), (images,), tie_weights=False)
        if not isinstance(features, Tensor):
            raise MergeError(
                f"network: expected a tensor of features (B, D), found {type(features).__name__}; wrap the network in "
                "a module that returns one tensor"
            )
        return features


def load_base(network: nn.Module, base: Mapping[str, Tensor] | str | Path) -> nn.Module:
    """Put a state dict into a network, in place.

    Args:
        network: The network; it is changed. It may be on the meta device.
        base: State dict, or a file with one; it is copied.

    Returns:
        The same network.

    Raises:
        MergeError: Names or shapes differ, or the file is not usable.
    """
    where = "base" if isinstance(base, Mapping) else str(base)
    state = base if isinstance(base, Mapping) else read_state(base)
    own = network.state_dict()
    check_keys(where, state, own, of="network", advice="give the state dict of this very network")
    empty = any(value.is_meta for value in own.values())
    values = {}
    for name, value in own.items():
        given = state[name]
        if given.shape != value.shape:
            expected, found = tuple(value.shape), tuple(given.shape)
            raise MergeError(f"{where}: {name}: the network expects shape {expected}, found {found}")
        values[name] = given.detach().to(value.dtype, copy=True) if empty else given
    network.load_state_dict(values, assign=empty)
    return network


def plant(root: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter or buffer under a dotted name; modules on the way are made as they are needed.

    Args:
        root: Where the name begins.
        name: Dotted name, such as ``"blocks.0.weight"``.
        value: An ``nn.Parameter``, or a tensor that becomes a persistent buffer.

    >>> root = nn.Module()
    >>> plant(root, "blocks.0.weight", nn.Parameter(Tensor([1.0, 2.0])))
    >>> list(root.state_dict())
    ['blocks.0.weight']
    """
    path, _, leaf = name.rpartition(".")
    owner = root
    for part in path.split(".") if path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def tensor_at(root: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer of a dotted name, whichever it is at the moment."""
    value: Tensor = attrgetter(name)(root)
    return value
