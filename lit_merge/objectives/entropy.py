"""Entropy of predictions."""

from __future__ import annotations

from torch import Tensor

from lit_merge.objectives.base import Objective, TaskOutput, at_least_float32

__all__ = ("Entropy", "entropy")


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax in nats, ``(B, C)`` to ``(B,)``; between 0 and log C.

    >>> import torch
    >>> entropy(torch.zeros(1, 4))
    tensor([1.3863])
    """
    # through the logarithm: exact for confident predictions, also under half-precision autocast
    log_p = at_least_float32(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Entropy(Objective):
    """Mean entropy of the predictions: the objective of AdaMerging.

    Confident predictions have low entropy, and on test images of the right task low entropy goes with low error. It
    also rewards confident mistakes: watch the collapse warnings, and prefer
    :class:`~lit_merge.objectives.ExpertAlignment` where experts can be run.

    Source: Yang et al., AdaMerging, equation 5, arXiv 2310.02575.

    >>> import torch
    >>> Entropy()(TaskOutput(torch.tensor([[0.0, 0.0], [100.0, 0.0]]), torch.zeros(2, 1)))
    tensor(0.3466)
    """

    def __call__(self, output: TaskOutput) -> Tensor:
        """Return the mean entropy in nats."""
        return entropy(output.logits).mean()
