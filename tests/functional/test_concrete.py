from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from testers import bank
from torch import Tensor
from toys import Kind

import lit_merge.functional.concrete as F
from lit_merge import MergeError, TaskVectors
from lit_merge.functional import sum_merge
from lit_merge.functional.masked import Mask
from lit_merge.storage import DenseBlock


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The mask itself -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.0, 1.0, -2.0])
def test_an_entry_stays_with_the_probability_of_its_logit(x: float) -> None:
    mask = F.concrete_sample(torch.full((40_000,), x, dtype=torch.float64), generator=seeded(1))
    assert float((mask > 0.5).double().mean()) == pytest.approx(torch.tensor(x).sigmoid().item(), abs=0.01)
    if x == 0:
        assert float(mask.mean()) == pytest.approx(0.5, abs=0.01)
        u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000  # at temperature ½: u² / (u² + (1 − u)²)
        exact = u**2 / (u**2 + (1 - u) ** 2)
        torch.testing.assert_close(mask.sort().values, exact, rtol=0, atol=0.03)


def test_a_lower_temperature_is_closer_to_binary() -> None:
    spread = [F.concrete_sample(torch.zeros(1000), t, seeded(0)).std() for t in (2.0, 0.5, 0.01)]
    assert spread[0] < spread[1] < spread[2] <= 0.5003


def test_a_sample_is_a_function_of_its_generator() -> None:
    state = torch.get_rng_state()
    logits = torch.linspace(-1, 1, 50)
    first = F.concrete_sample(logits, generator=seeded(3))
    assert torch.equal(first, F.concrete_sample(logits, generator=seeded(3)))
    assert not torch.equal(first, F.concrete_sample(logits, generator=seeded(4)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["mean", "threshold", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rescaled_mask_has_mean_one(kind: F.FinalMask, dtype: torch.dtype) -> None:
    logits = torch.randn(7, 11, generator=seeded(0)).to(dtype)
    mask = F.rescale_mask(F.final_mask(logits, kind))
    assert float(mask.mean()) == pytest.approx(1, abs=1e-6)
    assert mask.dtype == dtype
    assert (mask >= 0).all()


def test_gradients_of_logits_are_finite_and_flow_through_the_mean() -> None:
    logits = torch.tensor([0.0, 1.0, -40.0, 40.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.rescale_mask(F.concrete_sample(x, generator=seeded(2))), logits)
    (gradient,) = torch.autograd.grad(F.rescale_mask(F.concrete_sample(logits)).sum(), logits)
    assert gradient.abs().max() < 1e-14  # the sum is constant
    wide = torch.zeros(1000, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.rescale_mask(F.concrete_sample(wide))[0], wide)
    assert torch.isfinite(gradient).all()
    assert (gradient != 0).sum() > 900


def test_the_mask_of_one_entry_is_the_constant_one() -> None:
    logits = torch.tensor([-3.3], requires_grad=True)
    for kind in ("mean", "sample"):
        mask = F.rescale_mask(F.final_mask(logits, kind))
        assert mask.item() == 1
        assert torch.autograd.grad(mask.sum() * 7, logits)[0].item() == 0


def test_a_mask_of_zeros_stays_zero() -> None:
    assert torch.equal(F.rescale_mask(F.final_mask(torch.full((3,), -1.0), "threshold")), torch.zeros(3))


def test_names_wrong_arguments() -> None:
    with pytest.raises(MergeError, match="temperature: expected a number above 0, found 0"):
        F.concrete_sample(torch.zeros(1), 0.0)
    with pytest.raises(MergeError, match="expected mean, threshold or sample, found 'binary'"):
        F.final_mask(torch.zeros(1), "binary")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match=r"mask: expected logits \(5504,\), found \(3,\)"):
        bank().contract(0.3, Mask(lambda _, x: x, (torch.zeros(3),)))


def test_a_shared_mask_is_that_of_every_task() -> None:
    deltas = {"w": torch.randn(3, 4, 5, generator=seeded(0)), "b": torch.randn(3, 2, generator=seeded(1))}
    masks = {name: torch.rand(delta.shape[1:], generator=seeded(2)) for name, delta in deltas.items()}
    scale = torch.tensor([0.1, -0.4, 0.7])
    merged = F.concrete_merge(deltas, masks, scale)
    for name, delta in deltas.items():
        torch.testing.assert_close(merged[name], sum(scale[t] * (masks[name] * delta[t]) for t in range(3)))
    ones = {name: torch.ones_like(mask) for name, mask in masks.items()}
    torch.testing.assert_close(F.concrete_merge(deltas, ones), sum_merge(deltas))


# In the contraction --------------------------------------------------------------------------------------------------


def drawn(temperature: float = 0.5) -> Callable[..., Tensor]:
    """A recipe that is seeded by the number of the tensor."""
    return lambda column, x: F.rescale_mask(F.concrete_sample(x, temperature, seeded(column)))


def dual(column: int, x: Tensor, y: Tensor) -> Tensor:
    """The product of a rescaled mask and one that can remove."""
    return F.rescale_mask(F.concrete_sample(x, generator=seeded(column))) * y.sigmoid()


def naive(vectors: TaskVectors, coefficients: Tensor, mask: Mask) -> dict[str, Tensor]:
    """T masked task vectors, by plain autograd."""
    merged, start = {}, 0
    for column, (name, delta) in enumerate(vectors.deltas.items()):
        stop = start + delta[0].numel()
        factor = mask.recipe(column, *(x[start:stop] for x in mask.logits)).reshape(delta.shape[1:])
        terms = [coefficients[t, column] * (factor * delta[t]) for t in range(len(delta))]
        merged[name], start = vectors.base[name] + torch.stack(terms).sum(0), stop
    return merged


def loss_of(merged: dict[str, Tensor]) -> Tensor:
    values = [(value * torch.linspace(-1, 2, value.numel()).reshape(value.shape)).sin() for value in merged.values()]
    return torch.stack([value.sum() for value in values]).sum()


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("recipe", [drawn(), dual], ids=["one", "dual"])
def test_gradient_equals_autograd(kind: Kind, dtype: torch.dtype, tolerance: float, recipe: Any) -> None:
    vectors = bank(kind, dtype=dtype)
    size = sum(vectors.sizes)
    coefficients = torch.randn(3, len(vectors.names), dtype=dtype, generator=seeded(0)).requires_grad_()
    logits = [torch.randn(size, dtype=dtype, generator=seeded(s)).requires_grad_() for s in range(1 + (recipe is dual))]
    mask = Mask(recipe, tuple(logits))
    found, wanted = vectors.contract(coefficients, mask), naive(vectors, coefficients, mask)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(loss_of(found), [coefficients, *logits])
    for one, other in zip(ours, torch.autograd.grad(loss_of(wanted), [coefficients, *logits]), strict=True):
        assert other.norm() > 1
        assert (one - other).norm() / other.norm() < tolerance


def test_a_constant_side_has_no_gradient_and_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    for name in ("offset", "products"):
        original = getattr(DenseBlock, name)

        def counted(self: DenseBlock, vector: Tensor, original: Any = original) -> Any:
            passes[-1] += self.base().numel()
            return original(self, vector)

        monkeypatch.setattr(DenseBlock, name, counted)
    vectors = bank()
    size = sum(vectors.sizes)
    coefficients = torch.full((3, len(vectors.names)), 0.3, dtype=torch.float64, requires_grad=True)
    logits = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    for values, mask, wanted in (
        (coefficients, Mask(drawn(), (logits,)).detach(), coefficients),
        (coefficients.detach(), Mask(drawn(), (logits,)), logits),
    ):
        passes.append(0)
        merged = vectors.contract(values, mask)
        passes.append(0)
        loss_of(merged).backward()
        assert passes[-2:] == [size, size]  # one each way
        assert wanted.grad is not None
        assert (coefficients.grad is None) or (logits.grad is None)
        wanted.grad = None


def test_nothing_as_large_as_the_network_is_kept_but_the_logits() -> None:
    vectors = bank()
    logits = torch.zeros(sum(vectors.sizes), dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        vectors.contract(0.3, Mask(drawn(), (logits,)))
    assert sum(x.numel() for x in kept) == logits.numel() + 3 * len(vectors.names)
    assert any(x.data_ptr() == logits.data_ptr() for x in kept)


def test_limits() -> None:
    ones = Mask(lambda _, x: torch.ones_like(x), (torch.zeros(sum(bank().sizes), dtype=torch.float64),))
    vectors = bank()
    plain, masked = vectors.contract(0.3), vectors.contract(0.3, ones)
    for name in plain:  # not bit for bit: here the sum over tasks is rounded before the base is added
        torch.testing.assert_close(masked[name], plain[name], rtol=1e-15, atol=1e-15)
    random = Mask(drawn(), ones.logits)
    assert all(torch.equal(value, vectors.base[name]) for name, value in vectors.contract(0.0, random).items())
    single = bank(tasks=1)
    assert all(torch.equal(value, single.expert("t0")[name]) for name, value in single.contract(1.0, ones).items())


def test_masks_are_never_in_half_precision() -> None:
    vectors = bank(dtype=torch.float32)
    logits = torch.randn(sum(vectors.sizes), generator=seeded(0)).requires_grad_()
    results = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            merged = vectors.contract(0.3, Mask(drawn(), (logits,)))
            (gradient,) = torch.autograd.grad(loss_of(merged), logits)
        results.append((*merged.values(), gradient))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
