"""The diagonal of the Fisher information of a classifier, from gradients of single images.

Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, section 3.2, arXiv 2111.09832.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.errors import MergeError

__all__ = ("FisherTarget", "Gradients", "Logits", "Squares", "diagonal_fisher")

FisherTarget = Literal["expected", "sampled", "labels", "root"]
Squares = Literal["image", "batch"]
Gradients = Literal["vmap", "loop"]
Logits = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def diagonal_fisher(
    logits: Logits,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    *,
    target: FisherTarget = "expected",
    squares: Squares = "image",
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    gradients: Gradients = "vmap",
    chunk_size: int = 8,
) -> dict[str, Tensor]:
    """Sum the diagonal Fisher information over images.

    ============  ===================================================================================================
    ``expected``  Σ_c p(c|x) (∇ log p(c|x))², the definition; one backward pass per class
    ``sampled``   (∇ log p(y|x))² for one y drawn from p(y|x): the same in expectation, one backward pass
    ``labels``    the same for the labels, the "empirical Fisher", which is another matrix
    ``root``      (∇ Σ_c √p(c|x) log p(c|x))² with √p as a constant, as in FusionBench: that of ``expected`` plus the
                  products of different classes; one backward pass
    ============  ===================================================================================================

    Args:
        logits: Maps parameters by name and images ``(B, C, H, W)`` to logits ``(B, classes)``, image by image.
        parameters: Where the gradients are taken, by name; not changed.
        images: ``(B, C, H, W)``.
        target: See the table.
        squares: Of the gradient of each ``image``, as the definition has it; or of the sum over the ``batch``, as in
            FusionBench, which depends on how images are batched.
        labels: ``(B,)``, for ``labels``.
        generator: On the CPU, for ``sampled``.
        gradients: ``vmap``: of several images at once; ``loop``: one after the other, for networks that ``torch.func``
            cannot batch. The results are the same.
        chunk_size: Images at once with ``vmap``, each of which takes the memory of one network.

    Returns:
        By the names of ``parameters``, at least in float32; divide by the number of images for the mean.

    Raises:
        MergeError: A value is unknown or missing, or a gradient is not finite.

    Logits (w x, 0) at w = 0 have p = ½ and ∇ log p = ±x / 2, so F = Σ_x x² / 4:

    >>> def logits(parameters, images):
    ...     return torch.cat([parameters["w"] * images, 0 * images], 1)
    >>> diagonal_fisher(logits, {"w": torch.zeros(1)}, torch.tensor([[2.0], [4.0]]))
    {'w': tensor([5.0000])}
    """
    for option, given, known in (
        ("target", target, FisherTarget),
        ("squares", squares, Squares),
        ("gradients", gradients, Gradients),
    ):
        if given not in get_args(known):
            raise MergeError(f"{option}: expected {', '.join(get_args(known))}, found {given!r}")
    if chunk_size < 1:
        raise MergeError(f"chunk_size: expected at least 1, found {chunk_size}")
    found = {
        name: torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        for name, value in parameters.items()
    }
    with torch.no_grad():
        chances = logits(parameters, images).softmax(-1, torch.promote_types(images.dtype, torch.float32))
    take = _batched if squares == "batch" else _mapped if gradients == "vmap" else _looped
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be mapped over images
        for weights in _rounds(chances, target, labels, generator):
            for name, value in take(logits, dict(parameters), images, weights, chunk_size):
                found[name] += value
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise MergeError(f"fisher: {name}: a gradient is not finite; look at the expert's outputs on these images")
    return found


def _rounds(
    chances: Tensor, target: FisherTarget, labels: Tensor | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield weights ``(B, classes)``: each round squares the gradient of Σ_c weight · log p(c|x)."""
    classes = chances.shape[1]
    if target == "root":
        yield chances.sqrt()
    elif target == "expected":
        for number in range(classes):
            yield chances.sqrt() * torch.eye(classes, dtype=chances.dtype, device=chances.device)[number]
    else:
        if target == "labels":
            if labels is None:
                raise MergeError("labels: expected one per image for the target labels, found none")
            drawn = labels
        else:
            if generator is None:
                raise MergeError("generator: expected one for the target sampled, found none")
            drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0]
        yield torch.nn.functional.one_hot(drawn.to(chances.device), classes).to(chances.dtype)


def _score(logits: Logits, parameters: Mapping[str, Tensor], images: Tensor, weights: Tensor) -> Tensor:
    return (logits(parameters, images).log_softmax(-1, weights.dtype) * weights).sum()


def _mapped(
    logits: Logits, parameters: dict[str, Tensor], images: Tensor, weights: Tensor, chunk_size: int
) -> Iterator[tuple[str, Tensor]]:
    def one(values: dict[str, Tensor], image: Tensor, weight: Tensor) -> Tensor:
        return _score(logits, values, image[None], weight[None])

    every = vmap(grad(one), in_dims=(None, 0, 0))
    for part, chosen in zip(images.split(chunk_size), weights.split(chunk_size), strict=True):
        for name, value in every(parameters, part, chosen).items():
            yield name, value.to(torch.promote_types(value.dtype, torch.float32)).square().sum(0)


def _looped(
    logits: Logits, parameters: dict[str, Tensor], images: Tensor, weights: Tensor, chunk_size: int
) -> Iterator[tuple[str, Tensor]]:
    for image, weight in zip(images.split(1), weights.split(1), strict=True):
        yield from _batched(logits, parameters, image, weight, chunk_size)


def _batched(
    logits: Logits, parameters: dict[str, Tensor], images: Tensor, weights: Tensor, chunk_size: int
) -> Iterator[tuple[str, Tensor]]:
    with torch.enable_grad():
        values = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        score = _score(logits, values, images, weights)
        slopes = torch.autograd.grad(score, list(values.values()), allow_unused=True, materialize_grads=True)
    for name, value in zip(values, slopes, strict=True):
        yield name, value.to(torch.promote_types(value.dtype, torch.float32)).square()
