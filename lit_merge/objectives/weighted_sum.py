"""Sums of objectives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.objectives.base import Objective, TaskOutput
from lit_merge.perturbations import Ascent

__all__ = ("WeightedSum",)


class WeightedSum(Objective):
    """Weighted sum of objectives.

    Args:
        terms: The objectives.
        weights: Their factors; by default 1 each.

    Raises:
        MergeError: There are no terms, not one weight per term, or terms that find perturbations differently.

    >>> import torch
    >>> from lit_merge.objectives import Diversity, Entropy
    >>> loss = WeightedSum([Entropy(), Diversity()], [1.0, 0.5])
    >>> loss(TaskOutput(torch.zeros(2, 2), torch.zeros(2, 1)))
    tensor(0.3466)
    """

    def __init__(self, terms: Sequence[Objective], weights: Sequence[float] | None = None) -> None:
        self.terms = tuple(terms)
        self.weights = (1.0,) * len(self.terms) if weights is None else tuple(weights)
        if not self.terms or len(self.weights) != len(self.terms):
            raise MergeError(
                f"WeightedSum: expected at least one term and as many weights, found {len(self.terms)} terms and "
                f"{len(self.weights)} weights"
            )
        ascents = [term.ascent for term in self.terms if term.ascent is not None]
        if any(other != ascents[0] for other in ascents):
            raise MergeError(f"WeightedSum: its terms share one universal perturbation, found {ascents}")

    @property
    def uses_expert(self) -> bool:
        """Whether a term needs the experts' outputs."""
        return any(term.uses_expert for term in self.terms)

    @property
    def ascent(self) -> Ascent | None:
        """That of the terms which have one; they share the perturbations."""
        return next((term.ascent for term in self.terms if term.ascent is not None), None)

    def __call__(self, output: TaskOutput) -> Tensor:
        """Return the sum."""
        losses = [weight * term(output) for weight, term in zip(self.weights, self.terms, strict=True)]
        return sum(losses[1:], start=losses[0])
