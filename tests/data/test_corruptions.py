"""Corruptions: stronger with severity, the same in any order and process, and in the right place of a transform."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.transforms import v2

from lit_merge import MergeError
from lit_merge.data.corruptions import CORRUPTIONS, CorruptedImages, Corruption, split_preprocess
from lit_merge.data.file_images import FolderImages

RANDOM = ("gaussian_noise", "impulse_noise", "motion_blur", "spatter")


def scene(size: int = 224, seed: int = 0) -> NDArray[np.uint8]:
    """A picture with the spectrum of photographs (amplitude 1/f) in three correlated channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    layers = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(size, size))) / frequency).real for _ in range(4)]
    picture = np.stack([3 * layers[0] + layer for layer in layers[1:]], -1)
    scaled = 127 + 50 * (picture - picture.mean()) / picture.std()
    return np.asarray(scaled.clip(0, 255), dtype=np.uint8)


def corrupted(name: str, severity: int, picture: NDArray[np.uint8], index: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    """One picture as an array."""
    if name == "spatter":
        pytest.importorskip("skimage")
    return np.asarray(Corruption(name, severity, seed)(picture, index))


def distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Mean squared difference in grey levels."""
    return float(((one.astype(float) - other) ** 2).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
class TestEveryCorruption:
    def test_the_damage_grows_with_severity(self, name: str) -> None:
        pictures = [scene(seed=seed) for seed in range(3)]
        damage = [
            sum(distance(corrupted(name, severity, picture, i), picture) for i, picture in enumerate(pictures))
            for severity in range(1, 6)
        ]
        assert damage[0] > 0
        assert damage == sorted(set(damage))

    def test_number_and_seed_decide_and_nothing_else(self, name: str) -> None:
        picture = scene(48)
        np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
        first = [corrupted(name, 3, picture, index) for index in range(4)]
        np.random.seed(2)  # noqa: NPY002
        again = [corrupted(name, 3, picture, index) for index in reversed(range(4))][::-1]
        assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
        assert np.array_equal(picture, scene(48)), "the picture itself was changed"
        others = [first[1], corrupted(name, 3, picture, 0, seed=1)]
        assert all(np.array_equal(first[0], other) != (name in RANDOM) for other in others)

    def test_kind_and_shape_are_kept(self, name: str) -> None:
        picture = scene(64)[:40]
        found = corrupted(name, 5, picture)
        assert found.dtype == np.uint8
        assert found.shape == (40, 64, 3)
        pillow = Corruption(name, 5)(Image.fromarray(picture))
        assert isinstance(pillow, Image.Image)
        assert np.array_equal(np.asarray(pillow), found)

    def test_a_picture_of_one_colour(self, name: str) -> None:
        """Nothing divides by zero; what only moves or mixes pixels leaves it as it is."""
        flat = np.full((32, 32, 3), (200, 100, 50), np.uint8)
        difference = np.abs(corrupted(name, 2, flat).astype(int) - flat).max()
        assert (difference <= 8) == (name in ("contrast", "jpeg_compression", "motion_blur", "pixelate"))


class TestNumbers:
    """What the paper's parameters mean."""

    def test_contrast(self) -> None:
        picture = scene()
        assert corrupted("contrast", 2, picture).std() == pytest.approx(0.3 * picture.std(), rel=0.02)
        assert corrupted("contrast", 2, picture).mean() == pytest.approx(picture.mean(), abs=1)

    def test_gaussian_noise(self) -> None:
        grey = np.full((224, 224, 3), 128, np.uint8)
        assert corrupted("gaussian_noise", 1, grey).std() / 255 == pytest.approx(0.08, rel=0.01)

    def test_impulse_noise(self) -> None:
        found = corrupted("impulse_noise", 5, np.full((224, 224, 3), 128, np.uint8))
        assert (found != 128).mean() == pytest.approx(0.27, rel=0.03)
        assert set(np.unique(found)) == {0, 128, 255}
        assert (found == 255).mean() == pytest.approx((found == 0).mean(), rel=0.05)

    def test_pixelate(self) -> None:
        found = corrupted("pixelate", 5, scene())  # 56 x 56 blocks of 4 x 4
        blocks = found.reshape(56, 4, 56, 4, 3).swapaxes(1, 2).reshape(56, 56, 16, 3)
        assert (blocks == blocks[:, :, :1]).all()

    def test_motion_blur_smears_one_point_along_a_line(self) -> None:
        point = np.zeros((101, 101, 3), np.uint8)
        point[50, 50] = 255
        for index in range(5):
            rows, columns = np.nonzero(corrupted("motion_blur", 2, point, index)[:, :, 0])
            assert len(columns) >= 15  # sigma 5: visible for about 3 sigma, on one side
            assert columns.max() == 50 or columns.min() == 50
            slope = np.polyfit(columns, rows, 1)
            assert abs(slope[0]) <= 1.05
            assert np.abs(np.polyval(slope, columns) - rows).max() < 1.2

    def test_mud_covers_and_water_shines(self) -> None:
        dark, bright = np.zeros((96, 96, 3), np.uint8), np.full((96, 96, 3), 255, np.uint8)
        assert corrupted("spatter", 3, dark).max() > 50  # water adds light
        mud = corrupted("spatter", 5, bright)
        covered = mud[(mud != 255).any(-1)]
        assert len(covered) > 0.1 * 96 * 96
        assert covered[:, 0].max() <= 255 - 0.8 * (255 - 63)
        assert (covered >= (63, 42, 20)).all()

    def test_the_same_forever(self) -> None:
        """A result that was published can be had again: the numbers drawn must not change."""
        picture = np.arange(12 * 12 * 3, dtype=np.uint16).reshape(12, 12, 3).astype(np.uint8)
        found = corrupted("impulse_noise", 4, picture, index=11, seed=7)
        assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "f7ef2adec3d682b4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fog",), "expected one of contrast, .* found 'fog'"),
        (("contrast", 0), "severity: expected 1 to 5, found 0"),
        (("contrast", 6), "severity: expected 1 to 5, found 6"),
        (("contrast", 1.0), "severity: expected 1 to 5, found 1.0"),
        (("contrast", 1, -1), "seed: expected an integer"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        Corruption(*arguments)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        Image.new("L", (8, 8)),
    ],
)
def test_wrong_pictures(picture: Any) -> None:
    with pytest.raises(MergeError, match=r"expected (uint8 of shape|an RGB picture)"):
        Corruption("contrast")(picture)


def to_rgb(picture: Image.Image) -> Image.Image:
    """As open_clip's own step."""
    return picture.convert("RGB")


PREPROCESSINGS = {
    "open_clip": T.Compose([T.Resize(20), T.CenterCrop(16), to_rgb, T.ToTensor(), T.Normalize(0.5, 0.5)]),
    "nested": T.Compose([T.Compose([T.Resize(20), T.CenterCrop(16)]), T.Compose([T.PILToTensor(), lambda x: x / 255])]),
    "v2": v2.Compose([v2.Resize(20), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "tensor only": T.ToTensor(),
}


class TestSplitPreprocess:
    @pytest.mark.parametrize("name", PREPROCESSINGS)
    def test_the_parts_make_the_whole(self, name: str) -> None:
        transform: Any = PREPROCESSINGS[name]
        picture = Image.fromarray(scene(40)[:30])
        pick, rest = split_preprocess(transform)
        crop = pick(picture)
        assert crop.size == ((40, 30) if name == "tensor only" else (16, 16))
        assert torch.equal(rest(crop), transform(picture))

    @pytest.mark.parametrize(
        ("transform", "message"),
        [
            (T.Compose([T.ToTensor(), T.Resize(20), T.CenterCrop(16)]), r"resized or cropped to \(16, 16\) afterwards"),
            (T.Compose([T.Resize(20), T.CenterCrop(16)]), "expected it to end in a tensor, found Image"),
            (T.Compose([]), "expected it to end in a tensor"),
        ],
    )
    def test_no_place_to_cut(self, transform: Any, message: str) -> None:
        with pytest.raises(MergeError, match=message):
            split_preprocess(transform)

    def test_a_random_crop_is_not_disturbed(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        split_preprocess(T.Compose([T.RandomResizedCrop(16), T.ToTensor()]))
        assert torch.equal(torch.rand(1), expected)


class TestCorruptedImages:
    @pytest.fixture
    def images(self, tmp_path: Path) -> FolderImages:
        for number in range(6):
            path = tmp_path / "set" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene(40, number)).save(path)
        return FolderImages(tmp_path / "set", transform=PREPROCESSINGS["open_clip"])

    def test_the_crop_is_corrupted_and_then_normalised(self, images: FolderImages) -> None:
        data = CorruptedImages(images, Corruption("gaussian_noise", 4))
        picture, label = images.picture(5)
        crop = np.asarray(T.Compose([T.Resize(20), T.CenterCrop(16)])(picture))
        noisy = Corruption("gaussian_noise", 4)(crop, 5)
        image, found = data[5]
        assert torch.equal(image, torch.from_numpy(noisy).permute(2, 0, 1) / 255 * 2 - 1)
        assert (found, len(data), data.classes) == (label, 6, ("a", "b"))
        assert torch.equal(data[-1][0], image)

    def test_workers_and_order_do_not_matter(self, images: FolderImages) -> None:
        data = CorruptedImages(images, Corruption("impulse_noise", 2))
        direct = torch.stack([data[index][0] for index in (3, 1, 4, 0)])
        loader: DataLoader[Any] = DataLoader(
            data, batch_size=2, sampler=[3, 1, 4, 0], num_workers=1, multiprocessing_context="fork"
        )
        assert torch.equal(torch.cat([batch[0] for batch in loader]), direct)
