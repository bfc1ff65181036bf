"""Encoders and heads: networks from images to features, and frozen maps from features to logits.

Names are imported when they are first used: each encoder needs a library of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CosineHead": "heads",
    "HuggingFaceEncoder": "hugging_face_encoder",
    "ImageEncoder": "base",
    "OpenClipEncoder": "open_clip_encoder",
    "TimmEncoder": "timm_encoder",
    "TorchvisionEncoder": "torchvision_encoder",
    "small_vit": "vit",
}

__all__ = (
    "CosineHead",
    "HuggingFaceEncoder",
    "ImageEncoder",
    "OpenClipEncoder",
    "TimmEncoder",
    "TorchvisionEncoder",
    "small_vit",
)

if TYPE_CHECKING:
    from lit_merge.encoders.base import ImageEncoder
    from lit_merge.encoders.heads import CosineHead
    from lit_merge.encoders.hugging_face_encoder import HuggingFaceEncoder
    from lit_merge.encoders.open_clip_encoder import OpenClipEncoder
    from lit_merge.encoders.timm_encoder import TimmEncoder
    from lit_merge.encoders.torchvision_encoder import TorchvisionEncoder
    from lit_merge.encoders.vit import small_vit


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name in _HOMES:
        return getattr(import_module(f"lit_merge.encoders.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lit_merge.encoders' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
