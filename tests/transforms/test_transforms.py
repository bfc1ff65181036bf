from __future__ import annotations

import pytest
import torch
from testers import bank
from toys import ToySuite

import lit_merge.functional as F
from lit_merge import AdaMerging, TaskArithmetic, Ties, transforms


def test_ties_is_the_function() -> None:
    tv = bank("cnn")
    expected = F.ties(tv.deltas, 0.3)
    assert all(torch.equal(value, expected[name]) for name, value in transforms.Ties(0.3)(tv.deltas).items())


def test_dare_is_seeded() -> None:
    tv = bank("cnn")
    first, second, other = (
        transforms.Dare(0.5, 1)(tv.deltas),
        transforms.Dare(0.5, 1)(tv.deltas),
        transforms.Dare(0.5, 2)(tv.deltas),
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_adamerging_plus_plus_starts_at_ties_with_sum() -> None:
    suite = ToySuite("vit")
    plus, ties = AdaMerging(suite=suite, transforms=[transforms.Ties()]), Ties(suite=suite, reduce="sum", scale=0.3)
    for module in (plus, ties):
        module.configure_model()
    first, second = plus.merged_state(), ties.merged_state()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_transforms_apply_in_order() -> None:
    suite = ToySuite("mlp")
    states = []
    for chain in ([transforms.Ties(0.3), transforms.Dare(0.5)], [transforms.Dare(0.5), transforms.Ties(0.3)]):
        module = TaskArithmetic(suite=suite, transforms=chain)
        module.configure_model()
        states.append(module.merged_state())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("transform", [transforms.Ties(0.2), transforms.Dare(0.5, 3)])
def test_repr_tells_all_arguments(transform: transforms.Transform) -> None:
    assert all(f"{name}={value!r}" in repr(transform) for name, value in vars(transform).items())
