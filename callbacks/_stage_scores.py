"""Accuracies of a network in the middle of a fit, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.module import MergeModule

__all__ = ("count_hits",)


@torch.no_grad()
def count_hits(
    trainer: L.Trainer, module: MergeModule, state: Mapping[str, Tensor], tasks: Sequence[str]
) -> dict[str, list[int]]:
    """Score a network on the validation images of some tasks, under the Trainer's precision.

    Args:
        trainer: Has the data module, and the ranks among which its loaders share the images.
        module: Runs the network.
        state: Complete state dict of the network.
        tasks: Which tasks.

    Returns:
        Correct predictions and images per task, of all ranks together.

    Raises:
        MergeError: There is no data module with a loader per task.
    """
    if not tasks:
        return {}
    loaders = _loaders(trainer, tasks)
    counts = torch.zeros(len(tasks), 2, dtype=torch.long, device=module.device)
    for number, task in enumerate(tasks):
        for place, batch in enumerate(loaders[task]):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                logits = module.outputs(state, task, batch.images)[1]
            counts[number, 0] += (logits.argmax(-1) == batch.labels).sum()
            counts[number, 1] += len(batch.labels)
            if trainer.fast_dev_run and place == 0:  # type: ignore[attr-defined]
                break
    totals = torch.as_tensor(trainer.strategy.reduce(counts, reduce_op="sum")).tolist()
    return dict(zip(tasks, totals, strict=True))


def _loaders(trainer: L.Trainer, tasks: Sequence[str]) -> Mapping[str, Any]:
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise MergeError(
            "SequentialMerging.evaluate: there is no data module to score with; give --data, or evaluate: none"
        )
    loaders = data.evaluation_loaders(tasks) if hasattr(data, "evaluation_loaders") else data.val_dataloader()
    if not isinstance(loaders, Mapping) or not set(tasks) <= set(loaders):
        raise MergeError(
            f"SequentialMerging.evaluate: expected val_dataloader to return a loader for each of {', '.join(tasks)}; "
            "use a TaskDataModule, or evaluate: none"
        )
    return loaders
