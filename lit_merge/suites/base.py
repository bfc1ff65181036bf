"""The contract of a suite: what is merged, and on which images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from lit_merge.errors import MergeError
from lit_merge.suites.inventory import Piece

if TYPE_CHECKING:
    from lit_merge.data.pixels import PixelScale

__all__ = ("LabelledDataset", "Split", "Suite")

Split = Literal["train", "test"]


@runtime_checkable
class LabelledDataset(Sized, Protocol):
    """A map-style dataset of ``(image, label)``: a float tensor ``(C, H, W)`` and a class index."""

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]:
        """Return image and label number ``index``."""
        ...


class Suite(ABC):
    """Base network, experts, heads and datasets of a merging problem.

    A suite is cheap to construct: files are read, and whatever has to be built is built, only when asked for.
    Everything it returns belongs to the caller only for reading; the merge copies what it changes.
    """

    @property
    def name(self) -> str:
        """Name of the suite in reports."""
        return type(self).__name__

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they index every stacked tensor."""

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of further tasks that are scored with the merged network but neither merged nor adapted on."""
        return ()

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of all tasks that are scored: :attr:`tasks`, then :attr:`unseen`."""
        return (*self.tasks, *self.unseen)

    def has_expert(self, task: str) -> bool:
        """Whether :meth:`expert` has a network for ``task``; unseen tasks may have none."""
        return task in self.tasks

    def sources(self) -> dict[str, Any]:
        """Where the networks come from, as plain data for reports and model cards."""
        return {}

    def inventory(self) -> Sequence[Piece]:
        """List networks and datasets with their sizes, licences and whether they are on this disk; fetch nothing."""
        return ()

    def prepare(self) -> None:  # noqa: B027 - optional hook, not an oversight
        """Build or download what is missing; called once per node, before anything else is asked for."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the architecture, mapping images ``(B, C, H, W)`` to features ``(B, D)``; its values do not matter."""

    @abstractmethod
    def base(self) -> Mapping[str, Tensor]:
        """Return the state dict of the pretrained network."""

    @abstractmethod
    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return the state dict of the network fine-tuned on ``task``."""

    @abstractmethod
    def head(self, task: str) -> nn.Module:
        """Return the frozen head of ``task``, mapping features ``(B, D)`` to logits ``(B, classes)``."""

    @abstractmethod
    def num_classes(self, task: str) -> int:
        """Return the number of classes of ``task``."""

    @abstractmethod
    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Return the labelled images of one split of ``task``."""

    def pixels(self, task: str) -> PixelScale:
        """Return how the values of a task's images come from pixels, for what is defined in pixels.

        By default it is read off the test set: its ``pixels``, or its ``transform`` of pictures, which is measured.

        Raises:
            MergeError: It cannot be told.
        """
        from lit_merge.data.pixels import pixel_scale  # the data package is built on suites

        return pixel_scale(self.dataset(task, "test"))

    def check_task(self, task: str) -> str:
        """Return ``task`` if the suite has it.

        Raises:
            MergeError: It does not; the message lists the tasks it has.
        """
        if task not in self.scored:
            raise MergeError(f"{self.name}: unknown task {task!r}; it has {', '.join(self.scored)}")
        return task
