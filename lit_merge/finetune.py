"""Supervised fine-tuning of an encoder under task heads: how experts are made."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.errors import MergeError
from lit_merge.metrics import Hits

__all__ = ("Batch", "FineTuneModule", "SupervisedModule", "warmup_cosine")

Batch = Mapping[str, tuple[Tensor, Tensor] | None]
"""Images and labels of every task; ``None`` for a task whose loader is exhausted (CombinedLoader's ``max_size``)."""


class SupervisedModule(L.LightningModule):
    """The steps of supervised training; a subclass says which network it trains, under which heads.

    A batch is a dict from task to ``(images, labels)``, which is what Lightning makes of a dict of loaders. The loss
    is the cross-entropy, averaged over the images of a task and then over the tasks. All images pass through the
    encoder as one batch where their shapes allow it.

    The defaults are the recipe of the published CLIP experts (Ilharco et al. 2023, "Editing models with task
    arithmetic", App. B): AdamW, learning rate 1e-5, weight decay 0.1 on every tensor, 500 steps of linear warm-up,
    then a cosine down to 0, frozen zero-shot heads. The rest of the recipe is not the module's: give the Trainer
    ``gradient_clip_val=1.0`` and 2,000 steps, and the loader ``batch_size=128``.

    Nothing here communicates between ranks apart from what the Trainer's strategy does with gradients, and the counts
    of right answers. The logged loss is that of one rank.

    Args:
        label_smoothing: Share of the target that goes to all classes alike, in [0, 1).
        learning_rate: Largest learning rate, after the warm-up.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Optimiser steps of linear warm-up.

    Attributes:
        tasks: Names of the tasks that are trained.
        accuracies: Fraction of right answers per task in the last evaluation.

    Raises:
        MergeError: A number is out of range.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 500,
    ) -> None:
        super().__init__()
        _check(label_smoothing, learning_rate, weight_decay, warmup_steps)
        self.label_smoothing = label_smoothing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.tasks: tuple[str, ...] = ()
        self.accuracies: dict[str, float] = {}
        self._hits: dict[str, Hits] = {}

    def hold(self, network: nn.Module, heads: Mapping[str, nn.Module], *, train_heads: bool = False) -> None:
        """Take the network to train, in place, and copies of the heads.

        Raises:
            MergeError: There is no head.
        """
        if not heads:
            raise MergeError(f"{type(self).__name__} needs at least one head")
        self.tasks = tuple(heads)
        self.network = network.train().requires_grad_(True)
        # a list, since names of tasks may contain dots
        copies = [copy.deepcopy(head).requires_grad_(train_heads).train(train_heads) for head in heads.values()]
        self._heads = nn.ModuleList(copies)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The module's own heads, by task."""
        return dict(zip(self.tasks, self._heads, strict=True))

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the images ``(B_t, C, H, W)`` of each task to its logits ``(B_t, classes)``."""
        unknown = set(images) - set(self.tasks)
        if unknown:
            known = ", ".join(self.tasks)
            raise MergeError(f"batch of unknown tasks {sorted(unknown)}; there are heads for {known}")
        features = _encode(self.network, list(images.values()))
        heads = self.heads
        return {task: heads[task](rows) for task, rows in zip(images, features, strict=True)}

    def loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy, averaged over the images of each task and then over the tasks."""
        losses = [
            F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            for logits, labels in self._answers(batch).values()
        ]
        return torch.stack(losses).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss and log it as ``train/loss``."""
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=1)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right answers."""
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<task>/accuracy``, the fraction of right answers over the images of all ranks. Higher is better."""
        self._log_accuracies("val")

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self._reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count right answers."""
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/<task>/accuracy``, the fraction of right answers over the images of all ranks."""
        self._log_accuracies("test")

    def _reset(self) -> None:
        self._hits = {task: Hits().to(self.device) for task in self.tasks}

    def _count(self, batch: Batch) -> None:
        for task, (logits, labels) in self._answers(batch).items():
            self._hits[task].update(logits, labels)

    def _log_accuracies(self, stage: str) -> None:
        for task, hits in self._hits.items():
            correct, total = hits.compute().tolist()
            if total:
                self.accuracies[task] = correct / total
                self.log(f"{stage}/{task}/accuracy", correct / total)

    def _answers(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return logits and labels of the tasks that are in the batch."""
        present = {task: pair for task, pair in batch.items() if pair is not None}
        logits = self({task: images for task, (images, _) in present.items()})
        return {task: (logits[task], labels) for task, (_, labels) in present.items()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make AdamW over everything that is trained, with one learning rate step per optimiser step."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.trainer.max_steps == -1 and self.trainer.max_epochs in (None, -1):
            raise MergeError("the cosine schedule needs an end; give the Trainer max_steps or max_epochs")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Return the factor of the learning rate; the first one, asked for here above, does not depend on the end.

        To ask for the end so early would make Lightning open the loader before a checkpoint is restored, and the
        loader would begin from its start.
        """
        total = self.trainer.estimated_stepping_batches if step else self.warmup_steps + 1
        return warmup_cosine(step, self.warmup_steps, int(total))


class FineTuneModule(SupervisedModule):
    """Fine-tune one encoder on one or more classification tasks; see :class:`SupervisedModule` for loss and recipe.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is trained in place.
        heads: One head per task, ``(B, D)`` to ``(B, classes)``. They are copied.
        train_heads: Whether the copies are trained too. Experts that will be merged keep them frozen.
        label_smoothing: Share of the target that goes to all classes alike, in [0, 1).
        learning_rate: Largest learning rate, after the warm-up.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Optimiser steps of linear warm-up.

    Raises:
        MergeError: There is no head, or a number is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        train_heads: bool = False,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 500,
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
        self.hold(network, heads, train_heads=train_heads)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the factor of the learning rate at ``step``: linear warm-up, then half a cosine down to 0.

    Args:
        step: Number of optimiser steps done, from 0.
        warmup: Length of the warm-up in steps; the first step already has ``1 / warmup``.
        total: Number of steps of the whole run; where it is not beyond ``warmup`` there is no cosine.

    Returns:
        A factor in [0, 1].

    >>> [round(warmup_cosine(step, 2, 6), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _encode(network: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """Encode the images of every task, as one batch if they have one shape."""
    if len({batch.shape[1:] for batch in images}) != 1:
        return [network(batch) for batch in images]
    return list(network(torch.cat(images)).split([len(batch) for batch in images]))


def _check(label_smoothing: float, learning_rate: float, weight_decay: float, warmup: int) -> None:
    """Refuse numbers that cannot be meant."""
    if not 0 <= label_smoothing < 1:
        raise MergeError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup}.items():
        if not (value >= 0 and math.isfinite(value)):
            raise MergeError(f"{name} must be finite and not negative, got {value}")
