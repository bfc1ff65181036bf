"""Pixels in [0, 1] and the values that networks take: how the one becomes the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lit_merge.data.corruptions import split_preprocess
from lit_merge.errors import MergeError

__all__ = ("PixelScale", "per_channel", "pixel_scale")


@dataclass(frozen=True)
class PixelScale:
    """How the values of an image come from its pixels in [0, 1]: ``value = (pixel - mean) / std`` per channel.

    Args:
        mean: One number for all channels, or one per channel.
        std: Likewise, positive.

    Raises:
        MergeError: The numbers are not finite, a deviation is not positive, or there are not equally many.

    >>> scale = PixelScale.of_range(-1, 1)
    >>> scale.values(torch.tensor([[[0.0, 0.5, 1.0]]])).tolist()
    [[[-1.0, 0.0, 1.0]]]
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        if not self.mean or len(self.mean) != len(self.std) or not all(map(math.isfinite, numbers)):
            raise MergeError(f"PixelScale: expected as many finite means as deviations, found {self.mean}, {self.std}")
        if min(self.std) <= 0:
            raise MergeError(f"PixelScale.std: expected positive numbers, found {self.std}")

    @classmethod
    def of_range(cls, low: float, high: float) -> PixelScale:
        """Return the scale of images with values from ``low`` (black) to ``high`` (white)."""
        return cls((low / (low - high),), (1 / (high - low),))

    @classmethod
    def measured(cls, transform: Callable[[Any], Any]) -> PixelScale:
        """Measure what a preprocessing does to pixels after it has resized and cropped.

        Args:
            transform: Maps an RGB picture to a float tensor ``(3, H, W)``.

        Raises:
            MergeError: It cannot be cut there (:func:`~lit_merge.data.corruptions.split_preprocess`), or is not
                affine per channel, so that there is no place for a patch after it.

        >>> from torchvision import transforms as T
        >>> scale = PixelScale.measured(T.Compose([T.CenterCrop(8), T.ToTensor(), T.Normalize(0.5, 0.25)]))
        >>> [round(number, 5) for number in (*scale.mean, *scale.std)]
        [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
        """
        pick, rest = split_preprocess(transform)
        size = pick(Image.new("RGB", (320, 256))).size
        black, white = (rest(Image.new("RGB", size, (level,) * 3)).double() for level in (0, 255))
        low, high = black.mean((1, 2)), white.mean((1, 2))
        probe = rest(Image.new("RGB", size, (51, 102, 204))).double()
        expected = low + (high - low) * torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)
        if not torch.allclose(probe, expected[:, None, None], atol=1e-4) or not bool((high > low).all()):
            raise MergeError("transform: after the crop it is not one scale and shift per channel; give pixels: {...}")
        std = 1 / (high - low)
        return cls(tuple((-low * std).tolist()), tuple(std.tolist()))

    def values(self, pixels: Tensor) -> Tensor:
        """Map pixels ``(..., C, H, W)`` to values."""
        mean, std = self._columns(pixels)
        return (pixels - mean) / std

    def pixels(self, values: Tensor) -> Tensor:
        """Map values ``(..., C, H, W)`` to pixels."""
        mean, std = self._columns(values)
        return values * std + mean

    def _columns(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.mean) not in (1, images.shape[-3]):
            raise MergeError(f"PixelScale: {len(self.mean)} channels do not fit images {tuple(images.shape)}")
        return per_channel(self.mean, images), per_channel(self.std, images)


def per_channel(numbers: Sequence[float], images: Tensor) -> Tensor:
    """Return numbers as ``(C, 1, 1)``, with dtype and device of images.

    They are filled in there: a tensor that is made on the host would have to be copied, for which the host waits until
    the device has done everything else.

    Args:
        numbers: One per channel, or one for all.
        images: ``(..., C, H, W)``.

    >>> per_channel((0.5, 0.25), torch.zeros(2, 4, 4)).flatten()
    tensor([0.5000, 0.2500])
    """
    return torch.stack([images.new_full((1, 1), number) for number in numbers])


def pixel_scale(data: object) -> PixelScale:
    """Tell how the values of a dataset's images come from pixels, also through views of it.

    Args:
        data: Has the scale as ``pixels``, or a ``transform`` of pictures that is measured, or is a view that holds
            such a dataset as ``images``, ``data`` or ``dataset``.

    Raises:
        MergeError: Nothing tells it, or the transform has no place for a patch.
    """
    seen: object = data
    while seen is not None:
        if isinstance(scale := getattr(seen, "pixels", None), PixelScale):
            return scale
        if callable(transform := getattr(seen, "transform", None)):
            return PixelScale.measured(transform)
        inner = [getattr(seen, name, None) for name in ("images", "data", "dataset")]
        seen = next((view for view in inner if isinstance(view, Dataset)), None)
    raise MergeError(
        f"{type(data).__name__}: nothing tells how its values come from pixels; give pixels, such as "
        "{mean: [0.5], std: [0.5]} for images in [-1, 1]"
    )
