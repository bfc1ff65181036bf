"""Fisher merging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from lit_merge.calibrated_module import CalibratedModule
from lit_merge.errors import MergeError
from lit_merge.functional.diagonal_fisher import FisherTarget, Gradients, Squares, diagonal_fisher
from lit_merge.functional.finite import check_finite
from lit_merge.functional.fisher_merge import FisherAverage
from lit_merge.methods._task_weights import TaskWeights, task_weights
from lit_merge.task_vectors import TaskVectors

__all__ = ("FisherMerging",)


class FisherMerging(CalibratedModule):
    """Average of the experts with their diagonal Fisher information as weights: θ = Σ w_t F_t θ_t / Σ w_t F_t.

    F_t is the mean over images of the task of squared gradients of log p(y|x), at the expert, with its frozen head. As
    published these are gradients of single images, in expectation over the expert's own predictions y: labels are not
    looked at. FusionBench's numbers for CLIP come from ``target: root`` and ``squares: batch`` on the ``first`` 256
    images.

    Args:
        target: ``expected``, ``sampled``, ``labels`` or ``root``, see :func:`lit_merge.functional.diagonal_fisher`.
            ``expected`` costs a pass per class; take ``sampled`` where there are hundreds.
        squares: Of the gradient of each ``image``, or of the sum over a ``batch``.
        normalize: Make all tasks count alike, whatever the length of F_t.
        floor: Added to F, above 0.
        weights: w, above 0, in the order of the suite's tasks or by name; null for equal weights.
        gradients: ``vmap`` or ``loop``; the results are the same.
        chunk_size: Images at once with ``vmap``, each of which takes the memory of one network.
        **kwargs: See :class:`~lit_merge.calibrated_module.CalibratedModule`.

    Raises:
        MergeError: A value is out of range or unknown, or labels of test images are asked for.

    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832.
    """

    def __init__(
        self,
        target: FisherTarget = "expected",
        squares: Squares = "image",
        normalize: bool = True,
        floor: float = 1e-6,
        weights: TaskWeights = None,
        gradients: Gradients = "vmap",
        chunk_size: int = 8,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self._one_of("target", target, get_args(FisherTarget))
        self._one_of("squares", squares, get_args(Squares))
        self._one_of("gradients", gradients, get_args(Gradients))
        check_finite("FisherMerging.floor", floor, above=0)
        check_finite("FisherMerging.weights", weights, above=0)
        check_finite("FisherMerging.chunk_size", chunk_size, least=1)
        if target == "labels" and self.image_source == "adapt":
            raise MergeError(
                "FisherMerging.target: labels are those of images that are scored; give another target, or "
                "image_source: train"
            )
        self.target: FisherTarget = target
        self.squares: Squares = squares
        self.normalize = normalize
        self.floor = floor
        self.weights = weights
        self.gradients: Gradients = gradients
        self.chunk_size = chunk_size

    def combine(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the weighted average of the task vectors; every tensor has weights of its own."""
        average = FisherAverage(self.normalize, self.floor)
        for row, weight in enumerate(task_weights(self.weights, bank.tasks)):
            own = {name: delta[row].to(bank.compute_dtype) for name, delta in bank.deltas.items()}
            average.add(own, self.fisher(bank, bank.tasks[row]), weight)
        return average.result()

    def fisher(self, bank: TaskVectors, task: str) -> dict[str, Tensor]:
        """Return the diagonal Fisher information of a task's expert, ``(*shape)`` each, a mean over its images."""
        state = bank.expert(task)
        parameters = {name: state[name] for name in bank.names}
        aliases = {alias: name for alias, name in self.skeleton.tied.items() if name in parameters}

        def logits(values: Mapping[str, Tensor], images: Tensor) -> Tensor:
            tied = {alias: values[name] for alias, name in aliases.items()}
            return self.outputs({**state, **values, **tied}, task, images)[1]

        found: dict[str, Tensor] = {}
        for number, batch in self.batches(task):
            squares = diagonal_fisher(
                logits,
                parameters,
                batch.images,
                target=self.target,
                squares=self.squares,
                labels=batch.labels,
                generator=self.generator("classes", task, number),
                gradients=self.gradients,
                chunk_size=self.chunk_size,
            )
            found = {name: found[name].add_(value) if found else value for name, value in squares.items()}
        count = len(self.positions(task))
        return {name: self.total(task, value).div_(count) for name, value in found.items()}

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        found = super().report_extra()
        found["calibration"] |= {"target": self.target, "squares": self.squares}
        return found
