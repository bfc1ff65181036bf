"""Concrete masks: relaxed Bernoulli variables that say which entries of a merged task vector stay.

Source: Tang et al., Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion,
arXiv 2312.06173; the relaxation is that of Maddison et al., The Concrete Distribution, arXiv 1611.00712.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("FinalMask", "concrete_merge", "concrete_sample", "final_mask", "rescale_mask")

FinalMask = Literal["mean", "threshold", "sample"]


def concrete_sample(
    logits: Tensor, temperature: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:  # fmt: skip
    """Draw m = σ((x + log u − log(1 − u)) / temperature) with u uniform in (0, 1), independently for every entry.

    Differentiable with respect to the logits (reparametrised). The probability of m > ½ is σ(x) at any temperature.
    At x = 0 and temperature ½ most values lie near 0 or 1: rescaled, that is dropping half of the entries, as DARE
    does.

    Args:
        logits: x, any shape, in float32 or float64.
        temperature: Above 0; the smaller, the closer to 0 and 1.
        generator: Source of randomness, on the device of the logits; by default a new one with seed 0.

    Returns:
        The mask, in [0, 1], of the shape of the logits.

    Raises:
        MergeError: ``temperature`` is not above 0.

    Source: arXiv 2312.06173, section 3; FusionBench draws the same with ``RelaxedBernoulli.rsample``.

    >>> import torch
    >>> concrete_sample(torch.zeros(4), generator=torch.Generator().manual_seed(0))
    tensor([0.4925, 0.9166, 0.0093, 0.0226])
    """
    if not temperature > 0:
        raise MergeError(f"temperature: expected a number above 0, found {temperature}")
    generator = torch.Generator(logits.device).manual_seed(0) if generator is None else generator
    noise = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    noise.logit_(eps=torch.finfo(logits.dtype).eps)  # bounded: a gradient of 0 · ∞ would be NaN
    return ((logits + noise) / temperature).sigmoid()


def rescale_mask(mask: Tensor) -> Tensor:
    """Divide a mask by its mean, so that it moves weight inside its tensor and never scales the tensor.

    The gradient flows through the mean as well. The mask of a single entry is the constant 1, and one that is zero
    everywhere stays zero.

    Args:
        mask: Not negative, any shape; the mask of one parameter tensor.

    Returns:
        A mask of mean 1, of the same shape.

    Source: arXiv 2312.06173; the released code rescales each parameter tensor.

    >>> import torch
    >>> rescale_mask(torch.tensor([0.25, 0.75])), rescale_mask(torch.tensor([0.1]))
    (tensor([0.5000, 1.5000]), tensor([1.]))
    """
    if mask.numel() == 1:
        return mask * 0 + 1  # x / x has a gradient of rounding noise, which Adam would blow up to full steps
    return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)


def final_mask(
    logits: Tensor, kind: FinalMask = "mean", temperature: float = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mask that is used in the end, before rescaling.

    Args:
        logits: x, any shape.
        kind: ``mean``: σ(x), the probability that an entry stays; ``threshold``: 1 where that is at least ½, else 0,
            without a gradient; ``sample``: one draw of :func:`concrete_sample`.
        temperature: Of the sample.
        generator: Of the sample.

    Returns:
        The mask, in [0, 1], of the shape of the logits.

    Raises:
        MergeError: ``kind`` is unknown.

    >>> import torch
    >>> final_mask(torch.tensor([-1.0, 0.0, 1.0])), final_mask(torch.tensor([-1.0, 0.0, 1.0]), "threshold")
    (tensor([0.2689, 0.5000, 0.7311]), tensor([0., 1., 1.]))
    """
    if kind == "mean":
        return logits.sigmoid()
    if kind == "threshold":
        return (logits >= 0).to(logits.dtype)
    if kind == "sample":
        return concrete_sample(logits, temperature, generator)
    raise MergeError(f"final_mask: expected mean, threshold or sample, found {kind!r}")


def concrete_merge(
    deltas: Mapping[str, Tensor], masks: Mapping[str, Tensor], scale: float | Tensor = 0.3
) -> dict[str, Tensor]:
    """Return Σ_t λ_t (m ⊙ τ_t), which is m ⊙ Σ_t λ_t τ_t as the mask is shared by the tasks.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        masks: Masks, ``(*shape)`` each, rescaled where that is wanted.
        scale: The coefficients λ: a number, or one per task ``(T,)``.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Source: arXiv 2312.06173, section 3.

    >>> import torch
    >>> concrete_merge({"w": torch.tensor([[1.0, 2.0], [3.0, -2.0]])}, {"w": torch.tensor([2.0, 0.0])}, scale=0.5)
    {'w': tensor([4., 0.])}
    """
    merged = {}
    for name, delta in deltas.items():
        weights = torch.as_tensor(scale, dtype=delta.dtype, device=delta.device).expand(len(delta))
        merged[name] = masks[name] * torch.tensordot(weights, delta, dims=1)
    return merged
