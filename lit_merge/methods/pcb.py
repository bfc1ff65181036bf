"""PCB-Merging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.functional.finite import check_finite
from lit_merge.functional.pcb import PcbFacts, PcbFormula, pcb_facts, pcb_merge
from lit_merge.functional.scopes import share
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Pcb",)


class Pcb(MergeModule):
    """Average each entry by its score in a competition within and between tasks: θ = θ0 + λ · PCB(τ_1 … τ_T).

    Args:
        density: Share r of entries per task that stay, in (0, 1].
        scale: The coefficient λ; tuned together with r in the paper.
        formula: The score of the ``paper``, or that of the ``released`` code, see
            :func:`lit_merge.functional.pcb.pcb_merge`.
        per: Statistics and ranks over the ``network``, as published, or a ``tensor``.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Source: Du et al., Parameter Competition Balancing for Model Merging, section 3, arXiv 2410.02396.
    """

    def __init__(
        self,
        density: float = 0.1,
        scale: Coefficient = 1.0,
        formula: PcbFormula = "paper",
        per: Literal["network", "tensor"] = "network",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.density = share("Pcb.density", density)
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.formula: PcbFormula = formula
        self.per: Literal["network", "tensor"] = per

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once: what has a statistic of its own."""
        return "statistics" if self.per == "network" else "tensor"

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + λ · PCB; every tensor takes part in one competition."""
        return self._merge(bank)

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges piece by piece, in the competition of the network if it is that of all tensors."""
        facts = pcb_facts(pieces, self.density, self.formula) if self.per == "network" else None
        return partial(self._merge, facts=facts)

    def _merge(self, bank: TaskVectors, facts: PcbFacts | None = None) -> dict[str, Tensor]:
        merged = pcb_merge(bank.deltas, self.density, per=self.per, formula=self.formula, facts=facts)
        return bank.offset(merged, self.scale)
