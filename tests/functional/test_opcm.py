from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.opcm import network_norm, opcm, opcm_projection, opcm_rescale, opcm_step

SHAPES = {"h.0.tall": (9, 5), "h.0.wide": (4, 7), "h.0.square": (6, 6), "h.0.bias": (6,), "embedding": (8, 4)}
Vector = dict[str, Tensor]


def experts(number: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Vector]:
    """Random task vectors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(number)
    ]


def stacked(vectors: list[Vector]) -> Vector:
    return {name: torch.stack([vector[name] for vector in vectors]) for name in vectors[0]}


def published(base: Vector, taus: list[Vector], alpha: float, linear: set[str]) -> list[Vector]:
    """The recursive definition: models after each stage, rescaled each time, with full bases."""
    model = {name: base[name] + taus[0][name] for name in base}
    models, factor = [model], 1.0
    norms = [torch.cat([value.flatten() for value in tau.values()]).norm() for tau in taus]
    for number in range(2, len(taus) + 1):
        tau, total = taus[number - 1], {}
        for name in base:
            merged = model[name] - base[name]
            if name in linear:
                u, s, vh = torch.linalg.svd(merged, full_matrices=True)
                shares = (s / s.sum()).cumsum(0).tolist()
                rank = next(i for i, value in enumerate(shares) if value > alpha)
                inside = u.T @ tau[name] @ vh.T
                for i in range(min(inside.shape)):
                    inside[i, i] = 0
                inside[:rank, :rank] = 0
                total[name] = factor * merged + u @ inside @ vh
            else:
                total[name] = factor * merged + tau[name]
        mean = torch.stack(norms[:number]).mean()
        length = torch.cat([value.flatten() for value in total.values()]).norm()
        model = {name: base[name] + total[name] * mean / length for name in base}
        factor = float(length / mean)
        models.append(model)
    return models


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_the_closed_form_is_the_recursive_definition_in_every_stage(alpha: float) -> None:
    taus, (base,) = experts(6), experts(1, seed=9)
    models = published(base, taus, alpha, {"h.0.tall", "h.0.wide", "h.0.square"})
    for number, model in enumerate(models, start=1):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            merged = opcm(stacked([{n: v.to(dtype) for n, v in tau.items()} for tau in taus[:number]]), alpha)
            for name, value in model.items():
                torch.testing.assert_close(merged[name].double(), value - base[name], rtol=tolerance, atol=tolerance)


def test_a_rank_deficient_merge_and_every_route() -> None:
    generator = torch.Generator().manual_seed(3)
    merged = torch.randn(12, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    tau = torch.randn(12, 8, generator=generator)
    u, _, vh = torch.linalg.svd(merged.double())
    inside = u.T @ tau.double() @ vh.T
    for alpha, rank in ((0.0, 0), (1.0, 2)):  # α = 1: all that M spans, and no direction that it does not have
        expected = inside.clone()
        expected[0, 0] = expected[1, 1] = 0
        expected[:rank, :rank] = 0
        options: list[dict[str, Any]] = [{}, {"method": "svd"}]
        options += [{"diagonal": False}, {"diagonal": False, "method": "randomized"}] if rank else []
        for kwargs in options:
            cleaned, facts = opcm_projection(1e-4 * merged, tau, alpha, **kwargs)  # a factor of M changes nothing
            torch.testing.assert_close(cleaned.double(), u @ expected @ vh, rtol=1e-5, atol=1e-5)
            assert facts.rank == rank or alpha == 1
            assert facts.removed == pytest.approx(float(inside.square().sum() - expected.square().sum()), rel=1e-4)
            assert facts.total == pytest.approx(float(tau.square().sum()), rel=1e-5)


def test_orthogonal_experts_are_summed_and_rescaled() -> None:
    """Orthogonal: τ_iᵀ τ_j = 0 for every matrix. One side is enough for Uᵀ τ V to be zero where M has directions."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(12, dtype=torch.float64).reshape(4, 3, 12)
    taus = [part.T @ torch.randn(3, 7, generator=generator, dtype=torch.float64) for part in rows]
    deltas = {"w": torch.stack([tau / tau.norm() for tau in taus])}
    total = deltas["w"].sum(0)
    torch.testing.assert_close(opcm(deltas)["w"], total / total.norm())
    state = {"w": torch.zeros(12, 7, dtype=torch.float64)}
    for number, tau in enumerate(deltas["w"], start=1):
        state, facts = opcm_step(state, {"w": tau})
        assert facts.energy == pytest.approx(0, abs=1e-12)
        assert opcm_rescale(state, [1.0] * number)[1] == pytest.approx(number**0.5)


def test_identical_matrices_are_projected_out_and_one_expert_comes_back() -> None:
    (tau,) = experts(1)
    matrices = {name: tau[name] for name in ("h.0.tall", "h.0.wide", "h.0.square")}
    assert opcm_step(matrices, matrices)[1].energy == pytest.approx(1)
    for vectors in ([matrices] * 3, [tau]):
        merged = opcm(stacked(vectors))
        assert all(torch.allclose(merged[name], value) for name, value in vectors[0].items())


def test_what_is_projected_and_how_long_the_merge_is() -> None:
    first, second = experts(2)
    total, facts = opcm_step(first, second)
    assert set(facts.ranks) == {"h.0.tall", "h.0.wide", "h.0.square"}
    for name in ("embedding", "h.0.bias"):
        torch.testing.assert_close(total[name], first[name] + second[name])
    everything = MatrixPolicy("sum")
    assert "embedding" in opcm_step(first, second, policy=everything)[1].ranks
    assert network_norm(opcm(stacked([first, second]))) == pytest.approx(
        (network_norm(first) + network_norm(second)) / 2
    )
    kernel = {"conv": torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))}
    assert opcm_step(kernel, kernel)[1].energy == 0
    assert opcm_step(kernel, kernel, policy=MatrixPolicy("sum", True))[1].energy == pytest.approx(1)
    zeros = {name: torch.zeros_like(value) for name, value in first.items()}
    again = opcm(stacked([zeros, zeros]))
    assert not any(value.any() for value in again.values())


def test_bad_input() -> None:
    (tau,) = experts(1)
    matrix = tau["h.0.tall"]
    for call, message in (
        (lambda: opcm_projection(matrix, matrix, 1.5), r"alpha: expected a share in \[0, 1\], found 1.5"),
        (lambda: opcm_projection(matrix, matrix.T), r"two matrices of one shape, found \(9, 5\) and \(5, 9\)"),
        (lambda: opcm_projection(matrix, matrix, method="randomized"), "give diagonal: false"),
        (lambda: opcm_step(tau, {"w": matrix}), "only one of them has embedding"),
        (lambda: opcm_step(tau, tau, policy=MatrixPolicy("mean")), "others: expected sum"),
        (lambda: opcm_rescale(tau, []), "norms: expected one for each expert"),
    ):
        with pytest.raises(MergeError, match=message):
            call()
