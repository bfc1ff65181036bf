from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.decomposition_cache import DecompositionCache
from lit_merge.functional import decompositions
from lit_merge.functional.decompositions import (
    PolarMethod,
    SvdMethod,
    left_basis,
    polar,
    randomized_error_bound,
    truncated_svd,
)


def matrix(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, len(spectrum), generator=generator, dtype=torch.float64) for size in (rows, columns)]
    u, v = (torch.linalg.qr(part).Q for part in draw)
    made: Tensor = (u * spectrum) @ v.mT
    return made


def task_matrix(rows: int = 60, columns: int = 40, seed: int = 0, noise: float = 0.05) -> Tensor:
    """Low rank plus noise: the cut of a truncation lies in a flat part of the spectrum."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    return low + noise * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 30)])
def test_the_gram_route_equals_the_svd(shape: tuple[int, int]) -> None:
    given = task_matrix(*shape)
    exact = truncated_svd(given.double(), 10, "svd")
    for method, atol in (("gram", 1e-6), ("svd", 1e-4)):  # in float32 LAPACK is the less accurate of the two
        found = truncated_svd(given, 10, method)  # type: ignore[arg-type]
        assert [part.shape for part in found] == [(shape[0], 10), (10,), (10, shape[1])]
        torch.testing.assert_close(found.s.double(), exact.s, rtol=5e-6, atol=0)
        torch.testing.assert_close(found.dense().double(), exact.dense(), rtol=0, atol=atol * float(exact.s[0]))
        torch.testing.assert_close(found.u.mT @ found.u, torch.eye(10), rtol=0, atol=1e-5)


def test_the_gram_route_resolves_what_it_says() -> None:
    spectrum = torch.logspace(0, -6, 12, dtype=torch.float64)
    found = truncated_svd(matrix(30, 20, spectrum), 12, "gram", tolerance=1e-7)
    torch.testing.assert_close(found.s, spectrum, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", ["svd", "gram", "randomized"])
def test_directions_that_are_not_there_are_zero(method: SvdMethod) -> None:
    low = matrix(20, 16, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    stack = torch.stack([low, torch.zeros_like(low)])
    found = truncated_svd(stack, 8, method, tolerance=1e-5)
    assert (found.s > 0).sum(1).tolist() == [3, 0]
    assert not found.u[0, :, 3:].any()
    assert not found.vh[1].any()
    torch.testing.assert_close(found.dense(), stack, rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_the_error_of_the_random_range_finder_is_within_its_bound(decay: float) -> None:
    spectrum = torch.arange(1, 41, dtype=torch.float64).pow(-decay)
    given, best = matrix(60, 40, spectrum), spectrum[8]
    for oversampling, powers in ((4, 0), (8, 1), (8, 4)):
        bound = randomized_error_bound(spectrum, 8, oversampling, powers)
        for seed in range(3):
            found = truncated_svd(given, 8, "randomized", oversampling=oversampling, power_iterations=powers, seed=seed)
            error = torch.linalg.matrix_norm(given - found.dense(), 2)
            assert best * (1 - 1e-9) <= error <= bound
    assert error < 1.02 * best
    assert randomized_error_bound(spectrum, 8, 8, 4) < 3 * best


def test_the_seed_alone_decides_about_the_random_range_finder() -> None:
    first = truncated_svd(task_matrix(), 5, "randomized", seed=1, power_iterations=0)
    torch.rand(3)
    assert torch.equal(first.u, truncated_svd(task_matrix(), 5, "randomized", seed=1, power_iterations=0).u)
    assert not torch.equal(first.u, truncated_svd(task_matrix(), 5, "randomized", seed=2, power_iterations=0).u)


@pytest.mark.parametrize("method", ["auto", "svd", "gram", "newton-schulz"])
@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (24, 24)])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_polar_factors(method: PolarMethod, shape: tuple[int, int], ridge: float) -> None:
    given = matrix(*shape, torch.logspace(0, -3, 20, dtype=torch.float64))
    u, s, vh = torch.linalg.svd(given, full_matrices=False)
    u, s, vh = u[:, :20], s[:20], vh[:20]  # the square one has rank 20
    expected = (u * (s / (s * s + ridge).sqrt())) @ vh
    found = polar(given.float(), method, ridge=ridge, tolerance=1e-5)
    worst = 5e-4 if method == "svd" else 1e-5  # in float32 LAPACK is off by about 1e-7 · κ, and κ is 1000
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=worst)


@pytest.mark.parametrize("method", ["gram", "newton-schulz"])
def test_polar_factors_of_badly_conditioned_matrices(method: PolarMethod) -> None:
    given = matrix(40, 30, torch.logspace(0, -5, 30, dtype=torch.float64)).float()
    u, _, vh = torch.linalg.svd(given.double(), full_matrices=False)
    torch.testing.assert_close(polar(given, method, tolerance=1e-7).double(), u @ vh, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_one_batch_is_what_single_matrices_are(shape: tuple[int, int]) -> None:
    """The route of accelerators, forced here."""
    stack = torch.stack([task_matrix(*shape), torch.zeros(shape), task_matrix(*shape, seed=1)])
    batched, single = decompositions._by_grams(stack, 9, 1e-6), truncated_svd(stack, 9)
    torch.testing.assert_close(batched.s, single.s)
    torch.testing.assert_close(batched.dense(), single.dense(), rtol=0, atol=1e-5)


def test_newton_schulz_says_nothing_but_the_truth_about_missing_directions() -> None:
    twice = task_matrix(30, 8).repeat(1, 2)  # rank 8 of 16: the iteration cannot converge
    found = polar(twice, "newton-schulz", tolerance=1e-5)
    torch.testing.assert_close(found, polar(twice, "svd", tolerance=1e-5), rtol=0, atol=1e-4)
    assert not polar(torch.zeros(4, 3), "newton-schulz").any()


def test_left_basis_is_that_of_the_concatenation() -> None:
    tasks = torch.stack([task_matrix(12, 20, seed, noise=0.0) for seed in range(2)])  # rank 4 each
    for given in (tasks, tasks.double()):
        u, s = left_basis(given, tolerance=1e-5)
        joined = torch.cat(list(given), dim=1)
        assert u.shape == (12, 8)
        torch.testing.assert_close(s, torch.linalg.svdvals(joined)[:8], rtol=1e-4, atol=0)
        torch.testing.assert_close(u @ (u.mT @ joined), joined, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_svd(torch.ones(3, 2), 3), r"rank: expected 1 to 2 for \(3, 2\) matrices, found 3"),
        (lambda: truncated_svd(torch.ones(3)), r"expected matrices \(…, m, n\), found shape \(3,\)"),
        (lambda: truncated_svd(torch.ones(3, 2), 1, "qr"), "method: expected auto, svd, gram, randomized, found 'qr'"),  # type: ignore[arg-type]
        (lambda: truncated_svd(torch.ones(3, 2), tolerance=1.0), r"tolerance: expected a share in \[0, 1\), found 1.0"),
        (lambda: truncated_svd(torch.ones(3, 2), 1, "randomized", oversampling=-1), "oversampling, power_iterations"),
        (lambda: polar(torch.ones(3, 2), ridge=-1.0), "ridge: expected a number ≥ 0, found -1.0"),
        (lambda: polar(torch.ones(2, 3, 2)), r"polar: expected a matrix \(m, n\), found shape \(2, 3, 2\)"),
        (lambda: randomized_error_bound(torch.ones(3), 1, 1), "oversampling: the bound needs at least 2, found 1"),
    ],
)
def test_bad_values_are_named(call: object, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        call()  # type: ignore[operator]


class TestCache:
    def test_in_memory(self) -> None:
        cache = DecompositionCache()
        first, again = cache(task_matrix(), 4), cache(task_matrix().clone(), 4)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        cache(task_matrix(), 5)
        cache(task_matrix(seed=1), 4)
        assert (cache.hits, cache.misses) == (1, 3)
        cache.clear()
        cache(task_matrix(), 4)
        assert cache.misses == 4

    def test_on_disk(self, tmp_path: Path) -> None:
        first = DecompositionCache(tmp_path / "cache")(task_matrix(), 4)
        cache = DecompositionCache(tmp_path / "cache")
        assert all(torch.equal(a, b) for a, b in zip(first, cache(task_matrix(), 4), strict=True))
        assert (cache.hits, cache.misses) == (1, 0)
        other = DecompositionCache(tmp_path / "cache", method="svd")
        other(task_matrix(), 4)
        assert other.misses == 1, "other settings, other factors"
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_a_damaged_file_is_made_again(self, tmp_path: Path) -> None:
        cache = DecompositionCache(tmp_path)
        first = cache(task_matrix(), 4)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.warns(UserWarning, match="is damaged .* and is made again"):
            again = cache(task_matrix(), 4)
        assert torch.equal(first.u, again.u)
        assert cache(task_matrix(), 4).s.shape == (4,)
