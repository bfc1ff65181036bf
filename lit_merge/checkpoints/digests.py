"""Hashes of networks: the same values have the same digest, however they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_state

__all__ = ("StateDigest", "read_hashed", "state_digest")


class StateDigest:
    """SHA-256 over names, dtypes, shapes and bytes of tensors; feed them in sorted order of names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, name: str, value: Tensor) -> None:
        """Add one tensor."""
        self.begin(name, value.dtype, value.shape)
        self.feed(value)

    def begin(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        """Begin a tensor that is added in parts."""
        self._hash.update(f"{name}|{dtype}|{tuple(shape)}|".encode())

    def feed(self, part: Tensor) -> None:
        """Add the next entries of the tensor that was begun, in the order of memory."""
        flat = part.detach().cpu().contiguous().flatten()
        if flat.numel():
            self._hash.update(flat.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the digest so far."""
        return self._hash.hexdigest()


def read_hashed(where: str, state: Mapping[str, Tensor], put: Callable[[str, Tensor], None] | None = None) -> str:
    """Read every tensor of a state dict once: check it, hand it on, hash it.

    Args:
        where: Whose it is, for messages.
        state: State dict, which may be lazy: one tensor is held at a time. The order of its keys does not matter.
        put: Takes each name and tensor, in sorted order of names.

    Returns:
        What :func:`state_digest` returns.

    Raises:
        MergeError: A tensor is of an unusable kind, or a value is NaN or infinite.

    >>> found = {}
    >>> read_hashed("base", {"b": torch.ones(1), "a": torch.zeros(2)}, found.__setitem__)[:8], list(found)
    ('13ce9a1b', ['a', 'b'])
    """
    digest = StateDigest()
    for name in sorted(state):
        value = state[name]
        check_state(where, name, value)
        if put is not None:
            put(name, value)
        digest.update(name, value)
    return digest.hexdigest()


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
