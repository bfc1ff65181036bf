"""What the benchmarks on the embedded suite share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lit_merge import MergeModule
from lit_merge.suites import Split

SCALES = tuple(s / 10 for s in range(1, 11))
Row = dict[str, Any]


@torch.inference_mode()
def accuracies(
    module: MergeModule, state: Mapping[str, Tensor], split: Split, tasks: Sequence[str] | None = None, every: int = 1
) -> dict[str, float]:
    """Accuracy of a complete state dict per task, of all tasks by default; ``every``: on one image out of so many."""
    result = {}
    for task in module.suite.tasks if tasks is None else tasks:
        data = module.suite.dataset(task, split)
        hits = total = 0
        for images, labels in DataLoader(Subset(data, range(0, len(data), every)), batch_size=512):  # type: ignore[arg-type]
            hits += int((module.outputs(state, task, images)[1].argmax(-1) == labels).sum())
            total += len(labels)
        result[task] = hits / total
    return result


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, the latter only of several values."""
    return f"{fmean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"
