"""Steps without data."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ("Steps",)


class Steps:
    """Numbers of the steps of an epoch; the Trainer, which counts them itself, may resume anywhere.

    Args:
        count: Steps of an epoch.

    >>> list(Steps(3))
    [0, 1, 2]
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def state_dict(self) -> dict[str, int]:
        """Nothing: no step depends on its number."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing."""
