"""Fisher merging: every entry of the experts' weights counts as much as their predictions depend on it.

Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, section 3, arXiv 2111.09832.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite

__all__ = ("FisherAverage", "fisher_merge")


class FisherAverage:
    """The weighted average, summed task by task, so that no two tasks' Fisher information is in memory at once.

    Args:
        normalize: Divide the weight of each task by the length ‖F_t‖ of its Fisher information over the whole network,
            plus 1e-6: else the task whose expert is least certain decides on most entries. The tables have it so.
        floor: Added to every entry, above 0: where no task depends on an entry, the average is the plain one.

    Raises:
        MergeError: ``floor`` is not above 0.

    >>> average = FisherAverage(normalize=False)
    >>> average.add({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 0.0])})
    >>> average.add({"w": torch.tensor([5.0, 5.0])}, {"w": torch.tensor([1.0, 0.0])})
    >>> average.result()  # (3 · 1 + 1 · 5) / 4, and no task depends on the other
    {'w': tensor([2.0000, 3.0000])}
    """

    def __init__(self, normalize: bool = True, floor: float = 1e-6) -> None:
        check_finite("floor", floor, above=0)
        self.normalize = normalize
        self.floor = floor
        self._above: dict[str, Tensor] = {}
        self._below: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, deltas: Mapping[str, Tensor], fisher: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add a task.

        Args:
            deltas: Its task vector, ``(*shape)`` each.
            fisher: Its diagonal Fisher information, ``(*shape)`` each, at least 0.
            weight: Its weight, above 0.

        Raises:
            MergeError: Names, shapes or the weight are wrong.
        """
        check_finite("weights", weight, above=0)
        if set(deltas) != set(fisher):
            differing = ", ".join(sorted(set(deltas) ^ set(fisher)))
            raise MergeError(f"fisher: expected the names of the task vectors, they differ in {differing}")
        if self.normalize:
            squares = [torch.linalg.vector_norm(fisher[name], dtype=torch.float64).square() for name in sorted(fisher)]
            weight = weight / (float(torch.stack(squares).sum().sqrt()) + 1e-6)
        for name, delta in deltas.items():
            if fisher[name].shape != delta.shape:
                found = tuple(fisher[name].shape)
                raise MergeError(f"fisher: {name}: expected shape {tuple(delta.shape)}, found {found}")
            factor = (fisher[name].to(torch.promote_types(delta.dtype, torch.float32)) + self.floor) * weight
            self._above[name] = self._above[name].addcmul_(factor, delta) if name in self._above else factor * delta
            self._below[name] = self._below[name].add_(factor) if name in self._below else factor

    def result(self) -> dict[str, Tensor]:
        """Return the merged task vector, ``(*shape)`` each."""
        return {name: value / self._below[name] for name, value in self._above.items()}


def fisher_merge(
    deltas: Mapping[str, Tensor],
    fishers: Mapping[str, Tensor],
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    floor: float = 1e-6,
) -> dict[str, Tensor]:
    """Average the task vectors with the tasks' Fisher information as weights: Σ w_t F_t τ_t / Σ w_t F_t.

    Every tensor is treated alike. As the weights of each entry sum to 1, this averages the experts' weights.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        fishers: Diagonal Fisher information of each expert, a mean over its images, ``(T, *shape)`` each; see
            :func:`~lit_merge.functional.diagonal_fisher`.
        weights: Weight w of each task, above 0; by default equal.
        normalize: See :class:`FisherAverage`.
        floor: Added to every entry, above 0.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range, or names, shapes or the number of weights are wrong.

    Source: arXiv 2111.09832, equation 3.

    >>> deltas = {"w": torch.tensor([[1.0, 1.0], [5.0, 5.0]])}
    >>> fisher_merge(deltas, {"w": torch.tensor([[3.0, 0.0], [1.0, 0.0]])}, normalize=False)
    {'w': tensor([2.0000, 3.0000])}
    """
    average = FisherAverage(normalize, floor)
    tasks = max((len(delta) for delta in deltas.values()), default=0)
    shares = [1.0] * tasks if weights is None else list(weights)
    if len(shares) != tasks:
        raise MergeError(f"weights: expected one for each of {tasks} tasks, found {len(shares)}")
    for row, share in enumerate(shares):
        own = {name: delta[row] for name, delta in deltas.items()}
        average.add(own, {name: value[row] for name, value in fishers.items()}, share)
    return average.result()
