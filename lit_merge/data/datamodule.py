"""TaskDataModule: unlabelled batches to adapt on, labelled ones to score on, and which images are which."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch.utils.data import DataLoader

from lit_merge.data.batches import LabelledBatch, UnlabelledBatch
from lit_merge.data.datasets import Indexed, TaskMixture
from lit_merge.data.image_cache import CachedImages, cache_images
from lit_merge.data.loaders import EvaluationSampler, ResumableLoader, StreamSampler
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset, Suite

__all__ = ("Protocol", "TaskDataModule")

Protocol = Literal["transductive", "split", "online"]


class TaskDataModule(L.LightningDataModule):
    """The test images of a suite, for adaptation without labels and for evaluation with them.

    Protocols:

    * ``transductive``: adapt on all test images and score all of them, as the AdaMerging paper does.
    * ``split``: a seeded part of the test images is adapted on, and only the others are scored.
    * ``online``: the test images arrive once, in a seeded order; each is scored with the weights of the moment it
      arrives at, before the step that uses it. One epoch is one pass, ``max_epochs`` must be 1.

    Args:
        suite: Where the images come from.
        batch_size: Unlabelled images per task, step and process.
        eval_batch_size: Images per batch in evaluation.
        steps_per_epoch: Adaptation steps per epoch; by default one pass over the largest task.
        protocol: Which images adaptation may see and which are scored.
        adapt_fraction: Share of the test images that ``split`` adapts on, in (0, 1).
        num_workers: Worker processes per loader.
        seed: Seed of the order and of the split; by default that of ``seed_everything``.
        image_cache: Bytes of memory per process of the trainer, for images that adaptation comes back to; 0 for none.
            They are decoded, resized and cropped once, and all loader workers share them, see
            :mod:`lit_merge.data.image_cache`; the images are the same bit by bit. The default, 2 GiB, holds 14,266
            pictures of 224 pixels: three of the eight usual test sets (DTD, EuroSAT, RESISC45), which a run of 1,000
            steps of 16 images goes through more than once. It is taken only as far as such images need it.
        prefetch: Adaptation batches made ahead of the step that uses them: by each worker; or on a GPU without workers
            by a thread. The next one is copied to the GPU meanwhile, from pinned memory. With 0 a batch is made, and
            copied, when it is asked for; a worker always makes one ahead. A resumed run goes on after the batches that
            were used, not those that were made.

    Attributes:
        tasks_at: In a stream of experts, the tasks whose images are adapted on in an epoch, by its number;
            :class:`~lit_merge.callbacks.SequentialMerging` sets it.

    Raises:
        MergeError: A value is out of range, a task is unknown, or a dataset is empty.
    """

    def __init__(
        self,
        suite: Suite,
        batch_size: int = 16,
        eval_batch_size: int = 256,
        steps_per_epoch: int | None = None,
        protocol: Protocol = "transductive",
        adapt_fraction: float = 0.5,
        num_workers: int = 0,
        seed: int | None = None,
        image_cache: int = 2 * 2**30,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        # ranks without an image of a small task are fine: metrics are summed over ranks
        self.allow_zero_length_dataloader_with_multiple_devices = True
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise MergeError(f"data.{name}: expected at least 1, found {value}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise MergeError(f"data.steps_per_epoch: expected at least 1, found {steps_per_epoch}")
        for name, value in (("num_workers", num_workers), ("image_cache", image_cache), ("prefetch", prefetch)):
            if value < 0:
                raise MergeError(f"data.{name}: expected at least 0, found {value}")
        if protocol not in get_args(Protocol):
            raise MergeError(f"data.protocol: expected transductive, split or online, found {protocol!r}")
        if not 0 < adapt_fraction < 1:
            raise MergeError(f"data.adapt_fraction: expected a share in (0, 1), found {adapt_fraction}")
        self.suite = suite
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.protocol: Protocol = protocol
        self.adapt_fraction = adapt_fraction
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.image_cache = image_cache
        self.prefetch = prefetch
        self.tasks_at: Callable[[int], Sequence[str]] | None = None
        self._data: dict[str, LabelledDataset] = {}
        self._parts: dict[str, tuple[list[int], list[int]]] = {}
        self._caches: dict[str, CachedImages] | None = None

    def prepare_data(self) -> None:
        """Build or download the suite, once per node."""
        self.suite.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Decide which images are adapted on and which are scored.

        Raises:
            MergeError: A dataset is empty or too small to be split, or ``online`` is to be fitted for another number of
                epochs than 1.
        """
        epochs = None if self.trainer is None else self.trainer.max_epochs
        if stage == "fit" and self.protocol == "online" and epochs not in (None, 1):
            raise MergeError(
                f"trainer.max_epochs: protocol online shows every image once, so it must be 1, found {epochs}"
            )
        if self._data:
            return
        for task in self.suite.scored:
            data = self.suite.dataset(task, "test")
            if len(data) == 0:
                raise MergeError(f"{self.suite.name}: task {task!r}: its test set is empty; expected images")
            self._data[task] = data
            seen = task in self.suite.tasks
            self._parts[task] = self._partition(task, len(data)) if seen else ([], list(range(len(data))))

    def _partition(self, task: str, size: int) -> tuple[list[int], list[int]]:
        if self.protocol == "transductive":
            return list(range(size)), list(range(size))
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(size, generator=generator).tolist()
        if self.protocol == "online":
            return order, list(range(size))
        cut = round(self.adapt_fraction * size)
        if not 0 < cut < size:
            raise MergeError(f"{self.suite.name}: task {task!r}: {size} test images cannot be split at {cut}")
        return sorted(order[:cut]), sorted(order[cut:])

    def state_dict(self) -> dict[str, Any]:
        """What decides on the images of each step."""
        return {
            "protocol": self.protocol,
            "seed": self.seed,
            "adapt_fraction": self.adapt_fraction if self.protocol == "split" else None,
            "images per task and step": self.batch_size * self._place()[1],
            "steps_per_epoch": self._steps(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the run of a checkpoint.

        Raises:
            MergeError: A resumed fit would see other images, or images would be scored that were adapted on.
        """
        fit = self.trainer is not None and self.trainer.state.fn == "fit"
        split = ("protocol", "seed", "adapt_fraction") if self.protocol == "split" else ("protocol",)
        current = self.state_dict()
        for key in current if fit else split:
            if state_dict[key] != current[key]:
                raise MergeError(
                    f"checkpoint: its data had {key} {state_dict[key]}, this run has {current[key]}; "
                    "give the --data and --seed_everything of the checkpoint, or start without --ckpt_path"
                )

    def positions(self, part: Literal["adapt", "score"]) -> dict[str, list[int]]:
        """Positions of the images per task that are adapted on, or scored."""
        adapted = self.suite.tasks if part == "adapt" else self.suite.scored
        return {task: self._parts[task][part == "score"] for task in adapted}

    def labels(self, task: str, positions: Sequence[int]) -> torch.Tensor:
        """Labels of some test images of a task, for scoring a stream after the fact."""
        data = Indexed(self._data[task], positions, f"{task} (test)", self.suite.num_classes(task))
        return torch.tensor([data[i][1] for i in range(len(data))], dtype=torch.long)

    def train_dataloader(self) -> ResumableLoader:
        """Unlabelled batches: ``{task: UnlabelledBatch}``, every task in every batch."""
        # workers start before Lightning says it (issue 21938); after a resume from the end of an epoch
        # trainer.current_epoch is still that epoch
        epoch = 0 if self.trainer is None else self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        tasks = self.suite.tasks if self.tasks_at is None else self.tasks_at(epoch)
        positions = {task: self.positions("adapt")[task] for task in tasks}
        rank, world = self._place()
        sampler = StreamSampler(
            positions, self.batch_size, self._steps(tasks),
            seed=self.seed, rank=rank, world=world, once=self.protocol == "online",
        )  # fmt: skip
        sampler.set_epoch(epoch)
        if self._caches is None:
            again = {task: data for task, data in self._data.items() if self._comes_again(task)}
            adapt = self.positions("adapt")
            here = 1 if self.trainer is None else max(1, self.trainer.num_devices)
            self._caches = cache_images(again, adapt, self.image_cache, self.num_workers > 0, here)
        options = self._worker_options()
        if self.prefetch and options["pin_memory"]:
            assert self.trainer is not None
            options |= {"ahead": self.prefetch, "device": self.trainer.strategy.root_device}
        return ResumableLoader(self._mixture(tasks), sampler, **options)

    def _mixture(self, tasks: Sequence[str]) -> TaskMixture:
        caches = {task: cache for task, cache in (self._caches or {}).items() if task in tasks}
        return TaskMixture({task: self._data[task] for task in tasks}, caches)

    def _comes_again(self, task: str) -> bool:
        """Whether a fit adapts on some images of a task more than once."""
        if task not in self.suite.tasks or self.protocol == "online" or not self.image_cache:
            return False
        batches = math.inf
        if self.trainer is not None and self.trainer.max_epochs not in (None, -1):
            batches = self.trainer.max_epochs * self._steps()
        if self.trainer is not None and self.trainer.max_steps >= 0:
            batches = min(batches, self.trainer.max_steps * self.trainer.accumulate_grad_batches)
        return batches * self.batch_size * self._place()[1] > len(self._parts[task][0])

    def _steps(self, tasks: Sequence[str] | None = None) -> int:
        longest = max(len(self._parts[task][0]) for task in tasks or self.suite.tasks)
        return self.steps_per_epoch or -(-longest // (self.batch_size * self._place()[1]))

    def adaptation_batches(self, count: int = 50) -> Iterator[dict[str, UnlabelledBatch]]:
        """Yield the first unlabelled batches of a one-process run, the same on all ranks."""
        sampler = StreamSampler(self.positions("adapt"), self.batch_size * self._place()[1], count, seed=self.seed)
        mixture = self._mixture(self.suite.tasks)
        return (mixture[draws] for draws in sampler)

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Labelled batches of every task, one loader a task."""
        return self.evaluation_loaders()

    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Labelled batches of every task, one loader a task."""
        return self.evaluation_loaders()

    def predict_dataloader(self) -> dict[str, DataLoader[Any]]:
        """Labelled batches of every task, one loader a task; prediction does not look at the labels."""
        return self.evaluation_loaders()

    def evaluation_loaders(self, tasks: Sequence[str] | None = None) -> dict[str, DataLoader[Any]]:
        """Labelled batches, one loader a task; over all ranks every image comes once.

        Args:
            tasks: Which tasks; by default all that are scored.
        """
        rank, world = self._place()
        loaders = {}
        for task, positions in self.positions("score").items():
            if tasks is not None and task not in tasks:
                continue
            data = Indexed(self._data[task], positions, f"{task} (test)", self.suite.num_classes(task))
            loaders[task] = DataLoader(
                data,
                batch_size=self.eval_batch_size,
                sampler=EvaluationSampler(len(data), rank, world),
                collate_fn=_labelled,
                **self._worker_options(),
            )
        return loaders

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _worker_options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        factor = {"prefetch_factor": max(1, self.prefetch)} if self.num_workers else {}
        return {"num_workers": self.num_workers, "pin_memory": on_gpu, **factor}


def _labelled(items: list[tuple[torch.Tensor, int, int]]) -> LabelledBatch:
    images, labels, index = zip(*items, strict=True)
    return LabelledBatch(torch.stack(images), torch.tensor(labels), torch.tensor(index))
