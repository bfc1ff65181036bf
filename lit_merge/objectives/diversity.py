"""Diversity of predictions over a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_merge.objectives.base import Objective, TaskOutput, at_least_float32, mean_over_ranks

__all__ = ("Diversity",)


class Diversity(Objective):
    """Negative entropy of the mean prediction: lowest when the batch is spread over the classes.

    Added to :class:`~lit_merge.objectives.Entropy` it keeps entropy minimisation from collapsing onto few classes;
    the sum is the information maximisation loss. It assumes that classes are about equally frequent, and it needs a
    batch with several images per task.

    Source: Liang et al., SHOT, equation 3 (L_div), arXiv 2002.08546.

    >>> Diversity()(TaskOutput(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.zeros(2, 1)))
    tensor(-0.6931)
    """

    def __call__(self, output: TaskOutput) -> Tensor:
        """Return minus the entropy in nats, between -log C and 0; over the images of all ranks."""
        mean = mean_over_ranks(at_least_float32(output.logits).softmax(-1).mean(0), output.share)
        return (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
