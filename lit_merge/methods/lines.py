"""LiNeS after task arithmetic or TIES."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_merge.functional.finite import check_finite
from lit_merge.functional.lines import intercept_of, lines, lines_intercept
from lit_merge.functional.scopes import share
from lit_merge.functional.ties import TiesFacts
from lit_merge.methods._multi_task import MultiTask, check_multi_task, multi_task_facts, multi_task_vector
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Lines",)


class Lines(MergeModule):
    """Scale the merged vector up with depth: θ_l = θ0_l + (α + β (l − 1)/(L − 1)) τ_MTL,l.

    Before any other rule, scaling with fixed factors is the transform :class:`lit_merge.transforms.Lines`.

    Args:
        beta: What the last block has more than the first; the one number that the paper tunes.
        alpha: Factor of the first block; null for ‖Σ_t τ_t‖ / (T ‖τ_MTL‖), as published: 1/T with ``sum``.
        multi_task: τ_MTL: ``sum`` of the task vectors, or their ``ties`` merge with the disjoint mean.
        density: Share of entries that TIES keeps.
        outside: Factor of tensors outside of all blocks; null for α, as released.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range; or, later, the network has no numbered blocks.

    Source: Wang et al., LiNeS, equation 2 and section 4.2, arXiv 2410.17146.
    """

    def __init__(
        self,
        beta: float = 0.5,
        alpha: float | None = None,
        multi_task: MultiTask = "sum",
        density: float = 0.2,
        outside: float | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        check_multi_task(multi_task)
        for name, value in (("alpha", alpha), ("beta", beta), ("outside", outside)):
            check_finite(f"Lines.{name}", value)
        self.beta = beta
        self.alpha = alpha
        self.multi_task: MultiTask = multi_task
        self.density = share("Lines.density", density)
        self.outside = outside

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: of a sum one tensor, as α is then 1/T."""
        return "tensor" if self.multi_task == "sum" else "statistics"

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether every entry is merged for itself; a length is summed tensor by tensor."""
        return self.multi_task == "sum" or self.alpha is not None

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + the scaled τ_MTL; tensors outside of the blocks have the factor ``outside``."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with the thresholds and the α of the network if TIES comes before."""
        facts = multi_task_facts(pieces, self.multi_task, self.density)
        alpha = self.alpha
        if alpha is None and facts is not None:
            alpha = intercept_of(_with_vector(pieces, self.density, facts))
        return partial(self._merge, facts=facts, alpha=alpha)

    def _merge(
        self, bank: TaskVectors, facts: TiesFacts | None = None, alpha: float | None = None
    ) -> dict[str, Tensor]:
        vector = multi_task_vector(bank.deltas, self.multi_task, self.density, facts)
        alpha = self.alpha if alpha is None else alpha
        alpha = lines_intercept(bank.deltas, vector) if alpha is None else alpha
        return bank.offset(lines(vector, alpha, self.beta, outside=self.outside, network=bank.network))


def _with_vector(
    pieces: Pieces, density: float, facts: TiesFacts
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    for piece in pieces:
        yield piece, multi_task_vector(piece, "ties", density, facts)
        del piece
