"""SCE merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.functional.sce import SceFacts, sce_facts, sce_merge
from lit_merge.functional.scopes import share
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Sce",)


class Sce(MergeModule):
    """Select by variance, calculate coefficients by energy, erase the minority: θ = θ0 + λ · SCE(τ_1 … τ_T).

    Args:
        density: Share of entries of largest variance that are merged, in (0, 1]; mergekit's ``select_topk`` is 1.
        scale: The coefficient λ; the paper has none.
        per: Selection and coefficients of each ``tensor``, as published, or of the ``network``.
        renormalize: Divide by the coefficients that were not erased, as mergekit does and the paper does not.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Wan et al., FuseChat, section 3.3, arXiv 2408.07990.
    """

    def __init__(
        self,
        density: float = 0.1,
        scale: Coefficient = 1.0,
        per: Literal["tensor", "network"] = "tensor",
        renormalize: bool = False,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.density = share("Sce.density", density)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.per: Literal["tensor", "network"] = per
        self.renormalize = renormalize

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "statistics" if self.per == "network" else "tensor"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · SCE; every tensor is treated alike."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, with selection and coefficients of the network if these are asked for."""
        return partial(self._merge, facts=sce_facts(pieces, self.density) if self.per == "network" else None)

    def _merge(self, bank: TaskVectors, facts: SceFacts | None = None) -> dict[str, Tensor]:
        merged = sce_merge(bank.deltas, self.density, per=self.per, renormalize=self.renormalize, facts=facts)
        return bank.offset(merged, self.scale)
