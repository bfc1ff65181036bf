"""The classifiers of torchvision as encoders."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torchvision.models as models
from torch import nn
from torchvision.transforms import Compose

from lit_merge.encoders.base import built
from lit_merge.encoders.preprocessing import to_rgb
from lit_merge.errors import MergeError

__all__ = ("TorchvisionEncoder",)

_CLASSIFIERS = ("fc", "classifier", "heads", "head")


class TorchvisionEncoder(nn.Module):
    """A classifier of torchvision without its last layer, from images ``(B, 3, H, W)`` to features ``(B, D)``.

    Constructing it gives torchvision's own module with an identity in place of the last linear layer, so that the other
    tensors have torchvision's names; the attribute ``preprocess`` makes its input from a ``PIL.Image``. Nothing is
    downloaded, and the values are random until a state dict is loaded.

    Args:
        name: Name of the network, such as ``resnet50``, ``vit_b_16``, ``convnext_tiny``, ``efficientnet_b0``.
        weights: Weights whose preprocessing is meant, such as ``IMAGENET1K_V2``; by default the first of the network.
        kwargs: For ``torchvision.models.get_model``.

    Raises:
        MergeError: torchvision does not know the name or the weights, or the network does not end in a linear layer.

    >>> network = TorchvisionEncoder("resnet18")
    >>> network.fc, "layer1.0.conv1.weight" in network.state_dict()
    (Identity(), True)
    """

    def __new__(cls, name: str, weights: str | None = None, **kwargs: Any) -> nn.Module:  # type: ignore[misc] # noqa: ANN401, D102
        known = models.list_models(module=models)
        if name not in known:
            near = ", ".join(get_close_matches(name, known, n=4)) or "see torchvision.models.list_models()"
            raise MergeError(f"{name}: no classifier of torchvision; near: {near}")
        network = built(lambda: models.get_model(name, weights=None, **kwargs))
        _drop_classifier(network, name)
        network.preprocess = Compose([to_rgb, _weights(name, weights).transforms()])
        return network


def _weights(name: str, weights: str | None) -> Any:  # noqa: ANN401 - an entry of an enumeration of torchvision
    known = models.get_model_weights(name)
    if weights is None:
        return next(iter(known))
    chosen = weights.rpartition(".")[2]
    if chosen not in known.__members__:
        raise MergeError(f"{name}: weights: expected one of {', '.join(known.__members__)}, found {weights}")
    return known[chosen]


def _drop_classifier(network: nn.Module, name: str) -> None:
    """Put an identity in place of the last linear layer; what stands before it, such as a normalisation, stays."""
    attribute = next((attribute for attribute in _CLASSIFIERS if hasattr(network, attribute)), None)
    layers = [] if attribute is None else list(network.get_submodule(attribute).named_modules(prefix=attribute))
    linear = [path for path, module in layers if isinstance(module, nn.Linear)]
    if not linear or not isinstance(layers[-1][1], nn.Linear):
        raise MergeError(f"{name}: expected a network that ends in a linear layer; give an nn.Module of your own")
    parent, _, leaf = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
