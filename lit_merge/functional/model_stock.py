"""Model Stock: how far to go from the base towards the experts' mean, read off the angle between the experts.

Source: Jang et al., Model Stock: All we need is just a few fine-tuned models, equation 3, arXiv 2403.19522.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import Scope, check_scope, combine, gram

__all__ = ("AngleMean", "model_stock")

AngleMean = Literal["cosine", "angle"]


def model_stock(
    deltas: Mapping[str, Tensor],
    *,
    per: Scope = "tensor",
    average: AngleMean = "cosine",
    clamp: bool = True,
    products: Tensor | None = None,
) -> dict[str, Tensor]:
    """Shrink the mean task vector by t = T cos θ / (1 + (T − 1) cos θ), with θ the mean angle between the experts.

    For experts of one and the same task, which differ by noise around a centre. Experts of different tasks are close to
    orthogonal, and the result is then close to the base: the rule takes what they do not share for noise.

    Args:
        deltas: Task vectors of at least two experts, ``(T, *shape)`` each.
        per: What has an angle: a ``tensor`` ("layer-wise"), a ``row`` ("filter-wise") or the ``network``.
        average: Of the pairs of experts: mean ``cosine``, as in mergekit, or mean ``angle``, as in FusionBench.
        clamp: Take a negative mean cosine for 0, so the base comes out. The formula itself would step away from
            the experts, without bound as cos θ → −1/(T − 1).
        products: What :func:`~lit_merge.functional.scopes.network_gram` said, where ``deltas`` is a piece of a network
            and ``per`` is that.

    Returns:
        Merged task vector, ``(*shape)`` each. A pair with a zero vector counts as orthogonal.

    Raises:
        MergeError: There is one expert only, or a value is unknown.

    >>> model_stock({"w": torch.tensor([[2.0, 0.0], [1.0, 3.0**0.5]])})["w"]  # 60°, so t = 2/3
    tensor([1.0000, 0.5774])
    """
    check_scope(per, ("row", "tensor", "network"))
    if average not in get_args(AngleMean):
        raise MergeError(f"average: expected cosine or angle, found {average!r}")
    for name, delta in deltas.items():
        if len(delta) < 2:
            raise MergeError(f"model_stock: {name}: expected at least two experts, found {len(delta)}")
    coefficients = {name: _shrink(g, average, clamp) for name, g in gram(deltas, per, network=products).items()}
    return combine(deltas, coefficients, per)


def _shrink(g: Tensor, average: AngleMean, clamp: bool) -> Tensor:
    """Coefficients t/T, ``(R, T)``, from Gram matrices ``(R, T, T)``."""
    tasks = g.shape[-1]
    norms = g.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    first, second = torch.triu_indices(tasks, tasks, 1, device=g.device)
    pairs = torch.where(scale > 0, g / torch.where(scale > 0, scale, 1), 0)[:, first, second].clamp(-1, 1)
    cosine = pairs.mean(-1) if average == "cosine" else pairs.acos().mean(-1).cos()
    if clamp:
        cosine = cosine.clamp(min=0)
    ratio = tasks * cosine / (1 + (tasks - 1) * cosine)
    return (ratio / tasks)[:, None].expand(-1, tasks)
