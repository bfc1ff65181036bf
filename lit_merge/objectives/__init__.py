"""Losses on unlabelled batches; any of them fits any learnable merge."""

from lit_merge.objectives.alignment import ExpertAlignment
from lit_merge.objectives.base import Objective, TaskOutput
from lit_merge.objectives.consistency import PerturbationConsistency
from lit_merge.objectives.diversity import Diversity
from lit_merge.objectives.entropy import Entropy
from lit_merge.objectives.weighted_sum import WeightedSum

__all__ = (
    "Diversity",
    "Entropy",
    "ExpertAlignment",
    "Objective",
    "PerturbationConsistency",
    "TaskOutput",
    "WeightedSum",
)
