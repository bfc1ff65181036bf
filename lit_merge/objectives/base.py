"""What an objective sees, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lit_merge.perturbations import Ascent

__all__ = ("Objective", "TaskOutput", "at_least_float32", "mean_over_ranks")


class TaskOutput(NamedTuple):
    """Outputs of one task's unlabelled batch.

    Attributes:
        logits: ``(B, C)``, of the merged network.
        features: ``(B, D)``, of the merged network.
        expert_logits: ``(B, C)``, of the task's expert on the same images; only if the objective needs experts.
        expert_features: ``(B, D)``, likewise.
        share: Weight of this rank's mean in the mean over all ranks, see
            :class:`~lit_merge.data.UnlabelledBatch`; for :func:`mean_over_ranks`.
        perturbed_logits: ``(B, C)``, of the merged network on the same images under the task's universal perturbation;
            only if the objective has an :attr:`Objective.ascent`.
    """

    logits: Tensor
    features: Tensor
    expert_logits: Tensor | None = None
    expert_features: Tensor | None = None
    share: float = 1.0
    perturbed_logits: Tensor | None = None


class Objective(ABC):
    """A loss of one task on unlabelled images; lower is better. The losses of the tasks are summed.

    A subclass computes a scalar from a :class:`TaskOutput`. It must be a mean over images, so that the gradients of
    several ranks average to that of one; a nonlinear function of a mean takes it by :func:`mean_over_ranks`.
    """

    needs_expert: ClassVar[bool] = False
    """Whether the expert's outputs are asked for; they are computed once per image and kept where memory allows."""

    @property
    def uses_expert(self) -> bool:
        """Whether this instance needs the experts' outputs."""
        return self.needs_expert

    @property
    def ascent(self) -> Ascent | None:
        """How universal perturbations are found, if this instance wants to see the images under them."""
        return None

    @abstractmethod
    def __call__(self, output: TaskOutput) -> Tensor:
        """Return the loss, a scalar."""


def at_least_float32(value: Tensor) -> Tensor:
    """Widen half precision, as objectives are computed in single precision or better.

    >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return value.to(torch.promote_types(value.dtype, torch.float32))


def mean_over_ranks(value: Tensor, share: float = 1.0) -> Tensor:
    """Mean of a per-rank mean over all ranks; its gradient is that of the local term, which the caller weights.

    With the averaging of gradients that distributed training does, this makes a nonlinear function of a batch mean
    the same function of the global batch.

    Args:
        value: Any shape, the same on all ranks.
        share: Weight of this rank; over all ranks the mean of the weights is 1.

    Returns:
        The same shape.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    total = value.detach() * share
    dist.all_reduce(total)
    with torch.no_grad():
        difference = total / dist.get_world_size() - value
    return value + difference
