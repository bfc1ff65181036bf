"""WUDI merging."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_merge.data_free_module import DataFreeModule
from lit_merge.functional.wudi import WudiProblem

__all__ = ("Wudi",)


class Wudi(DataFreeModule):
    """Learn, without data, the merged task vector that interferes least: θ0 + M, with M from Σ_t ‖(M − τ_t) τ_tᵀ‖².

    The defaults are the published ones: in every matrix, position embeddings too, 400 steps of Adam with learning rate
    1e-5 from M = Σ_t τ_t; each task's term is divided by ‖τ_t‖². There is no coefficient. All other tensors take the
    mean of their task vectors. The optimum is not the aim: few and small steps keep M near the sum.

    Args:
        **kwargs: See :class:`~lit_merge.data_free_module.DataFreeModule`.

    Source: Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
    Vectors, arXiv 2503.08099; see :func:`lit_merge.functional.wudi`.
    """

    rate: ClassVar[float] = 1e-5
    problem = WudiProblem

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on to the base class
        super().__init__(**kwargs)
