"""Masks over a flat vector of parameters, as a recipe instead of as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("Mask", "pulled")


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

    def check(self, size: int) -> None:
        """Refuse logits of another shape than ``(size,)``.

        Raises:
            MergeError: There are some.
        """
        for logits in self.logits:
            if logits.shape != (size,):
                raise MergeError(f"mask: expected logits ({size},), found {tuple(logits.shape)}")

    def detach(self) -> Mask:
        """Return the same mask as a constant."""
        return Mask(self.recipe, tuple(x.detach() for x in self.logits))


class _Block(Protocol):
    """What is needed of a :class:`~lit_merge.storage.Block`."""

    def offset(self, weights: Tensor) -> Tensor: ...
    def products(self, vector: Tensor) -> Tensor: ...


def pulled(
    block: _Block,
    gradient: Tensor,
    weights: Tensor,
    column: int,
    recipe: Callable[..., Tensor] | None,
    pieces: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Take the gradient of one merged tensor, θ0 + m ⊙ Σ_t λ_t τ_t, back to what it was made of.

    Args:
        block: Its base and task vectors.
        gradient: dL/dθ, ``(n,)``, in the dtype of the arithmetic.
        weights: Its coefficients ``(T,)``.
        column: Its number.
        recipe: That of the mask, if there is one.
        pieces: The tensor's own piece of each of the mask's logits, ``(n,)``.
        wanted: For the coefficients and for each of the pieces, whether its gradient is asked for.

    Returns:
        Gradients ``(T,)`` and, for each of the pieces, ``(n,)``; ``None`` where none is asked for or there is none.
    """
    if recipe is None:
        return [block.products(gradient) if wanted[0] else None]
    with torch.enable_grad():
        ends = [x.detach().requires_grad_(want) for x, want in zip(pieces, wanted[1:], strict=True)]
        factor = recipe(column, *ends)
    found: list[Tensor | None] = [block.products(gradient * factor.detach()) if wanted[0] else None]
    if not factor.requires_grad:
        return found + [None] * len(ends)
    asked = [x for x in ends if x.requires_grad]
    slopes = iter(torch.autograd.grad(factor, asked, gradient * block.offset(weights), allow_unused=True))
    return found + [next(slopes) if x.requires_grad else None for x in ends]
