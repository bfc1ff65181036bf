"""RegMean++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_merge.functional.layer_problem import merge_other
from lit_merge.functional.regmean import NormalEquations
from lit_merge.methods.regmean import RegMean
from lit_merge.task_vectors import TaskVectors

__all__ = ("RegMeanPlusPlus",)


class RegMeanPlusPlus(RegMean):
    """RegMean with the inputs that a layer will have in the merged network.

    Blocks are merged one after the other, in the order in which the network calls them. What enters a block comes from
    the merge so far; within the block it is expert t's, whole, that runs on it and tells the inputs of its layers. The
    other tensors of a block, and all tensors outside of blocks, take the mean, or what ``others`` says. What has no
    numbered block around it is a block of its own.

    The published code leaves the last normalisation at the base, by way of not merging it: ``at_base:
    ["*post_layernorm*"]``, or ``["ln_post*"]`` in open_clip's names.

    Each block costs a pass of all images through the network up to it, and images are read once and kept in memory.

    Args:
        **kwargs: See :class:`~lit_merge.methods.RegMean`.

    Raises:
        MergeError: As in :class:`~lit_merge.methods.RegMean`.

    Source: Nguyen et al., RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging,
    arXiv 2508.03121.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on to the base class
        super().__init__(**kwargs)
        self._kept: dict[str, list[Tensor]] = {}

    def combine(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the merged task vector, block by block, each from the inputs within the merge so far."""
        merged = {name: merge_other(delta, self.others) for name, delta in bank.deltas.items()}
        merged |= {name: torch.zeros_like(value) for name, value in merged.items() if self.stays(name)}
        self._kept = {task: list(super(RegMeanPlusPlus, self).task_images(task)) for task in bank.tasks}
        try:
            stages = self._stages(bank)
            self._solve_blocks(bank, merged, stages)
        finally:
            self._kept = {}  # images
        self.solved = tuple(name for weights in stages.values() for name in weights)
        return merged

    def _solve_blocks(self, bank: TaskVectors, merged: dict[str, Tensor], stages: Mapping[str, list[str]]) -> None:
        """Put the merged weights of one block after the other into the merged task vector."""
        for block, weights in stages.items():
            equations: dict[str, NormalEquations] = {}
            for row, task in enumerate(bank.tasks):
                state = self._hybrid(bank, merged, task, block)
                self.add(equations, bank, row, self.inputs(state, task, weights, stop=True))
            merged.update({name: self.solve(layer) for name, layer in equations.items()})

    def task_images(self, task: str) -> list[Tensor]:
        """Images ``(B, C, H, W)`` of a task, kept from block to block."""
        return self._kept[task]

    def _stages(self, bank: TaskVectors) -> dict[str, list[str]]:
        """Weights by block, in the order in which the network calls them."""
        task, watched = bank.tasks[0], self.watched(bank)
        if not watched:
            return {}
        whole, self._kept[task] = self._kept[task], self._kept[task][:1]
        stages: dict[str, list[str]] = {}
        blocks = _blocks(bank)
        for name in self.inputs(bank.expert(task), task, watched):
            stages.setdefault(blocks[name], []).append(name)
        self._kept[task] = whole
        return stages

    def _hybrid(self, bank: TaskVectors, merged: Mapping[str, Tensor], task: str, block: str) -> dict[str, Tensor]:
        """State dict of the merge so far with one block of an expert, running statistics included."""
        expert, blocks = bank.expert(task), _blocks(bank)
        parameters = {n: expert[n] if blocks[n] == block else v for n, v in bank.offset(merged).items()}
        inside = {n: v for n, v in expert.items() if n in self.skeleton.buffers_of and n.startswith(f"{block}.")}
        return bank.complete(parameters) | inside


def _blocks(bank: TaskVectors) -> dict[str, str]:
    """Block of each tensor."""
    names, which = bank.groups("block")
    return {name: names[number] for name, number in zip(bank.names, which.tolist(), strict=True)}
