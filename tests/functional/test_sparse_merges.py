"""MagMax, Breadcrumbs, DELLA, SCE and PCB: against plain code on flat vectors, and where they could break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.breadcrumbs import breadcrumbs
from lit_merge.functional.dare import dare
from lit_merge.functional.della import elected_mean_merge, magprune
from lit_merge.functional.magmax import magmax
from lit_merge.functional.pcb import pcb_merge
from lit_merge.functional.sce import sce_merge

SHAPES: dict[str, tuple[int, ...]] = {"w": (6, 5), "b": (7,), "s": (), "k": (3, 2, 2)}


def deltas(tasks: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (1 if name == "w" else 0.1) * torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def array(some: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """All tensors as (T, d), sorted by name."""
    return torch.cat([some[name].reshape(len(some[name]), -1) for name in sorted(some)], 1).numpy()


def vector(merged: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """A merged vector as (d,), sorted by name."""
    return torch.cat([merged[name].reshape(-1) for name in sorted(merged)]).numpy()


def test_magmax_takes_the_largest_of_every_entry_whatever_the_order() -> None:
    flat = array(deltas())
    expected = flat[np.abs(flat).argmax(0), np.arange(flat.shape[1])]
    np.testing.assert_array_equal(vector(magmax(deltas())), expected)
    tied = {"w": torch.tensor([[2.0, 0.0], [-2.0, 0.0]])}
    assert magmax(tied)["w"].tolist() == magmax({"w": tied["w"].flip(0)})["w"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("per", ["tensor", "network"])
def test_breadcrumbs_keeps_the_middle(per: Any) -> None:
    kept = breadcrumbs(deltas(), 0.5, 0.1, per=per)
    whole = {"all": torch.from_numpy(array(deltas()))} if per == "network" else deltas()
    left = {"all": torch.from_numpy(array(kept))} if per == "network" else kept
    for name, value in whole.items():
        for row, sparse in zip(value.reshape(3, -1).numpy(), left[name].reshape(3, -1).numpy(), strict=True):
            size = len(row)
            stay = max(1, round(0.4 * size))
            out = min(round(0.1 * size), size - stay)
            order = np.argsort(-np.abs(row))[out : out + stay]
            np.testing.assert_array_equal(np.flatnonzero(sparse), np.sort(order))
            np.testing.assert_array_equal(sparse[order], row[order])


def test_breadcrumbs_leaves_scalars_and_constants_alone() -> None:
    some = {"s": torch.tensor([2.0, -3.0]), "c": torch.full((2, 40), 0.5), "z": torch.zeros(2, 9)}
    assert all(torch.equal(value, some[name]) for name, value in breadcrumbs(some).items())


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_magprune_keeps_large_entries_more_often_and_the_expectation(per: Any) -> None:
    row = torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0] * 5)
    wide = {"w": row.expand(1, 4000, 10)}  # ranks are the same in each row
    kept = magprune(wide, 0.6, 0.4, per="row")["w"][0]
    rate = (kept != 0).float().mean(0)
    torch.testing.assert_close(rate, 0.4 + 0.4 * ((torch.arange(10) + 0.5) / 10 - 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(kept.mean(0), row, atol=0, rtol=0.1)
    plain = magprune({"w": row.expand(1, 50, 10)}, 0.6, 0.4, per=per, rescale=False)["w"]
    assert set(plain.unique().tolist()) <= {0.0, *row.tolist()}


def test_magprune_without_a_window_is_dare_and_does_not_depend_on_names_order() -> None:
    some = deltas()
    turned = magprune(dict(reversed(some.items())), 0.3, 0.0)
    expected = dare({name: value.reshape(3, -1) for name, value in some.items()}, 0.3)
    for name, value in magprune(some, 0.3, 0.0).items():
        torch.testing.assert_close(value, expected[name].reshape(value.shape))
        assert torch.equal(value, turned[name])
    assert list(turned) == list(reversed(some))


def test_elected_mean_by_hand() -> None:
    some = {"w": torch.tensor([[4.0, 1.0, 0.0], [2.0, -3.0, 0.0], [-5.0, 1.0, 0.0]])}
    assert elected_mean_merge(some)["w"].tolist() == [3.0, -3.0, 0.0]


@pytest.mark.parametrize("per", ["tensor", "network"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_sce_is_the_algorithm(per: Any, renormalize: bool) -> None:
    some = deltas()
    parts = [some] if per == "network" else [{name: value} for name, value in some.items()]
    merged = sce_merge(some, 0.3, per=per, renormalize=renormalize)
    for part in parts:
        flat = array(part)
        variance = flat.var(0)
        mask = np.zeros(flat.shape[1])
        mask[np.argsort(-variance)[: max(1, round(0.3 * flat.shape[1]))]] = 1
        chosen = flat * mask
        eta = (chosen**2).sum(1) / (chosen**2).sum()
        agrees = np.sign(chosen) == np.where(chosen.sum(0) < 0, -1, 1)
        expected = (eta[:, None] * agrees * chosen).sum(0)
        if renormalize:
            weight = (eta[:, None] * agrees).sum(0)
            expected /= np.where(weight > 0, weight, 1)
        np.testing.assert_allclose(vector({name: merged[name] for name in part}), expected)


def unit(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = (values - values.min()) / (values.max() - values.min())
    return result


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = np.exp(values) / np.exp(values).sum()
    return result


def plain_pcb(flat: np.ndarray[Any, Any], density: float, formula: str) -> np.ndarray[Any, Any]:
    """The paper's equations, and what the released code computes, on (T, d)."""
    tasks, size = flat.shape
    values, scores = flat.copy(), np.zeros_like(flat)
    for t, row in enumerate(flat):
        if formula == "paper":
            scores[t] = softmax(tasks * unit(row * row)) * sum(softmax(unit(row * other)) for other in flat)
            scores[t][np.argsort(-scores[t])[max(1, round(density * size)) :]] = 0
        else:
            ranked = np.sort(np.abs(row))
            clipped = np.clip(np.abs(row), ranked[int(size * 1e-4)], ranked[int(size * (1 - 1e-4) - 1)])
            values[t] = np.sign(row) * clipped
            scores[t] = np.exp(tasks * unit(clipped) ** 2) * np.tanh(row * flat.sum(0))
            scores[t] = unit(np.maximum(scores[t], np.sort(scores[t])[int(size * (1 - density))]))
    result: np.ndarray[Any, Any] = (scores * values).sum(0) / np.maximum(scores.sum(0), 1e-12)
    return result


@pytest.mark.parametrize("formula", ["paper", "released"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_pcb_is_the_algorithm(formula: Any, density: float) -> None:
    some = deltas(4)
    expected = plain_pcb(array(some), density, formula)
    np.testing.assert_allclose(vector(pcb_merge(some, density, formula=formula)), expected, atol=1e-12)
    alone = pcb_merge(some, density, formula=formula, per="tensor")["w"]
    np.testing.assert_allclose(vector({"w": alone}), plain_pcb(array({"w": some["w"]}), density, formula), atol=1e-12)


@pytest.mark.parametrize("per", ["tensor", "network"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_breaks_at_the_edges(per: Any, dtype: torch.dtype) -> None:
    one = {name: value.to(dtype) for name, value in deltas(1).items()}
    same = {name: value.expand(3, *value.shape[1:]) for name, value in one.items()}
    none = {name: torch.zeros_like(value) for name, value in same.items()}
    for rule in (
        magmax,
        lambda x: sce_merge(x, 0.5, per=per),
        lambda x: pcb_merge(x, 0.5, per=per),
        lambda x: pcb_merge(x, 0.5, per=per, formula="released"),
        lambda x: elected_mean_merge(magprune(breadcrumbs(x, 0.3, 0.1, per=per), 0.0, 0.0)),
    ):
        assert all(not value.any() for value in rule(none).values())
        for some in (one, same):
            for name, value in rule(some).items():
                assert value.shape == SHAPES[name]
                assert torch.isfinite(value).all()
                assert (value.sign() * one[name][0].sign() >= 0).all()  # of experts that agree
    for some in (one, same):  # all alike: nothing to select
        assert all(torch.allclose(v, one[n][0].float()) for n, v in sce_merge(some, 0.5, renormalize=True).items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: breadcrumbs(deltas(), 0.7, 0.3), r"bottom \+ top must be below 1, found 0.7 \+ 0.3"),
        (lambda: breadcrumbs(deltas(), 0.9, 0.1), r"bottom \+ top must be below 1, found 0.9 \+ 0.1"),
        (lambda: breadcrumbs(deltas(), -0.1), r"bottom: expected a share in \[0, 1\], found -0.1"),
        (lambda: breadcrumbs(deltas(), per="row"), "per: expected tensor or network, found 'row'"),  # type: ignore[arg-type]
        (lambda: magprune(deltas(), 0.1, 0.3), r"expected probabilities in \[0, 1\), found 0.1 ± 0.15"),
        (lambda: magprune(deltas(), 0.9, 0.3), r"expected probabilities in \[0, 1\), found 0.9 ± 0.15"),
        (lambda: sce_merge(deltas(), 0.0), r"density: expected a share in \(0, 1\], found 0.0"),
        (lambda: pcb_merge(deltas(), 1.5), r"density: expected a share in \(0, 1\], found 1.5"),
        (lambda: pcb_merge(deltas(), formula="code"), "formula: expected paper or released"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        call()
