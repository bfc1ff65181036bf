"""The small vision transformer."""

from __future__ import annotations

import pytest
import torch

from lit_merge.encoders.vit import small_vit
from lit_merge.errors import MergeError


def test_features_are_one_row_per_image() -> None:
    features = small_vit(width=32, layers=1, output_dim=16)(torch.randn(3, 3, 28, 28))
    assert features.shape == (3, 16)
    assert bool(features.isfinite().all())


def test_tensor_names_are_those_of_clips_image_tower() -> None:
    names = set(small_vit(width=32, layers=1).state_dict())
    assert {"conv1.weight", "class_embedding", "proj", "transformer.resblocks.0.attn.in_proj_weight"} <= names


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    network = small_vit(width=32, layers=2).eval()
    images = torch.randn(4, 3, 28, 28)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-5)


def test_other_sizes() -> None:
    assert small_vit(32, 8, width=32, layers=1, output_dim=8)(torch.randn(1, 3, 32, 32)).shape == (1, 8)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"image_size": 28, "patch_size": 8}, "patch_size 8 does not divide"), ({"width": 30}, "heads 4 does not divide")],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        small_vit(**sizes)
