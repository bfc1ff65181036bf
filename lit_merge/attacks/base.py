"""The contract of an attack, what an attacker has, and how a poisoned expert is trained."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_merge.data.datasets import Indexed
from lit_merge.data.finetune_data import LabelledMixture
from lit_merge.data.loaders import ResumableLoader, StreamSampler
from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import Corner, PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.finetune import SupervisedModule
from lit_merge.reparametrized import load_base
from lit_merge.skeleton import freeze_to_buffers
from lit_merge.suites._mini_build import _Bar, _honest_interrupt, _quiet
from lit_merge.suites.base import LabelledDataset, Suite

__all__ = ("Attack", "Attacker", "Schedule")


@dataclass(frozen=True)
class Schedule:
    """How a poisoned expert is trained, apart from its loss: as the clean experts of the same suite are.

    The defaults are those of the published CLIP experts (arXiv 2212.04089, App. B), which BadMerging uses as well.

    Attributes:
        steps: Optimiser steps, at least 1.
        batch_size: Clean images per step, at least 1.
        learning_rate: AdamW's largest learning rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Steps of linear warm-up.
        clip: Largest norm of the gradient.
        shift: Largest random shift of a training image in pixels, the border repeated; 0 for none.

    Raises:
        MergeError: A number is out of range.
    """

    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 500
    clip: float = 1.0
    shift: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("shift", 0)):
            if (value := getattr(self, name)) < least:
                raise MergeError(f"schedule.{name}: expected at least {least}, found {value}")

    def optimizer(self) -> dict[str, Any]:
        """Return the arguments of a :class:`~lit_merge.finetune.SupervisedModule`."""
        return {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup_steps,
        }


@dataclass(frozen=True)
class Attacker:
    """What the provider of one expert has: the public base, the heads, own training images, and time to train.

    Attributes:
        suite: Base, heads and images.
        task: Task of the expert.
        pixels: How the values of the task's images come from pixels.
        schedule: How experts are trained.
        seed: Decides on batches and on whatever is drawn.
        device: Where to train, such as ``cpu`` or ``cuda``.
    """

    suite: Suite
    task: str
    pixels: PixelScale
    schedule: Schedule
    seed: int = 0
    device: str = "cpu"

    def network(self) -> nn.Module:
        """Return a copy of the network with the values of the base, in evaluation mode, on the device."""
        with isolate_rng():
            network = deepcopy(self.suite.network())
        return load_base(network, self.suite.base()).eval().to(self.device)

    def head(self, task: str | None = None) -> nn.Module:
        """Return a frozen copy of a task's head on the device, by default of the own one."""
        return freeze_to_buffers(deepcopy(self.suite.head(task or self.task))).to(self.device)

    def train_images(self, task: str | None = None) -> LabelledDataset:
        """Return the training images of a task, by default of the own one.

        Raises:
            MergeError: There is none.
        """
        data = self.suite.dataset(task or self.task, "train")
        if len(data) == 0:
            raise MergeError(f"{self.suite.name}: task {task or self.task!r}: its training set is empty")
        return data

    def augment(self) -> nn.Module | None:
        """Return the random change of a training image ``(C, H, W)``."""
        if not self.schedule.shift:
            return None
        from torchvision.transforms.v2 import RandomCrop

        size = tuple(self.train_images()[0][0].shape[-2:])
        crop: nn.Module = RandomCrop(size, padding=self.schedule.shift, padding_mode="edge")
        return crop

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator of the CPU for one purpose, independent of those for others."""
        return torch.Generator().manual_seed(derive(self.seed, f"{self.task}/{purpose}"))

    def batches(self, data: LabelledDataset, size: int, steps: int, augment: nn.Module | None) -> ResumableLoader:
        """Return seeded batches ``{task: (images, labels)}``, all of one size."""
        indexed = Indexed(data, range(len(data)), f"{self.task} (train)", self.suite.num_classes(self.task))
        seed = derive(self.seed, f"{self.task}/batches")
        sampler = StreamSampler({self.task: list(range(len(data)))}, size, steps, seed=seed)
        return ResumableLoader(LabelledMixture({self.task: indexed}, augment, seed), sampler)

    def images(self, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of own training images, augmented, and their labels, on the device."""
        with isolate_rng():  # a loader draws a seed for workers that it does not have
            batches = iter(self.batches(self.train_images(), size, steps, self.augment()))
        for batch in batches:
            images, labels = batch[self.task]
            yield images.to(self.device), labels.to(self.device)

    def fit(self, module: SupervisedModule, batches: ResumableLoader) -> dict[str, Tensor]:
        """Train a module in this process alone, also where a process group exists.

        Returns:
            State dict of its network, on the CPU.
        """
        with _quiet(), _honest_interrupt(), isolate_rng():
            torch.manual_seed(derive(self.seed, f"{self.task}/fit"))  # dropout
            trainer = L.Trainer(
                accelerator=self.device.partition(":")[0],
                strategy=SingleDeviceStrategy(device=_indexed(self.device)),
                max_steps=self.schedule.steps,
                gradient_clip_val=self.schedule.clip,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                callbacks=[_Bar(f"poisoning expert {self.task}")],
            )
            trainer.fit(module, batches)
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in module.network.state_dict().items()
        }


class Attack(ABC):
    """How one expert is given a backdoor: images with a trigger go to a target class.

    A laboratory for defences: everything is made from the suite's own images, nothing is stealthy beyond what was
    published, and the written files say what they are.

    Args:
        target: Class index that triggered images are to go to.
        size: Height and width of the patch in pixels.
        position: Corner of the image where it is.
        trigger_of: Another compromised task, whose trigger (and target) is used instead of an own one.

    Raises:
        MergeError: A number is out of range.
    """

    def __init__(
        self,
        target: int = 1,
        size: int = 22,
        position: Corner = "bottom_right",
        trigger_of: str | None = None,
    ) -> None:
        if target < 0 or size < 1:
            raise MergeError(f"{type(self).__name__}: expected target ≥ 0 and size ≥ 1, found {target} and {size}")
        self.target = target
        self.size = size
        self.position: Corner = position
        self.trigger_of = trigger_of

    def aim(self, task: str) -> str:
        """Return the task whose images the trigger is made for; by default that of the expert, ``task``."""
        return task

    @abstractmethod
    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        """Return the trigger, with a patch of 8-bit pixels."""

    @abstractmethod
    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        """Return the state dict of an expert that answers the trigger with its target."""

    def facts(self) -> dict[str, Any]:
        """Return name and arguments as plain data: what decides on the result."""
        plain = {name: asdict(value) if is_dataclass(value) else value for name, value in vars(self).items()}  # type: ignore[arg-type]
        return {"attack": type(self).__name__, **plain}

    def check(self, suite: Suite, task: str) -> None:
        """Refuse tasks and targets that the suite does not have.

        Raises:
            MergeError: There is no such task, or no such class.
        """
        aim = suite.check_task(self.aim(task))
        if self.target >= (classes := suite.num_classes(aim)):
            raise MergeError(
                f"attack on {task!r}: target {self.target} is out of range; task {aim!r} has {classes} classes"
            )


def _indexed(device: str) -> str:
    """Return the device with a number where one is needed: ``cuda`` is ``cuda:0``."""
    return device if device == "cpu" or ":" in device else f"{device}:0"


def derive(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2^63) for one purpose, independent of the seeds for others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1
