"""Universal adversarial patches: one patch that makes a network give one class to any image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger

__all__ = ("adversarial_images", "universal_patch")

Logits = Callable[[Tensor], Tensor]


def universal_patch(
    logits: Logits, batches: Iterable[Tensor], start: PatchTrigger, scale: PixelScale, rate: float = 0.05
) -> PatchTrigger:
    """Climb the mean of ``log p(target | image with the patch)`` by Adam on the pixels, which stay in [0, 1].

    The released code of BadMerging (arXiv 2408.07362) climbs the same quantity image by image, by plain gradients of
    rate 1 on normalised values until each image is fooled; batches and Adam are ours.

    Args:
        logits: Maps images ``(B, C, H, W)`` to logits ``(B, classes)``; its tensors are not trained.
        batches: Images ``(B, C, H, W)``; one step each.
        start: Where to begin; it says what the target is and where the patch is.
        scale: How the images' values come from pixels.
        rate: Adam's learning rate, in pixels of [0, 1].

    Returns:
        The trigger with the learned patch, rounded to 8 bits.
    """
    patch: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    for images in batches:
        if patch is None or optimizer is None:
            patch = start.patch.detach().to(images, copy=True).requires_grad_()
            optimizer = torch.optim.Adam([patch], lr=rate, maximize=True)
        score = logits(replace(start, patch=patch).stamp(images, scale)).log_softmax(-1)[:, start.target].mean()
        (patch.grad,) = torch.autograd.grad(score, patch)
        optimizer.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
    return (start if patch is None else replace(start, patch=patch.detach().cpu())).rounded()


def adversarial_images(
    logits: Logits,
    images: Tensor,
    classes: Tensor,
    scale: PixelScale,
    radius: float = 8 / 255,
    step: float = 1 / 255,
    steps: int = 40,
) -> Tensor:
    """Push images towards other classes by signed gradients (PGD, arXiv 1706.06083).

    Args:
        logits: Maps images ``(B, C, H, W)`` to logits ``(B, classes)``.
        images: ``(B, C, H, W)``; they are not changed.
        classes: ``(B,)``, the class that each is pushed to.
        scale: How the images' values come from pixels.
        radius: Largest change of a pixel of [0, 1].
        step: Change of a pixel per step.
        steps: Number of steps.

    Returns:
        Images ``(B, C, H, W)`` whose pixels are in [0, 1] and no further than the radius from where they were.
    """
    origin = scale.pixels(images)
    pixels = origin.clone()
    for _ in range(steps):
        pixels.requires_grad_()
        score = logits(scale.values(pixels)).log_softmax(-1).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, pixels)
        moved = pixels.detach() + step * gradient.sign()
        pixels = moved.clamp(origin - radius, origin + radius).clamp(0, 1)
    return scale.values(pixels)
