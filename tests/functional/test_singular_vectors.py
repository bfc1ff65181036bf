from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.decompositions import Factors
from lit_merge.functional.isotropic import common_rank, iso_c, iso_cts
from lit_merge.functional.knots import align, knots
from lit_merge.functional.matrices import MatrixPolicy, Others
from lit_merge.functional.sums import mean_merge, sum_merge
from lit_merge.functional.ties import disjoint_mean_merge, ties
from lit_merge.functional.tsv import (
    TsvFacts,
    orthogonalize,
    singular_task_interference,
    task_overlap,
    task_singular_vectors,
    tsv_merge,
)
from lit_merge.functional.tsv_compress import compressed_bytes, tsv_compress, tsv_restore

Rule = Callable[..., dict[str, Tensor]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal_tasks(tasks: int = 4, rows: int = 24, columns: int = 16, rank: int = 4) -> Tensor:
    """Task matrices whose singular vectors are orthogonal across tasks; rank = min(m, n) / T."""
    left, right = (torch.linalg.qr(random(n, tasks * rank, seed=n)).Q for n in (rows, columns))
    values = torch.arange(1.0, tasks * rank + 1)
    return torch.stack([(left * values)[:, t::tasks] @ right[:, t::tasks].mT for t in range(tasks)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


class TestTsv:
    def test_orthogonal_tasks_give_their_sum(self) -> None:
        tasks = orthogonal_tasks()
        assert relative(tsv_merge({"w": tasks})["w"], tasks.sum(0)) < 1e-5
        assert singular_task_interference(task_singular_vectors(tasks)) < 1e-2  # of about 2000 for random tasks

    def test_nothing_interferes_after_orthogonalisation(self) -> None:
        factors = task_singular_vectors(random(4, 24, 16))
        assert singular_task_interference(factors) > 100
        assert singular_task_interference(orthogonalize(factors)) < 1e-3

    def test_one_task_is_itself(self) -> None:
        one = random(1, 24, 16)
        assert relative(tsv_merge({"w": one})["w"], one[0]) < 1e-5

    def test_identical_tasks_are_one_of_them_without_a_warning(self) -> None:
        low = random(24, 2, seed=1) @ random(2, 16, seed=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert relative(tsv_merge({"w": low.expand(4, 24, 16)})["w"], low) < 1e-4

    def test_similar_tasks_are_warned_about_and_a_ridge_helps(self) -> None:
        common = random(64, 8, seed=1) @ random(8, 64, seed=2)
        tasks = torch.stack([common + 0.02 * random(64, 64, seed=t) for t in range(3, 11)])
        with pytest.warns(UserWarning, match=r"nearly coincide in 1 of 1 tensors \(most in w, overlap 1.00 of 1"):
            blown_up = tsv_merge({"w": tasks})["w"]
        assert cosine(blown_up, common) < 0.45  # 1/√8 = 0.354
        assert blown_up.norm() > 2.5 * common.norm()  # √8 = 2.83
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calm = tsv_merge({"w": tasks}, ridge=0.1)["w"]
        assert cosine(calm, common) > 0.98
        assert 0.9 < calm.norm() / common.norm() < 1.05

    def test_overlap_is_chance_corrected(self) -> None:
        independent = task_singular_vectors(random(2, 40, 40))
        assert abs(task_overlap(independent, 2)) < 0.1
        assert task_overlap(task_singular_vectors(orthogonal_tasks()), 4) < 0

    def test_updates_of_low_rank_have_no_arbitrary_directions(self) -> None:
        """A plain decomposition fills k = 12 columns of each task with what LAPACK finds in the null space."""
        tasks = torch.stack([random(24, 2, seed=t) @ random(2, 24, seed=9 + t) for t in range(2)])
        exact = task_singular_vectors(tasks.double(), 2)
        assert relative(tsv_merge({"w": tasks})["w"].double(), orthogonalize(exact).dense()) < 1e-5

    def test_facts_and_order_of_names(self) -> None:
        given = {"a": random(3, 9, 6), "b": random(3, 6), "c": random(3, 6, 9)}
        facts: dict[str, TsvFacts] = {}
        first = tsv_merge(given, 0.5, observe=facts.__setitem__)
        again = tsv_merge(dict(reversed(given.items())), 0.5)
        assert all(torch.equal(first[name], again[name]) for name in given)
        assert {name: fact.rank for name, fact in facts.items()} == {"a": 2, "c": 2}
        assert facts["a"].interference == pytest.approx(singular_task_interference(task_singular_vectors(given["a"])))
        torch.testing.assert_close(first["b"], 0.5 * given["b"].mean(0))

    @pytest.mark.parametrize("fraction", [0.0, 1.5])
    def test_a_wrong_fraction_is_named(self, fraction: float) -> None:
        with pytest.raises(MergeError, match=rf"fraction: expected a share in \(0, 1\], found {fraction}"):
            tsv_merge({"w": random(2, 4, 4)}, fraction=fraction)


class TestCompress:
    def test_restores_the_best_approximation(self) -> None:
        given = {"w": random(4, 24, 16), "b": random(4, 24), "k": random(4, 8, 2, 3, 3)}
        compressed = tsv_compress(given, policy=MatrixPolicy(convolutions=True))
        shapes = {name: value.shape[1:] for name, value in given.items()}
        for task in range(4):
            restored = tsv_restore(compressed, shapes, task)
            torch.testing.assert_close(restored["b"], given["b"][task])
            for name, k in (("w", 4), ("k", 2)):
                flat, back = given[name][task].flatten(1), restored[name].flatten(1)
                best = torch.linalg.svdvals(flat)[k:].norm()
                torch.testing.assert_close((flat - back).norm(), best)
        assert compressed_bytes(compressed) == 4 * 4 * (4 * (24 + 16 + 1) + 24 + 2 * (8 + 18 + 1))

    def test_half_precision_is_multiplied_in_full(self) -> None:
        compressed = tsv_compress({"w": random(2, 24, 16)}, fraction=0.2, dtype=torch.bfloat16)
        factors = compressed["w"]
        assert isinstance(factors, Factors)
        u, s, vh = (part[1].float() for part in factors)
        found = tsv_restore(compressed, {"w": torch.Size([24, 16])}, 1)["w"]
        torch.testing.assert_close(found, (u * s) @ vh)

    def test_never_takes_more_than_the_matrices(self) -> None:
        pair = {"w": random(2, 10, 10)}
        assert compressed_bytes(tsv_compress(pair)) == pair["w"].nbytes  # 5 · 21 numbers instead of 100
        assert compressed_bytes(tsv_compress(pair, fraction=0.3, dtype=torch.bfloat16)) == 2 * 2 * 3 * 21


class TestIsotropic:
    def test_the_spectrum_is_flat(self) -> None:
        tasks = random(3, 20, 12)
        u, s, vh = torch.linalg.svd(tasks.sum(0).double(), full_matrices=False)
        assert relative(iso_c({"w": tasks})["w"].double(), s.mean() * u @ vh) < 1e-5
        values = torch.linalg.svdvals(iso_cts({"w": tasks})["w"])
        torch.testing.assert_close(values, values.mean().expand(12), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
    def test_iso_cts_equals_the_algorithm_of_the_paper(self, common: float) -> None:
        tasks = random(3, 20, 12).double()
        shared, specific = common_rank(20, 12, 3, common)
        assert shared + 3 * specific == 12
        u, s, vh = torch.linalg.svd(tasks.sum(0), full_matrices=False)
        parts = [(u[:, :shared], s[:shared], vh[:shared])]
        for task in tasks:
            rest = task - u[:, :shared] @ u[:, :shared].mT @ task
            parts.append(tuple(torch.linalg.svd(rest, full_matrices=False)))
            a, b, c = parts[-1]
            parts[-1] = (a[:, :specific], b[:specific], c[:specific])
        left, middle, right = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), torch.cat(
            [p[2] for p in parts])  # fmt: skip
        (p, _, q), (a, _, b) = (torch.linalg.svd(x, full_matrices=False) for x in (left, right))
        expected = (p @ q) @ (a @ b) * middle.mean()
        assert relative(iso_cts({"w": tasks.float()}, common=common)["w"].double(), expected) < 1e-4
        if common == 1:
            torch.testing.assert_close(iso_cts({"w": tasks}, common=common)["w"], iso_c({"w": tasks})["w"])

    @pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
    def test_iso_cts_does_not_take_rounding_for_directions(self, shape: tuple[int, int]) -> None:
        low = torch.stack([random(shape[0], 2, seed=t) @ random(2, shape[1], seed=9 + t) for t in range(4)])
        merged = iso_cts({"w": low})["w"]  # what the common subspace leaves of a task is rounding
        s = torch.linalg.svdvals(merged)
        torch.testing.assert_close(s, s[0] * (torch.arange(20) < 8), rtol=1e-4, atol=1e-4 * float(s[0]))
        torch.testing.assert_close(merged, iso_c({"w": low})["w"], rtol=1e-3, atol=1e-4)

    def test_more_tasks_than_directions(self) -> None:
        assert common_rank(4, 3, 5, 0.0) == (3, 0)
        assert torch.isfinite(iso_cts({"w": random(5, 4, 3)}, common=0.0)["w"]).all()

    def test_nothing_gives_nothing(self) -> None:
        zero = {"w": torch.zeros(3, 4, 5)}
        for rule in (iso_c, iso_cts, tsv_merge, knots):
            assert not rule(zero)["w"].any()


class TestKnots:
    def test_linear_rules_do_not_notice_the_basis(self) -> None:
        given = {"w": random(3, 10, 6), "b": random(3, 10)}
        for weighted in (True, False):
            found = knots(given, 1.0, rule=mean_merge, weighted=weighted)
            torch.testing.assert_close(found["w"], given["w"].mean(0), rtol=0, atol=1e-5)

    def test_low_rank_updates_have_few_common_directions(self) -> None:
        tasks = torch.stack([random(30, 2, seed=t) @ random(2, 20, seed=9 + t) for t in range(3)])
        basis, parts = align(tasks, tolerance=1e-5)
        assert (basis.shape, parts.shape) == ((30, 6), (3, 6, 20))
        torch.testing.assert_close(basis @ parts, tasks, rtol=0, atol=1e-4)

    def test_is_ties_on_the_aligned_parts(self) -> None:
        given = {"w": random(3, 10, 6), "v": random(3, 6, 6, seed=1)}
        u, s, vh = torch.linalg.svd(torch.cat(list(given["w"]), 1), full_matrices=False)
        x, y, z = torch.linalg.svd(torch.cat(list(given["v"]), 1), full_matrices=False)
        parts = {"w": torch.stack((s[:, None] * vh).split(6, 1)), "v": torch.stack((y[:, None] * z).split(6, 1))}
        merged = disjoint_mean_merge(ties(parts, 0.3))  # both together: trimming is global
        found = knots(given, 0.6, density=0.3)
        torch.testing.assert_close(found["w"], 0.6 * u @ merged["w"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["v"], 0.6 * x @ merged["v"], rtol=0, atol=1e-4)

    def test_a_wrong_density_is_named(self) -> None:
        with pytest.raises(MergeError, match=r"density: expected a share in \(0, 1\], found 0"):
            knots({"w": random(2, 3, 3)}, density=0)


class TestPolicy:
    @pytest.mark.parametrize("rule", [tsv_merge, iso_c, iso_cts, knots])
    def test_what_is_no_matrix(self, rule: Rule) -> None:
        given = {"b": random(3, 5), "s": random(3), "k": random(3, 4, 2, 3, 3), "e": torch.zeros(3, 0, 4)}
        given["x"] = random(3, 4, 4)
        cases: list[tuple[Others, dict[str, Tensor]]] = [("mean", mean_merge(given)), ("sum", sum_merge(given, 1.0))]
        for others, expected in cases:
            found = rule(given, 0.5, policy=MatrixPolicy(others, exclude=["x*"]))
            assert all(torch.allclose(found[name], 0.5 * expected[name], atol=1e-6) for name in given)
        assert not any(v.any() for v in rule(given, policy=MatrixPolicy("base", exclude=["x"])).values())

    @pytest.mark.parametrize("rule", [tsv_merge, iso_c, iso_cts, knots])
    def test_kernels_are_matrices_if_asked(self, rule: Rule) -> None:
        kernel = random(3, 6, 2, 3, 3)
        found = rule({"k": kernel}, policy=MatrixPolicy(convolutions=True))["k"]
        torch.testing.assert_close(found.flatten(1), rule({"k": kernel.flatten(2)})["k"])

    @pytest.mark.parametrize("rule", [mean_merge, sum_merge, disjoint_mean_merge])
    def test_sums_are_not_rounded_to_half_precision(self, rule: Rule) -> None:
        half = {"w": random(5, 9).bfloat16()}
        torch.testing.assert_close(rule(half)["w"], rule({"w": half["w"].float()})["w"])

    def test_half_precision_is_computed_in_full(self) -> None:
        half = {"w": random(3, 10, 6).bfloat16(), "b": random(3, 5).bfloat16()}
        for rule in (tsv_merge, iso_c, iso_cts, knots):
            found, expected = rule(half), rule({name: value.float() for name, value in half.items()})
            assert all(torch.equal(found[name], expected[name]) for name in half)

    def test_bad_values_are_named(self) -> None:
        with pytest.raises(MergeError, match="others: expected mean, sum or base, found 'max'"):
            MatrixPolicy("max")  # type: ignore[arg-type]
        with pytest.raises(MergeError, match="exclude: expected a list of names or patterns, found 'w'"):
            MatrixPolicy(exclude="w")
