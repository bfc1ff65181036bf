"""The networks of timm as encoders."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision.transforms import Compose

from lit_merge.encoders.base import built
from lit_merge.encoders.preprocessing import to_rgb
from lit_merge.errors import MergeError

__all__ = ("TimmEncoder",)


class TimmEncoder(nn.Module):
    """Any network of timm, from images ``(B, 3, H, W)`` to features ``(B, D)``.

    Constructing it gives timm's own module, so that its tensors have timm's names and a file that timm wrote fits; the
    attribute ``preprocess`` makes its input from a ``PIL.Image``, as the architecture's weights want it. Nothing is
    downloaded, and the values are random until a state dict is loaded.

    Args:
        name: Name of the network, maybe with a tag, such as ``vit_base_patch16_224.augreg_in21k``.
        kwargs: For ``timm.create_model``; ``num_classes`` is 0 unless given: no classifier, only features.

    Raises:
        MergeError: timm does not know the name, or ``pretrained`` is asked for.

    >>> network = TimmEncoder("resnet10t")
    >>> network.num_features, network.preprocess.transforms[-1].mean.tolist()[0] > 0.48
    (512, True)
    """

    def __new__(cls, name: str, **kwargs: Any) -> nn.Module:  # type: ignore[misc] # noqa: ANN401, D102
        if kwargs.pop("pretrained", False):
            raise MergeError(f"{name}: pretrained: an encoder downloads nothing; give the weights as the suite's base")
        if not timm.is_model(name):
            near = ", ".join(get_close_matches(name, timm.list_models(), n=4)) or "see timm.list_models()"
            raise MergeError(f"{name}: no network of timm; near: {near}")
        network = built(lambda: timm.create_model(name, **{"num_classes": 0, **kwargs}))
        with torch.device("cpu"):  # its mean and std are tensors
            transform = create_transform(**resolve_model_data_config(network, args=_size(kwargs)), is_training=False)  # type: ignore[no-untyped-call]
        network.preprocess = Compose([to_rgb, *transform.transforms])
        return network


def _size(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Size of the images, where the caller chose it."""
    size = kwargs.get("img_size")
    if size is None:
        return {}
    return {"input_size": (3, size, size) if isinstance(size, int) else (3, *size)}
