"""Reading task vectors piece by piece: some small tensors, one large one, or a part of one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lit_merge.checkpoints.checks import check_state, check_tied, common_layout
from lit_merge.checkpoints.digests import StateDigest
from lit_merge.checkpoints.shards import Kind
from lit_merge.stack import Stack
from lit_merge.task_vectors import TaskVectors

__all__ = ("Part", "PieceReader")

_PIECE = 64 * 2**20  # bytes of task vectors that go together
# Entries that a part of a tensor is a multiple of: sums of products are made of as many (functional.scopes), and the
# processor takes a divisor of it at once, so that sums over tasks have the order that they have in the whole tensor.
_ENTRIES = 2**22


class Part(NamedTuple):
    """A tensor, or some of its entries.

    Attributes:
        name: Name of the tensor.
        entries: Which of its entries, in the order of memory; ``None`` for all, in the tensor's own shape.
    """

    name: str
    entries: range | None = None

    @property
    def first(self) -> bool:
        """Whether the tensor begins here."""
        return self.entries is None or self.entries.start == 0

    def of(self, value: Tensor) -> Tensor:
        """Return the part of the tensor."""
        return value if self.entries is None else value.reshape(-1)[self.entries.start : self.entries.stop]


@dataclass
class PieceReader:
    """Task vectors of some experts, piece by piece in sorted order of names; every iteration reads the files again.

    Args:
        base: State dict of the base; lazy.
        experts: State dict per task; lazy.
        buffers: Names of running statistics.
        tied: Second names of tied tensors, ``{alias: name}``.
        dtype: Storage of the task vectors; by default that of the base, at least float32.
        piece_bytes: Most bytes of task vectors at a time, but at least one tensor, or 2²² entries of one that may be
            read in parts.
        progress: Whether a bar shows how far a reading is.

    Attributes:
        digests: Hashes of base (key ``""``) and experts, made by :meth:`banks` with ``hashed``.

    Raises:
        MergeError: Base and experts do not fit together; later, a value is NaN or infinite.
    """

    base: Mapping[str, Tensor]
    experts: Mapping[str, Mapping[str, Tensor]]
    buffers: Collection[str] = ()
    tied: Mapping[str, str] | None = None
    dtype: torch.dtype | None = None
    piece_bytes: int = _PIECE
    progress: bool = False
    digests: dict[str, str] = field(default_factory=dict, init=False)
    _checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.layout = common_layout(self.base, self.experts, buffers=self.buffers, tied=self.tied)
        self.kinds = {name: Kind(value.dtype, tuple(value.shape)) for name, value in self.base.items()}
        self._widest = [
            _widest(self.kinds[n].dtype for n in part) for part in (self.layout.parameters, self.layout.buffers)
        ]
        self.names = tuple(sorted(self.layout.parameters))

    def pieces(self, entrywise: Callable[[str, Sequence[int]], bool] | None = None) -> list[list[Part]]:
        """Return all tensors, in the order and groups in which they are read.

        Args:
            entrywise: Says of name and shape of a tensor with task vectors whether it may be read in parts.
        """
        groups: list[list[Part]] = []
        size, weights = 0, set(self.names)
        for name in sorted(self.kinds):
            shape = self.kinds[name].shape
            own = 4 * len(self.experts) * self.kinds[name].numel
            if own > self.piece_bytes and entrywise is not None and name in weights and entrywise(name, shape):
                parts = _parts(self.kinds[name].numel, self.piece_bytes // (4 * len(self.experts)))
                if len(parts) > 1:
                    groups += [[Part(name, part)] for part in parts]
                    size = self.piece_bytes  # nothing goes with the last part
                    continue
            if not groups or size + own > self.piece_bytes:
                groups.append([])
                size = 0
            groups[-1].append(Part(name))
            size += own
        return groups

    def banks(self, label: str, pieces: list[list[Part]] | None = None, hashed: bool = False) -> Iterator[TaskVectors]:
        """Read base and experts once.

        Args:
            label: What for, beside the progress bar.
            pieces: What is read at a time, all tensors in sorted order; by default :meth:`pieces`.
            hashed: Whether :attr:`digests` are made.
        """
        digests = {task: StateDigest() for task in ("", *self.experts)} if hashed else {}
        total = sum(kind.nbytes for kind in self.kinds.values()) * (1 + len(self.experts))
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not self.progress, leave=False) as bar:
            for parts in self.pieces() if pieces is None else pieces:
                yield self._bank(parts, digests)
                bar.update(sum(self._nbytes(part) for part in parts) * (1 + len(self.experts)))
        self._checked = True  # files that change later are refused when they are opened
        self.digests = {task: digest.hexdigest() for task, digest in digests.items()}

    def _bank(self, parts: list[Part], digests: Mapping[str, StateDigest]) -> TaskVectors:
        own = {part.name for part in parts}
        base = {part.name: part.of(self.base[part.name].detach()) for part in parts}
        stacks = [
            Stack([part.name for part in parts if part.name in chosen], base, len(self.experts), dtype, widest)
            for chosen, dtype, widest in zip(
                (set(self.layout.parameters), set(self.layout.buffers)), (self.dtype, None), self._widest, strict=True
            )
        ]
        for row, (task, state) in enumerate({"": base, **self.experts}.items()):
            where = f"expert {task!r}" if row else "base"
            for part in parts:
                value = part.of(state[part.name]) if row else base[part.name]
                if not self._checked:
                    check_state(where, part.name, value)
                if digests:
                    if part.first:
                        digests[task].begin(part.name, *self.kinds[part.name])
                    digests[task].feed(value)
                for stack in stacks if row else ():
                    stack.put(row - 1, part.name, value)
            first = {part.name for part in parts if part.first}
            aliases = {alias: name for alias, name in self.layout.tied.items() if alias in first}
            check_tied(where, self.base if not row else state, aliases)
        constants = {name: base[name] for name in self.layout.constants if name in own}
        return TaskVectors(tuple(self.experts), stacks[0], stacks[1], constants, {}, {}, self.names)

    def _nbytes(self, part: Part) -> int:
        kind = self.kinds[part.name]
        return kind.nbytes if part.entries is None else len(part.entries) * kind.dtype.itemsize


def _parts(size: int, most: int) -> list[range]:
    """Cut the entries of a tensor; what is left after the last cut goes with the part before it if it is little."""
    step = max(most // _ENTRIES, 1) * _ENTRIES
    starts = list(range(0, max(size - step // 4, 1), step))
    return [range(start, end) for start, end in zip(starts, [*starts[1:], size], strict=True)]


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    found: torch.dtype | None = None
    for dtype in dtypes:
        found = dtype if found is None else torch.promote_types(found, dtype)
    return found
