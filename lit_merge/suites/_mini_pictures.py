"""Crops of the photographs and micrographs inside the wheels of scikit-image and scikit-learn.

The pictures of scikit-image are public domain or freely licensed, as the docstrings of ``skimage.data`` say one by one;
``china.jpg`` and ``flower.jpg`` of scikit-learn are CC BY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lit_merge.errors import MergeError, require

__all__ = ("PICTURE_TASKS", "PictureTask", "crop_task")

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SIZE = 28
_FLAT = 6.0  # standard deviation in grey levels: plain sky and black background say nothing
_TRIES = 50


@dataclass(frozen=True)
class PictureTask:
    """Which pictures a task tells apart, by small crops.

    Attributes:
        files: One picture per class.
        mode: Pillow mode of the crops, ``"L"`` (grey) or ``"RGB"``.
        side: Smallest and largest side of a crop, as a fraction of the picture's height.
        contrast: Largest relative change of contrast and brightness.
        equalise: Whether all crops get about the same contrast first.
    """

    files: Sequence[str]
    mode: str
    side: tuple[float, float]
    contrast: float
    equalise: bool


_MATERIALS = ("brick.png", "grass.png", "gravel.png")
_SCENES = ("astronaut.png", "chelsea.png", "motorcycle_left.png", "rocket.jpg", "china.jpg")

PICTURE_TASKS: dict[str, PictureTask] = {
    "textures": PictureTask(
        (
            *_MATERIALS,
            "ihc.png",
            "hubble_deep_field.jpg",
            "moon.png",
            "coins.png",
            "page.png",
            "text.png",
            "retina.jpg",
        ),
        "L",
        (0.2, 0.4),
        0.3,
        equalise=True,
    ),
    "photos": PictureTask(
        (*_SCENES, "coffee.png", "flower.jpg", "ihc.png", "retina.jpg", "logo.png"),
        "RGB",
        (0.25, 0.5),
        0.2,
        equalise=False,
    ),
}


def crop_task(task: PictureTask, split: int, count: int, rng: np.random.Generator) -> tuple[Pixels, Labels]:
    """Cut the images of one split.

    Training crops lie in the left 58 % of a picture and test crops in the right 40 %: no pixel is in both.

    Args:
        task: What is cut.
        split: 0 for the training images, 1 for the test images.
        count: Number of images; the classes take turns.
        rng: Source of every random choice.

    Returns:
        Images ``(N, C, 28, 28)`` and labels ``(N,)``; C is 1 for grey and 3 for colour.
    """
    regions = [_region(_picture(file, task.mode), split) for file in task.files]
    labels = np.arange(count) % len(regions)
    crops = np.stack([_crop(regions[label], task.side, rng) for label in labels])
    crops = crops[:, None] if crops.ndim == 3 else crops.transpose(0, 3, 1, 2)
    return _relight(crops, task, rng), labels


def _region(picture: Image.Image, split: int) -> Image.Image:
    """Return the part of a picture that belongs to one split."""
    width, height = picture.size
    return picture.crop((0, 0, int(0.58 * width), height) if split == 0 else (int(0.6 * width), 0, width, height))


def _crop(region: Image.Image, side: tuple[float, float], rng: np.random.Generator) -> Pixels:
    """Return one random square of the region, scaled to 28 x 28 and perhaps mirrored; rarely one without content."""
    for _ in range(_TRIES):
        length = min(int(rng.uniform(*side) * region.size[1]), *region.size)
        left, top = (int(rng.integers(0, extent - length + 1)) for extent in region.size)
        box = (left, top, left + length, top + length)
        small = region.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
        pixels = np.asarray(small, dtype=np.uint8)
        if pixels.std() > _FLAT:
            break
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _relight(crops: Pixels, task: PictureTask, rng: np.random.Generator) -> Pixels:
    """Change contrast and brightness of every crop at random, so that the mean grey does not give the class away."""
    shape = (len(crops), 1, 1, 1)
    values = crops.astype(np.float32) / 255
    mean = values.mean(axis=(1, 2, 3), keepdims=True)
    contrast = np.exp(rng.uniform(-task.contrast, task.contrast, shape))
    if task.equalise:
        contrast *= 0.2 / values.std(axis=(1, 2, 3), keepdims=True).clip(0.02)
    level = mean + task.contrast * (rng.uniform(0.2, 0.8, shape) - mean)
    seen = np.asarray(np.clip((values - mean) * contrast + level, 0, 1))
    return (seen * 255).round().astype(np.uint8)


def _picture(file: str, mode: str) -> Image.Image:
    """Open one picture of scikit-image or scikit-learn."""
    path = _find(file)
    try:
        with Image.open(path) as picture:
            return _opaque(picture).convert(mode)
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error}); reinstall the package it belongs to") from error


def _opaque(picture: Image.Image) -> Image.Image:
    """Put a picture with transparency on white."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _find(file: str) -> Path:
    """Return the path of a picture inside the installed packages."""
    if file in ("china.jpg", "flower.jpg"):
        return _folder("sklearn") / "datasets" / "images" / file
    return _folder("skimage") / "data" / file


def _folder(package: str) -> Path:
    """Return the folder of an installed package."""
    return Path(str(require(package, "demo").__file__)).parent
