"""Predictions that a universal perturbation does not change: what a merge without a backdoor has."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as tf
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.objectives.base import Objective, TaskOutput, at_least_float32
from lit_merge.objectives.entropy import entropy
from lit_merge.perturbations import Ascent

__all__ = ("PerturbationConsistency", "Safety", "safety_loss")

Safety = Literal["consistency", "entropy"]


def safety_loss(perturbed: Tensor, classes: Tensor, kind: Safety = "consistency") -> Tensor:
    """Mean loss of predictions under a perturbation.

    Args:
        perturbed: Logits ``(B, C)`` of the perturbed images.
        classes: ``(B,)``, what was predicted without the perturbation.
        kind: ``consistency``: cross-entropy with these; ``entropy``: that of the perturbed predictions, whatever they
            are, as in the released code of DAM. A successful trigger has a low entropy, so the latter cannot see it.

    Returns:
        A scalar in nats.

    Raises:
        MergeError: ``kind`` is unknown.

    Source: Yang et al., Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace, arXiv
    2410.13910, whose code has the entropy; consistency is the form that lowers attack success.

    >>> import torch
    >>> flipped = torch.tensor([[0.0, 9.0]])
    >>> safety_loss(flipped, torch.tensor([0])), safety_loss(flipped, torch.tensor([0]), "entropy")
    (tensor(9.0001), tensor(0.0012))
    """
    if kind == "consistency":
        return tf.cross_entropy(at_least_float32(perturbed), classes)
    if kind == "entropy":
        return entropy(perturbed).mean()
    raise MergeError(f"safety: expected {' or '.join(get_args(Safety))}, found {kind!r}")


class PerturbationConsistency(Objective):
    """CE(f(x + δ), argmax f(x)) with the universal perturbation δ that flips the most predictions.

    It makes any learnable merge safety-aware: add it to the objective that adapts the merge. In each step the
    perturbation of each task is first moved uphill under the merged network, then the loss is taken under it.

    .. code-block:: yaml

        objective:
          class_path: lit_merge.objectives.WeightedSum
          init_args:
            terms:
              - class_path: lit_merge.objectives.Entropy
              - class_path: lit_merge.objectives.PerturbationConsistency
            weights: [1.0, 0.3]

    A step takes ``steps`` + 1 encoder passes more.

    Args:
        epsilon: Largest change of a pixel in [0, 1]; null for none.
        steps: Steps of ascent for each step of the merge.
        rate: Change of a pixel by one step; by default a quarter of ``epsilon``.
        kind: ``consistency``, or ``entropy`` as in DAM's released code, see :func:`safety_loss`.

    Raises:
        MergeError: A value is out of range.

    Source: arXiv 2410.13910.

    >>> import torch
    >>> PerturbationConsistency(epsilon=0.1).ascent.pixel_rate
    0.025
    """

    def __init__(
        self, epsilon: float | None = 0.1, steps: int = 1, rate: float | None = None, kind: Safety = "consistency"
    ) -> None:
        self._ascent = Ascent(epsilon, steps, rate)
        self.kind: Safety = kind
        if kind not in get_args(Safety):
            raise MergeError(f"PerturbationConsistency.kind: expected consistency or entropy, found {kind!r}")

    @property
    def ascent(self) -> Ascent:
        """How the perturbations are found."""
        return self._ascent

    def __call__(self, output: TaskOutput) -> Tensor:
        """Return the loss in nats.

        Raises:
            MergeError: The outputs have no perturbed logits.
        """
        if output.perturbed_logits is None:
            raise MergeError("PerturbationConsistency: needs perturbed_logits, which MergeModule gives")
        return safety_loss(output.perturbed_logits, output.logits.detach().argmax(-1), self.kind)
