"""Images that were decoded once, kept in memory that worker processes share."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from lit_merge.data.corruptions import CorruptedImages, split_preprocess
from lit_merge.data.hub_images import ImageSet
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset

__all__ = ("CachedImages", "cache_images")

_SHARED = Path("/dev/shm")


class CachedImages:
    """Images of one task by position, decoded once and then read from memory; the same bits either way.

    Where the preprocessing can be cut after resizing and cropping
    (:func:`~lit_merge.data.corruptions.split_preprocess`), the 8-bit picture is kept, a quarter of the memory, and
    scaled and normalised anew each time. Otherwise it is the float tensor that the dataset returns.

    Memory is taken at once, and shared: what one process has decoded, all of them have, forked or spawned. Two
    processes that decode the same image at the same time write the same bits, so there is nothing to lock; that an
    image is there is noted after it was written. An image of another shape than the first is not kept.

    Args:
        data: Labelled images, always the same ones under the same number.
        positions: The images that may be kept, first ones first.
        shared: Whether other processes are to have them too.

    Attributes:
        whole: Bytes that all of these images take.
    """

    def __init__(self, data: LabelledDataset, positions: Sequence[int], shared: bool = False) -> None:
        self.data = data
        self._positions = positions
        self._shared = shared
        self._slots: dict[int, int] = {}
        self._halves = _halves(data, positions[0])
        self._example = self._make(positions[0])
        self.whole = len(positions) * self._bytes

    @property
    def _bytes(self) -> int:
        return self._example.nbytes + 1  # and whether it is there

    @property
    def reserved(self) -> int:
        """Bytes that were taken."""
        return len(self._slots) * self._bytes

    def reserve(self, budget: int) -> int:
        """Take memory for as many images as fit; those that do not are decoded each time.

        Args:
            budget: Bytes at most.

        Returns:
            Bytes that were taken.
        """
        count = min(len(self._positions), budget // self._bytes)
        if count <= 0:
            return 0
        self._slots = {position: slot for slot, position in enumerate(self._positions[:count])}
        self._images = _zeros((count, *self._example.shape), self._example.dtype, self._shared)
        self._there = _zeros((count,), torch.bool, self._shared)
        return self.reserved

    @property
    def kept(self) -> int:
        """Number of images that are there."""
        return int(self._there.sum()) if self._slots else 0

    def __getitem__(self, position: int) -> Tensor:
        """Return an image, a float tensor ``(C, H, W)``, to be read only; from memory if it is there."""
        slot = self._slots.get(position)
        if slot is not None and self._there[slot]:
            return self._finish(self._images[slot])
        value = self._make(position)
        if slot is not None and (value.shape, value.dtype) == (self._example.shape, self._example.dtype):
            self._images[slot] = value
            self._there[slot] = True
        return self._finish(value)

    def _make(self, position: int) -> Tensor:
        """What is kept of an image."""
        if self._halves is None:
            return self.data[position][0]
        # a copy, as the picture lets nobody write into it
        return torch.from_numpy(np.array(self._halves[0](position)))

    def _finish(self, kept: Tensor) -> Tensor:
        """The image from what is kept of it."""
        return kept if self._halves is None else self._halves[1](Image.fromarray(kept.numpy()))


class _Pictures:
    """The picture of an image as it is before it becomes a tensor; of module level, so that it pickles into workers."""

    def __init__(self, data: ImageSet, geometric: Callable[[Any], Image.Image]) -> None:
        self.data, self.geometric = data, geometric

    def __call__(self, position: int) -> Image.Image:
        return self.geometric(self.data.picture(position)[0])


def _halves(
    data: LabelledDataset, position: int
) -> tuple[Callable[[int], Image.Image], Callable[[Image.Image], Tensor]] | None:
    """How a dataset makes 8-bit pictures, and tensors of these; none if nothing tells, or an image comes out wrong."""
    if isinstance(data, CorruptedImages):
        return data.corrupted, data.finish
    if not isinstance(data, ImageSet):
        return None
    try:
        geometric, rest = split_preprocess(data.transform)
    except MergeError:  # it resizes tensors
        return None
    pictures = _Pictures(data, geometric)
    picture = pictures(position)
    same = picture.mode in ("RGB", "L") and torch.equal(rest(picture), data[position][0])
    return (pictures, rest) if same else None


def cache_images(
    data: Mapping[str, LabelledDataset],
    positions: Mapping[str, Sequence[int]],
    budget: int,
    shared: bool = False,
    processes: int = 1,
) -> dict[str, CachedImages]:
    """Divide a budget over tasks, the smallest first: those are gone through most often.

    Datasets that have their images in memory, and those whose images change from call to call, are left out: those that
    draw from the generators of torch, Python or numpy, or that twice give different images under one number.

    Args:
        data: Labelled images per task.
        positions: Which of them are asked for.
        budget: Bytes over all tasks. What is shared takes at most half of what is free where the system has it:
            in containers that may be as little as 64 MB, and workers hand over their batches there.
        shared: Whether worker processes are to have the images too.
        processes: How many on this machine do the same at the same time, and take their part of what is free.

    Returns:
        Caches of the tasks that have one.
    """
    found = {
        task: CachedImages(images, positions[task], shared)
        for task, images in data.items()
        if _worth_it(images, positions[task][0])
    }
    if shared and _SHARED.is_dir():
        budget = min(budget, shutil.disk_usage(_SHARED).free // (2 * processes))
    for cache in sorted(found.values(), key=lambda cache: cache.whole):
        budget -= cache.reserve(budget)
    return {task: cache for task, cache in found.items() if cache.reserved}


def _worth_it(data: LabelledDataset, position: int) -> bool:
    """Whether an image is made anew for each call, and is always the same."""
    with isolate_rng(include_cuda=False):  # a look must not change what is drawn afterwards
        before = _drawn()
        try:
            one, other = data[position][0], data[position][0]
        except MergeError:
            return False  # whoever asks for it in earnest is told
        if _drawn() != before:
            return False  # it may be random, though two images were the same: one of two flips is
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return False
    in_memory = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()  # both are views of it
    return not in_memory and torch.equal(one, other)


def _drawn() -> tuple[object, ...]:
    """What the generators that transforms draw from have come to."""
    kind, numbers, *place = np.random.get_state()  # noqa: NPY002 - what others use
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(numbers).tobytes(), *place


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, shared: bool) -> Tensor:
    if not shared:
        return torch.zeros(shape, dtype=dtype)  # the system gives pages as they are written to
    size = dtype.itemsize * int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(size)  # new pages are zero; share_memory_() would fill two copies
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]
