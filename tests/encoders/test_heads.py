"""Cosine heads and linear ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.encoders.heads import CosineHead, LinearHead, read_head
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_plain_linear_head(suffix: str, bias: bool) -> None:
    layer, features = nn.Linear(4, 3, bias=bias), torch.randn(2, 4)
    state = dict(layer.state_dict())
    if suffix == ".safetensors":
        save_file(state, "head.safetensors")
    else:
        torch.save(state, "head.pt")
    head = read_head(f"head{suffix}")
    assert torch.equal(head(features), layer(features))
    assert head.state_dict().keys() == state.keys()
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert f"classes=3, features=4, bias={bias}, normalize=False" in repr(head)


def test_the_header_says_whether_features_are_normalised() -> None:
    weight, features = torch.randn(3, 4), torch.randn(2, 4)
    save_file({"weight": weight}, "head.safetensors", metadata={"normalize": "true"})
    head = read_head(Path("head.safetensors"))
    torch.testing.assert_close(head(features), (features / features.norm(dim=1, keepdim=True)) @ weight.T)
    torch.testing.assert_close(head(9 * features), head(features))
    assert torch.equal(head(torch.zeros(1, 4)), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"weight": torch.ones(3)}, "expected a linear head with weight"),
        ({"weight": torch.ones(3, 4).int()}, "finite float matrix"),
        ({"weight": torch.full((3, 4), torch.nan)}, "finite float matrix"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, "finite bias"),
        ({"weight": torch.ones(3, 4), "bias": torch.full((3,), torch.inf)}, "finite bias"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(3).half()}, "finite bias"),
        ({"bias": torch.ones(3)}, "expected a linear head with weight"),
        ({"weight": torch.ones(3, 4), "scale": torch.ones(1)}, "expected a linear head with weight"),
    ],
)
def test_files_that_are_no_heads(state: dict[str, Tensor], what: str) -> None:
    save_file(state, "head.safetensors")
    with pytest.raises(MergeError, match=rf"head\.safetensors: .*{what}"):
        read_head("head.safetensors")


def test_a_header_that_says_neither() -> None:
    save_file({"weight": torch.ones(3, 4)}, "head.safetensors", metadata={"normalize": "maybe"})
    with pytest.raises(MergeError, match=r"head\.safetensors: its header says normalize: maybe"):
        read_head("head.safetensors")


def test_a_linear_head_copies_what_it_is_given() -> None:
    weight, bias = torch.ones(2, 3), torch.ones(2)
    head = LinearHead(weight, bias)
    weight.zero_()
    bias.zero_()
    assert head(torch.ones(1, 3)).tolist() == [[4.0, 4.0]]
