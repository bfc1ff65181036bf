from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import ToySuite

from lit_merge import AdaMerging, MergeError, TaskArithmetic, methods
from lit_merge.coefficients import Filtered, per_tensor, start_values, tying

NAMES = ["stem.w", "h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.mlp.w", "h.2.attn.w", "h.2.mlp.w"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "expected a number"),
        ([], "expected a number"),
        ("0.3", "expected a number"),
        ([0.1, float("nan")], "expected finite numbers"),
        ([{"filter": "mpl", "value": 1.0}, {"value": 0.3}], "'mpl' fits no tensor"),
        ([{"filter": "h", "value": 1.0}, {"filter": "h.0", "value": 1.0}, {"value": 0.3}], r"'h\.0' fits no tensor"),
        ([{"filter": "mlp", "value": 1.0}], "exactly the last entry without a filter"),
        ([{"value": 1.0}, {"filter": "mlp", "value": 1.0}], "exactly the last entry without a filter"),
        ([{"filtre": "mlp", "value": 1.0}], "expected entries such as"),
        ([{"filter": "mlp"}, {"value": 1.0}], "as value"),
    ],
)
def test_what_is_no_coefficient(value: Any, said: str) -> None:
    with pytest.raises(MergeError, match=said):
        per_tensor(value, NAMES)


def test_a_list_needs_depth() -> None:
    with pytest.raises(MergeError, match="no name has a block number"):
        per_tensor([0.1, 0.2], ["a.w", "b.w"])


def test_patterns_and_words() -> None:
    filters: list[Filtered] = [{"filter": "h.*.w", "value": 0.5}, {"filter": "*", "value": 0.1}]
    found = per_tensor(filters, NAMES)
    assert found == {name: 0.1 if name == "stem.w" else 0.5 for name in NAMES}


@pytest.mark.parametrize("granularity", ["taks", 1, 0, True, [{"filter": "mlp", "value": "blok"}, {}]])
def test_what_is_no_granularity(granularity: Any) -> None:
    with pytest.raises(MergeError, match="expected task, block, tensor or layer"):
        tying(granularity, NAMES)


def test_tied_by_name() -> None:
    groups, shares = tying([{"filter": "mlp", "value": "block"}, {"filter": "h."}, {"value": "tensor"}], NAMES)
    assert groups == ("mlp: h.0", "mlp: h.1", "mlp: h.2", "h.", "rest: stem.w")
    assert shares.argmax(0).tolist() == [4, 3, 0, 3, 1, 3, 2]
    assert torch.equal(shares.sum(0), torch.ones(7, dtype=torch.float64))


def test_values_over_depth_are_reached_from_coefficients_over_depth() -> None:
    for anchors in (2, 3, 5):
        _, shares = tying(anchors, NAMES)
        start = start_values([0.2, 0.8], shares, NAMES)
        assert (start @ shares).tolist() == pytest.approx(list(per_tensor([0.2, 0.8], NAMES).values()))


def test_adamerging_learns_over_depth_and_starts_like_task_arithmetic() -> None:
    suite, scale = ToySuite("vit"), [0.2, 0.6]
    fixed = TaskArithmetic(suite=suite, scale=scale)
    learned = AdaMerging(suite=suite, granularity=2, init=scale)
    fixed.configure_model()
    learned.configure_model()
    assert learned.coefficients.shape == (3, 2)
    for name, value in fixed.merged_state().items():
        torch.testing.assert_close(learned.merged_state()[name], value)
    sum(value.sum() for value in learned.merge(learned.bank).values()).backward()  # type: ignore[union-attr]
    assert learned.coefficients.grad is not None
    assert bool((learned.coefficients.grad != 0).all())
    with torch.no_grad():
        assert learned.coefficient_table().shape == (3, len(learned.bank.names))


@pytest.mark.parametrize("method", ["ConcreteMerging", "DAM"])
def test_coefficients_under_masks_are_tied_and_begin_by_name_too(method: str) -> None:
    suite = ToySuite("vit")
    names: list[Any] = [{"filter": "bias", "value": "task"}, {"value": "tensor"}]
    start: list[Any] = [{"filter": "bias", "value": 0.1}, {"value": [0.2, 0.6]}]
    model = getattr(methods, method)(suite=suite, granularity=names, init=start)
    model.configure_model()
    biases = [name for name in model.bank.names if "bias" in name]
    assert model.coefficients.shape == (3, 1 + len(model.bank.names) - len(biases))
    expected = [per_tensor(start, model.bank.names)[name] for name in model.bank.names]
    assert model.coefficient_table().tolist() == [pytest.approx(expected)] * 3
    with pytest.raises(MergeError, match="shares its coefficient"):
        getattr(methods, method)(suite=suite, granularity="task", init=start).configure_model()
