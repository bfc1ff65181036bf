"""Robust z-scores: how far one expert lies from the others, where one of the others may be an outlier itself."""

from __future__ import annotations

from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("robust_z",)


def robust_z(values: Tensor, least: float = 1e-6) -> Tensor:
    """Return (x − median) / (1.4826 · MAD) along the first dimension.

    MAD is the median of the distances from the median; 1.4826 makes it a standard deviation where values are normal.
    Half of the values may be anything without a change of the scale. The median is the mean of the middle two.

    Args:
        values: ``(N, ...)``.
        least: Smallest scale, above 0, in units of the values: differences that mean nothing. It keeps nearly equal
            values from having large scores.

    Returns:
        Scores ``(N, ...)``; 0 for a single value.

    Raises:
        MergeError: ``least`` is not above 0.

    >>> robust_z(Tensor([1.0, 2.0, 3.0, 4.0, 11.0]))  # median 3, distances from it 2, 1, 0, 1, 8
    tensor([-1.3490, -0.6745,  0.0000,  0.6745,  5.3959])
    """
    if not least > 0:
        raise MergeError(f"robust_z: least: expected a number above 0, found {least}")
    centred = values - values.quantile(0.5, dim=0)
    scale = 1.4826 * centred.abs().quantile(0.5, dim=0)
    return centred / scale.clamp(min=least)
