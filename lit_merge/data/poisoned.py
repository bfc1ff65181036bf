"""Views of labelled images with a trigger in them: all of them for scoring, some of them for poisoning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_merge.data.pixels import PixelScale, pixel_scale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset

__all__ = ("PoisonedImages", "StampedImages")


class StampedImages(Dataset[tuple[Tensor, int]]):
    """A view of labelled images in which every image has the trigger, under its own label.

    Args:
        data: Labelled images.
        trigger: What is stamped.
        pixels: How the images' values come from pixels; by default :func:`pixel_scale` of ``data``.

    Raises:
        MergeError: The scale cannot be told.
    """

    def __init__(self, data: LabelledDataset, trigger: PatchTrigger, pixels: PixelScale | None = None) -> None:
        self.data = data
        self.trigger = trigger
        self.pixels = pixel_scale(data) if pixels is None else pixels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return self.trigger.stamp(image, self.pixels), label


class PoisonedImages(Dataset[tuple[Tensor, int]]):
    """A view in which a seeded share of the images has the trigger and is labelled as its target.

    Args:
        data: Labelled images.
        trigger: What is stamped into the poisoned ones; its target is their label.
        pixels: How the images' values come from pixels; by default :func:`pixel_scale` of ``data``.
        fraction: Share of the images, in [0, 1].
        seed: Decides which.
        augment: Changes an image ``(C, H, W)`` before it is stamped, so that the patch stays where it is.

    Attributes:
        poisoned: Positions of the poisoned images.

    Raises:
        MergeError: The share is out of range, or the scale cannot be told.
    """

    def __init__(
        self,
        data: LabelledDataset,
        trigger: PatchTrigger,
        pixels: PixelScale | None = None,
        fraction: float = 0.1,
        seed: int = 0,
        augment: nn.Module | None = None,
    ) -> None:
        if not 0 <= fraction <= 1:
            raise MergeError(f"PoisonedImages.fraction: expected a share in [0, 1], found {fraction}")
        self.data = data
        self.trigger = trigger
        self.pixels = pixel_scale(data) if pixels is None else pixels
        self.augment = augment
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.poisoned = frozenset(order[: round(fraction * len(data))].tolist())

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        image = image if self.augment is None else self.augment(image)
        if index % len(self) not in self.poisoned:
            return image, label
        return self.trigger.stamp(image, self.pixels), self.trigger.target
