"""Heads: frozen maps from features to logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import MergeError

__all__ = ("CosineHead",)


class CosineHead(nn.Module):
    """Classify by the angle to one direction per class, as CLIP's zero-shot head does.

    ``logits = scale * cos(features, weight[c])``. The directions need not be unit vectors, nor the features.

    Args:
        weight: One row per class, ``(C, D)``; copied.
        scale: Factor of the cosines, positive. CLIP's learned value is 100; small networks train well with 20.
        trainable: Whether the rows take gradients; a merge wants them frozen.

    Raises:
        MergeError: ``weight`` is not a finite matrix of floats, or ``scale`` is not positive and finite.

    >>> head = CosineHead(torch.eye(2), scale=20.0)
    >>> head(torch.tensor([[3.0, 0.0]])).tolist()
    [[20.0, 0.0]]
    """

    def __init__(self, weight: Tensor, scale: float = 20.0, trainable: bool = False) -> None:
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise MergeError(
                f"CosineHead wants a finite float matrix (classes, features), got {weight.dtype} {tuple(weight.shape)}"
            )
        if not (scale > 0 and math.isfinite(scale)):
            raise MergeError(f"CosineHead wants a positive, finite scale, got {scale}")
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=trainable)
        self.scale = scale

    @classmethod
    def fresh(cls, classes: int, features: int, scale: float = 20.0) -> CosineHead:
        """Make a trainable head with random directions, drawn from PyTorch's global generator.

        Args:
            classes: Number of classes C.
            features: Number of features D.
            scale: Factor of the cosines, positive.
        """
        return cls(torch.randn(classes, features) / math.sqrt(features), scale, trainable=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)`` within +-``scale``."""
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        """Show the sizes and the scale."""
        classes, features = self.weight.shape
        return f"classes={classes}, features={features}, scale={self.scale:g}"
