from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from toys import SIZE, network

import lit_merge.functional as F
from lit_merge import MergeError


def deltas(seed: int = 0, tasks: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(tasks, 7, 5, generator=generator, dtype=torch.float64),
        "b": 0.1 * torch.randn(tasks, 5, generator=generator, dtype=torch.float64),
        "s": torch.randn(tasks, generator=generator, dtype=torch.float64),
    }


def test_ties_by_hand() -> None:
    given_ = {"w": torch.tensor([[3.0, -1.0, 0.1, 4.0, 0.2], [2.0, -5.0, 0.1, -6.0, 0.3], [0.1, 4.0, 0.2, 3.0, -0.1]])}
    # density 0.4 keeps two of five: rows [3,.,.,4,.], [.,-5,.,-6,.], [.,4,.,3,.]; signs of sums 3, -1, 0, 1, 0
    expected = torch.tensor([[3.0, 0, 0, 4, 0], [0.0, -5, 0, 0, 0], [0.0, 0, 0, 3, 0]])
    assert torch.equal(F.ties(given_, 0.4)["w"], expected)
    assert torch.equal(F.disjoint_mean_merge(F.ties(given_, 0.4))["w"], torch.tensor([3.0, -5, 0, 3.5, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_ties_in_one_go_is_its_steps(density: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("lit_merge.functional.ties"), "_ENTRIES", 7)  # the function hides its module
    given_ = {name: (4 * value).round().to(dtype) for name, value in deltas(tasks=4).items()}  # sums are often zero
    for value in (given_, {name: -value for name, value in given_.items()}):  # either majority
        steps = F.ties(value, density)
        mean, total = F.ties_merge(value, density), F.ties_merge(value, density, "sum")
        facts = F.ties_facts([{name: one} for name, one in value.items()], density)
        for name in value:
            assert torch.equal(mean[name], F.disjoint_mean_merge(steps)[name])
            assert torch.equal(total[name], F.sum_merge(steps, 1.0)[name].to(total[name]))
            assert torch.equal(F.ties_merge({name: value[name]}, density, facts=facts)[name], mean[name])
    with pytest.raises(MergeError, match="reduce: expected mean or sum, found 'max'"):
        F.ties_merge(given_, reduce="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["noise", "constant", "sorted", "rare"])
def test_selection_in_memory_is_that_of_sorting(kind: str) -> None:
    size = 300_000  # enough for a sample
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    vector = {"noise": noise, "constant": torch.ones(size), "sorted": noise.sort().values,
              "rare": noise * (torch.arange(size) % 5000 == 0)}[kind]  # fmt: skip
    ordered = vector.abs().sort().values
    for rank in (1, 7, 60_000, 240_000, 299_990, size):
        found = F.kth_magnitude([vector[:12], vector[12:200_000].view(4, -1), vector[200_000:]], rank)
        assert torch.equal(found, ordered[rank - 1])


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_trim_is_global_and_keeps_the_largest(density: float) -> None:
    kept = F.trim(deltas(), density)
    for task in range(3):
        flat = torch.cat([value[task].flatten() for value in deltas().values()])
        left = torch.cat([value[task].flatten() for value in kept.values()])
        assert left.count_nonzero() == round(density * len(flat))
        assert flat[left != 0].abs().min() >= flat[left == 0].abs().max() if density < 1 else True


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), density=st.floats(0.05, 1.0), factor=st.floats(0.1, 10))
def test_ties_agrees_in_sign_and_scales(seed: int, density: float, factor: float) -> None:
    kept = F.ties(deltas(seed), density)
    scaled = F.ties({n: factor * v for n, v in deltas(seed).items()}, density)
    for name, value in kept.items():
        assert not ((value > 0).any(0) & (value < 0).any(0)).any()
        torch.testing.assert_close(scaled[name], factor * value)


def test_dare_drops_and_keeps_the_mean() -> None:
    big = {"w": torch.ones(2, 100, 100)}
    sparse = F.dare(big, 0.9, torch.Generator().manual_seed(1))["w"]
    torch.testing.assert_close(sparse.unique(), torch.tensor([0.0, 10.0]))
    assert float(sparse.mean()) == pytest.approx(1.0, abs=0.05)
    assert not torch.equal(sparse[0], sparse[1])
    plain = F.dare(big, 0.9, torch.Generator().manual_seed(1), rescale=False)["w"]
    assert plain.unique().tolist() == [0.0, 1.0]


def test_dare_does_not_depend_on_the_order_of_names() -> None:
    turned = dict(reversed(deltas().items()))
    first, second = F.dare(deltas()), F.dare(turned)
    assert list(second) == list(turned)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5])
def test_trim_names_a_wrong_density(density: float) -> None:
    with pytest.raises(MergeError, match=f"density: expected a share in \\(0, 1\\], found {density}"):
        F.ties(deltas(), density)


@pytest.mark.parametrize("drop", [1.0, -0.1])
def test_dare_names_a_wrong_probability(drop: float) -> None:
    with pytest.raises(MergeError, match=f"drop: expected a probability in \\[0, 1\\), found {drop}"):
        F.dare(deltas(), drop)


def test_nothing_is_mutated() -> None:
    given_, before = deltas(), deltas()
    for function in (F.ties, F.dare, F.sum_merge, F.mean_merge, F.trim, F.elect_signs, F.disjoint_mean_merge):
        function(given_)
    assert all(torch.equal(given_[name], before[name]) for name in before)


def test_sums() -> None:
    torch.testing.assert_close(F.sum_merge(deltas(), 0.3)["w"], 0.3 * deltas()["w"].sum(0))
    torch.testing.assert_close(F.mean_merge(deltas())["s"], deltas()["s"].mean())


def test_leaf_loss_equals_autograd_and_frees_each_graph() -> None:
    coefficient = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    merged = {"a": coefficient[0] * torch.ones(3), "b": coefficient.prod().reshape(1), "c": torch.ones(2)}
    weights = F.leaf_gradient.leaves(merged)
    assert not weights["c"].requires_grad
    loss = F.leaf_loss(merged, weights, (weights["a"].sum() ** 2 * k + weights["b"].sum() for k in (1, 2)), scale=8.0)
    (0.5 * loss).backward()
    plain = coefficient.detach().clone().requires_grad_()
    expected = 0.5 * (3 * (3 * plain[0]) ** 2 + 2 * plain.prod())
    expected.backward()
    assert float(loss.detach()) == pytest.approx(2 * float(expected.detach()))
    torch.testing.assert_close(coefficient.grad, plain.grad)


def test_leaves_serve_again_after_a_loss_and_after_an_error() -> None:
    coefficient = torch.tensor(2.0, requires_grad=True)
    merged = {"w": coefficient * torch.ones(3)}
    weights = F.leaf_gradient.leaves(merged)

    def broken() -> Iterator[Tensor]:
        yield weights["w"].sum()
        raise RuntimeError("no more images")

    with pytest.raises(RuntimeError, match="no more images"):
        F.leaf_loss(merged, weights, broken())
    for factor in (1.0, 10.0):
        F.leaf_loss(merged, weights, [factor * weights["w"].sum()]).backward(retain_graph=True)
    assert coefficient.grad is not None
    assert coefficient.grad.item() == 33.0


def test_recalibrated_statistics_are_those_of_a_training_pass() -> None:
    images = torch.randn(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    net = network("cnn").eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    measured = F.recalibrate_batch_norm(net, net.state_dict(), [images])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m.training for m in net.modules())
    reference = network("cnn").train()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    reference(images)
    for name, value in measured.items():
        torch.testing.assert_close(value, reference.state_dict()[name])
    assert set(measured) == {f"{n}.running_{s}" for n in ("bn1", "blocks.1") for s in ("mean", "var")}


def test_networks_without_batch_norm_have_nothing_to_recalibrate() -> None:
    net = network("mlp")
    assert F.recalibrate_batch_norm(net, net.state_dict(), [torch.zeros(1, 3, SIZE, SIZE)]) == {}
