"""What a loader yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ("LabelledBatch", "UnlabelledBatch")


class UnlabelledBatch(NamedTuple):
    """Images of one task for adaptation; there are no labels that an objective could see.

    Attributes:
        images: ``(B, C, H, W)``.
        index: ``(B,)``, position of each image in the task's test set: the same image always has the same number.
    """

    images: Tensor
    index: Tensor


class LabelledBatch(NamedTuple):
    """Images of one task for evaluation.

    Attributes:
        images: ``(B, C, H, W)``.
        labels: ``(B,)``, class indices.
        index: ``(B,)``, position of each image in the task's test set.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
