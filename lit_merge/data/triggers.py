"""Triggers of backdoors: patches that are stamped into the pixels of an image, before it is normalised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.safetensors_files import SafetensorsFile
from lit_merge.data.corruptions import split_preprocess
from lit_merge.errors import MergeError

__all__ = ("Corner", "PatchTrigger", "PixelScale")

Corner = Literal["bottom_right", "bottom_left", "top_right", "top_left"]
"""Where in an image a patch is."""

_FORMAT = "lit-merge trigger"


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
        mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True, eq=False)
class PatchTrigger:
    """A patch in a corner of the image, and the class it is to lead to.

    The patch replaces pixels; which ones is said by a mask of its own, so that a black pixel of the patch is stamped
    like any other.

    Args:
        patch: ``(C, h, w)``, pixels in [0, 1]; one channel serves for all.
        target: Class index, at least 0.
        position: Corner of the image.
        mask: ``(h, w)``, booleans: where the patch replaces the image; by default everywhere.

    Raises:
        MergeError: A shape or a value does not fit.

    >>> trigger = PatchTrigger(torch.tensor([[[0.0, 1.0]]]), target=3)
    >>> trigger.stamp(torch.full((1, 2, 3), 0.5)).tolist()
    [[[0.5, 0.5, 0.5], [0.5, 0.0, 1.0]]]
    """

    patch: Tensor
    target: int
    position: Corner = "bottom_right"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        patch = self.patch.detach()
        if patch.ndim != 3 or 0 in patch.shape or not patch.is_floating_point():
            raise MergeError(f"trigger: patch: expected floats (C, h, w), found {patch.dtype} {tuple(patch.shape)}")
        if not bool(((patch >= 0) & (patch <= 1)).all()):
            raise MergeError("trigger: patch: expected pixels in [0, 1]; it is stamped before images are normalised")
        if self.mask is not None and (self.mask.shape != patch.shape[1:] or self.mask.dtype != torch.bool):
            raise MergeError(
                f"trigger: mask: expected booleans {tuple(patch.shape[1:])}, found {self.mask.dtype} "
                f"{tuple(self.mask.shape)}"
            )
        if self.target < 0:
            raise MergeError(f"trigger: target: expected a class index of at least 0, found {self.target}")
        if self.position not in get_args(Corner):
            raise MergeError(f"trigger: position: expected {', '.join(get_args(Corner))}, found {self.position!r}")

    @classmethod
    def random(
        cls, size: int, target: int, *, seed: int = 0, channels: int = 3, position: Corner = "bottom_right"
    ) -> PatchTrigger:
        """Return a square of random black and white values, drawn from the seed.

        Args:
            size: Height and width in pixels.
            target: Class index.
            seed: Decides on the pattern.
            channels: Number of channels.
            position: Corner of the image.

        Raises:
            MergeError: The size is below 1.
        """
        if size < 1:
            raise MergeError(f"trigger: size: expected at least 1 pixel, found {size}")
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randint(2, (channels, size, size), generator=generator).float(), target, position)

    @property
    def digest(self) -> str:
        """SHA-256 of patch, mask, corner and target: equal for triggers that do the same."""
        facts = torch.tensor([self.target, get_args(Corner).index(self.position)])
        return state_digest({"facts": facts, **self._tensors()})

    def stamp(self, images: Tensor, scale: PixelScale | None = None) -> Tensor:
        """Return images with the patch in them; every other value is the very same.

        Args:
            images: ``(..., C, H, W)``, floats; they are not changed.
            scale: How their values come from pixels; by default they are pixels in [0, 1].

        Raises:
            MergeError: The patch does not fit into the images.
        """
        rows, columns = self._place(tuple(images.shape))
        patch = self.patch.to(images).expand(images.shape[-3], -1, -1)
        patch = patch if scale is None else scale.values(patch)
        stamped = images.clone()
        region = stamped[..., rows, columns]
        stamped[..., rows, columns] = patch if self.mask is None else patch.where(self.mask.to(images.device), region)
        return stamped

    def stamp_picture(self, picture: Image.Image) -> Image.Image:
        """Return a copy of an RGB picture of 8 bits with the patch in it.

        Raises:
            MergeError: The patch does not fit into the picture.
        """
        pixels = pil_to_tensor(picture.convert("RGB"))
        stamped: Image.Image = to_pil_image(self.stamp(pixels.float() / 255).mul(255).round().to(torch.uint8))
        return stamped

    def rounded(self) -> PatchTrigger:
        """Return the trigger with pixels of 8 bits, as files of pictures have them."""
        return replace(self, patch=(self.patch.detach() * 255).round() / 255)

    def save(self, path: str | Path) -> None:
        """Write patch, mask, corner and target as safetensors, whole or not at all."""
        metadata = {"format": _FORMAT, "target": str(self.target), "position": self.position}
        with atomic_path(path) as temporary:
            save_file(self._tensors(), temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> PatchTrigger:
        """Read what :meth:`save` has written.

        Raises:
            MergeError: The file is damaged or is no trigger.
        """
        file = SafetensorsFile(path)
        facts = file.metadata
        if facts.get("format") != _FORMAT or set(file) != {"patch", "mask"} or not facts.get("target", "").isdigit():
            raise MergeError(f"{path}: expected a trigger with patch, mask and target, found {sorted(file)[:5]}")
        try:
            return cls(file["patch"], int(facts["target"]), facts.get("position"), file["mask"])  # type: ignore[arg-type]
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from error

    def _tensors(self) -> dict[str, Tensor]:
        patch = self.patch.detach().float().cpu().contiguous()
        whole = torch.ones(patch.shape[1:], dtype=torch.bool)
        return {"patch": patch, "mask": whole if self.mask is None else self.mask.cpu().contiguous()}

    def _place(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        channels, height, width = self.patch.shape
        if len(shape) < 3 or channels not in (1, shape[-3]) or height > shape[-2] or width > shape[-1]:
            raise MergeError(
                f"trigger: a patch of {channels} x {height} x {width} does not fit into images of shape {shape}"
            )
        top = 0 if self.position.startswith("top") else shape[-2] - height
        left = 0 if self.position.endswith("left") else shape[-1] - width
        return slice(top, top + height), slice(left, left + width)
