from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.doge import DogeProblem, doge, masked_vectors, shared_basis, task_aware_coefficients
from lit_merge.functional.layer_problem import LayerProblem, choose_layers, layer_batches
from lit_merge.functional.wudi import WudiProblem, wudi

DELTAS = torch.randn(3, 4, 24, 18, generator=torch.Generator().manual_seed(0))  # (L, T, m, n)


def random(like: Tensor, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(like.shape, generator=torch.Generator().manual_seed(1), dtype=like.dtype)


def named(deltas: Tensor = DELTAS) -> dict[str, Tensor]:
    """Layers of three blocks, and what stands around them."""
    around = {"embed": deltas[0, :, :7], "h.0.bias": deltas[0, :, 0]}
    return {**around, **{f"h.{number}.weight": delta for number, delta in enumerate(deltas)}}


# Closed forms, against autograd through T products -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize(
    "make",
    [
        WudiProblem,
        lambda deltas: DogeProblem(deltas, scale=1.0, subspace=0),
        lambda deltas: DogeProblem(deltas, scale=1.0, subspace=3),
        lambda deltas: DogeProblem(deltas, scale=0.4, relative=True, subspace=None, offsets="per_task"),
    ],
    ids=["wudi", "doge", "doge projected", "doge per task"],
)
def test_the_closed_form_is_the_gradient(make: Any, transposed: bool, dtype: torch.dtype) -> None:
    deltas = (DELTAS.mT if transposed else DELTAS).to(dtype).clone()
    deltas[1, 2] = 0  # a layer that one expert left alone
    problem = make(deltas)
    value = problem.start() + random(problem.start())
    losses, gradient = problem.gradient(value)
    assert losses.dtype == gradient.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    point = value.double().requires_grad_()
    exact = make(deltas.double())
    (expected,) = torch.autograd.grad(exact.losses(point).sum(), point)
    basis = getattr(exact, "basis", torch.zeros(3, deltas.shape[2], 0, dtype=torch.float64))
    projector = torch.eye(deltas.shape[2]) - basis @ basis.mT
    expected = (projector.unsqueeze(1) if value.ndim == 4 else projector) @ expected
    for got, wanted in ((losses, exact.losses(point)), (gradient, expected)):
        assert (got.double() - wanted).norm() / wanted.norm() < tolerance
    for number in range(3):  # layers are independent
        torch.testing.assert_close(make(deltas[number : number + 1]).gradient(value[number : number + 1])[1][0],
                                   gradient[number], rtol=1e-4, atol=1e-4)  # fmt: skip


def test_half_a_step_along_the_closed_form_solves_wudi_for_orthonormal_tasks() -> None:
    frame = torch.linalg.qr(DELTAS[0, 0].double().T).Q.mT  # (18, 18), orthonormal rows
    deltas = torch.zeros(1, 3, 6, 18, dtype=torch.float64)
    for task in range(3):
        deltas[0, task] = frame[6 * task : 6 * task + 6]
    problem = WudiProblem(deltas)
    assert problem.gradient(deltas.sum(1))[0] < 1e-20  # orthogonal rows: the sum does not interfere
    away = deltas.sum(1) + random(deltas[:, 0])
    _, gradient = problem.gradient(away)
    assert problem.gradient(away - 3 * gradient)[0] < 1e-20  # K = 1/6 on each task's rows, so the curvature is 1/3


# The parts of DOGE ---------------------------------------------------------------------------------------------------


def textbook_basis(deltas: Tensor, divisor: int) -> Tensor:
    """Of one layer, by singular value decompositions alone."""
    tasks, rank = len(deltas), min(deltas.shape[1:])
    own = [torch.linalg.svd(delta.double())[0][:, : rank // tasks] for delta in deltas]
    left: Tensor = torch.linalg.svd(torch.cat(own, 1))[0]
    return left[:, : rank // divisor]


@pytest.mark.parametrize("divisor", [6, 2])
@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
def test_the_shared_basis_is_that_of_two_decompositions(transposed: bool, divisor: int) -> None:
    deltas = DELTAS.mT if transposed else DELTAS
    basis = shared_basis(deltas, divisor)
    assert basis.shape == (3, deltas.shape[2], 18 // divisor)
    for found, layer in zip(basis.double(), deltas, strict=True):
        expected = textbook_basis(layer, divisor)
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-5)


def test_directions_that_are_not_there_are_not_shared() -> None:
    left, right = DELTAS[0, 0, :, :2], DELTAS[0, 1, :2]
    alike = torch.stack([left @ right, 3 * left @ right, torch.zeros(24, 18)])  # rank 2, and an idle expert
    basis = shared_basis(alike, 3)
    assert basis.shape == (24, 6)
    torch.testing.assert_close(basis.norm(dim=0), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(basis @ (basis.T @ left), left, rtol=0, atol=1e-4)
    assert shared_basis(DELTAS[:, :, :5], 6).shape == (3, 5, 0)


def test_relative_coefficients_are_those_of_task_arithmetic_where_lengths_are_equal() -> None:
    equal = DELTAS / DELTAS.flatten(2).norm(dim=2)[..., None, None]
    torch.testing.assert_close(task_aware_coefficients(5 * equal, 0.3, relative=True), torch.full((3, 4), 0.3))
    torch.testing.assert_close(task_aware_coefficients(5 * equal, 0.3), torch.full((3, 4), 0.06))


def test_the_mask_is_global_and_of_the_task_vectors_as_they_were() -> None:
    deltas = {"a": DELTAS[0], "b": 0.1 * DELTAS[1]}
    offsets = {name: random(delta[0], 5.0) for name, delta in deltas.items()}
    for task, found in enumerate(masked_vectors(deltas, offsets, 0.3)):
        flat = torch.cat([delta[task].abs().flatten() for delta in deltas.values()])
        last = flat.sort(descending=True).values[round(0.3 * len(flat)) - 1]
        for name, delta in deltas.items():
            expected = torch.where(delta[task].abs() >= last, delta[task] + offsets[name], 0)
            assert torch.equal(found[name], expected)
    assert (found["b"] != 0).float().mean() < 0.01  # ten times smaller


def textbook_doge(deltas: Tensor, steps: int, rate: float, per_task: bool, divisor: int) -> Tensor:
    """One layer as in the paper: autograd through T products, a projector, and Adam."""
    weights = [0.07 / delta.norm() for delta in deltas]
    basis = textbook_basis(deltas, divisor).float()
    offset = torch.zeros_like(deltas if per_task else deltas[0], requires_grad=True)
    adam = torch.optim.Adam([offset], lr=rate)
    for _ in range(steps):
        offsets = offset if per_task else [offset] * len(deltas)
        merged = torch.stack([w * (delta + o) for w, delta, o in zip(weights, deltas, offsets, strict=True)]).sum(0)
        loss = torch.stack([((delta * (delta - merged)).sum(1) ** 2).sum() for delta in deltas]).sum()
        adam.zero_grad()
        loss.backward()
        assert offset.grad is not None
        offset.grad -= basis @ basis.T @ offset.grad
        adam.step()
    return deltas + offset.detach()


@pytest.mark.parametrize("offsets", ["shared", "per_task"])
def test_doge_is_the_textbook_algorithm(offsets: Any) -> None:
    deltas = named()
    found = doge(deltas, steps=30, rate=1e-2, density=1.0, subspace=3, offsets=offsets)
    for number, layer in enumerate(DELTAS):
        expected = textbook_doge(layer, 30, 1e-2, offsets == "per_task", 3)
        torch.testing.assert_close(found[f"h.{number}.weight"], expected, rtol=0, atol=1e-4)
    assert (expected - layer).abs().max() > 0.05
    assert not found["embed"].any()
    assert not found["h.0.bias"].any()
    kept = doge(deltas, steps=0, others="keep")
    assert torch.equal(kept["embed"], deltas["embed"])
    assert ((kept["h.0.weight"] == 0) | (kept["h.0.weight"] == DELTAS[0])).all()


def test_wudi_is_the_textbook_algorithm() -> None:
    found = wudi(named(), steps=40, rate=1e-2)
    for layer, name in ((DELTAS[1], "h.1.weight"), (DELTAS[0, :, :7], "embed")):
        merged = layer.sum(0).requires_grad_()
        adam = torch.optim.Adam([merged], lr=1e-2)
        for _ in range(40):
            adam.zero_grad()
            torch.stack([((merged - d) @ d.T).square().sum() / d.square().sum() for d in layer]).sum().backward()
            adam.step()
        torch.testing.assert_close(found[name], merged.detach(), rtol=0, atol=1e-4)
    assert (found["h.1.weight"] - DELTAS[1].sum(0)).abs().max() > 0.1
    torch.testing.assert_close(found["h.0.bias"], DELTAS[0, :, 0].mean(0))


# Layers --------------------------------------------------------------------------------------------------------------


def test_large_layers_are_views_and_small_ones_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = named()
    names = [f"h.{number}.weight" for number in range(3)]
    (found,) = layer_batches(deltas, names)
    assert found[0] == slice(0, 3)
    assert torch.equal(found[1], DELTAS)
    assert DogeProblem(found[1])._rows().data_ptr() == found[1].data_ptr()
    monkeypatch.setattr("lit_merge.functional.layer_problem._BATCH", DELTAS[0].numel())
    batches = list(layer_batches(deltas, names))
    assert [part for part, _ in batches] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert all(batch.data_ptr() == DELTAS[n].data_ptr() for n, (_, batch) in enumerate(batches))
    rows = DogeProblem(batches[0][1])._rows()
    assert rows.data_ptr() == DELTAS.data_ptr()
    assert torch.equal(rows, DELTAS[0].transpose(0, 1))


def test_layers_are_chosen_by_place_and_name() -> None:
    deltas = named()
    assert choose_layers(deltas) == ("h.0.weight", "h.1.weight", "h.2.weight")
    assert choose_layers(deltas, "matrices", exclude=["h.[12].*"]) == ("embed", "h.0.weight")


class Odd(LayerProblem):
    """Diverges."""

    def losses(self, value: Tensor) -> Tensor:
        return (value / 0).sum((1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_layers(named(), "all"), "layers: expected blocks or matrices, found 'all'"),  # type: ignore[arg-type]
        (lambda: choose_layers(named(), exclude=["h.*"]), r"found none; give layers: matrices for those outside"),
        (lambda: choose_layers(named(), "matrices", exclude=["*"]), r"among matrices after excluding \*, found none$"),
        (lambda: wudi(named(), steps=-1), "steps: expected at least 0, found -1"),
        (lambda: wudi(named(), layers="all", others="keep"), "others: expected base, mean or sum, found 'keep'"),  # type: ignore[arg-type]
        (lambda: doge(named(), rate=float("nan")), "rate: expected at least 0, found nan"),
        (lambda: doge(named(), steps=0, density=0.0), r"density: expected a share in \(0, 1\], found 0.0"),
        (lambda: doge(named(), steps=1, subspace=-1), "subspace: expected at least 0, found -1"),
        (lambda: doge(named(), others="mean"), "others: expected base or keep, found 'mean'"),  # type: ignore[arg-type]
        (lambda: DogeProblem(DELTAS, offsets="own"), "offsets: expected shared or per_task, found 'own'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_names_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        call()
