from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from testers import bank
from torch import Tensor
from toys import ToySuite, expert_state, network

from lit_merge import MergeError, NetworkSuite, TaskArithmetic, TaskVectors
from lit_merge.checkpoints import state_digest


def states(**changes: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = {"w": torch.zeros(2, 3), "b": torch.ones(3)}
    experts = {
        "a": {"w": torch.ones(2, 3), "b": torch.zeros(3)},
        "b": {"w": torch.full((2, 3), 2.0), "b": torch.ones(3)},
    }
    experts["b"] = {**experts["b"], **changes}
    return base, experts


def test_surface_of_the_design() -> None:
    base, experts = states()
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.tasks == ("a", "b")
    assert dict(tv.base).keys() == base.keys()
    assert all(torch.equal(tv.base[name], value) for name, value in base.items())
    assert tv.deltas["w"].shape == (2, 2, 3)
    torch.testing.assert_close(tv.deltas["b"], torch.tensor([[-1.0] * 3, [0.0] * 3]))


def test_nothing_is_mutated_or_shared() -> None:
    base, experts = states()
    tv = TaskVectors.from_state_dicts(base, experts)
    base["w"] += 5
    experts["a"]["w"] += 5
    assert float(tv.base["w"].sum()) == 0
    assert float(tv.deltas["w"][0].sum()) == 6


def test_nothing_is_saved_everything_moves_and_keeps_its_type() -> None:
    tv = bank("cnn")
    assert tv.state_dict() == {}
    assert not list(tv.parameters())
    moved = tv.to("meta", torch.float32)
    assert all(delta.dtype == torch.float64 for delta in moved.deltas.values())
    assert all(value.device.type == "meta" for value in (*moved.deltas.values(), *moved.base.values()))


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied", "mlp"])
def test_contract_equals_the_formula(kind: Any) -> None:
    tv = bank(kind)
    coefficients = torch.randn(3, len(tv.names), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = tv.contract(coefficients)
    for column, name in enumerate(tv.names):
        expected = tv.base[name] + torch.einsum("t,t...->...", coefficients[:, column], tv.deltas[name])
        torch.testing.assert_close(merged[name], expected)


def test_contract_takes_a_number_a_vector_or_a_table() -> None:
    tv = bank()
    number, vector = tv.contract(0.3), tv.contract(torch.full((3,), 0.3))
    table = tv.contract(torch.full((3, len(tv.names)), 0.3))
    for name in tv.names:
        torch.testing.assert_close(number[name], vector[name])
        torch.testing.assert_close(number[name], table[name])


def test_contract_names_a_wrong_shape() -> None:
    tv = bank("mlp")
    with pytest.raises(MergeError, match=r"expected a number, \(3,\) or \(3, 4\), found \(2,\)"):
        tv.contract(torch.zeros(2))


@pytest.mark.parametrize("kind", ["cnn", "tied"])
def test_contract_passes_gradcheck(kind: Any) -> None:
    tv = bank(kind)
    coefficients = torch.full((3, len(tv.names)), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: tuple(tv.contract(c).values()), (coefficients,))


def test_tensors_that_are_not_used_have_zero_gradient() -> None:
    tv = bank("mlp")
    coefficients = torch.full((3, 4), 0.3, dtype=torch.float64, requires_grad=True)
    tv.contract(coefficients)["1.bias"].sum().backward()
    assert coefficients.grad is not None
    used = tv.names.index("1.bias")
    assert (coefficients.grad[:, used] != 0).all()
    assert coefficients.grad.count_nonzero() == 3


def test_low_precision_storage_keeps_coefficients_in_float32() -> None:
    base = network("vit")
    experts = {"a": expert_state(base, 1), "b": expert_state(base, 2)}
    exact = TaskVectors.from_state_dicts(base.state_dict(), experts)
    half = TaskVectors.from_state_dicts(base.state_dict(), experts, dtype=torch.bfloat16)
    coefficients = torch.full((2, len(exact.names)), 0.3, requires_grad=True)
    merged, rounded = exact.contract(coefficients), half.contract(coefficients)
    assert half.deltas[half.names[0]].dtype == torch.bfloat16
    for name, value in merged.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], value, atol=0.01, rtol=0)


def test_half_precision_networks_lose_nothing() -> None:
    base = {"w": torch.tensor([1.0, -3.0], dtype=torch.bfloat16)}
    expert = {"w": torch.tensor([1.0078125, 0.001], dtype=torch.bfloat16)}
    tv = TaskVectors.from_state_dicts(base, {"a": expert})
    assert torch.equal(tv.contract(1.0)["w"], expert["w"])
    assert torch.equal(tv.expert("a")["w"], expert["w"])


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied"])
def test_expert_comes_back(kind: Any) -> None:
    base = network(kind).double()
    state = expert_state(base, 7)
    tv = TaskVectors.from_state_dicts(base.state_dict(), {"a": state}, buffers=dict(base.named_buffers()))
    again = tv.expert("a")
    assert again.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(again[name], value)


def test_buffers_are_averaged_or_kept() -> None:
    tv = bank("cnn")
    merged = tv.contract(0.0)
    mean = torch.stack([tv.expert(task)["bn1.running_mean"] for task in tv.tasks]).mean(0)
    torch.testing.assert_close(tv.complete(merged)["bn1.running_mean"], mean)
    assert torch.equal(tv.complete(merged, "base")["bn1.running_mean"], tv.base["bn1.running_mean"])
    assert "bn1.running_mean" not in tv.deltas
    assert tv.complete(merged)["bn1.num_batches_tracked"].dtype == torch.int64


def test_tied_tensors_have_one_task_vector_and_all_names() -> None:
    tv = bank("tied")
    assert "first.weight" in tv.deltas
    assert "second.weight" not in tv.deltas
    merged = tv.complete(tv.contract(0.3))
    assert torch.equal(merged["first.weight"], merged["second.weight"])


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [("task", 1), ("block", 5), ("tensor", 10), ("layer", 10)],
)
def test_groups(granularity: Any, groups: int) -> None:
    tv = bank("cnn")
    names, column = tv.groups(granularity)
    assert len(names) == groups == int(column.max()) + 1
    assert len(column) == len(tv.names)
    if granularity == "block":
        assert names == ("conv1", "bn1", "blocks.0", "blocks.1", "out")


def test_order_of_the_expert_dictionaries_does_not_matter() -> None:
    base, experts = states()
    turned = {task: dict(reversed(state.items())) for task, state in experts.items()}
    first, second = TaskVectors.from_state_dicts(base, experts), TaskVectors.from_state_dicts(base, turned)
    assert first.digests == second.digests
    assert all(torch.equal(first.deltas[name], second.deltas[name]) for name in base)


def test_digests_are_those_of_the_state_dicts() -> None:
    base, experts = states()
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.digests == {"": state_digest(base), **{task: state_digest(state) for task, state in experts.items()}}
    changed = TaskVectors.from_state_dicts(base, states(b=torch.full((3,), 1.0 + 1e-6))[1])
    assert changed.digests["b"] != tv.digests["b"]
    assert changed.digests["a"] == tv.digests["a"]


def test_map_replaces_task_vectors_only() -> None:
    tv = bank("cnn")
    doubled = tv.map(lambda deltas: {name: 2 * delta for name, delta in deltas.items()})
    torch.testing.assert_close(doubled.contract(0.1)["out.weight"], tv.contract(0.2)["out.weight"])
    assert doubled.digests == tv.digests
    torch.testing.assert_close(doubled.expert("t0")["bn1.running_mean"], tv.expert("t0")["bn1.running_mean"])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda d: {}, "changed the names of the tensors"),
        (lambda d: {n: v[:1] for n, v in d.items()}, r"expected shape \(3, .*found \(1"),
        (lambda d: {n: v / 0 for n, v in d.items()}, "not finite"),
    ],
)
def test_map_refuses_broken_transforms(transform: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        bank("mlp").map(transform)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": torch.ones(3, 2)}, r"expert 'b': w: expected shape \(2, 3\), found \(3, 2\)"),
        ({"w": torch.ones(2, 3, dtype=torch.float16)}, "expert 'b': w: expected torch.float32 .* found torch.float16"),
        ({"w": torch.full((2, 3), torch.nan)}, "expert 'b': w: 6 of 6 values are NaN or infinite"),
        ({"w": torch.full((2, 3), torch.inf)}, "expert 'b': w: 6 of 6 values are NaN or infinite"),
        ({"c": torch.ones(1)}, r"expert 'b': .* 0 missing, 1 extra \(c\)"),
        ({"w": "weights"}, "expert 'b': w: expected a tensor, found str"),
        ({"w": torch.ones(2, 3).to(torch.float8_e4m3fn)}, "expected float64, .* found torch.float8_e4m3fn"),
        ({"w": torch.ones(2, 3).to_sparse()}, "expected a dense real tensor"),
    ],
)
def test_names_what_does_not_fit(changes: Mapping[str, Any], message: str) -> None:
    base, experts = states(**changes)
    with pytest.raises(MergeError, match=message):
        TaskVectors.from_state_dicts(base, experts)


def test_names_a_missing_tensor() -> None:
    base, experts = states()
    del experts["a"]["b"]
    with pytest.raises(MergeError, match=r"expert 'a': .* 1 missing \(b\), 0 extra"):
        TaskVectors.from_state_dicts(base, experts)


def test_needs_experts_and_a_base() -> None:
    with pytest.raises(MergeError, match="experts: expected at least one"):
        TaskVectors.from_state_dicts({"w": torch.ones(1)}, {})
    with pytest.raises(MergeError, match=r"base: .* empty"):
        TaskVectors.from_state_dicts({}, {"a": {}})


def test_nan_in_the_base_is_named() -> None:
    base, experts = states()
    base["b"][0] = torch.nan
    with pytest.raises(MergeError, match="base: b: 1 of 3 values"):
        TaskVectors.from_state_dicts(base, experts)


def test_integers_keep_the_base_and_must_agree() -> None:
    base = {"w": torch.ones(1), "ids": torch.arange(3), "n.num_batches_tracked": torch.tensor(4)}
    expert = {**base, "n.num_batches_tracked": torch.tensor(9)}
    tv = TaskVectors.from_state_dicts(base, {"a": expert})
    state = tv.complete(tv.contract(1.0))
    assert torch.equal(state["ids"], base["ids"])
    assert int(state["n.num_batches_tracked"]) == 4
    with pytest.raises(MergeError, match="ids: integer tensors cannot be merged"):
        TaskVectors.from_state_dicts(base, {"a": {**base, "ids": torch.zeros(3, dtype=torch.int64)}})


def test_tied_tensors_that_differ_are_refused() -> None:
    shared = torch.ones(2)
    base = {"first": shared, "second": shared}
    with pytest.raises(MergeError, match="expert 'a': second and first are tied"):
        TaskVectors.from_state_dicts(base, {"a": {"first": torch.ones(2), "second": torch.zeros(2)}})


def test_unknown_task_is_named() -> None:
    with pytest.raises(MergeError, match="unknown task 'cars'; the bank has t0, t1, t2"):
        bank("mlp").expert("cars")


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.integers(1, 5),
    scales=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_contraction_is_linear_in_the_coefficients(tasks: int, scales: list[float], seed: int) -> None:
    tv = bank("mlp", tasks)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, tasks, 4, dtype=torch.float64, generator=generator)
    a, b = scales[:2]
    left, right = tv.contract(a * x + b * y), (tv.contract(x), tv.contract(y))
    for name in tv.names:
        base = tv.base[name]
        expected = base + a * (right[0][name] - base) + b * (right[1][name] - base)
        torch.testing.assert_close(left[name], expected)


def test_columns_go_with_the_network_whatever_the_order_of_a_file() -> None:
    suite = ToySuite("vit")
    turned = NetworkSuite(
        network=suite.network(),
        base=dict(sorted(suite.base().items())),
        experts={task: dict(sorted(suite.expert(task).items())) for task in suite.tasks},
        heads={task: suite.head(task) for task in suite.tasks},
        test={task: suite.dataset(task, "test") for task in suite.tasks},  # type: ignore[misc]
    )
    banks = []
    for each in (suite, turned):
        module = TaskArithmetic(suite=each)
        module.configure_model()
        banks.append(module.bank)
    assert banks[0].names == banks[1].names == tuple(name for name, _ in suite.network().named_parameters())


class OtherBase(ToySuite):
    """Its base is that of another network."""

    def base(self) -> Mapping[str, Tensor]:
        return {"w": torch.zeros(1)}


def test_a_base_of_another_network_is_named() -> None:
    with pytest.raises(MergeError, match=r"base: its tensors are not those of the network: .* 1 extra \(w\); give"):
        TaskArithmetic(suite=OtherBase("mlp")).configure_model()
