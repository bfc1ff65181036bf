"""Training inside the embedded suite: joint pretraining of the base, then one expert per task."""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.vit import small_vit
from lit_merge.finetune import FineTuneModule
from lit_merge.linearized import LinearizedNetwork
from lit_merge.suites._mini_images import IMAGE_SIZE

__all__ = (
    "LINEARIZED_RATE",
    "RECIPE",
    "Finetuning",
    "Labelled",
    "Recipe",
    "fine_tune",
    "make_head",
    "make_network",
    "pretrain",
)

Labelled = tuple[Tensor, Tensor]
"""Images ``(N, 3, 28, 28)`` and labels ``(N,)``."""

Finetuning = Literal["full", "linearized"]
"""What experts are trained as: the network, or its tangent at the base."""


@dataclass(frozen=True)
class Recipe:
    """Everything but the arguments that decides what the suite's weights are."""

    width: int = 96
    layers: int = 4
    features: int = 64
    scale: float = 20.0
    shift: int = 2  # largest shift of a training image in pixels, both ways
    pretrain_batch: int = 16  # per task
    pretrain_rate: float = 1e-3
    pretrain_smoothing: float = 0.1
    finetune_batch: int = 64
    finetune_rate: float = 4e-4
    weight_decay: float = 0.1
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0

    def as_dict(self) -> dict[str, float]:
        """Return the constants by name."""
        return asdict(self)


RECIPE = Recipe()
LINEARIZED_RATE = 2e-3  # best on training images of 1e-4 to 4e-3; outside the recipe, which is hashed for the base too


def make_network() -> nn.Module:
    """Return the suite's vision transformer, freshly initialised."""
    network: nn.Module = small_vit(IMAGE_SIZE, width=RECIPE.width, layers=RECIPE.layers, output_dim=RECIPE.features)
    return network


def make_head(weight: Tensor) -> CosineHead:
    """Return the frozen head with the given class directions ``(C, 64)``."""
    return CosineHead(weight, RECIPE.scale)


def pretrain(
    images: Mapping[str, Labelled], classes: Mapping[str, int], steps: int, seed: int, title: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train network and heads jointly on the clean training images of every task.

    Args:
        images: Clean training images and labels of every task.
        classes: Number of classes of every task.
        steps: Optimiser steps.
        seed: Decides the initial weights and the batches.
        title: Text of the progress bar.

    Returns:
        State dict of the network, and the heads' class directions ``(C, 64)`` by task.
    """
    with isolate_rng():
        torch.manual_seed(_derive(seed, "pretrain"))
        network = make_network()
        heads = {task: CosineHead.fresh(classes[task], RECIPE.features, RECIPE.scale) for task in images}
        module = FineTuneModule(
            network,
            heads,
            train_heads=True,
            label_smoothing=RECIPE.pretrain_smoothing,
            **_schedule(RECIPE.pretrain_rate, steps),
        )
        _fit(module, images, RECIPE.pretrain_batch, steps, seed, title)
    directions = {task: head.get_parameter("weight").detach().clone() for task, head in module.heads.items()}
    return _state(network), directions


def fine_tune(
    base: Mapping[str, Tensor],
    head: nn.Module,
    task: str,
    images: Labelled,
    steps: int,
    seed: int,
    title: str,
    finetuning: Finetuning = "full",
) -> dict[str, Tensor]:
    """Train the expert of one task under its frozen head; depends on nothing but the arguments.

    Args:
        base: State dict of the pretrained network.
        head: The task's head.
        task: Its name, which with ``seed`` decides the batches.
        images: All its training images and labels.
        steps: Optimiser steps.
        seed: Seed of the suite.
        title: Text of the progress bar.
        finetuning: What is trained.

    Returns:
        State dict of the expert.
    """
    with isolate_rng():
        torch.manual_seed(_derive(seed, task))
        network = make_network()
        network.load_state_dict(base)
        if linear := finetuning == "linearized":
            network = LinearizedNetwork(network)
        rate = LINEARIZED_RATE if linear else RECIPE.finetune_rate
        module = FineTuneModule(network, {task: head}, **_schedule(rate, steps))
        _fit(module, {task: images}, RECIPE.finetune_batch, steps, seed, title)
    return _state(network)


def _schedule(rate: float, steps: int) -> dict[str, Any]:
    """Return the optimiser's numbers for a run of ``steps`` steps."""
    return {
        "learning_rate": rate,
        "weight_decay": RECIPE.weight_decay,
        "warmup_steps": int(RECIPE.warmup * steps),
    }


def _state(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the network's state dict."""
    return {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}


def _derive(seed: int, purpose: str) -> int:
    """Return a seed in [0, 2^63) for one purpose, independent of the seeds for others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big") >> 1


class _Batches(IterableDataset[Labelled]):
    """Endless random batches of shifted images, drawn with an own generator."""

    def __init__(self, images: Labelled, size: int, seed: int) -> None:
        self.images, self.labels = images
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[Labelled]:
        """Yield batches; every iteration starts from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for chosen in torch.randperm(len(self.images), generator=generator).split(self.size):
                yield _shift(self.images[chosen], RECIPE.shift, generator), self.labels[chosen]


def _shift(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``reach`` pixels in both directions; the border is repeated."""
    count, _, height, width = images.shape
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    which = torch.arange(count)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _fit(module: FineTuneModule, images: Mapping[str, Labelled], batch: int, steps: int, seed: int, title: str) -> None:
    """Train ``module`` on the CPU of this process alone, also where a process group exists."""
    loaders = {
        task: DataLoader(_Batches(pair, batch, _derive(seed, f"batches/{task}")), batch_size=None)
        for task, pair in images.items()
    }
    with _quiet(), _honest_interrupt():
        trainer = L.Trainer(
            accelerator="cpu",
            strategy=SingleDeviceStrategy(device="cpu"),
            max_steps=steps,
            gradient_clip_val=RECIPE.clip,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[_Bar(title)],
        )
        trainer.fit(module, CombinedLoader(loaders, "min_size"))


@contextmanager
def _honest_interrupt() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning ignores SIGINT from then on and exits, which kills a notebook."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


class _Bar(L.Callback):
    """Say on the terminal what is being built; a line every ten seconds where there is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        pause = 0.2 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=trainer.max_steps, desc=self.title, mininterval=pause, leave=False, unit="step")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Move the bar by one step."""
        if self.bar is not None:
            self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away."""
        self.on_train_end(trainer, pl_module)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's hints about hardware and loaders out of the way for a while."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
