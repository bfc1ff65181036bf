"""A network without values of its own."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_merge.autocast_weights import AutocastWeights
from lit_merge.block_by_block import BlockByBlock
from lit_merge.errors import MergeError
from lit_merge.lazy_weights import LazyWeights

__all__ = ("Skeleton", "freeze_to_buffers")


def freeze_to_buffers(module: nn.Module) -> nn.Module:
    """Turn every parameter into a non-persistent buffer, in place, and switch to evaluation mode.

    The module still moves and runs as before, but is never trained, and never part of a checkpoint.

    Args:
        module: The module; it is changed.

    Returns:
        The same module.

    >>> layer = freeze_to_buffers(nn.Linear(2, 1))
    >>> len(list(layer.parameters())), len(list(layer.buffers())), len(layer.state_dict())
    (0, 2, 0)
    """
    frozen: dict[int, Tensor] = {}  # tied parameters stay one tensor
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, frozen.setdefault(id(parameter), parameter.detach()), persistent=False)
        part._non_persistent_buffers_set.update(part._buffers)
    return module.eval()


class Skeleton(nn.Module):
    """The architecture, run with parameters that are passed in: the same module serves merge, base and experts.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is copied, not changed.

    Attributes:
        by_block: Runs the network with lazy weights.
        buffers_of: Names of the persistent floating and integer buffers.
        tied: Second names of tied parameters, ``{alias: name}``.
        autocast_weights: Which weights autocast casts, known after the first pass under it.

    >>> skeleton = Skeleton(nn.Linear(2, 1))
    >>> skeleton({"weight": torch.ones(1, 2), "bias": torch.ones(1)}, torch.ones(1, 2))
    tensor([[3.]])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.keys = tuple(network.state_dict())
        self.tied = _tied_names(network)
        parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self.buffers_of = frozenset(self.keys) - parameters
        self.network = freeze_to_buffers(deepcopy(network))
        self.autocast_weights = AutocastWeights()
        self._drop_values()
        self.by_block = BlockByBlock(self.network, self.keys)

    def _drop_values(self) -> None:
        """Replace what is passed in at every call by empty tensors: the bank holds the base already."""
        owners = dict(self.network.named_modules(remove_duplicate=False))  # a state dict has shared ones twice
        for key in self.keys:
            path, _, leaf = key.rpartition(".")
            if leaf in owners[path]._buffers:
                value = owners[path]._buffers[leaf]
                owners[path]._buffers[leaf] = None if value is None else torch.empty(0, dtype=value.dtype)

    def forward(self, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Run the network.

        Args:
            state: Complete state dict. With lazy weights each numbered block makes its own, anew in the backward pass.
            images: ``(B, C, H, W)``.

        Returns:
            Features ``(B, D)``.

        Raises:
            MergeError: The network returned something else than a tensor ``(B, ...)``.
        """
        if isinstance(state, LazyWeights):
            features = self.by_block.run(self.network, state, images)
        else:
            with self.autocast_weights.watching(self.network, self.tied, images.device):
                features = functional_call(self.network, dict(state), (images,), tie_weights=False)
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise MergeError(
                f"network: expected features ({len(images)}, D) for {len(images)} images, found {found}; "
                "wrap the network in a module that returns one tensor"
            )
        return features


def _tied_names(network: nn.Module) -> dict[str, str]:
    """Names beyond the first under which the same parameter appears."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if (seen := first.setdefault(id(parameter), name)) != name:
            aliases[name] = seen
    return aliases
