"""RegMean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, get_args

from torch import Tensor

from lit_merge.calibrated_module import CalibratedModule
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.layer_problem import Others, merge_other
from lit_merge.functional.linear_inputs import LinearInputs, linear_weights
from lit_merge.functional.regmean import NormalEquations
from lit_merge.task_vectors import TaskVectors

__all__ = ("RegMean",)


class RegMean(CalibratedModule):
    """Linear layers that answer the tasks' inputs as the experts do: W = Σ_t W_t G_t (Σ_t G_t)⁻¹, G_t = Σ x xᵀ.

    The inputs x of a layer are those within expert t on images of its task. Every ``nn.Linear`` is merged so, and the
    projections of ``nn.MultiheadAttention``, packed or not. Convolutions (patch embeddings too), matrices that are used
    otherwise, such as the bare projection at the end of open_clip's towers, and all other tensors take the mean, or
    what ``others`` says. The report lists these matrices and kernels.

    Args:
        off_diagonal: Factor of the off-diagonal entries of every G_t, in [0, 1]; 0.95 is that of the tables for CLIP.
        ridge: Makes layers solvable whose inputs do not have all directions: these take the mean. 0 is as published.
        per_row: Divide G_t by its number of inputs, so that tasks count alike, as in the tables for CLIP; else a
            task counts as often as it has inputs.
        others: What is done with all other tensors: ``mean``, as published, ``sum`` or ``base``.
        **kwargs: See :class:`~lit_merge.calibrated_module.CalibratedModule`.

    Raises:
        MergeError: A value is out of range or unknown; or, later, the network has no linear layer.

    Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849; see
    :func:`lit_merge.functional.regmean`.
    """

    def __init__(
        self,
        off_diagonal: float = 0.95,
        ridge: float = 1e-6,
        per_row: bool = True,
        others: Others = "mean",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self._one_of("others", others, get_args(Others))
        if not 0 <= off_diagonal <= 1:
            raise MergeError(f"{type(self).__name__}.off_diagonal: expected [0, 1], found {off_diagonal}")
        check_finite(f"{type(self).__name__}.ridge", ridge, least=0)
        self.off_diagonal = off_diagonal
        self.ridge = ridge
        self.per_row = per_row
        self.others: Others = others
        self.solved: tuple[str, ...] = ()

    def combine(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the merged task vector, layer by layer, each from the inputs within the experts."""
        equations: dict[str, NormalEquations] = {}
        watched = self.watched(bank)
        for row, task in enumerate(bank.tasks if watched else ()):
            self.add(equations, bank, row, self.inputs(bank.expert(task), task, watched))
        self.solved = tuple(equations)
        merged = {n: merge_other(delta, self.others) for n, delta in bank.deltas.items() if n not in equations}
        return merged | {name: self.solve(layer) for name, layer in equations.items()}

    def watched(self, bank: TaskVectors) -> set[str]:
        """Names of the weights of linear layers that do not stay at the base.

        Raises:
            MergeError: The network has no linear layer.
        """
        linear = linear_weights(self.skeleton.network, self.skeleton.tied) & {*bank.names}
        if not linear:
            raise MergeError(
                f"{type(self).__name__}: no layer of {type(self.skeleton.network).__name__} is an nn.Linear or an "
                "nn.MultiheadAttention with a weight of the suite; choose a method that needs no inputs"
            )
        return {name for name in linear if not self.stays(name)}

    def inputs(
        self, state: Mapping[str, Tensor], task: str, only: Collection[str], stop: bool = False
    ) -> dict[str, Tensor]:
        """Return the matrices G of a network on a task's images, ``(k, n, n)`` by the name of the weight.

        Args:
            state: Complete state dict of the network.
            task: Whose images.
            only: Names of the weights.
            stop: Run no further than to the last of them.
        """
        with LinearInputs(self.skeleton.network, only, self.skeleton.tied, stop) as seen:
            for images in self.task_images(task):
                seen.run(partial(self.skeleton, state, images))
        grams = {}
        for name, gram in seen.grams.items():
            rows = self.total(task, gram.new_tensor(seen.rows[name])) if self.per_row else 1.0
            grams[name] = self.total(task, gram) / rows
        return grams

    def task_images(self, task: str) -> Any:  # noqa: ANN401 - an iterable of tensors
        """Yield images ``(B, C, H, W)`` of a task."""
        return (batch.images for _, batch in self.batches(task))

    def add(
        self, equations: dict[str, NormalEquations], bank: TaskVectors, row: int, grams: Mapping[str, Tensor]
    ) -> None:
        """Add a task to the equations of some layers."""
        for name, gram in grams.items():
            equations.setdefault(name, NormalEquations(self.off_diagonal)).add(gram, bank.deltas[name][row])

    def solve(self, layer: NormalEquations) -> Tensor:
        """Return a layer's merged task vector ``(m, n)``."""
        return layer.solve(self.ridge).to(self.bank.compute_dtype)

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report: also what was not merged by its inputs, vectors aside."""
        found, solved = super().report_extra(), set(self.solved)
        left = [name for name, delta in self.bank.deltas.items() if delta.ndim > 2 and name not in solved]
        found["calibration"] |= {"layers": len(solved), "other_matrices": left}
        return found
