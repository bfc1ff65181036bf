"""Interpolation on the sphere: SLERP for two experts, the Karcher mean for any number.

Both are linear combinations of the experts whose coefficients depend on nothing but their inner products, so the bank
is read twice and everything between is arithmetic on T × T matrices.

Sources: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; Karcher, Riemannian Center of Mass and
Mollifier Smoothing, Comm. Pure Appl. Math. 30, 1977.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import Scope, check_scope, combine, gram

__all__ = ("Lengths", "karcher_mean", "slerp")

Lengths = Literal["blend", "linear"]
_ARC = 1.5e-6  # least sine: what rounding to float32 leaves of opposite vectors is below, and is no arc


def slerp(
    deltas: Mapping[str, Tensor],
    t: float = 0.5,
    *,
    base: Mapping[str, Tensor] | None = None,
    per: Scope = "tensor",
    lengths: Lengths = "blend",
    threshold: float = 0.9995,
    products: Tensor | None = None,
) -> dict[str, Tensor]:
    """Interpolate two experts along the arc between them: sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b.

    Ω is the angle between a and b: the task vectors or, with a base, the weights. Where they are nearly parallel or
    opposite (|cos Ω| above the threshold) or one of them is zero, there is no arc and the interpolation is linear.

    Args:
        deltas: Task vectors of two experts, ``(2, *shape)`` each.
        t: Where between the first (0) and the second (1), in [0, 1].
        base: Weights of the base, ``(*shape)`` each, to interpolate weights as in common practice.
        per: What has an angle: a ``row``, a ``tensor`` (as in mergekit) or the ``network``.
        lengths: ``blend``: the formula applied to a and b as they are, as in mergekit; where their lengths differ the
            result is longer than either the wider the angle, halfway (‖b‖ − ‖a‖) / (2 cos(Ω / 2)) near 180°, which only
            the threshold bounds. ``linear``: applied to their directions, and the length interpolated linearly, so
            that it lies between theirs.
        threshold: Largest |cos Ω| with an arc.
        products: What :func:`~lit_merge.functional.scopes.network_gram` said, where ``deltas`` is a piece of a network
            and ``per`` is that.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: There are not two experts, or a value is out of range.

    >>> halfway = slerp({"w": torch.tensor([[2.0, 0.0], [0.0, 2.0]])})["w"]
    >>> halfway, halfway.norm()
    (tensor([1.4142, 1.4142]), tensor(2.0000))
    >>> wide = {"w": torch.tensor([[1.0, 0.0], [-2.0, 0.1]])}  # 177°
    >>> slerp(wide)["w"].norm(), slerp(wide, lengths="linear")["w"].norm()  # 1 / (2 cos 88.6°) and 1.5
    (tensor(20.1186), tensor(1.5012))
    """
    check_scope(per, ("row", "tensor", "network"))
    _check(lengths, deltas)
    for label, value in (("t", t), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise MergeError(f"{label}: expected a number in [0, 1], found {value}")
    for name, delta in deltas.items():
        if len(delta) != 2:
            raise MergeError(f"slerp: {name}: expected two experts, found {len(delta)}; karcher_mean takes any number")
    coefficients = {name: _arc(g, t, lengths, threshold) for name, g in gram(deltas, per, base, products).items()}
    return combine(deltas, coefficients, per, base)


def _arc(g: Tensor, t: float, lengths: Lengths, threshold: float) -> Tensor:
    """Coefficients ``(R, 2)`` of a and b from Gram matrices ``(R, 2, 2)``."""
    norms = g.diagonal(dim1=-2, dim2=-1).sqrt()
    product = norms.prod(-1)
    cosine = torch.where(product > 0, g[:, 0, 1] / product, 1).clamp(-1, 1)
    angle = cosine.acos()
    ends = torch.tensor([1 - t, t], dtype=g.dtype, device=g.device)
    arc = torch.sin(ends * angle[:, None]) / angle.sin()[:, None]
    if lengths == "linear":
        arc = arc / norms * (ends * norms).sum(-1, keepdim=True)
    straight = (cosine.abs() > threshold) | (angle.sin() < _ARC)
    return torch.where(straight[:, None], ends, arc)


def karcher_mean(
    deltas: Mapping[str, Tensor],
    weights: Sequence[float] | None = None,
    *,
    base: Mapping[str, Tensor] | None = None,
    per: Scope = "tensor",
    tolerance: float = 1e-9,
    max_steps: int = 100,
    products: Tensor | None = None,
) -> dict[str, Tensor]:
    """Take the mean of the experts' directions on the sphere, with the mean of their lengths.

    The direction u minimises Σ_t w_t ∠(u, u_t)²: steps u ← exp_u(Σ_t w_t log_u u_t) from the normalised mean until
    the step is below the tolerance. For two experts this is :func:`slerp` with ``lengths="linear"``. A zero vector
    has no direction, but counts as a length of zero. Where the directions cancel each other, or two are opposite, as
    in a tensor of one entry with both signs, there is no such mean, and the vectors are averaged.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        weights: w, one per task, not negative; they are divided by their sum. By default all are equal.
        base: Weights of the base, ``(*shape)`` each, to average weights (as in mergekit) instead of task vectors.
        per: What has a direction: a ``row``, a ``tensor`` or the ``network``.
        tolerance: Length of the last step, in radians; mergekit: 1e-5.
        max_steps: Most steps; mergekit: 10. A step costs nothing that depends on the size of the network.
        products: What :func:`~lit_merge.functional.scopes.network_gram` said, where ``deltas`` is a piece of a network
            and ``per`` is that.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range, or the number of weights is not T.

    >>> axes = {"w": torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])}
    >>> karcher_mean(axes)["w"]
    tensor([1.1547, 1.1547, 1.1547])
    """
    check_scope(per, ("row", "tensor", "network"))
    _check("blend", deltas)
    if not tolerance > 0 or max_steps < 1:
        raise MergeError(f"karcher_mean: expected tolerance > 0 and max_steps >= 1, found {tolerance} and {max_steps}")
    coefficients = {}
    for name, g in gram(deltas, per, base, products).items():
        given = [1.0] * g.shape[-1] if weights is None else list(weights)
        check_finite("weights", given, least=0)
        if len(given) != g.shape[-1] or not sum(given) > 0:
            raise MergeError(f"weights: expected {g.shape[-1]} numbers, at least 0 and not all 0, found {given}")
        w = torch.tensor(given, dtype=g.dtype, device=g.device)
        coefficients[name] = _centre(g, w / w.sum(), tolerance, max_steps)
    return combine(deltas, coefficients, per, base)


def _centre(g: Tensor, w: Tensor, tolerance: float, max_steps: int) -> Tensor:
    """Coefficients ``(R, T)`` of the vectors in the mean, from Gram matrices ``(R, T, T)`` and weights ``(T,)``."""
    norms = g.diagonal(dim1=-2, dim2=-1).sqrt()
    there = (norms > 0) & (w > 0)
    inverse = torch.where(there, 1 / norms, 0)
    units = g * inverse[:, :, None] * inverse[:, None, :]  # cosines between the experts
    start = w * there
    size = (start[:, None] @ units @ start[:, :, None]).clamp(min=0).sqrt().flatten()
    lost = size <= 1e-7 * start.sum(-1)  # a square that cancels to 1e-16 leaves a root of 1e-8
    lost |= units.flatten(1).amin(-1) < -1 + 1e-12  # opposite: no arc leads from one to the other
    c = start / torch.where(lost, 1, size)[:, None]  # the mean direction, as a combination of the experts'
    share = start / torch.where(start.sum(-1) > 0, start.sum(-1), 1)[:, None]
    for _ in range(max_steps):
        cosine = (units @ c[:, :, None]).squeeze(-1).clamp(-1, 1)
        pull = share * torch.where(cosine.abs() < 1 - 1e-12, cosine.acos() / cosine.acos().sin(), (cosine > 0).to(c))
        tangent = pull - (pull * cosine).sum(-1, keepdim=True) * c
        step = (tangent[:, None] @ units @ tangent[:, :, None]).clamp(min=0).sqrt().reshape(-1, 1)
        if bool((step[~lost] < tolerance).all()):
            break
        c = torch.cos(step) * c + torch.where(step > 0, torch.sin(step) / step, 1) * tangent
        length = (c[:, None] @ units @ c[:, :, None]).clamp(min=0).sqrt().reshape(-1, 1)
        c = c / torch.where(length > 0, length, 1)
    return torch.where(lost[:, None], w, c * inverse * (w * norms).sum(-1, keepdim=True))


def _check(lengths: str, deltas: Mapping[str, Tensor]) -> None:
    if lengths not in get_args(Lengths):
        raise MergeError(f"lengths: expected blend or linear, found {lengths!r}")
    if any(len(delta) == 0 for delta in deltas.values()):
        raise MergeError("there are no experts to merge")
