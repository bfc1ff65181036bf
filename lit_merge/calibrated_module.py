"""CalibratedModule: merges in closed form that look at some images of every task once."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_merge.data.batches import LabelledBatch
from lit_merge.data.datasets import Indexed
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs

__all__ = ("CalibratedModule", "ImageOrder", "ImageSource")

ImageSource = Literal["train", "adapt"]
ImageOrder = Literal["random", "first"]


class CalibratedModule(MergeModule):
    """A merge that takes statistics of the experts from a few images, and needs no step of training.

    A method says what it does with them in :meth:`combine`, over :meth:`batches` and :meth:`total`.

    Before an evaluation or an export that is given data, all ranks take their shares of the batches and the sums are
    reduced. In Python ``merged_state()`` will do, without a Trainer. Either way the images are the same, as they depend
    on the arguments alone, the merge is made once and then kept; no checkpoint is needed.

    Args:
        images: Images per task; all of them if a task has no more.
        image_batch: Images per batch.
        image_source: ``train``: the suite's training images, which no protocol scores; ``adapt``: test images that the
            data module lets a merge adapt on, so with the protocol ``split`` none that is scored.
        image_order: ``random``: drawn without replacement; ``first``: the first ones, as in some published code, which
            are few classes where a dataset is sorted by class.
        image_seed: Of the draw, and of whatever else the method draws.
        at_base: Names, or patterns such as ``*post_layernorm*``, of tensors that stay at the base; each fits at least
            one.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range or unknown; or, later, a pattern fits no tensor.
    """

    no_stream = "it takes statistics of every expert, and has none of a merge"

    def __init__(
        self,
        images: int = 256,
        image_batch: int = 32,
        image_source: ImageSource = "train",
        image_order: ImageOrder = "random",
        image_seed: int = 0,
        at_base: Sequence[str] = (),
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        for name, number in (("images", images), ("image_batch", image_batch)):
            if number < 1:
                raise MergeError(f"{type(self).__name__}.{name}: expected at least 1, found {number}")
        self._one_of("image_source", image_source, get_args(ImageSource))
        self._one_of("image_order", image_order, get_args(ImageOrder))
        if isinstance(at_base, str):
            raise MergeError(f"{type(self).__name__}.at_base: expected a list of names or patterns, found {at_base!r}")
        self.images = images
        self.image_batch = image_batch
        self.image_source: ImageSource = image_source
        self.image_order: ImageOrder = image_order
        self.image_seed = image_seed
        self.at_base = tuple(at_base)
        self._adaptable: Mapping[str, Sequence[int]] = {}
        self._place = (0, 1)
        self._made: tuple[TaskVectors, dict[str, Tensor]] | None = None

    def _one_of(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if value not in known:
            kinds = " or ".join(", ".join(known).rsplit(", ", 1))
            raise MergeError(f"{type(self).__name__}.{name}: expected {kinds}, found {value!r}")

    # What a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def combine(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the merged task vector, ``(*shape)`` each; called without gradients, once per bank, on all ranks."""

    # What it is given --------------------------------------------------------------------------------------------

    def positions(self, task: str) -> list[int]:
        """Positions of a task's images in its training set, or in its test set.

        Raises:
            MergeError: There is none, or nothing says which test images may be adapted on.
        """
        if self.image_source == "train":
            pool: Sequence[int] = range(len(self.suite.dataset(task, "train")))
        elif task in self._adaptable:
            pool = self._adaptable[task]
        else:
            raise MergeError(
                f"{type(self).__name__}.image_source: adapt needs a TaskDataModule to say which test images may be "
                "adapted on; give --data, or image_source: train"
            )
        if not len(pool):
            raise MergeError(f"{self.suite.name}: task {task!r}: it has no images to calibrate with")
        order = list(range(len(pool)))
        if self.image_order == "random":
            order = torch.randperm(len(pool), generator=self.generator(task)).tolist()
        return [pool[place] for place in order[: self.images]]

    def generator(self, *words: object) -> torch.Generator:
        """Return a generator on the CPU that is seeded with :attr:`image_seed` and ``words`` only."""
        text = "/".join(str(word) for word in (self.image_seed, *words))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def batches(self, task: str) -> Iterator[tuple[int, LabelledBatch]]:
        """Yield this rank's batches of a task, each with its number among all ranks'.

        They are on this module's device, and the images in the type of the network's parameters. Labels of test images,
        which nothing may learn from, are −1.

        A sum over them becomes that over all ranks by :meth:`total`.
        """
        split: Literal["train", "test"] = "train" if self.image_source == "train" else "test"
        places = self.positions(task)
        data = Indexed(self.suite.dataset(task, split), places, f"{task} ({split})", self.suite.num_classes(task))
        count = self._batches(task)
        dtype = self.bank.base[self.bank.names[0]].dtype
        for number in range(*((self._place[0], count, self._place[1]) if self._shared(task) else (count,))):
            span = range(number * self.image_batch, min((number + 1) * self.image_batch, len(data)))
            images, labels, index = zip(*(data[item] for item in span), strict=True)
            pictures = torch.stack(images).to(self.device, dtype)
            known = torch.tensor(labels, device=self.device)
            known = known if split == "train" else torch.full_like(known, -1)
            yield number, LabelledBatch(pictures, known, torch.tensor(index))

    def _batches(self, task: str) -> int:
        return -(-len(self.positions(task)) // self.image_batch)

    def _shared(self, task: str) -> bool:
        """Whether each rank has a batch of its own; else every rank goes through all of them."""
        return 1 < self._place[1] <= self._batches(task)

    def total(self, task: str, value: Tensor) -> Tensor:
        """Return the sum over ranks of a sum over :meth:`batches`."""
        if self._shared(task):
            value = value.contiguous()
            torch.distributed.all_reduce(value)
        return value

    def _check_patterns(self, bank: TaskVectors) -> None:
        for pattern in self.at_base:
            if not any(fnmatchcase(name, pattern) for name in bank.names):
                some = ", ".join(bank.names[:4])
                raise MergeError(
                    f"{type(self).__name__}.at_base: {pattern!r} fits no tensor, of {some} …; expected whole names or "
                    "patterns for them"
                )

    def stays(self, name: str) -> bool:
        """Whether a tensor stays at the base."""
        return any(fnmatchcase(name, pattern) for pattern in self.at_base)

    # The merge ---------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """Images: no merge of weights alone."""
        return "data"

    @property
    def needs_images(self) -> bool:
        """Whether :meth:`calibrate` needs a data module."""
        return self.image_source == "adapt" or super().needs_images

    def calibrate(self, datamodule: Any) -> None:  # noqa: ANN401 - any data module, or none
        """Make the merge on all ranks together, then what the base class does.

        Raises:
            MergeError: The protocol is ``online``, and test images are asked for.
        """
        if self.image_source == "adapt" and datamodule is not None:
            if datamodule.protocol == "online":
                raise MergeError(
                    f"data.protocol: online scores each image before it is used, and {type(self).__name__} would look "
                    "at them before; use split or transductive, or image_source: train"
                )
            adaptable = datamodule.positions("adapt")
            if adaptable != self._adaptable:
                self._adaptable, self._made = adaptable, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._place = (torch.distributed.get_rank(), torch.distributed.get_world_size())
        try:
            self.merge(self.bank)
        finally:
            self._place = (0, 1)  # from now on a rank may be alone
        super().calibrate(datamodule)

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + the merged task vector, which is made when it is first asked for."""
        # not in inference mode, whose tensors have no gradients; nor in half precision
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self._made is None or self._made[0] is not bank:
                self._check_patterns(bank)
                made = self.combine(bank)
                self._made = (bank, {n: torch.zeros_like(v) if self.stays(n) else v for n, v in made.items()})
            return bank.offset({name: value.to(self.device) for name, value in self._made[1].items()})

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        counts = {task: len(self.positions(task)) for task in self.suite.tasks}
        return {"calibration": {"source": self.image_source, "order": self.image_order, "images": counts}}
