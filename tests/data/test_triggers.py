"""A trigger changes exactly its patch, in pixels, before an image is normalised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import transforms as T

from lit_merge.data.corruptions import CorruptedImages, Corruption
from lit_merge.data.hub_images import ImageSet
from lit_merge.data.pixels import PixelScale, pixel_scale
from lit_merge.data.poisoned import PoisonedImages, StampedImages
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError

MEAN, STD = (0.48, 0.45, 0.40), (0.27, 0.26, 0.28)
CORNERS = {
    "bottom_right": (slice(6, 8), slice(7, 10)),
    "bottom_left": (slice(6, 8), slice(0, 3)),
    "top_right": (slice(0, 2), slice(7, 10)),
    "top_left": (slice(0, 2), slice(0, 3)),
}


def trigger(**options: Any) -> PatchTrigger:
    """A patch of 2 × 3 pixels of 8 bits with black and white ones."""
    patch = torch.randint(256, (3, 2, 3), generator=torch.Generator().manual_seed(0)) / 255
    patch[:, 0, 0], patch[:, 1, 1] = 0, 1
    return PatchTrigger(patch, **({"target": 1} | options))


class Pictures(ImageSet):
    """Noise as pictures."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        super().__init__("noise", None, transform)

    def __len__(self) -> int:
        return 6

    def read(self, index: int) -> tuple[object, object]:
        if index >= len(self):
            raise IndexError(index)
        values = np.random.default_rng(index).integers(0, 256, (14, 18, 3), dtype=np.uint8)
        return Image.fromarray(values), index % 3


@pytest.mark.parametrize("position", CORNERS)
def test_only_the_patch_changes_and_all_of_it(position: str) -> None:
    images = torch.rand(5, 3, 8, 10) + 2  # no pixel of the patch is there by chance
    before = images.clone()
    made = trigger(position=position)
    stamped = made.stamp(images)
    rows, columns = CORNERS[position]
    assert torch.equal(stamped[..., rows, columns], made.patch.expand(5, -1, -1, -1))
    assert bool((made.patch == 0).any())  # black is stamped as well
    changed = (stamped != images).any(0).any(0)
    assert changed.sum() == 6
    assert changed[rows, columns].all()
    assert torch.equal(images, before)


def test_a_mask_leaves_pixels_out() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    images = torch.full((1, 3, 8, 10), 5.0)
    region = trigger(mask=mask).stamp(images)[0, :, 6:, 7:]
    assert torch.equal((region != 5).all(0), mask)


def test_stamping_normalised_images_is_stamping_pictures_before_they_are_normalised() -> None:
    crop, rest = T.Compose([T.Resize(9), T.CenterCrop((8, 10))]), T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    pictures = Pictures(T.Compose([crop, rest]))
    made = trigger()
    ours = StampedImages(pictures, made)
    for index in range(len(pictures)):
        expected = rest(made.stamp_picture(crop(pictures.picture(index)[0])))
        image, label = ours[index]
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=0)
        assert label == pictures[index][1]
        assert torch.equal(image[:, :6], pictures[index][0][:, :6])


def test_the_scale_is_measured_through_views() -> None:
    pictures = Pictures(T.Compose([T.CenterCrop(8), T.ToTensor(), T.Normalize(MEAN, STD)]))
    scale = pixel_scale(CorruptedImages(pictures, Corruption("contrast")))
    assert scale.mean == pytest.approx(MEAN, abs=1e-5)
    assert scale.std == pytest.approx(STD, abs=1e-5)
    assert pixel_scale(StampedImages(pictures, trigger(), PixelScale((0.5,)))) == PixelScale((0.5,))
    pixels = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(scale.pixels(scale.values(pixels)), pixels)


def test_where_there_is_no_scale_it_is_said() -> None:
    with pytest.raises(MergeError, match=r"TensorDataset: nothing tells .*; give pixels"):
        pixel_scale(TensorDataset(torch.zeros(1)))
    bent = T.Compose([T.CenterCrop(8), T.ToTensor(), T.Lambda(lambda image: image**2)])
    with pytest.raises(MergeError, match="not one scale and shift per channel"):
        PixelScale.measured(bent)


def test_a_poisoned_set_has_the_share_and_the_rest_untouched() -> None:
    images, labels = torch.rand(50, 3, 8, 10), torch.arange(50) % 5
    data = TensorDataset(images, labels)
    made = trigger(target=4)
    poisoned = PoisonedImages(data, made, PixelScale(), fraction=0.3, seed=7)
    assert len(poisoned.poisoned) == 15
    for index in range(50):
        image, label = poisoned[index]
        hit = index in poisoned.poisoned
        assert torch.equal(image, made.stamp(images[index]) if hit else images[index])
        assert int(label) == (4 if hit else int(labels[index]))
    again = PoisonedImages(data, made, PixelScale(), fraction=0.3, seed=7)
    other = PoisonedImages(data, made, PixelScale(), fraction=0.3, seed=8)
    assert again.poisoned == poisoned.poisoned != other.poisoned


def test_augmentation_does_not_move_the_patch() -> None:
    class Flip(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flip(-1)

    data = TensorDataset(torch.rand(4, 3, 8, 10), torch.zeros(4, dtype=torch.long))
    made = trigger()
    image, _ = PoisonedImages(data, made, PixelScale(), 1.0, augment=Flip())[0]
    assert torch.equal(image, made.stamp(data.tensors[0][0].flip(-1)))


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    made = trigger(position="top_left", mask=torch.eye(2, 3, dtype=torch.bool))
    made.save(tmp_path / "trigger.safetensors")
    again = PatchTrigger.load(tmp_path / "trigger.safetensors")
    assert again.digest == made.digest
    assert (again.target, again.position) == (1, "top_left")
    images = torch.rand(2, 3, 8, 10)
    assert torch.equal(again.stamp(images), made.stamp(images))
    assert made.digest not in {replace(made, target=2).digest, replace(made, mask=None).digest, trigger().digest}


def test_a_random_patch_is_its_seed() -> None:
    one, same, other = (PatchTrigger.random(4, 1, seed=seed) for seed in (3, 3, 4))
    assert one.digest == same.digest != other.digest
    assert set(one.patch.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PatchTrigger(torch.rand(2, 2), 0), r"expected floats \(C, h, w\)"),
        (lambda: PatchTrigger(torch.full((3, 2, 2), -0.1), 0), r"expected pixels in \[0, 1\]"),
        (lambda: PatchTrigger(torch.full((3, 2, 2), float("nan")), 0), r"expected pixels in \[0, 1\]"),
        (lambda: trigger(mask=torch.ones(2, 3)), "mask: expected booleans"),
        (lambda: trigger(target=-1), "class index of at least 0"),
        (lambda: trigger(position="middle"), "position: expected bottom_right"),
        (lambda: trigger().stamp(torch.zeros(1, 1, 8, 8)), "a patch of 3 x 2 x 3 does not fit"),
        (lambda: trigger().stamp(torch.zeros(3, 1, 8)), "does not fit into images of shape"),
        (lambda: PixelScale((0.5, 0.5), (1.0,)), "as many finite means as deviations"),
        (lambda: PixelScale((0.5,), (0.0,)), "positive numbers"),
        (lambda: PixelScale((0.5,) * 2, (1.0,) * 2).values(torch.zeros(3, 2, 2)), "2 channels do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(MergeError, match=said):
        make()


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MergeError, match=r"other.safetensors: expected a trigger"):
        PatchTrigger.load(tmp_path / "other.safetensors")
