"""Views of labelled datasets: with labels for evaluation, without for adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_merge.data.batches import UnlabelledBatch
from lit_merge.errors import MergeError

if TYPE_CHECKING:
    from lit_merge.data.image_cache import CachedImages
    from lit_merge.suites.base import LabelledDataset

__all__ = ("EvenlySpread", "Indexed", "TaskMixture")


class Indexed(Dataset[tuple[Tensor, int, int]]):
    """Some images of a labelled dataset as ``(image, label, position)``; labels are checked as they are read.

    Args:
        data: The labelled dataset.
        positions: Which of its images, in which order.
        where: Name for messages, such as ``"mnist (test)"``.
        num_classes: Labels must be in ``range(num_classes)``.
    """

    def __init__(self, data: LabelledDataset, positions: Sequence[int], where: str, num_classes: int) -> None:
        self.data = data
        self.positions = positions
        self.where = where
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        position = int(self.positions[item])
        image, label = self.data[position]
        if not 0 <= int(label) < self.num_classes:
            raise MergeError(
                f"{self.where}: image {position}: label {int(label)} is out of range; the head has "
                f"{self.num_classes} classes, so labels must be 0 to {self.num_classes - 1}"
            )
        return _tensor(image, self.where, position), int(label), position


class EvenlySpread(Dataset[tuple[Tensor, int]]):
    """Some images of a labelled dataset, evenly spread over it: many datasets are sorted by class.

    Args:
        data: The labelled dataset.
        size: How many; all of them if it has no more.

    Attributes:
        classes: Names of the classes, if the dataset has them.
        positions: Positions of the images in the dataset.
    """

    def __init__(self, data: LabelledDataset, size: int) -> None:
        self.data = data
        self.classes = getattr(data, "classes", None)
        size = min(size, len(data))
        self.positions = [number * len(data) // size for number in range(size)]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[self.positions[index]]


class TaskMixture(Dataset[dict[str, UnlabelledBatch]]):
    """Unlabelled images of all tasks; one item is one batch of every task.

    An item is asked for by positions and share per task, as :class:`~lit_merge.data.StreamSampler` yields them.
    Labels are dropped here, before anything that learns can see them.

    Args:
        data: Labelled dataset per task.
        caches: Where images of some tasks are taken from instead, by position.
    """

    def __init__(self, data: Mapping[str, LabelledDataset], caches: Mapping[str, CachedImages] | None = None) -> None:
        self.data = dict(data)
        self.caches = dict(caches or {})

    def __len__(self) -> int:
        return sum(len(data) for data in self.data.values())

    def __getitem__(self, draws: Mapping[str, tuple[Sequence[int], float]]) -> dict[str, UnlabelledBatch]:
        return {task: self._batch(task, *draw) for task, draw in draws.items()}

    def _batch(self, task: str, positions: Sequence[int], share: float) -> UnlabelledBatch:
        images = [_tensor(self._image(task, position), task, position) for position in positions]
        return UnlabelledBatch(torch.stack(images), torch.tensor(positions, dtype=torch.long), share, tuple(positions))

    def _image(self, task: str, position: int) -> object:
        return self.caches[task][position] if task in self.caches else self.data[task][position][0]


def _tensor(image: object, where: str, position: int) -> Tensor:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        found = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise MergeError(
            f"{where}: image {position}: expected a float tensor (C, H, W), found {found}; "
            "give the dataset a transform that ends in one, such as torchvision.transforms.ToTensor"
        )
    return image
