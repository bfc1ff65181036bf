"""Batches, datasets, loaders and the data module."""

from lit_merge.data.batches import LabelledBatch, UnlabelledBatch
from lit_merge.data.datamodule import Protocol, TaskDataModule
from lit_merge.data.datasets import Indexed, TaskMixture
from lit_merge.data.finetune_data import FineTuneDataModule
from lit_merge.data.loaders import EvaluationSampler, ResumableLoader, StreamSampler

__all__ = (
    "EvaluationSampler",
    "FineTuneDataModule",
    "Indexed",
    "LabelledBatch",
    "Protocol",
    "ResumableLoader",
    "StreamSampler",
    "TaskDataModule",
    "TaskMixture",
    "UnlabelledBatch",
)
