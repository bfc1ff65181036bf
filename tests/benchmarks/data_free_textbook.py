"""Data-free merges as one writes them down from the papers; what :mod:`data_free_merges` compares with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rule = Callable[[Tensors, Tensors, int, torch.dtype], Tensors]


def ties(deltas: Tensors, grams: Tensors, steps: int, dtype: torch.dtype) -> Tensors:
    with torch.no_grad():
        flat = torch.cat([delta.flatten(1) for delta in deltas.values()], 1).to(dtype)
        size = flat.shape[1]
        keep = round(0.2 * size)
        limits = torch.stack([row.abs().kthvalue(size - keep + 1).values for row in flat])
        flat[flat.abs() < limits[:, None]] = 0
        signs = flat.sum(0).sign()
        signs[signs == 0] = signs.sum().sign()
        flat = torch.where(flat.sign() == signs, flat, 0)
        merged = flat.sum(0) / (flat != 0).sum(0).clamp(min=1)
        parts = merged.split([delta[0].numel() for delta in deltas.values()])
        return {name: part.view(deltas[name].shape[1:]) for name, part in zip(deltas, parts, strict=True)}


def whiten(vectors: Tensor) -> Tensor:
    p, _, q = torch.linalg.svd(vectors, full_matrices=False)
    found: Tensor = p @ q
    return found


def tsv(matrices: Tensor) -> Tensor:
    k = min(matrices.shape[1:]) // len(matrices)
    us, values, vs = [], [], []
    for matrix in matrices:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        us.append(u[:, :k].clone())
        values.append(s[:k])
        vs.append(v[:k].clone())
    return whiten(torch.cat(us, 1)) * torch.cat(values) @ whiten(torch.cat(vs))


def iso_c(matrices: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    found: Tensor = s.mean() * u @ v
    return found


def iso_cts(matrices: Tensor) -> Tensor:
    limit = min(matrices.shape[1:])
    specific = round((limit - int(limit * 0.8)) / len(matrices))
    shared = limit - specific * len(matrices)
    u, s, v = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    u, s, v = u[:, :shared], s[:shared], v[:shared]
    lefts, values, rights = [], [], []
    for matrix in matrices:
        x, y, z = torch.linalg.svd(matrix - u @ (u.mT @ matrix), full_matrices=False)
        lefts.append(x[:, :specific].clone())
        values.append(y[:specific])
        rights.append(z[:specific].clone())
    mean = torch.cat([*values, s]).mean()
    return mean * whiten(torch.cat([*lefts, u], 1)) @ whiten(torch.cat([*rights, v]))


def by_matrix(
    rule: Callable[[Tensor], Tensor], deltas: Tensors, grams: Tensors, steps: int, dtype: torch.dtype
) -> Tensors:
    with torch.no_grad():
        return {n: rule(d.to(dtype)).float() if d.ndim == 3 else d.mean(0) for n, d in deltas.items()}


def doge(deltas: Tensors, grams: Tensors, steps: int, dtype: torch.dtype) -> Tensors:
    return {name: doge_layer(delta.to(dtype), steps) for name, delta in deltas.items()}


def doge_layer(delta: Tensor, steps: int) -> Tensor:
    weights = [0.07 / one.norm() for one in delta]
    rank = min(delta.shape[1:])
    own = [torch.linalg.svd(one, full_matrices=False)[0][:, : rank // len(delta)].clone() for one in delta]
    basis = torch.linalg.svd(torch.cat(own, 1), full_matrices=False)[0][:, : rank // 6]
    projector = basis @ basis.mT
    offset = torch.zeros_like(delta[0], requires_grad=True)
    adam = torch.optim.Adam([offset], lr=1e-4)
    for _ in range(steps):
        adam.zero_grad()
        merged = torch.stack([w * (one + offset) for w, one in zip(weights, delta, strict=True)]).sum(0)
        torch.stack([((one * (one - merged)).sum(1) ** 2).sum() for one in delta]).sum().backward()
        assert offset.grad is not None
        offset.grad -= projector @ offset.grad
        adam.step()
    return offset.detach()


def wudi(deltas: Tensors, grams: Tensors, steps: int, dtype: torch.dtype) -> Tensors:
    return {name: wudi_layer(delta.to(dtype), steps) for name, delta in deltas.items()}


def wudi_layer(delta: Tensor, steps: int) -> Tensor:
    merged = delta.sum(0).requires_grad_()
    adam = torch.optim.Adam([merged], lr=1e-5)
    lengths = delta.square().sum((1, 2))
    for _ in range(steps):
        adam.zero_grad()
        terms = [((merged - one) @ one.mT).square().sum() / x for one, x in zip(delta, lengths, strict=True)]
        torch.stack(terms).sum().backward()
        adam.step()
    return merged.detach()


def regmean(deltas: Tensors, grams: Tensors, steps: int, dtype: torch.dtype) -> Tensors:
    with torch.no_grad():
        return {name: regmean_layer(delta, grams[name], dtype) for name, delta in deltas.items()}


def regmean_layer(delta: Tensor, grams: Tensor, dtype: torch.dtype) -> Tensor:
    left = torch.zeros_like(grams[0], dtype=dtype)
    right = torch.zeros_like(delta[0], dtype=dtype).mT.contiguous()
    for gram, one in zip(grams, delta, strict=True):
        shrunk = 0.95 * gram.to(dtype) + 0.05 * gram.diagonal().diag()
        left += shrunk
        right += shrunk @ one.to(dtype).mT
    solved: Tensor = torch.linalg.inv(left) @ right
    return solved.mT


RULES: dict[str, Rule] = {
    "ties": ties,
    "tsv": partial(by_matrix, tsv),
    "iso-c": partial(by_matrix, iso_c),
    "iso-cts": partial(by_matrix, iso_cts),
    "doge": doge,
    "wudi": wudi,
    "regmean": regmean,
}
