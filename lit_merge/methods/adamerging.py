"""AdaMerging: coefficients learned at test time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_merge.coefficients import Coefficient, Tying, start_values, tying
from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("AdaMerging",)


class AdaMerging(MergeModule):
    """Learn the coefficients of task vectors on unlabelled test images: θ_l = θ0_l + Σ_t λ_{t,l} τ_{t,l}.

    The published recipe is the default: 0.3 at the start, Adam with learning rate 1e-3, 16 images per task and step,
    sum of the tasks' entropies, no bounds in the loss. AdaMerging++ is this class after the transform
    :class:`lit_merge.transforms.Ties`.

    Args:
        granularity: ``task``: one coefficient per task; ``block``: per task and numbered block; ``tensor``, or
            ``layer`` in the paper's word: per task and parameter tensor; a number of them over depth, or by name: see
            :mod:`lit_merge.coefficients`.
        init: Coefficients at the start, in the same words; null for 1/T.
        bounds: Lowest and highest coefficient. They are projected onto the interval after each step: clamping in the
            graph, as in the released code, kills the gradient of whatever leaves it once.
        softmax: The coefficients of the tasks are a softmax, so they are positive and sum to 1; they start at 1/T,
            and ``init`` and ``bounds`` do not apply.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Yang et al., AdaMerging, equations 3 to 5, arXiv 2310.02575.
    """

    column: Tensor
    shares: Tensor | None

    def __init__(
        self,
        granularity: Tying = "tensor",
        init: Coefficient | None = 0.3,
        bounds: tuple[float, float] | None = None,
        softmax: bool = False,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise MergeError(f"AdaMerging.bounds: expected lowest < highest, found {bounds}")
        if bounds is not None and softmax:
            raise MergeError("AdaMerging: bounds and softmax exclude each other; softmax coefficients lie in (0, 1)")
        self.granularity: Tying = granularity
        check_finite(f"{type(self).__name__}.init", init)
        self.init = init
        self.bounds = bounds
        self.softmax = softmax

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make the coefficients ``(T, G)``, one column per group of tensors."""
        _, shares = tying(self.granularity, bank.names)
        init = 0.0 if self.softmax else 1 / len(bank.tasks) if self.init is None else self.init
        start = start_values(init, shares, bank.names).to(bank.compute_dtype)
        between = not bool((shares.sum(0) == shares.max(0).values).all())  # two coefficients over depth
        self.register_buffer("column", shares.argmax(0), persistent=False)
        self.register_buffer("shares", shares.to(bank.compute_dtype) if between else None, persistent=False)
        self.coefficients = nn.Parameter(start.expand(len(bank.tasks), -1).clone())

    def weights(self) -> Tensor:
        """Coefficients as they act, ``(T, L)``: one column per parameter tensor."""
        values = self.coefficients.softmax(0) if self.softmax else self.coefficients
        return values[:, self.column] if self.shares is None else values @ self.shares

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + Σ λ_{t,l} τ_{t,l}; every tensor has a coefficient."""
        return bank.contract(self.weights())

    def project(self) -> None:
        """Bring the coefficients back into their bounds."""
        if self.bounds is not None:
            self.coefficients.clamp_(*self.bounds)

    def coefficient_table(self) -> Tensor:
        """Coefficients as they act, ``(T, L)``."""
        return self.weights().detach()
