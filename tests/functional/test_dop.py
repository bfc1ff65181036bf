from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.dop import DopProblem, dop, dop_step

SHAPES = [(9, 3), (3, 9), (5, 5)]


def pair(shape: tuple[int, int], layers: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layers, 2, *shape, generator=generator, dtype=torch.float64)


def published(first: Tensor, second: Tensor, steps: int, rate: float) -> Tensor:
    """One layer as it is written down: decompositions, autograd, MGDA on normalised gradients, moving average."""
    value = ((first + second) / 2).requires_grad_()
    optimizer = torch.optim.Adam([value], lr=rate)
    weights = torch.tensor([0.8, 0.2], dtype=torch.float64)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in (first, second)]
    for _ in range(steps):
        losses = [
            (s.diag() @ u.T @ (value - tau)).square().sum() + ((value - tau) @ vh.T @ s.diag()).square().sum()
            for tau, (u, s, vh) in zip((first, second), parts, strict=True)
        ]
        a, b = (torch.autograd.grad(loss, value, retain_graph=True)[0] / loss.detach() for loss in losses)
        grid = torch.linspace(0, 1, 100001, dtype=torch.float64)  # ‖γ a + (1 − γ) b‖², on a grid
        lengths = grid**2 * (a * a).sum() + 2 * grid * (1 - grid) * (a * b).sum() + (1 - grid) ** 2 * (b * b).sum()
        best = grid[lengths.argmin()]
        weights = 0.9 * weights + 0.1 * torch.stack([best, 1 - best])
        optimizer.zero_grad()
        (weights[0] * losses[0] + weights[1] * losses[1]).backward()
        optimizer.step()
    return value.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("space", ["uv", "u", "v"])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_closed_gradient_is_autograds(shape: tuple[int, int], space: Any, share: float) -> None:
    problem = DopProblem(pair(shape), space, share, stability=0.7, momentum=1.0)
    point = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    losses = problem.losses(point)
    (expected,) = torch.autograd.grad(losses.sum(), point)
    found, gradient = problem.gradient(point.detach())
    torch.testing.assert_close(found, losses.detach())
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stage_is_the_published_loop(shape: tuple[int, int]) -> None:
    deltas = pair(shape)
    merged, new = ({"a": part[0], "b": part[1]} for part in deltas.unbind(1))
    found = dop_step(merged, new, steps=12, rate=0.05, momentum=0.9)
    for name in merged:
        torch.testing.assert_close(found[name], published(merged[name], new[name], 12, 0.05), rtol=1e-4, atol=1e-4)


def test_at_an_optimum_only_the_other_loss_counts() -> None:
    deltas = pair((4, 3))
    problem = DopProblem(deltas, momentum=0.0)
    gradient = problem.gradient(deltas[:, 0].clone())[1]
    torch.testing.assert_close(problem.weights, torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64))
    assert not gradient.any()


def test_others_embeddings_and_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 2, 2, generator=generator)
    deltas = {"w": torch.randn(3, 4, 3, generator=generator), "token_embedding": table, "b": torch.eye(3)}
    merged = dop(deltas, steps=2)
    torch.testing.assert_close(merged["b"], torch.tensor([0.25, 0.25, 0.5]))  # the first halves with every stage
    torch.testing.assert_close(merged["token_embedding"], table[0] / 4 + table[1] / 4 + table[2] / 2)
    same = dop({"w": deltas["w"][:1].expand(2, -1, -1)}, steps=5)
    torch.testing.assert_close(same["w"], deltas["w"][0])
    for kwargs, message in (
        ({"space": "w"}, "space: expected uv, u or v, found 'w'"),
        ({"share": 0.0}, r"share: expected a share in \(0, 1\], found 0.0"),
        ({"steps": -1}, "steps: expected at least 0, found -1"),
    ):
        with pytest.raises(MergeError, match=message):
            dop(deltas, **kwargs)
