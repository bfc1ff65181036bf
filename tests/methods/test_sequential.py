"""Opcm, Dop and LastK, and how other methods absorb and remove an expert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from testers import MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import (
    MergeError,
    MergeModule,
    SequentialModule,
    SimpleAverage,
    Stage,
    TaskArithmetic,
    Ties,
    WeightedAverage,
)
from lit_merge.functional.dop import dop
from lit_merge.functional.opcm import network_norm, opcm
from lit_merge.methods.dop import Dop
from lit_merge.methods.last_k import LastK
from lit_merge.methods.magmax import MagMax
from lit_merge.methods.opcm import Opcm

TASKS = ("task.a", "task.b", "task.c")
WEIGHTS = {"task.a": 1.0, "task.b": 3.0, "task.c": 0.5}


def built(make: Any, **kwargs: Any) -> Any:
    module = make(suite=ToySuite("vit", dtype="float64"), **kwargs)
    module.configure_model()
    return module


def experts(module: MergeModule) -> dict[str, dict[str, Tensor]]:
    """Task vectors by task."""
    bank = module.bank
    return {task: {name: delta[row] for name, delta in bank.deltas.items()} for row, task in enumerate(bank.tasks)}


def streamed(module: MergeModule, order: Sequence[str] = TASKS) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Absorb one expert after the other; what is kept between stages goes through JSON."""
    vectors, numbers = experts(module), dict[str, Any]()
    merged = {name: torch.zeros_like(value) for name, value in vectors[order[0]].items()}
    for place, task in enumerate(order):
        before = {name: value.clone() for name, value in merged.items()}
        stage = Stage(place + 1, task, tuple(order[:place]), json.loads(json.dumps(numbers)), vectors.__getitem__)
        given, merged = merged, module.absorb(merged, vectors[task], stage)
        assert all(torch.equal(given[name], value) for name, value in before.items())
        numbers = stage.numbers
    return merged, numbers


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=tolerance, atol=tolerance)


class TestOpcm(MergeTester):
    make = Opcm
    permutable = False
    unit: ClassVar[dict[str, Any] | None] = {}

    def test_is_the_function_and_keeps_its_numbers(self) -> None:
        module = built(Opcm, alpha=0.4)
        merged, numbers = streamed(module)
        close(merged, opcm(module.bank.deltas, 0.4))
        close(module.bank.offset(merged), module.merge(module.bank))
        norms = [network_norm(vector) for vector in experts(module).values()]
        assert numbers["norms"] == pytest.approx(norms)
        assert network_norm(merged) == pytest.approx(sum(norms) / 3)
        assert 0 < numbers["energy"] < 1 < numbers["lambda"] < numbers["sqrt_t"] * 1.1
        assert set(numbers["ranks"]) == {n for n, d in module.bank.deltas.items() if d.ndim == 3 and "embed" not in n}
        rows = module.report_extra()["sequential"]
        assert [row["task"] for row in rows] == list(TASKS)
        assert rows[2]["lambda"] == pytest.approx(numbers["lambda"])

    def test_a_bank_that_changed_is_absorbed_again(self) -> None:
        module = built(Opcm)
        before = module.merged_state()
        next(iter(module.bank.deltas.values()))[1].mul_(2)
        assert any(not torch.equal(before[name], value) for name, value in module.merged_state().items())


class TestDop(MergeTester):
    make = partial(Dop, steps=3, rate=0.01)
    permutable = False
    unit: ClassVar[dict[str, Any] | None] = {}

    def test_is_the_function(self) -> None:
        module = built(Dop, steps=3, rate=0.01, space="u")
        close(streamed(module)[0], dop(module.bank.deltas, steps=3, rate=0.01, space="u"))


class TestLastK(MergeTester):
    make = LastK
    unit: ClassVar[dict[str, Any] | None] = {"k": 1}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + deltas.mean(0)  # all three

    def test_only_the_last_count(self) -> None:
        module = built(LastK, k=2)
        vectors = experts(module)
        merged, _ = streamed(module)
        close(merged, {name: (value + vectors["task.b"][name]) / 2 for name, value in vectors["task.c"].items()})
        close(module.remove(merged, vectors["task.a"], "task.a", TASKS, {}), merged)
        assert module.removal("task.c", TASKS, {}).needs == ("task.a", "task.b")
        with pytest.raises(MergeError, match=r"it needs task\.a, task\.c"):
            module.remove(merged, vectors["task.b"], "task.b", TASKS, {})


SUMS = [
    (TaskArithmetic, {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]}),
    (SimpleAverage, {}),
    (WeightedAverage, {"weights": WEIGHTS}),
    (WeightedAverage, {"weights": WEIGHTS, "normalize": False}),
]


@pytest.mark.parametrize(("make", "kwargs"), [*SUMS, (MagMax, {"scale": -0.5})])
def test_a_stream_ends_where_all_at_once_do(make: Any, kwargs: dict[str, Any]) -> None:
    module = built(make, **kwargs)
    for order in (TASKS, TASKS[::-1]):
        close(module.bank.offset(streamed(module, order)[0]), module.merge(module.bank))


@pytest.mark.parametrize(("make", "kwargs"), SUMS)
@pytest.mark.parametrize("task", TASKS)
def test_removing_an_expert_is_as_if_it_had_not_come(make: Any, kwargs: dict[str, Any], task: str) -> None:
    module = built(make, **kwargs)
    merged, numbers = streamed(module)
    assert module.removal(task, TASKS, numbers).exact
    removed = module.remove(merged, experts(module)[task], task, TASKS, numbers)
    close(removed, streamed(module, [other for other in TASKS if other != task])[0])
    alone = module.remove(experts(module)[task], experts(module)[task], task, (task,), {})
    assert make is TaskArithmetic or not any(value.any() for value in alone.values())


@pytest.mark.parametrize(
    ("make", "needs"),
    [(Opcm, ("task.c",)), (Dop, ("task.c",)), (MagMax, ("task.a", "task.c")), (Ties, ("task.a", "task.c"))],
)
def test_what_cannot_be_removed_says_what_it_needs(make: Any, needs: tuple[str, ...]) -> None:
    module = make(suite=ToySuite("mlp"))
    found = module.removal("task.b", TASKS, {})
    assert (found.exact, found.needs) == (False, needs)
    if make is not Ties:
        with pytest.raises(MergeError, match=r"one of task\.a, task\.b, task\.c; found 'task\.d'"):
            module.removal("task.d", TASKS, {})
    with pytest.raises(MergeError, match=rf"{make.__name__}: cannot remove 'task.b' .* it needs {', '.join(needs)}"):
        module.remove({}, {}, "task.b", TASKS, {})


def test_ties_replaces_or_adds() -> None:
    vectors = experts(module := built(Ties, density=0.5, reduce="sum", scale=0.5, sequential="add"))
    first = {name: 0.5 * value for name, value in vectors["task.a"].items()}
    pair = module.bank.map(lambda deltas: {n: torch.stack([first[n], d[1], 0 * d[2]]) for n, d in deltas.items()})
    both = {name: value - module.bank.base[name] for name, value in module.merge(pair).items()}
    close(streamed(module, TASKS[:2])[0], {name: first[name] + value for name, value in both.items()})
    vectors = experts(module := built(Ties, density=0.5))
    pair = module.bank.map(lambda deltas: {n: torch.stack([d[0], d[1], 0 * d[2]]) for n, d in deltas.items()})
    close(module.bank.offset(streamed(module, TASKS[:2])[0]), module.merge(pair))
    with pytest.raises(MergeError, match=r"Ties\.sequential: expected replace or add, found 'sum'"):
        Ties(suite=ToySuite("mlp"), sequential="sum")  # type: ignore[arg-type]


def test_the_rule_for_two_is_what_a_method_without_its_own_absorb_does() -> None:
    module = built(SimpleAverage)
    vectors = experts(module)
    stage = Stage(2, "task.b", ("task.a",), {}, vectors.__getitem__)
    close(MergeModule.absorb(module, {}, vectors["task.b"], Stage(1, "task.b", (), {}, vectors.get)), vectors["task.b"])  # type: ignore[arg-type]
    found = MergeModule.absorb(module, vectors["task.a"], vectors["task.b"], stage)
    close(found, {name: delta.mean(0) for name, delta in module.bank.deltas.items()})  # its bank has three here


class Decay(SequentialModule):
    """A method of one's own: the older, the less."""

    def __init__(self, decay: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decay = decay

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        stage.numbers["seen"] = stage.numbers.get("seen", 0) + 1
        return {name: self.decay * merged[name] + incoming[name] for name in merged}


def test_a_method_of_ones_own() -> None:
    module = built(Decay)
    expected = {name: delta[0] / 4 + delta[1] / 2 + delta[2] for name, delta in module.bank.deltas.items()}
    close(module.merge(module.bank), module.bank.offset(expected))
    assert [row["seen"] for row in module.report_extra()["sequential"]] == [1, 2, 3]
    close(
        module.merge(bank := module.bank.map(lambda deltas: {n: -d for n, d in deltas.items()})),
        bank.offset({name: -value for name, value in expected.items()}),
    )  # another bank than its own


del MergeTester  # pytest would collect it
