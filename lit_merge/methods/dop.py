"""DOP: dual orthogonal projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.dop import Space, dop_step
from lit_merge.functional.finite import check_finite
from lit_merge.functional.layer_problem import Others
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.opcm import EMBEDDINGS
from lit_merge.functional.scopes import share as checked_share
from lit_merge.methods._removal import replay
from lit_merge.sequential_module import SequentialModule
from lit_merge.stages import Removal, Stage

__all__ = ("Dop",)


class Dop(SequentialModule):
    """Continual merging by dual projections: each stage finds weights near the merge so far and near the new expert.

    Distances are measured through the subspaces of both task vectors, and the two losses are balanced by MGDA. Nothing
    is kept between stages but the merge. It takes 200 steps of Adam per matrix and stage: slow on a CPU, see
    :func:`~lit_merge.functional.dop_step`. An expert cannot be taken out without a replay from its stage.

    Args:
        steps: Steps of Adam per stage, at least 0.
        rate: Its learning rate; published for CLIP.
        space: Which projections count: ``uv``, ``u`` or ``v``.
        share: Singular values count until their cumulative share reaches this, in (0, 1]; 1 needs no decomposition.
        stability: Weight of the merge so far at the beginning of a stage, in [0, 1].
        momentum: Of the weights on their way to MGDA's, in [0, 1]; 1 for fixed weights.
        others: What becomes of tensors that are not matrices: ``mean`` of the two, as published, ``sum`` or ``base``.
        convolutions: Kernels are matrices ``(out, in · k · k)`` too.
        exclude: Names or patterns of matrices that are treated as others.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Yang et al., Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity,
    NeurIPS 2025 (openreview zD5cUX67b9).
    """

    def __init__(
        self,
        steps: int = 200,
        rate: float = 1e-4,
        space: Space = "uv",
        share: float = 0.99999,
        stability: float = 0.8,
        momentum: float = 0.999,
        others: Others = "mean",
        convolutions: bool = False,
        exclude: Sequence[str] = EMBEDDINGS,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if space not in ("uv", "u", "v"):
            raise MergeError(f"Dop.space: expected uv, u or v, found {space!r}")
        check_finite("Dop.steps", steps, least=0)
        check_finite("Dop.rate", rate, least=0)
        self.steps = steps
        self.rate = rate
        self.space: Space = space
        self.share = checked_share("Dop.share", share)
        self.stability = checked_share("Dop.stability", stability, zero=True)
        self.momentum = checked_share("Dop.momentum", momentum, zero=True)
        self.policy = MatrixPolicy(others, convolutions, tuple(exclude) if not isinstance(exclude, str) else exclude)

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the merge of both; the first expert is taken as it is."""
        if stage.number == 1:
            return dict(incoming)
        return dop_step(
            merged,
            incoming,
            steps=self.steps,
            rate=self.rate,
            space=self.space,
            share=self.share,
            stability=self.stability,
            momentum=self.momentum,
            policy=self.policy,
        )

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say from where to replay: every stage is a descent from the merge before it."""
        return replay("Dop", task, history, "every stage descends from the merge before it")
