"""Trigger inversion under a budget: how easily a small universal change of the images leads to one class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as tf
from torch import Tensor

from lit_merge.data.pixels import PixelScale
from lit_merge.errors import MergeError

__all__ = ("Candidates", "Inversion", "invert", "project_budget", "reach", "reach_of_classes")

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inversion:
    """How candidate triggers are looked for.

    Args:
        area: Budget: the sum of a mask in [0, 1], as a share of the pixels. A patch of this size fits; it may be
            anywhere, and in pieces.
        steps: Steps of AMSGrad.
        batch_size: Images per step and class.
        rate: Learning rate for mask and colours, both in [0, 1].
        max_images: Images per encoder pass; classes are grouped up to it.

    Raises:
        MergeError: A value is out of range.
    """

    area: float = 0.02
    steps: int = 40
    batch_size: int = 8
    rate: float = 0.5
    max_images: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1:
            raise MergeError(f"Inversion.area: expected a share of the pixels in (0, 1], found {self.area}")
        if not self.rate > 0:
            raise MergeError(f"Inversion.rate: expected a number above 0, found {self.rate}")
        for name, least in (("steps", 0), ("batch_size", 1), ("max_images", 1)):
            if (value := getattr(self, name)) < least:
                raise MergeError(f"Inversion.{name}: expected at least {least}, found {value}")


class Candidates(NamedTuple):
    """One candidate trigger per class: pixels become ``(1 − mask) · pixel + mask · colour``.

    Attributes:
        targets: ``(K,)``, the classes.
        masks: ``(K, H, W)`` in [0, 1].
        colours: ``(K, C, H, W)`` in [0, 1].
    """

    targets: Tensor
    masks: Tensor
    colours: Tensor

    def stamp(self, images: Tensor, scale: PixelScale, number: int) -> Tensor:
        """Return images ``(B, C, H, W)`` with candidate ``number`` in them."""
        mask = self.masks[number]
        return scale.values(scale.pixels(images) * (1 - mask) + mask * self.colours[number])


def project_budget(masks: Tensor, budget: float) -> Tensor:
    """Return the nearest masks with entries in [0, 1] and a sum of at most ``budget``.

    The projection is clamp(m − θ, 0, 1) with the least θ ≥ 0 that satisfies the budget, found by bisection.

    Args:
        masks: ``(N, H, W)``.
        budget: Largest sum of each, above 0.

    >>> project_budget(torch.tensor([[[0.9, 0.5], [0.1, -1.0]]]), 1.0).round(decimals=3)
    tensor([[[0.7000, 0.3000],
             [0.0000, 0.0000]]])
    """
    flat = masks.flatten(1)
    low = torch.zeros_like(flat[:, :1])
    high = flat.amax(1, keepdim=True).clamp(min=0)
    over = flat.clamp(0, 1).sum(1, keepdim=True) > budget
    for _ in range(40):
        middle = (low + high) / 2
        large = (flat - middle).clamp(0, 1).sum(1, keepdim=True) > budget
        low, high = middle.where(large, low), high.where(large, middle)
    return (flat - high.where(over, torch.zeros_like(high))).clamp(0, 1).view_as(masks)


def invert(
    logits: Logits, images: Tensor, scale: PixelScale, targets: Sequence[int], options: Inversion, seed: int
) -> Candidates:
    """Look for one small universal change of the images per class that leads all of them to the class.

    As Neural Cleanse (Wang et al., IEEE S&P 2019), by cross-entropy towards the class over a mask and colours. There
    the mask is made small by a penalty whose weight is tuned until 99 % of the images are led astray, and its size is
    compared; here its size is given, and the share of images is compared: a fixed number of steps, nothing to tune.
    Every pixel of a mask moves alike (AMSGrad), so masks stay spread out. That is wanted: a search that follows the
    magnitudes of gradients finds in clean networks, too, the few pixels that matter, and tells poisoned ones less well.
    What is found is a probe, not a reconstruction: it need not be where the trigger is.

    Args:
        logits: Maps images ``(B, C, H, W)`` to ``(B, classes)``; what it is made of is not trained.
        images: ``(N, C, H, W)``, as the network takes them.
        scale: How their values come from pixels.
        targets: Classes, at least one; what is found for one does not depend on the others.
        options: How to look.
        seed: Decides on the batches, which are the same for all classes and networks.

    Returns:
        Candidates on the images' device.
    """
    device, (channels, height, width) = images.device, images.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    pixels, budget = scale.pixels(images), options.area * height * width
    classes = torch.as_tensor(targets, device=device)
    masks = torch.full((len(classes), height, width), options.area, device=device).requires_grad_()
    # from grey every colour is as near as any other: from random colours fewer backdoors were found
    colours = torch.full((len(classes), channels, height, width), 0.5, device=device).requires_grad_()
    # AMSGrad: a class that is reached has small gradients, and with Adam's own scale its mask would drift off again
    optimizer = torch.optim.Adam([masks, colours], lr=options.rate, betas=(0.9, 0.99), amsgrad=True)
    for _ in range(options.steps):
        chosen = torch.randperm(len(images), generator=generator)[: options.batch_size].to(device)
        with torch.enable_grad():
            cover = masks[:, None, None]
            stamped = pixels[chosen] * (1 - cover) + cover * colours[:, None]
            answers = logits(scale.values(stamped.flatten(0, 1))).float()
            # the sum over classes of means over images, so that the step of one does not depend on how many there are
            loss = tf.cross_entropy(answers, classes.repeat_interleave(len(chosen)), reduction="sum") / len(chosen)
            masks.grad, colours.grad = torch.autograd.grad(loss, (masks, colours))
        optimizer.step()
        with torch.no_grad():
            masks.copy_(project_budget(masks, budget))
            colours.clamp_(0, 1)
    return Candidates(classes, masks.detach(), colours.detach())


@torch.no_grad()
def reach(logits: Logits, images: Tensor, scale: PixelScale, candidates: Candidates) -> Tensor:
    """Return the share of images that each candidate leads to its class, of those that are not there already.

    It is an attack success rate in which predictions take the place of labels.

    Args:
        logits: Maps images ``(B, C, H, W)`` to ``(B, classes)``.
        images: ``(N, C, H, W)``; others than the candidates were found on.
        scale: How their values come from pixels.
        candidates: K candidates.

    Returns:
        Shares ``(K,)`` in [0, 1]; 0 for a class that everything is predicted to be.
    """
    clean = logits(images).argmax(-1)
    shares = torch.zeros(len(candidates.targets))
    for number, target in enumerate(candidates.targets):
        others = images[clean != target]
        if len(others):
            predicted = logits(candidates.stamp(others, scale, number)).argmax(-1)
            shares[number] = float((predicted == target).float().mean())
    return shares


def reach_of_classes(
    logits: Logits, learn: Tensor, count: Tensor, scale: PixelScale, classes: int, options: Inversion, seed: int
) -> Tensor:
    """Return the :func:`reach` of every class by candidates of its own, group by group.

    Args:
        logits: Maps images ``(B, C, H, W)`` to ``(B, classes)``.
        learn: Images ``(N, C, H, W)`` to look for candidates on.
        count: Images ``(M, C, H, W)`` to count on.
        scale: How their values come from pixels.
        classes: Number of classes.
        options: How to look.
        seed: Decides on the batches.

    Returns:
        Shares ``(classes,)`` in [0, 1], on the CPU.
    """
    group = max(1, options.max_images // min(options.batch_size, len(learn)))
    parts = [list(range(classes))[start : start + group] for start in range(0, classes, group)]
    found = [reach(logits, count, scale, invert(logits, learn, scale, part, options, seed)) for part in parts]
    return torch.cat(found)
