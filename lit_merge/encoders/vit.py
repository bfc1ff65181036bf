"""Small vision transformers, made of the same blocks as open_clip's image towers.

open_clip is imported when a network is made: it brings timm and wandb along, a second that no help text should take.
"""

from __future__ import annotations

from torch import nn

from lit_merge.errors import MergeError

__all__ = ("small_vit",)


def small_vit(
    image_size: int = 28,
    patch_size: int = 7,
    width: int = 96,
    layers: int = 4,
    heads: int = 4,
    mlp_ratio: float = 2.0,
    output_dim: int = 64,
) -> nn.Module:
    """Make a small vision transformer that maps images ``(B, 3, H, W)`` to features ``(B, output_dim)``.

    It is ``open_clip.transformer.VisionTransformer``, so its tensors have the names and the shapes' order of CLIP's
    image tower, and what merges one merges the other.

    Args:
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch in pixels; divides ``image_size``.
        width: Width of the tokens; a multiple of ``heads``.
        layers: Number of residual attention blocks.
        heads: Number of attention heads.
        mlp_ratio: Hidden width of the blocks' perceptrons over ``width``.
        output_dim: Number of features D.

    Returns:
        The network, freshly initialised from PyTorch's global generator.

    Raises:
        MergeError: The patch does not divide the image, or the heads do not divide the width.

    >>> import torch
    >>> small_vit(width=32, layers=1)(torch.zeros(2, 3, 28, 28)).shape
    torch.Size([2, 64])
    """
    if image_size % patch_size:
        raise MergeError(f"patch_size {patch_size} does not divide image_size {image_size}; choose one that does")
    if width % heads:
        raise MergeError(f"heads {heads} does not divide width {width}; choose a number that does")
    from open_clip.transformer import VisionTransformer

    network: nn.Module = VisionTransformer(
        image_size, patch_size, width, layers, heads, mlp_ratio, output_dim=output_dim
    )
    return network
