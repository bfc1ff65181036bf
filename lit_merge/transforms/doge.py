"""DOGE as a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_merge.functional.doge import Offsets, doge
from lit_merge.functional.finite import check_finite
from lit_merge.functional.layer_problem import LayerChoice
from lit_merge.functional.scopes import share
from lit_merge.transforms.base import Transform

__all__ = ("Doge",)


class Doge(Transform):
    """Add learned offsets to the task vectors and keep their largest entries: τ_t → (τ_t + δ_t) ⊙ m_t.

    Before :class:`~lit_merge.AdaMerging` this is DOGE-AM, and the defaults are its published ones: one offset per
    task, a shared subspace of ``min(m, n) // T`` directions, 400 steps. It runs on the current GPU if there is one, and
    whenever a model is configured, so also before a checkpoint is evaluated.

    Args:
        steps: Steps of Adam.
        rate: Its learning rate.
        scale: Length of a scaled task vector in the objective.
        relative: ``scale`` is in units of the mean length over tasks.
        density: Share of entries of a task vector that stay, in (0, 1].
        subspace: The shared subspace has ``min(m, n) // subspace`` directions; null for the number of tasks; 0 for
            none.
        offsets: ``per_task``, or one ``shared`` by the tasks.
        layers: ``blocks``: matrices in numbered blocks; or all ``matrices``.
        exclude: Names, with wildcards, that are left out of them.
        others: All other tensors ``keep`` their task vectors, or stay at the ``base``, as published.

    Raises:
        MergeError: A value is out of range.

    Source: Wei et al., arXiv 2501.01230; see :func:`lit_merge.functional.doge`.

    >>> Doge(density=0.2, steps=100)  # doctest: +ELLIPSIS
    Doge(density=0.2, exclude=(), layers='blocks', ...)
    """

    def __init__(
        self,
        steps: int = 400,
        rate: float = 1e-4,
        scale: float = 0.07,
        relative: bool = False,
        density: float = 0.3,
        subspace: int | None = None,
        offsets: Offsets = "per_task",
        layers: LayerChoice = "blocks",
        exclude: Sequence[str] = (),
        others: Literal["base", "keep"] = "base",
    ) -> None:
        check_finite("Doge.rate", rate, above=0)
        check_finite("Doge.scale", scale)
        self.steps = steps
        self.rate = rate
        self.scale = scale
        self.relative = relative
        self.density = share("Doge.density", density)
        self.subspace = subspace
        self.offsets: Offsets = offsets
        self.layers: LayerChoice = layers
        self.exclude = exclude if isinstance(exclude, str) else tuple(exclude)  # a word is refused later
        self.others: Literal["base", "keep"] = others

    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return sparse task vectors, ``(T, *shape)`` each."""
        return doge(deltas, **vars(self), device="cuda" if torch.cuda.is_available() else None)
