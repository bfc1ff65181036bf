"""What the encoders of CLIP have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.encoders.activations import activation_name, check_activation

__all__ = ("ImageEncoder", "built")


class ImageEncoder(nn.Module):
    """An image tower that knows how its images are prepared, which activation it has and how its tensors are called.

    Attributes:
        layout: Key scheme of its state dict, see :mod:`lit_merge.checkpoints.clip_keys`.
        activation: ``quick_gelu``, ``gelu``, or ``none`` if it has neither.
        preprocess: Makes the input ``(3, H, W)`` from a ``PIL.Image``, without augmentation.
    """

    layout: str
    activation: str
    preprocess: Callable[[Any], Tensor]

    def require_activation(self, expected: str, where: str) -> None:
        """Refuse weights that were trained with another activation.

        Args:
            expected: Activation of the weights, ``quick_gelu`` or ``gelu``.
            where: What the weights are, for the message.

        Raises:
            MergeError: This network has the other one; the message names the architecture to use.
        """
        expected = activation_name(expected)
        check_activation(self.activation, expected, where, self.activation_advice(expected))

    def activation_advice(self, expected: str) -> str:
        """Say how to get this architecture with another activation."""
        return f"use the same architecture with {expected}"


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network whose constants have values even under ``torch.device("meta")``.

    On the meta device nothing is allocated, and ``load_state_dict(..., assign=True)`` brings the parameters later.
    Constants that no state dict holds would be lost; they are taken from a second copy, made on the CPU.

    Args:
        make: Makes the network.

    >>> with torch.device("meta"):
    ...     layer = built(lambda: nn.Linear(2, 1))
    >>> layer.weight.device
    device(type='meta')
    """
    if torch.get_default_device().type != "meta":
        return make()
    try:
        network = make()
    except NotImplementedError:  # a few compute with values while they are made
        with torch.device("cpu"):
            return make()
    lost = [
        (path, name)
        for path, part in network.named_modules()
        for name in part._non_persistent_buffers_set
        if (value := part._buffers.get(name)) is not None and value.is_meta
    ]
    if lost:
        with torch.device("cpu"):
            whole = make()
        for path, name in lost:
            network.get_submodule(path)._buffers[name] = whole.get_submodule(path)._buffers[name]
    return network
