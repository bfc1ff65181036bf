"""Base and experts that do not fit together: the message names the expert, the tensor, what was expected and found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import expert_state, network

from lit_merge.checkpoints.checks import check_keys, common_layout, shared_memory
from lit_merge.errors import MergeError
from lit_merge.task_vectors import TaskVectors

State = dict[str, Any]


def base() -> dict[str, Tensor]:
    """A base with floating and integer tensors."""
    return {"w": torch.zeros(2, 3), "b": torch.zeros(3), "steps": torch.tensor([1, 2])}


def expert(**changes: object) -> State:
    """An expert that differs from it as asked; ``None`` leaves a tensor out."""
    state = {"w": torch.ones(2, 3), "b": torch.ones(3), "steps": torch.tensor([1, 2])} | changes
    return {name: value for name, value in state.items() if value is not None}


def refusal(state: State, base_state: State | None = None, **options: Any) -> str:
    """The message when a bank is made with this as its second expert."""
    with pytest.raises(MergeError) as error:
        TaskVectors.from_state_dicts(base_state or base(), {"good": expert(), "bad": state}, **options)
    return str(error.value)


def test_what_fits_is_taken() -> None:
    bank = TaskVectors.from_state_dicts(base(), {"a": expert(), "b": expert()})
    assert bank.names == ("w", "b")
    assert torch.equal(bank.base["steps"], torch.tensor([1, 2]))


def test_missing_and_extra_tensors() -> None:
    said = refusal(expert(b=None, extra=torch.ones(1)))
    assert said.startswith("expert 'bad': its tensors are not those of the base")
    assert "1 missing (b), 1 extra (extra)" in said
    assert "same base network" in said


def test_of_many_names_the_first_few_are_given() -> None:
    with pytest.raises(MergeError, match=r"2 missing \(y, z\), 5 extra \(a, b, c, …\)"):
        check_keys("here", "abcde", "yz")


def test_shape() -> None:
    assert refusal(expert(w=torch.ones(3, 2))) == "expert 'bad': w: expected shape (2, 3), found (3, 2)"


def test_dtype() -> None:
    said = refusal(expert(w=torch.ones(2, 3, dtype=torch.float16)))
    assert said == "expert 'bad': w: expected torch.float32 as in the base, found torch.float16; cast one of them"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "expert 'bad'"])
def test_values_that_are_not_finite(value: float, where: str) -> None:
    wrong = torch.ones(2, 3)
    wrong[0, 1] = wrong[1, 1] = value
    said = refusal(expert(w=wrong)) if "bad" in where else refusal(expert(), base() | {"w": wrong})
    assert said == f"{where}: w: 2 of 6 values are NaN or infinite; expected finite weights"


def test_running_statistics_that_are_not_finite() -> None:
    wrong = torch.tensor([1.0, float("nan"), 1.0])
    assert "expert 'bad': b: 1 of 3 values" in refusal(expert(b=wrong), buffers=("b",))


def test_integer_tensors_that_differ() -> None:
    said = refusal(expert(steps=torch.tensor([1, 3])))
    assert said.startswith("expert 'bad': steps: integer tensors cannot be merged")
    assert "expected equal values" in said


@pytest.mark.parametrize("name", ["bn.num_batches_tracked", "counter"])
def test_counters_may_differ(name: str) -> None:
    first, other = base() | {name: torch.tensor(1)}, expert(**{name: torch.tensor(5)})
    bank = TaskVectors.from_state_dicts(first, {"a": other}, buffers=("counter",))
    assert int(bank.base[name]) == 1


def test_tied_tensors_that_differ() -> None:
    net = network("tied")
    state = expert_state(net, 1)
    state["second.weight"] = state["second.weight"] + 1
    with pytest.raises(MergeError) as error:
        TaskVectors.from_state_dicts(net.state_dict(), {"bad": state})
    said = "expert 'bad': second.weight and first.weight are tied in the base network but have different values"
    assert str(error.value) == said


def test_tied_tensors_of_the_base_that_differ() -> None:
    with pytest.raises(MergeError, match="base: b and a are tied"):
        TaskVectors.from_state_dicts(
            {"a": torch.zeros(1), "b": torch.ones(1)}, {"t": {"a": torch.zeros(1), "b": torch.ones(1)}}, tied={"b": "a"}
        )


def test_no_expert() -> None:
    with pytest.raises(MergeError, match="experts: expected at least one, found none"):
        TaskVectors.from_state_dicts(base(), {})


def test_empty_base() -> None:
    with pytest.raises(MergeError, match="base: expected tensors, found an empty state dict"):
        TaskVectors.from_state_dicts({}, {"a": {}})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "expected a tensor, found list"),
        (torch.ones(2, 3).to_sparse(), "expected a dense real tensor, found torch.float32 (torch.sparse_coo)"),
        (torch.ones(2, 3, dtype=torch.complex64), "expected a dense real tensor, found torch.complex64"),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "found torch.float8_e4m3fn; cast it first"),
    ],
)
@pytest.mark.parametrize("where", ["base", "expert 'bad'"])
def test_values_of_another_kind(value: object, message: str, where: str) -> None:
    said = refusal(expert(w=value)) if "bad" in where else refusal(expert(), base() | {"w": value})
    assert said.startswith(f"{where}: w: ")
    assert message in said


def test_layout_sorts_names() -> None:
    net = network("tied")
    layout = common_layout(net.state_dict(), {"a": expert_state(net, 1)})
    assert layout.constants == ("index",)
    assert layout.tied == {"second.weight": "first.weight"}
    assert "second.weight" not in layout.parameters


def test_views_of_one_storage_are_not_tied() -> None:
    both = torch.zeros(4)
    assert shared_memory({"a": both[:2], "b": both[2:], "empty": torch.empty(0), "none": torch.empty(0)}) == {}
