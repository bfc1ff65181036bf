"""The one check of numbers that a config gives: no NaN and no infinity, which would be a network of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lit_merge.errors import MergeError

__all__ = ("check_finite",)


def check_finite(name: str, value: object, *, least: float | None = None, above: float | None = None) -> None:
    """Refuse numbers that are not finite, or too small.

    Args:
        name: What they are, for the message.
        value: A number, or lists and mappings with numbers in them; anything else in it is not looked at.
        least: They are at least this.
        above: They are above this.

    Raises:
        MergeError: One of the numbers is NaN, infinite or too small.

    >>> check_finite("weights", {"a": 0.5, "b": 1}, least=0)
    >>> check_finite("scale", [{"filter": "mlp", "value": [0.1, float("nan")]}, {"value": 0.3}])
    Traceback (most recent call last):
    ...
    lit_merge.errors.MergeError: scale: expected finite numbers, found nan
    """
    for number in _numbers(value):
        small = (least is not None and number < least) or (above is not None and number <= above)
        if small or not math.isfinite(number):
            wanted = "finite numbers" if least is None else f"at least {least:g}"
            wanted = wanted if above is None else f"a number above {above:g}"
            also = " and finite" if number == math.inf and wanted != "finite numbers" else ""
            raise MergeError(f"{name}: expected {wanted}{also}, found {number}")


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        yield from _numbers(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _numbers(part)
