"""MagMax: of every entry the change of largest magnitude.

Source: Marczak et al., MagMax: Leveraging Model Merging for Seamless Continual Learning, section 4, arXiv 2407.06322.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ("magmax",)


def magmax(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep of each entry the task's value that is largest in magnitude.

    Of two equal magnitudes with opposite signs the positive one is kept, so the order of the tasks does not matter; in
    the released code it is the later task's.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.

    Returns:
        Merged task vector, ``(*shape)`` each.

    >>> magmax({"w": torch.tensor([[1.0, -4.0, 2.0], [-3.0, 1.0, -2.0]])})
    {'w': tensor([-3., -4.,  2.])}
    """
    merged = {}
    for name, delta in deltas.items():
        high, low = delta.amax(0), delta.amin(0)
        merged[name] = torch.where(high >= -low, high, low)
    return merged
