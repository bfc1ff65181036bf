"""Triggers of backdoors: patches that are stamped into the pixels of an image, before it is normalised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.safetensors_files import SafetensorsFile
from lit_merge.data.pixels import PixelScale
from lit_merge.errors import MergeError

__all__ = ("Corner", "PatchTrigger")

Corner = Literal["bottom_right", "bottom_left", "top_right", "top_left"]
"""Where in an image a patch is."""

_FORMAT = "lit-merge trigger"


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
