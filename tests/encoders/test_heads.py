"""The cosine head."""

from __future__ import annotations

import pytest
import torch

from lit_merge.encoders.heads import CosineHead
from lit_merge.errors import MergeError


def test_logits_are_scaled_cosines() -> None:
    weight, features = torch.randn(5, 8), torch.randn(3, 8)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], weight[None], dim=-1)
    torch.testing.assert_close(CosineHead(weight, scale=30.0)(features), 30 * cosines, rtol=1e-5, atol=1e-4)


def test_lengths_do_not_matter() -> None:
    weight, features = torch.randn(5, 8), torch.randn(3, 8)
    torch.testing.assert_close(CosineHead(7 * weight)(0.1 * features), CosineHead(weight)(features))


def test_weight_is_copied_and_frozen_unless_wanted() -> None:
    weight = torch.randn(2, 4)
    head = CosineHead(weight)
    weight.zero_()
    assert head.weight.abs().sum() > 0
    assert not head.weight.requires_grad
    assert CosineHead(torch.randn(2, 4), trainable=True).weight.requires_grad


def test_fresh_head_is_trainable_and_drawn_from_the_global_generator() -> None:
    torch.manual_seed(0)
    first = CosineHead.fresh(3, 4)
    torch.manual_seed(0)
    assert torch.equal(first.weight, CosineHead.fresh(3, 4).weight)
    assert first.weight.shape == (3, 4)
    assert first.weight.requires_grad


def test_repr_names_the_sizes() -> None:
    assert "classes=3, features=4, scale=25" in repr(CosineHead(torch.ones(3, 4), scale=25.0))


@pytest.mark.parametrize(
    "weight", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.tensor([[float("nan"), 1.0]])]
)
def test_bad_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(MergeError, match="finite float matrix"):
        CosineHead(weight)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scales_are_refused(scale: float) -> None:
    with pytest.raises(MergeError, match="positive, finite scale"):
        CosineHead(torch.ones(2, 2), scale)
