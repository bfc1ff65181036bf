"""Heads: frozen maps from features to logits."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.checkpoints.reading import SafetensorsFile, read_state
from lit_merge.errors import MergeError

__all__ = ("CosineHead", "LinearHead", "read_head")


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


class LinearHead(nn.Module):
    """A frozen linear layer that may normalise the features first.

    ``logits = weight @ features / |features| + bias``: with ``normalize`` the zero-shot heads of the task-vectors code
    base (Ilharco et al., arXiv 2212.04089), whose weight holds the logit scale. All zero features stay zero.

    Args:
        weight: ``(C, D)``; copied.
        bias: ``(C,)``; copied. By default there is none.
        normalize: Whether features are divided by their Euclidean length.

    Raises:
        MergeError: The tensors are not finite floats of these shapes and of one dtype.

    >>> head = LinearHead(100 * torch.eye(2), torch.tensor([0.0, 1.0]), normalize=True)
    >>> head(torch.tensor([[0.0, 2.0]])).tolist()
    [[0.0, 101.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, normalize: bool = False) -> None:
        super().__init__()
        if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise MergeError(
                f"LinearHead wants a finite float matrix (classes, features), got {weight.dtype} {tuple(weight.shape)}"
            )
        if bias is not None and (
            bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or not bool(bias.isfinite().all())
        ):
            raise MergeError(
                f"LinearHead wants a finite bias of {weight.dtype} (classes,), got {bias.dtype} {tuple(bias.shape)}"
            )
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(B, D)`` to logits ``(B, C)``."""
        return F.linear(F.normalize(features, dim=-1) if self.normalize else features, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show the sizes and what is done to features."""
        classes, features = self.weight.shape
        return f"classes={classes}, features={features}, bias={self.bias is not None}, normalize={self.normalize}"


def read_head(path: str | Path) -> LinearHead:
    """Read a frozen linear head.

    Args:
        path: A file with ``weight`` ``(C, D)`` and maybe ``bias`` ``(C,)`` that
            :func:`~lit_merge.checkpoints.read_state` reads. The header of a safetensors file may say
            ``normalize: true``, as ``lit-merge convert`` writes it; otherwise features are taken as they are.

    Returns:
        The head.

    Raises:
        MergeError: The file is damaged or is no linear head.
    """
    state = read_state(path)
    if not set(state) <= {"weight", "bias"} or "weight" not in state or state["weight"].ndim != 2:
        raise MergeError(
            f"{path}: expected a linear head with weight (C, D) and maybe bias (C,), found {sorted(state)[:5]}"
        )
    said = state.metadata.get("normalize", "false") if isinstance(state, SafetensorsFile) else "false"
    if said not in ("true", "false"):
        raise MergeError(f"{path}: its header says normalize: {said}; expected true or false; convert it again")
    try:
        return LinearHead(state["weight"], state.get("bias"), normalize=said == "true")
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from error
