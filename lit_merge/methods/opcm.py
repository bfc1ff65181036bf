"""OPCM: orthogonal projection-based continual merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lit_merge.functional.decompositions import SvdMethod
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.opcm import EMBEDDINGS, opcm_rescale, opcm_step
from lit_merge.functional.scopes import share
from lit_merge.methods._removal import replay
from lit_merge.sequential_module import SequentialModule
from lit_merge.stages import Removal, Stage

__all__ = ("Opcm",)


class Opcm(SequentialModule):
    """Continual merging by orthogonal projection: A_t = A_{t−1} + Π_t(τ_t), θ = θ0 + A_t · mean‖τ‖ / ‖A_t‖.

    Π_t projects what arrives away from the leading subspace of what was merged before, matrix by matrix; the merge
    is as long as the experts are on average. The order of the experts matters.

    Kept between stages: ``norms`` of the experts and ``lambda`` = λ_t, with which M_t is as good as A_t. For reports:
    ``sqrt_t``, what λ_t would be for orthogonal experts of equal length; ``energy``, the share of ‖τ_t‖² that was
    projected out; ``ranks``, directions that were projected out as a block, by tensor.

    An expert cannot be taken out without a replay from the stage at which it came: the projection of every later one
    depends on it.

    Args:
        alpha: Share α of the sum of singular values that makes up the leading subspace, in [0, 1].
        diagonal: Whether the diagonal outside of it is projected out too, as published. ``false`` keeps more of each
            expert.
        convolutions: Kernels are projected as matrices ``(out, in · k · k)``; by default they are added.
        exclude: Names or patterns of matrices that are added, not projected. Biases, norms and class tokens always are.
        svd: See :func:`~lit_merge.functional.truncated_svd`; ``randomized`` only with ``diagonal: false``.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Tang et al., Merging Models on the Fly Without Retraining, arXiv 2501.09522; see
    :func:`lit_merge.functional.opcm_step`, also for what the released code does otherwise.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        diagonal: bool = True,
        convolutions: bool = False,
        exclude: Sequence[str] = EMBEDDINGS,
        svd: SvdMethod = "auto",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        self.alpha = share("Opcm.alpha", alpha, zero=True)
        self.diagonal = diagonal
        self.policy = MatrixPolicy("sum", convolutions, tuple(exclude) if not isinstance(exclude, str) else exclude)
        self.svd: SvdMethod = svd

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return M_t, and keep norms and λ_t."""
        numbers = stage.numbers
        accumulated = {name: numbers.get("lambda", 1.0) * value for name, value in merged.items()}
        total, facts = opcm_step(
            accumulated, incoming, self.alpha, policy=self.policy, diagonal=self.diagonal, method=self.svd
        )
        norms = [*numbers.get("norms", []), facts.norm]
        result, factor = opcm_rescale(total, norms)
        numbers.update(norms=norms, energy=facts.energy, ranks=facts.ranks, sqrt_t=math.sqrt(stage.number))
        numbers["lambda"] = factor
        return result

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say from where to replay: an expert decides on the projection of all that come after it."""
        return replay("Opcm", task, history, "each later expert was projected away from it")
