"""How much memory a network takes for its way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ("bytes_per_image", "saved_bytes")


def saved_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that autograd keeps for the backward pass of what ``run`` computes; each storage counts once.

    Args:
        run: Computes something that requires a gradient. What autograd keeps of it is dropped.

    >>> x = torch.ones(10, requires_grad=True)
    >>> saved_bytes(lambda: x.exp()), saved_bytes(lambda: x * x)  # the result; the factor, once
    (40, 40)
    """
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        # a storage that is kept cannot have its address given to another one
        kept.setdefault(value.untyped_storage().data_ptr(), value.detach())
        return value.detach()  # the result of a function would keep the function that keeps it, for ever

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def bytes_per_image(
    run: Callable[[Tensor], object],
    image: Tensor,
    saved: Callable[[Callable[[], object]], int] = saved_bytes,
) -> int:
    """Return the bytes that autograd keeps for each image of a batch.

    It is what a second image adds, so weights, and copies of them that mixed precision makes, do not count. It depends
    on shapes and types only.

    Args:
        run: Runs a network on images ``(B, C, H, W)``.
        image: One of them, ``(1, C, H, W)``.
        saved: Measures what is kept.

    >>> layer = torch.nn.Linear(3, 2)
    >>> bytes_per_image(lambda x: layer(x).exp(), torch.ones(1, 3))  # three inputs and two results
    20
    """
    one, two = (saved(lambda n=n: run(torch.cat([image] * n))) for n in (1, 2))  # type: ignore[misc]
    return max(1, two - one)
