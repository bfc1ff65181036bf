from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_merge.functional.decompositions import polar, truncated_svd
from lit_merge.functional.grams import eigenvectors, gram, outer, times


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(rows: int, columns: int, strong: float) -> Tensor:
    """Eight strong directions plus noise, like a task vector."""
    return strong * random(rows, 8, seed=1) @ random(8, columns, seed=2) + random(rows, columns, seed=3)


@pytest.mark.parametrize("size", [5, 64, 130, 301])
def test_symmetric_products_by_half(size: int) -> None:
    tall, weights = random(600, size), torch.rand(size)
    torch.testing.assert_close(gram(tall), tall.double().mT @ tall.double())
    torch.testing.assert_close(outer(tall, weights), tall * weights @ tall.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(times(tall.bfloat16(), tall.mT[:, :3].double(), torch.float32),
                               (tall.bfloat16().double() @ tall.mT[:, :3].double()).float())  # fmt: skip


@pytest.mark.parametrize(("strong", "dtype"), [(20.0, torch.float32), (0.0, torch.float32)])
def test_strong_directions_do_not_spoil_weak_ones(strong: float, dtype: torch.dtype) -> None:
    """What float32 alone gets wrong by eps · λ_1 / λ, here 0.01 and more."""
    given = noisy(400, 300, strong)
    values, vectors = eigenvectors(gram(given), 40)
    assert vectors.dtype == dtype
    exact = torch.linalg.svd(given.double()).Vh[:40].mT
    found = vectors.double() @ vectors.double().mT
    assert float(torch.linalg.matrix_norm(found - exact @ exact.mT)) < 1e-4
    torch.testing.assert_close(values.flip(0), torch.linalg.svdvals(given.double())[:40].square(), rtol=1e-5, atol=0)
    assert bool((values[1:] >= values[:-1]).all())


@pytest.mark.parametrize("spectrum", ["steep", "far apart", "low rank", "zero"])
def test_float32_is_left_alone_where_it_is_not_good_enough(spectrum: str) -> None:
    scale = torch.logspace(0, -6, 300, dtype=torch.float64)
    given = {
        "steep": torch.linalg.qr(random(300, 300).double()).Q * scale,
        "far apart": torch.linalg.qr(random(300, 300).double()).Q * torch.ones(300).index_fill(0, torch.arange(8), 1e5),
        "low rank": noisy(300, 300, 1.0).double() * (torch.arange(300) < 20),
        "zero": torch.zeros(300, 300).double(),
    }
    values, vectors = eigenvectors(gram(given[spectrum]), 200)
    assert vectors.dtype == torch.float64
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(200, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.isfinite(values).all()


def test_large_matrices_come_out_as_by_lapack_in_float64() -> None:
    given = noisy(640, 300, 5.0)
    u, s, vh = torch.linalg.svd(given.double(), full_matrices=False)
    torch.testing.assert_close(polar(given).double(), u @ vh, rtol=0, atol=2e-5)
    best = (u[:, :50] * s[:50]) @ vh[:50]
    for matrix, expected in ((given, best), (given.mT, best.mT)):
        found = truncated_svd(matrix, 50).dense().double()
        assert float((found - expected).norm() / expected.norm()) < 1e-5
