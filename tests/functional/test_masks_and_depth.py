"""TALL masks, Consensus, EMR and LiNeS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.consensus import consensus_mask, consensus_merge, tall_masks
from lit_merge.functional.emr import emr, emr_rescalers, emr_unified
from lit_merge.functional.lines import depths, lines, lines_intercept


def deltas(tasks: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (6, 5), "b": (4,), "s": ()}
    return {name: torch.randn(tasks, *shape, generator=generator) for name, shape in shapes.items()}


def test_tall_masks_are_the_definition() -> None:
    for name, mask in tall_masks(deltas(), [0.2, 0.4, 0.6]).items():
        value = deltas()[name]
        for task, threshold in enumerate((0.2, 0.4, 0.6)):
            expected = value[task].abs() >= threshold * (value.sum(0) - value[task]).abs()
            assert torch.equal(mask[task], expected)
    vector = {name: value.mean(0) for name, value in deltas().items()}
    other = tall_masks(deltas(), 0.5, multi_task=vector)["w"]
    assert torch.equal(other[1], deltas()["w"][1].abs() >= 0.5 * (vector["w"] - deltas()["w"][1]).abs())


def test_tasks_that_share_no_entry_are_cut_out_exactly() -> None:
    apart = {"w": torch.diag(torch.tensor([3.0, -2.0, 1.0]))}
    masks = tall_masks(apart, 0.6)["w"]
    assert torch.equal(torch.where(masks, apart["w"].sum(0), 0), apart["w"])
    assert not consensus_merge(apart, 1.0, 0.6)["w"].any()  # every entry is selfish
    assert torch.equal(consensus_merge(apart, 1.0, 0.6, least=1)["w"], apart["w"].sum(0))


def test_consensus_counts_masks() -> None:
    counts = {name: mask.sum(0) for name, mask in tall_masks(deltas(), 0.5).items()}
    for least in (1, 2, 3):
        for name, mask in consensus_mask(deltas(), 0.5, least).items():
            assert torch.equal(mask, counts[name] >= least)
    merged = consensus_merge(deltas(), 0.3, 0.5)
    for name, value in deltas().items():
        torch.testing.assert_close(merged[name], 0.3 * value.sum(0) * (counts[name] >= 2))


@pytest.mark.parametrize("balance", ["entries", "tensors"])
def test_emr_is_elect_mask_rescale(balance: Any) -> None:
    some = deltas()
    unified, rebuilt = emr_unified(some), emr(some, balance)
    factors = emr_rescalers(some, unified, balance)
    own, kept = torch.zeros(3), torch.zeros(3)
    for name, value in some.items():
        sign = torch.where(value.sum(0) > 0, 1.0, -1.0)
        agrees = value * sign > 0
        torch.testing.assert_close(unified[name], sign * (agrees * value).abs().amax(0))
        share = 1 / value[0].numel() if balance == "tensors" else 1.0
        own += share * value.abs().reshape(3, -1).sum(1)
        kept += share * (agrees * unified[name]).abs().reshape(3, -1).sum(1)
        for task in range(3):
            torch.testing.assert_close(rebuilt[name][task], factors[task] * agrees[task] * unified[name])
    torch.testing.assert_close(factors, own / kept)
    double = {name: value.double() for name, value in some.items()}
    assert emr_rescalers(double, emr_unified(double), balance).dtype == torch.float64
    for task in range(3):  # the mean magnitude of the expert comes back
        if balance == "entries":
            sums = [sum(float(x[task].abs().sum()) for x in y.values()) for y in (some, rebuilt)]
            assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emr_of_one_or_equal_experts_is_the_expert(dtype: torch.dtype) -> None:
    one = {name: value.to(dtype) for name, value in deltas(1).items()}
    for some in (one, {name: value.expand(4, *value.shape[1:]) for name, value in one.items()}):
        for name, value in emr(some).items():
            torch.testing.assert_close(value, some[name].float())
    none = {name: torch.zeros_like(value) for name, value in one.items()}
    assert all(not value.any() for value in emr(none).values())
    mixed = {"w": torch.tensor([[1.0, 2.0], [0.0, 0.0], [-0.5, -0.5]])}  # a base, and one that is outvoted everywhere
    assert emr(mixed)["w"].tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_depth_is_counted_in_each_stack() -> None:
    names = ["conv.weight", "a.h.0.w", "a.h.10.w", "a.h.2.mlp.0.w", "b.h.0.w", "b.h.1.w", "one.3.w"]
    assert list(depths(names).values()) == [None, 0.0, 1.0, 0.5, 0.0, 1.0, 0.0]
    assert depths(names[::-1]) == depths(names)


def test_numbered_stages_are_one_stack() -> None:
    names = ["conv1.weight", "layer1.0.w", "layer1.1.w", "layer2.0.w", "layer10.0.w", "a1.h.0.w", "a2.h.0.w"]
    assert list(depths(names).values()) == [None, 0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 0.0, 0.0]


def test_lines_by_hand() -> None:
    some = {f"h.{block}.w": torch.ones(2, 3) for block in range(4)} | {"ln.w": torch.ones(2, 1)}
    scaled = lines(some, 0.1, 0.6)
    for block in range(4):
        torch.testing.assert_close(scaled[f"h.{block}.w"], torch.full((2, 3), 0.1 + 0.2 * block))
    torch.testing.assert_close(scaled["ln.w"], torch.full((2, 1), 0.1))
    assert lines(some, 0.1, 0.6, outside=0.0)["ln.w"].tolist() == [[0.0], [0.0]]
    assert lines_intercept(some, {name: value.sum(0) for name, value in some.items()}) == pytest.approx(1 / 2)
    assert lines_intercept(some, {name: value.mean(0) for name, value in some.items()}) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tall_masks(deltas(), -0.1), "threshold: expected at least 0, found -0.1"),
        (lambda: tall_masks(deltas(), [0.1]), "threshold: expected a number or 3, one per task"),
        (lambda: consensus_mask(deltas(1)), "least: expected from 1 to 1, the number of tasks, found 2"),
        (lambda: emr(deltas(), "mean"), "balance: expected entries or tensors, found 'mean'"),  # type: ignore[arg-type]
        (lambda: lines(deltas()), "no name has a block number, as in h.3.weight, so there is no depth: b, s, w"),
        (lambda: lines({"h.0.w": torch.ones(1)}, float("inf")), "expected finite factors, found alpha inf"),
    ],
)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(MergeError, match=words):
        call()


def test_nothing_is_mutated() -> None:
    some, before = deltas(), deltas()
    for function in (tall_masks, consensus_mask, consensus_merge, emr_unified, emr):
        function(some)
    assert all(torch.equal(some[name], before[name]) for name in before)
