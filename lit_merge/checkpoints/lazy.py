"""State dicts that are read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

__all__ = ("Selected", "Widened")


class Selected(Mapping[str, Tensor]):
    """Some tensors of a state dict, in a given order; a tensor is read when it is asked for.

    Args:
        state: The state dict, which may itself be lazy.
        names: Which of its names; those it does not have are left out.

    >>> import torch
    >>> list(Selected({"a": torch.zeros(1), "b": torch.ones(1), "c": torch.ones(1)}, ["c", "a", "z"]))
    ['c', 'a']
    """

    def __init__(self, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._state = state
        self._names = {name: None for name in names if name in state}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._state[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Widened(Mapping[str, Tensor]):
    """A state dict whose half-precision tensors are read as float32, which is exact.

    Args:
        state: The state dict, which may itself be lazy.

    >>> import torch
    >>> Widened({"a": torch.ones(1, dtype=torch.bfloat16)})["a"].dtype
    torch.float32
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        value = self._state[name]
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
