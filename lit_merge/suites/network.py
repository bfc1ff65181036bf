"""A suite of your own networks and datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_merge.checkpoints.origin import check_origin
from lit_merge.checkpoints.reading import read_state
from lit_merge.data.pixels import PixelScale
from lit_merge.encoders.heads import read_head
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset, Split, Suite

__all__ = ("NetworkSuite",)


class NetworkSuite(Suite):
    """Any ``nn.Module`` with fine-tuned copies and labelled test sets, from Python or from a config.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``, or to logits if there are no heads.
        base: State dict of the pretrained network, or a file with one; by default that of ``network``.
        experts: State dict or file per task; the order of the tasks is that of this mapping.
        test: Test set per task: map-style, ``(image, label)`` with a float tensor ``(C, H, W)`` and a class index.
        heads: Frozen head per task: a module, or a file with the ``weight`` ``(C, D)`` and maybe the ``bias``
            ``(C,)`` of a linear layer. Tasks that are not named have the identity.
        train: Training set per task, for methods that fine-tune or calibrate.
        num_classes: Classes per task, where neither head nor dataset (``classes``) tells.
        name: Name in reports.
        pixels: How the values of all images come from pixels; by default the test sets are asked.

    Raises:
        MergeError: The tasks of the arguments do not agree, or a file is not usable.
    """

    def __init__(
        self,
        network: nn.Module,
        experts: dict[str, dict[str, Tensor] | str | Path],
        test: dict[str, Dataset],  # type: ignore[type-arg] # jsonargparse needs the plain class
        base: dict[str, Tensor] | str | Path | None = None,
        heads: dict[str, nn.Module | str | Path] | None = None,
        train: dict[str, Dataset] | None = None,  # type: ignore[type-arg]
        num_classes: dict[str, int] | None = None,
        name: str = "NetworkSuite",
        pixels: PixelScale | None = None,
    ) -> None:
        self._name = name
        self._pixels = pixels
        self._network = network
        self._base = base
        self._experts = dict(experts)
        self._heads = dict(heads or {})
        self._data = {"test": dict(test), "train": dict(train or {})}
        self._num_classes = dict(num_classes or {})
        if not self._experts:
            raise MergeError(f"{name}.experts: expected at least one, found none")
        if set(test) != set(experts):
            raise MergeError(
                f"{name}: experts are for {sorted(experts)}, test sets for {sorted(test)}; they must agree"
            )
        for argument, given in (("heads", self._heads), ("train", self._data["train"]), ("num_classes", num_classes)):
            if unknown := sorted(set(given or {}) - set(experts)):
                raise MergeError(f"{name}.{argument}: unknown tasks {unknown}; the experts are for {sorted(experts)}")

    @property
    def name(self) -> str:
        """Name of the suite in reports."""
        return self._name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the experts."""
        return tuple(self._experts)

    def network(self) -> nn.Module:
        """Return the architecture."""
        return self._network

    def base(self) -> Mapping[str, Tensor]:
        """Return the base, checked against the network."""
        own = self._network.state_dict()
        state = own if self._base is None else _state(self._base)
        if difference := sorted(set(state) ^ set(own)):
            raise MergeError(f"{self.name}: base and network have different tensors: {', '.join(difference[:5])}")
        for name, value in own.items():
            if (found := getattr(state[name], "shape", None)) is not None and found != value.shape:
                raise MergeError(
                    f"{self.name}: base: {name}: the network expects shape {tuple(value.shape)}, found {tuple(found)}"
                )
        return state

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return one expert; a file is read tensor by tensor where its format allows."""
        source = self._experts[self.check_task(task)]
        if not isinstance(source, Mapping):
            check_origin(Path(source), self.base(), f"{self.name}: expert {task!r}")
        return _state(source)

    def head(self, task: str) -> nn.Module:
        """Return the head of a task, made from its file if need be."""
        head = self._heads.get(self.check_task(task))
        if head is None:
            return nn.Identity()
        if not isinstance(head, nn.Module):
            head = self._heads[task] = read_head(head)
        return head

    def num_classes(self, task: str) -> int:
        """Return the number of classes, by argument, head or dataset.

        Raises:
            MergeError: None of them tells.
        """
        if self.check_task(task) in self._num_classes:
            return self._num_classes[task]
        weight = getattr(self.head(task), "weight", None)
        if isinstance(weight, Tensor):
            return len(weight)
        if (classes := getattr(self._data["test"][task], "classes", None)) is not None:
            return len(classes)
        raise MergeError(f"{self.name}: task {task!r}: number of classes unknown; give num_classes: {{{task}: ...}}")

    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Return one split of a task.

        Raises:
            MergeError: The suite has no such split.
        """
        if self.check_task(task) not in self._data[split]:
            raise MergeError(f"{self.name}: task {task!r} has no {split} set; give {split}: {{{task}: ...}}")
        data = self._data[split][task]
        if not isinstance(data, LabelledDataset):
            raise MergeError(
                f"{self.name}: task {task!r}: expected a dataset with a length, found {type(data).__name__}"
            )
        return data

    def pixels(self, task: str) -> PixelScale:
        """Return how the values of a task's images come from pixels.

        Raises:
            MergeError: It was not given and cannot be told.
        """
        return self._pixels or super().pixels(task)


def _state(source: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    return source if isinstance(source, Mapping) else read_state(source)
