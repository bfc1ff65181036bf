"""DARE: drop entries of the task vectors at random and rescale the rest.

Source: Yu et al., Language Models are Super Mario, equation 3, arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("check_drop", "dare")


def check_drop(drop: float, window: float = 0.0) -> None:
    """Refuse probabilities, from ``drop - window / 2`` to ``drop + window / 2``, that are outside of [0, 1).

    Raises:
        MergeError: They are.
    """
    if not (window >= 0 and drop - window / 2 >= 0 and drop + window / 2 < 1):
        around = f" ± {window / 2}" if window else ""
        name = "drop ± window/2: expected probabilities" if window else "drop: expected a probability"
        raise MergeError(f"{name} in [0, 1), found {drop}{around}")


def dare(
    deltas: Mapping[str, Tensor],
    drop: float = 0.5,
    generator: torch.Generator | None = None,
    *,
    rescale: bool = True,
) -> dict[str, Tensor]:
    """Zero each entry with probability ``drop``, independently per task, and divide the rest by ``1 - drop``.

    The mask depends on the generator and on the sorted names only, not on the order of the mapping or the device.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        drop: Probability of dropping an entry, in [0, 1).
        generator: Source of randomness, on the CPU; by default a new one with seed 0.
        rescale: Divide what stays by ``1 - drop``, so that the expectation does not change.

    Returns:
        Task vectors, ``(T, *shape)`` each.

    Raises:
        MergeError: ``drop`` is outside [0, 1).

    >>> import torch
    >>> dare({"w": torch.ones(1, 6)}, drop=0.5, generator=torch.Generator().manual_seed(0))
    {'w': tensor([[0., 2., 0., 0., 0., 2.]])}
    """
    check_drop(drop)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    factor = 1 / (1 - drop) if rescale else 1.0
    sparse = {}
    for name in sorted(deltas):
        delta = deltas[name]
        keep = torch.rand(delta.shape, generator=generator) >= drop
        sparse[name] = torch.where(keep.to(delta.device), delta * factor, 0)
    return {name: sparse[name] for name in deltas}
