"""What a statistic of task vectors is taken over: a row, a tensor or the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("Scope", "as_rows", "check_scope", "combine", "flat", "gram", "network_gram", "scopes", "share", "wide")

Scope = Literal["row", "tensor", "network"]
_PIECE = 2**22  # entries per task that are widened at once, so that no second copy of a large tensor is made


def check_scope(per: str, allowed: Sequence[str]) -> None:
    """Refuse a scope that a rule does not have.

    Raises:
        MergeError: ``per`` is not in ``allowed``.
    """
    if per not in allowed:
        raise MergeError(f"per: expected {' or '.join(allowed)}, found {per!r}")


def share(name: str, value: float, *, zero: bool = False) -> float:
    """Return a share in (0, 1], or in [0, 1] with ``zero``.

    Raises:
        MergeError: It is outside.
    """
    if not (0 <= value <= 1 if zero else 0 < value <= 1):
        raise MergeError(f"{name}: expected a share in {'[' if zero else '('}0, 1], found {value}")
    return value


def scopes(names: Iterable[str], per: str) -> list[list[str]]:
    """Return the tensors that share a statistic: each for itself, or for ``network`` all of them, sorted by name.

    >>> scopes(["b", "a"], "tensor"), scopes(["b", "a"], "network")
    ([['b'], ['a']], [['a', 'b']])
    """
    return [sorted(names)] if per == "network" else [[name] for name in names]


def wide(value: Tensor) -> Tensor:
    """Return the tensor in at least float32, so that half-precision storage does not round what is computed."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def flat(deltas: Mapping[str, Tensor], names: Iterable[str], task: int) -> Tensor:
    """Return one task's entries of some tensors as one vector, ``(P,)``."""
    return torch.cat([wide(deltas[name][task]).reshape(-1) for name in names])


def as_rows(delta: Tensor, per: str) -> Tensor:
    """View ``(T, *shape)`` as ``(T, R, n)``: R = 1, or with ``row`` one row per first index of a matrix or filter bank.

    Vectors and scalars are one row; what is taken over one entry alone would say nothing.

    >>> as_rows(torch.zeros(2, 3, 4, 5), "row").shape, as_rows(torch.zeros(2, 3), "row").shape
    (torch.Size([2, 3, 20]), torch.Size([2, 1, 3]))
    """
    rows = delta.shape[1] if per == "row" and delta.ndim > 2 else 1
    return delta.reshape(len(delta), rows, delta[0].numel() // max(rows, 1))


def gram(
    deltas: Mapping[str, Tensor],
    per: Scope = "tensor",
    base: Mapping[str, Tensor] | None = None,
    network: Tensor | None = None,
) -> dict[str, Tensor]:
    """Inner products ⟨τ_s, τ_t⟩ of the task vectors; with a base, those of the weights θ0 + τ_t.

    Summed in float64, as angles near zero are lost in float32, piece by piece.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        per: Over what: a ``row`` (see :func:`as_rows`), a ``tensor`` or the ``network``.
        base: Weights of the base, ``(*shape)`` each.
        network: What :func:`network_gram` said, where ``deltas`` is a piece of a network and this is over all of it.

    Returns:
        Gram matrices, ``(R, T, T)`` each, float64; with ``network`` the same for every name.

    >>> gram({"w": torch.tensor([[3.0, 4.0], [0.0, 1.0]])})["w"]
    tensor([[[25.,  4.],
             [ 4.,  1.]]], dtype=torch.float64)
    """
    if per == "network":
        whole = network_gram([(deltas, base)]) if network is None else network
        return {name: whole.to(delta.device) for name, delta in deltas.items()}
    return {name: _gram(delta, per, None if base is None else base[name]) for name, delta in deltas.items()}


def network_gram(pieces: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]) -> Tensor:
    """Inner products of the task vectors of a network that is read piece by piece; :func:`gram`'s over the network.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time, or of parts of one whose size is a
            multiple of 2²² entries, and the weights of the base if those of the experts are meant; read once.

    Returns:
        Gram matrix, ``(1, T, T)``, float64; empty if there are no task vectors.

    >>> network_gram([({"w": torch.tensor([[3.0], [0.0]])}, None), ({"b": torch.tensor([[4.0], [1.0]])}, None)])
    tensor([[[25.,  4.],
             [ 4.,  1.]]], dtype=torch.float64)
    """
    found: dict[str, Tensor] = {}
    for deltas, base in pieces:
        for name in sorted(deltas):
            found[name] = _gram(deltas[name], "network", None if base is None else base[name], found.get(name))
        del deltas, base  # before the next ones are read
    if not found:
        return torch.zeros(1, 0, 0, dtype=torch.float64)
    device = next(iter(found.values())).device
    return torch.stack([found[name].to(device) for name in sorted(found)]).sum(0)


def _gram(delta: Tensor, per: str, base: Tensor | None, total: Tensor | None = None) -> Tensor:
    """Inner products of one tensor, ``(R, T, T)``, added to those of the parts of it that came before."""
    rows = as_rows(delta, per)
    anchor = None if base is None else as_rows(base[None], per)
    tasks, number, size = rows.shape
    double = torch.float32 if rows.device.type == "mps" else torch.float64
    if total is None:
        total = torch.zeros(number, tasks, tasks, dtype=double, device=rows.device)
    across, along = max(1, _PIECE // max(size, 1)), min(max(size, 1), _PIECE)
    for top in range(0, number, across):
        for left in range(0, size, along):
            piece = rows[:, top : top + across, left : left + along].to(double)
            if anchor is not None:
                piece = piece + anchor[:, top : top + across, left : left + along].to(double)
            total[top : top + across] += torch.einsum("srn,trn->rst", piece, piece)
    return total


def combine(
    deltas: Mapping[str, Tensor],
    coefficients: Mapping[str, Tensor],
    per: Scope = "tensor",
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return Σ_t c_t τ_t; with a base Σ_t c_t (θ0 + τ_t) − θ0.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        coefficients: c by name, ``(R, T)`` each, with R as in :func:`gram`.
        per: What a row of coefficients is for.
        base: Weights of the base, ``(*shape)`` each.

    Returns:
        Merged task vector, ``(*shape)`` each, at least float32.

    >>> combine({"w": torch.eye(2)}, {"w": torch.tensor([[0.5, 2.0]])})
    {'w': tensor([0.5000, 2.0000])}
    """
    merged = {}
    for name, delta in deltas.items():
        rows, weights = as_rows(delta, per), coefficients[name]
        dtype = torch.promote_types(delta.dtype, torch.float32)
        total = torch.zeros(rows.shape[1:], dtype=dtype, device=delta.device)
        for task, row in enumerate(rows):
            total += weights[:, task, None].to(total) * row
        if base is not None:
            total += (weights.sum(-1, keepdim=True) - 1).to(total) * as_rows(base[name][None], per)[0]
        merged[name] = total.reshape(delta.shape[1:])
    return merged
