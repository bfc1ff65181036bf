"""Agreement with the expert of the task on the same images."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lit_merge.errors import MergeError
from lit_merge.objectives.base import Objective, TaskOutput, at_least_float32

__all__ = ("ExpertAlignment",)


class ExpertAlignment(Objective):
    """Distance between the merged network and the task's expert on the same unlabelled images.

    Args:
        distance: ``kl``: Kullback-Leibler divergence from the expert's prediction to the merged one (distillation,
            Hinton et al., arXiv 1503.02531); ``l1``, ``l2``: mean absolute or squared difference of the features
            (Yang et al., Representation Surgery, equation 4, arXiv 2402.02705, uses l1); ``cosine``: one minus the
            cosine of the features.
        temperature: Divides both logits of ``kl``, above 0; the loss is multiplied by its square, as usual.

    Raises:
        MergeError: A value is out of range.

    >>> same = torch.tensor([[1.0, 2.0]])
    >>> ExpertAlignment("kl")(TaskOutput(same, same, same, same))
    tensor(0.)
    >>> ExpertAlignment("l1")(TaskOutput(same, same, same, same + 0.5))
    tensor(0.5000)
    """

    needs_expert: ClassVar[bool] = True

    def __init__(self, distance: Literal["kl", "l1", "l2", "cosine"] = "kl", temperature: float = 1.0) -> None:
        if distance not in ("kl", "l1", "l2", "cosine"):
            raise MergeError(f"ExpertAlignment.distance: expected kl, l1, l2 or cosine, found {distance!r}")
        if temperature <= 0:
            raise MergeError(f"ExpertAlignment.temperature: expected a number above 0, found {temperature}")
        self.distance = distance
        self.temperature = temperature

    def __call__(self, output: TaskOutput) -> Tensor:
        """Return the mean distance over the images."""
        if output.expert_logits is None or output.expert_features is None:
            raise MergeError("ExpertAlignment: the expert's outputs are missing; ask for them with needs_expert = True")
        if self.distance == "kl":
            return self._divergence(at_least_float32(output.logits), at_least_float32(output.expert_logits))
        merged, expert = at_least_float32(output.features), at_least_float32(output.expert_features)
        if self.distance == "cosine":
            return 1 - torch.cosine_similarity(merged, expert, dim=-1).mean()
        return functional.l1_loss(merged, expert) if self.distance == "l1" else functional.mse_loss(merged, expert)

    def _divergence(self, merged: Tensor, expert: Tensor) -> Tensor:
        log_q = (merged / self.temperature).log_softmax(-1)
        log_p = (expert / self.temperature).log_softmax(-1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * self.temperature**2
