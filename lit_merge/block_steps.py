"""Adaptation block by block: the option, and what a step merges."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.evaluation import EvaluationSteps
from lit_merge.lazy_weights import LazyWeights

__all__ = ("BlockSteps", "MergeBy")

MergeBy = Literal["network", "block"]


class BlockSteps(EvaluationSteps):
    """The part of :class:`~lit_merge.MergeModule` that says what is merged at once in a step.

    With ``merge_by: block`` what a step merges is a recipe, :class:`~lit_merge.lazy_weights.LazyWeights`; the skeleton
    follows it block by block, see :class:`~lit_merge.block_by_block.BlockByBlock`. Evaluation merges once, as ever.

    Attributes:
        merge_by: ``network`` or ``block``.
        no_blocks: Why a method cannot be adapted block by block; empty if it can.
    """

    no_blocks: ClassVar[str] = ""
    merge_by: MergeBy

    @abstractmethod
    def merge(self, bank: Any) -> dict[str, Tensor]:  # noqa: ANN401 - said by MergeModule
        """Return the merged parameters by name."""

    def use_merge_by(self, merge_by: MergeBy) -> None:
        """Set :attr:`merge_by`.

        Raises:
            MergeError: It is neither ``network`` nor ``block``, or the method cannot be adapted so.
        """
        if merge_by not in get_args(MergeBy):
            raise MergeError(f"model.merge_by: expected network or block, found {merge_by!r}")
        if merge_by == "block" and self.no_blocks:
            raise MergeError(f"model.merge_by: {type(self).__name__} cannot merge by block: {self.no_blocks}")
        self.merge_by = merge_by

    def recipes(self) -> AbstractContextManager[None]:
        """Within it, with ``merge_by: block``, the bank's ``contract`` returns recipes."""
        return self.bank.lazily() if self.merge_by == "block" else nullcontext()

    def merged_to_adapt(self) -> dict[str, Tensor]:
        """Merge for a step: into weights, or into a recipe of weights.

        Raises:
            MergeError: The method merges in a way that has no recipe.
        """
        with self.recipes(), torch.autocast(self.device.type, enabled=False):  # coefficients are not for half precision
            merged = self.merge(self.bank)
        if self.merge_by == "block" and not isinstance(merged, LazyWeights):
            raise MergeError(
                f"model.merge_by: {type(self).__name__} cannot merge by block: its merge does not return what "
                "bank.contract gave it (tensors can be added by `|`); use merge_by: network"
            )
        return merged
