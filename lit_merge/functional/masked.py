"""Masks over a flat vector of parameters, as a recipe instead of as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ("Mask",)


class Mask(NamedTuple):
    """How to make the mask of each parameter tensor from logits, when it is needed.

    A mask is as large as the network, and so is everything that autograd would keep of the way to it. A recipe is
    followed tensor by tensor instead, forward and again backward, so that never more than one tensor's mask exists.
    It may combine several logits: a product of two masks is as good as one mask.

    Attributes:
        recipe: Maps the number of a parameter tensor and its piece of each of the logits, ``(n,)`` each, to the
            factors of its entries, ``(n,)``. It is differentiable in the pieces and pure: the same arguments give the
            same mask, which for a random one means a generator that is seeded inside.
        logits: One or more of ``(P,)``, the entries of all parameter tensors one after the other.

    >>> import torch
    >>> kept = Mask(lambda number, x: x.sigmoid(), (torch.zeros(3),))
    >>> kept.recipe(0, kept.logits[0][:2])
    tensor([0.5000, 0.5000])
    """

    recipe: Callable[..., Tensor]
    logits: tuple[Tensor, ...]

    def detach(self) -> Mask:
        """Return the same mask as a constant."""
        return Mask(self.recipe, tuple(x.detach() for x in self.logits))
