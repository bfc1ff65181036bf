"""What a loader yields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ("LabelledBatch", "UnlabelledBatch")


class UnlabelledBatch(NamedTuple):
    """Images of one task for adaptation; there are no labels that an objective could see.

    Attributes:
        images: ``(B, C, H, W)``.
        index: ``(B,)``, position of each image in the task's test set: the same image always has the same number.
        share: Weight of this batch in the mean over ranks: its images × ranks / the images of all ranks. It is 1 where
            all ranks have as many, and 0 for a borrowed image, which is there only so that every rank has every task.
        positions: The numbers of ``index`` once more, as plain integers that stay on the host: whoever looks one up
            there need not wait for the device. May be left out.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment] # not the method of a tuple
    share: float = 1.0
    positions: Sequence[int] = ()

    def on_host(self) -> Sequence[int]:
        """Return the numbers of ``index``; without ``positions`` the device is waited for.

        >>> import torch
        >>> UnlabelledBatch(torch.zeros(2, 1), torch.tensor([7, 3])).on_host()
        [7, 3]
        """
        return self.positions if len(self.positions) == len(self.index) else self.index.tolist()


class LabelledBatch(NamedTuple):
    """Images of one task for evaluation.

    Attributes:
        images: ``(B, C, H, W)``.
        labels: ``(B,)``, class indices.
        index: ``(B,)``, position of each image in the task's test set.
    """

    images: Tensor
    labels: Tensor
    index: Tensor  # type: ignore[assignment] # not the method of a tuple
