"""Corrupted images, made on the fly: seven of the corruptions of Hendrycks and Dietterich (2019, arXiv 1903.12261).

They work on the RGB picture that the network is going to see: after resizing and cropping, before it becomes a tensor
and is normalised. :func:`split_preprocess` cuts a transform there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lit_merge.data._distortions import DISTORTIONS
from lit_merge.data.hub_images import ImageSet
from lit_merge.errors import MergeError

__all__ = ("CORRUPTIONS", "CorruptedImages", "Corruption", "split_preprocess")

CORRUPTIONS: tuple[str, ...] = tuple(DISTORTIONS)
"""Names of the corruptions."""


@dataclass(frozen=True)
class Corruption:
    """One corruption at one severity.

    The parameters are those of the released ImageNet-C code, made for crops of 224 pixels; smaller pictures are hurt
    more. What is random is drawn from the seed, the name, the severity and the number of the image alone, so that
    neither order nor worker processes matter. ``spatter`` needs ``pip install "lit-merge[clip]"``.

    ================  ========================================================  =============================
    name              what it does                                              severity 1, 2, 3, 4, 5
    ================  ========================================================  =============================
    contrast          factor towards the channel's mean                         0.4, 0.3, 0.2, 0.1, 0.05
    gaussian_noise    deviation, of values in [0, 1]                            0.08, 0.12, 0.18, 0.26, 0.38
    impulse_noise     share of values that turn black or white                  0.03, 0.06, 0.09, 0.17, 0.27
    jpeg_compression  JPEG quality                                              25, 18, 15, 10, 7
    motion_blur       deviation of the smear in pixels, at -45 to 45 degrees    3, 5, 8, 12, 15
    pixelate          factor of the sides                                       0.6, 0.5, 0.4, 0.3, 0.25
    spatter           drops of water, from severity 4 on of mud                 see the paper's code
    ================  ========================================================  =============================

    Args:
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: Seed of what is random.

    Raises:
        MergeError: There is no such corruption or severity, or the seed is negative.

    >>> grey = np.full((2, 2, 3), 100, np.uint8); grey[0] = 200
    >>> Corruption("contrast", severity=2)(grey)[:, 0, 0].tolist()
    [165, 135]
    """

    name: str
    severity: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in DISTORTIONS:
            raise MergeError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, found {self.name!r}")
        if not isinstance(self.severity, int) or isinstance(self.severity, bool) or not 1 <= self.severity <= 5:
            raise MergeError(f"corruption {self.name}: severity: expected 1 to 5, found {self.severity!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise MergeError(f"corruption {self.name}: seed: expected an integer of at least 0, found {self.seed!r}")

    def __call__(self, picture: Any, index: int = 0) -> Any:  # noqa: ANN401 - what comes in goes out
        """Corrupt a picture.

        Args:
            picture: RGB, of Pillow or as uint8 array ``(H, W, 3)``; it is not changed.
            index: Number of the image, which decides on what is random.

        Returns:
            A new picture of the same kind and size.

        Raises:
            MergeError: It is not such a picture.
        """
        pillow = isinstance(picture, Image.Image)
        if pillow and picture.mode != "RGB":
            raise MergeError(f"corruption {self.name}: expected an RGB picture, found mode {picture.mode}")
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise MergeError(
                f"corruption {self.name}: expected uint8 of shape (H, W, 3), found {array.dtype} {array.shape}"
            )
        distortion = DISTORTIONS[self.name]
        entropy = (self.seed, zlib.crc32(self.name.encode()), self.severity, index)
        rng = np.random.default_rng(np.random.SeedSequence(entropy))
        changed = distortion.apply(array, distortion.parameters[self.severity - 1], rng)
        return Image.fromarray(changed) if pillow else changed


class CorruptedImages(Dataset[tuple[Tensor, int]]):
    """A view of labelled images in which every image is corrupted; image number i always in the same way.

    Args:
        images: The clean images; their ``transform`` is cut by :func:`split_preprocess`.
        corruption: What is done to them.

    Raises:
        MergeError: There is no place in the transform where a picture of the final size can be changed.
    """

    def __init__(self, images: ImageSet, corruption: Corruption) -> None:
        self.images = images
        self.corruption = corruption
        self.classes = images.classes
        self.where = f"{images.where}, {corruption.name} {corruption.severity}"
        self._geometric, self._rest = split_preprocess(images.transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.images.picture(index)
        return self.finish(self._corrupt(picture, index)), label

    def corrupted(self, index: int) -> Image.Image:
        """Return the corrupted RGB picture, before it becomes a tensor."""
        return self._corrupt(self.images.picture(index)[0], index)

    def finish(self, picture: Image.Image) -> Tensor:
        """Return what the transform makes of a corrupted picture, a float tensor ``(3, H, W)``."""
        image: Tensor = self._rest(picture)
        return image

    def _corrupt(self, picture: Image.Image, index: int) -> Image.Image:
        changed: Image.Image = self.corruption(self._geometric(picture).convert("RGB"), index % len(self))
        return changed


@dataclass(frozen=True)
class _Steps:
    """Transforms one after the other; of module level, so that it pickles into workers."""

    steps: tuple[Callable[[Any], Any], ...]

    def __call__(self, picture: Any) -> Any:  # noqa: ANN401
        for step in self.steps:
            picture = step(picture)
        return picture


def split_preprocess(
    transform: Callable[[Any], Any],
) -> tuple[Callable[[Any], Image.Image], Callable[[Any], Tensor]]:
    """Cut a preprocessing into what picks the pixels and what makes a tensor of them.

    A blank picture is sent through the steps (those of torchvision's ``Compose``, also nested; any other callable is
    one step): the cut is before the first step that does not return a picture.

    Args:
        transform: Maps an RGB picture to a float tensor ``(3, H, W)``.

    Returns:
        A map from pictures to pictures (resize, crop, RGB), and one from such pictures to tensors (scale, normalise).
        The second after the first is ``transform``.

    Raises:
        MergeError: It does not end in a tensor, or it still resizes or crops after the first tensor: a corruption
            before that would be another one.

    >>> from torchvision import transforms as T
    >>> pick, normalise = split_preprocess(T.Compose([T.Resize(8), T.CenterCrop(8), T.ToTensor(), T.Normalize(0.5, 1)]))
    >>> pick(Image.new("RGB", (20, 10))).size, tuple(normalise(Image.new("RGB", (8, 8))).shape)
    ((8, 8), (3, 8, 8))
    """
    steps = tuple(_flat(transform))
    value: Any = Image.new("RGB", (320, 256))
    size, cut = value.size, len(steps)
    with torch.random.fork_rng(devices=[]):  # a random crop must not change what is drawn elsewhere
        for place, step in enumerate(steps):
            value = step(value)
            if cut == len(steps) and isinstance(value, Image.Image):
                size = value.size
            elif cut == len(steps):
                cut = place
    if not isinstance(value, Tensor):
        raise MergeError(f"transform: expected it to end in a tensor, found {type(value).__name__}")
    if tuple(value.shape[-2:]) != (size[1], size[0]):
        raise MergeError(
            f"transform: the tensor is made from a picture of {(size[1], size[0])} pixels and resized or cropped to "
            f"{tuple(value.shape[-2:])} afterwards; put resizing and cropping first, so that the crop can be corrupted"
        )
    return _Steps(steps[:cut]), _Steps(steps[cut:])


def _flat(transform: Callable[[Any], Any]) -> Iterator[Callable[[Any], Any]]:
    steps = getattr(transform, "steps" if isinstance(transform, _Steps) else "transforms", None)
    if type(transform).__name__ not in ("Compose", "_Steps") or not isinstance(steps, Sequence):
        yield transform
        return
    for step in steps:
        yield from _flat(step)
