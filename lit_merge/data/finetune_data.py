"""FineTuneDataModule: labelled training batches of one task in a seeded order that a resumed run goes on with."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_merge.data.datasets import Indexed
from lit_merge.data.loaders import EvaluationSampler, ResumableLoader, StreamSampler
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset, Suite

__all__ = ("FineTuneDataModule", "LabelledMixture")

Labelled = dict[str, tuple[Tensor, Tensor]]


class FineTuneDataModule(L.LightningDataModule):
    """Training images of one task of a suite to fine-tune on, and its test images to score.

    Training batches are cut from one shuffled pass over the images after another; all have the full size. Which images
    a step sees is a function of seed and step alone, whatever the number of processes and workers. The images are as
    the suite's dataset gives them: there is no augmentation but that of the dataset itself and ``augment``. Whatever
    random numbers these draw from PyTorch, NumPy or Python's ``random`` are seeded per batch, so that a resumed run
    sees what the uninterrupted one would have seen.

    Args:
        suite: Where the images come from.
        task: Which of its tasks.
        batch_size: Training images per step, of all processes together.
        eval_batch_size: Test images per batch and process.
        augment: Changes a training image ``(C, H, W)``, for example ``torchvision.transforms.v2.RandomCrop``.
        num_workers: Worker processes per loader.
        seed: Seed of the order and of the augmentation; by default that of ``seed_everything``.

    Raises:
        MergeError: A value is out of range, the task is unknown, or its training set is empty.
    """

    def __init__(
        self,
        suite: Suite,
        task: str,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        augment: nn.Module | None = None,
        num_workers: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # right answers are summed over ranks
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise MergeError(f"data.{name}: expected at least 1, found {value}")
        if num_workers < 0:
            raise MergeError(f"data.num_workers: expected at least 0, found {num_workers}")
        self.suite = suite
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.augment = augment
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._train: LabelledDataset | None = None

    def prepare_data(self) -> None:
        """Build or download what this task needs, once per node; the suite's experts are not asked for."""
        self.suite.base()
        self.suite.head(self.suite.check_task(self.task))
        self.suite.dataset(self.task, "train")

    def setup(self, stage: str | None = None) -> None:
        """Open the training set.

        Raises:
            MergeError: It is missing or empty, or the batch cannot be divided among the processes.
        """
        world = self._place()[1]
        if self.batch_size % world:
            raise MergeError(
                f"data.batch_size: {self.batch_size} images a step cannot be divided among {world} processes"
            )
        if stage == "fit" and self._train is None:
            self._train = self.suite.dataset(self.suite.check_task(self.task), "train")
            if len(self._train) == 0:
                raise MergeError(f"{self.suite.name}: task {self.task!r}: its training set is empty; expected images")

    def state_dict(self) -> dict[str, Any]:
        """What decides on the images of each step."""
        return {
            "task": self.task,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "training images": 0 if self._train is None else len(self._train),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the run of a checkpoint.

        Raises:
            MergeError: A resumed fit would see other images.
        """
        for key, value in self.state_dict().items():
            if state_dict[key] != value:
                raise MergeError(
                    f"checkpoint: its {key} was {state_dict[key]}, that of this run is {value}; give the arguments of "
                    "the run that is resumed, or start without --ckpt_path"
                )

    def train_dataloader(self) -> ResumableLoader:
        """Labelled batches ``{task: (images, labels)}``."""
        assert self._train is not None
        rank, world = self._place()
        positions = {self.task: list(range(len(self._train)))}
        sampler = StreamSampler(
            positions, self.batch_size // world, self._steps(), seed=self.seed, rank=rank, world=world
        )
        if self.trainer is not None:  # workers start before Lightning sets the epoch, see TaskDataModule
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        mixture = LabelledMixture({self.task: self._indexed(self._train, "train")}, self.augment, self.seed)
        return ResumableLoader(mixture, sampler, **self._workers())

    def _steps(self) -> int:
        """Batches per epoch: where the Trainer counts steps, the run is one epoch, which can be resumed anywhere."""
        if self.trainer is not None and self.trainer.max_steps > 0 and self.trainer.max_epochs in (None, -1):
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        assert self._train is not None
        return -(-len(self._train) // self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """All test images, ``{task: (images, labels)}``, for whoever wants to watch them during the fit."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """All test images, ``{task: (images, labels)}``."""
        data = self._indexed(self.suite.dataset(self.suite.check_task(self.task), "test"), "test")
        return DataLoader(
            data,
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(len(data), *self._place()),
            collate_fn=partial(_collated, self.task),
            **self._workers(),
        )

    def _indexed(self, data: LabelledDataset, split: str) -> Indexed:
        return Indexed(data, range(len(data)), f"{self.task} ({split})", self.suite.num_classes(self.task))

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _workers(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"num_workers": self.num_workers, "pin_memory": on_gpu}


class LabelledMixture(Dataset[Labelled]):
    """Labelled images of some tasks; one item is one batch, as :class:`~lit_merge.data.StreamSampler` asks for it.

    Args:
        data: Labelled images with their positions, by task.
        augment: Changes an image ``(C, H, W)``; all results have one shape.
        seed: With the positions of a batch it seeds PyTorch's, NumPy's and Python's generators for that batch.
    """

    def __init__(self, data: Mapping[str, Indexed], augment: nn.Module | None, seed: int) -> None:
        self.data = dict(data)
        self.augment = augment
        self.seed = seed

    def __getitem__(self, draws: Mapping[str, tuple[Sequence[int], float]]) -> Labelled:
        with _seeded(f"{self.seed}/{sorted(draws.items())}"):
            return {task: self._batch(task, positions) for task, (positions, _) in draws.items()}

    def _batch(self, task: str, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        items = [self.data[task][position] for position in positions]
        images = [image if self.augment is None else self.augment(image) for image, _, _ in items]
        return torch.stack(images), torch.tensor([label for _, label, _ in items])


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Seed the global generators of the CPU while the block runs, and put them back as they were."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
        np.random.seed(seed)  # noqa: NPY002 - it is the global generator that datasets use
        random.seed(seed)
        yield


def _collated(task: str, items: list[tuple[Tensor, int, int]]) -> Labelled:
    images, labels, _ = zip(*items, strict=True)
    return {task: (torch.stack(images), torch.tensor(labels))}
