"""Hashes of networks: the same values have the same digest, however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ("StateDigest", "state_digest")


class StateDigest:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; feed them in sorted order of names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, name: str, value: Tensor) -> None:
        """Add one tensor."""
        self._hash.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.detach().cpu().contiguous().flatten()
        if flat.numel():
            self._hash.update(flat.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the digest so far."""
        return self._hash.hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict; the order of its keys does not matter.

    >>> a, b = torch.zeros(2), torch.ones(1)
    >>> state_digest({"a": a, "b": b}) == state_digest({"b": b, "a": a})
    True
    """
    digest = StateDigest()
    for name in sorted(state):
        digest.update(name, state[name])
    return digest.hexdigest()
