"""Merging piece by piece: networks of any size, in the memory of their largest tensor.

A rule says by ``needs`` what it has to see at once, and so does a transform:

==============  ========================================================================================================
``tensor``      one tensor of all experts: task arithmetic, TSV-M, the spherical means …; every file is read once
``statistics``  besides, numbers that are taken over the whole network, such as the thresholds of TIES: further readings
``network``     everything at once, which is what a rule of your own has until it says otherwise
``data``        images
==============  ========================================================================================================

The result is that of a merge in memory, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_merge.checkpoints.checks import check_keys, check_state, check_tied, common_layout
from lit_merge.checkpoints.digests import StateDigest, state_digest
from lit_merge.checkpoints.export import write_json
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.shards import Kind, ShardWriter
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.skeleton import Skeleton
from lit_merge.stack import Stack
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Transform

__all__ = ("PieceReader", "stream_merge", "stream_suite", "why_not_streamed")

_PIECE = 64 * 2**20  # bytes of task vectors that go together; a larger tensor goes alone


def why_not_streamed(model: MergeModule) -> str | None:
    """Say why a merge cannot go piece by piece; nothing if it can.

    Args:
        model: The merge, configured or not.
    """
    name = type(model).__name__
    if model.needs == "data":
        return f"{name} learns its merge" if model.learnable else f"{name} is calibrated with images"
    if model.buffer_policy == "recalibrate":
        return "buffers: recalibrate runs the merged network"
    parts: tuple[MergeModule | Transform, ...] = (model, *model.transforms)
    for part in parts:
        if part.needs not in ("tensor", "statistics"):
            return f"{type(part).__name__}, as it is set, has to see all tensors at once"
    return None


@dataclass
class PieceReader:
    """Task vectors of some experts, piece by piece in sorted order of names; every iteration reads the files again.

    Args:
        base: State dict of the base; lazy.
        experts: State dict per task; lazy.
        buffers: Names of running statistics.
        tied: Second names of tied tensors, ``{alias: name}``.
        dtype: Storage of the task vectors; by default that of the base, at least float32.
        piece_bytes: Most bytes of task vectors at a time, but at least one tensor.
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

    def __post_init__(self) -> None:
        self.layout = common_layout(self.base, self.experts, buffers=self.buffers, tied=self.tied)
        self.kinds = {name: Kind(value.dtype, tuple(value.shape)) for name, value in self.base.items()}
        self._widest = [
            _widest(self.kinds[n].dtype for n in part) for part in (self.layout.parameters, self.layout.buffers)
        ]
        self.names = tuple(sorted(self.layout.parameters))

    def pieces(self) -> list[list[str]]:
        """Return the names of all tensors, in the order and groups in which they are read."""
        parts: list[list[str]] = []
        size = 0
        for name in sorted(self.kinds):
            kind = self.kinds[name]
            own = 4 * len(self.experts) * kind.nbytes // kind.dtype.itemsize
            if not parts or size + own > self.piece_bytes:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += own
        return parts

    def banks(self, label: str, hashed: bool = False) -> Iterator[TaskVectors]:
        """Read base and experts once.

        Args:
            label: What for, beside the progress bar.
            hashed: Whether :attr:`digests` are made.
        """
        digests = {task: StateDigest() for task in ("", *self.experts)} if hashed else {}
        total = sum(kind.nbytes for kind in self.kinds.values()) * (1 + len(self.experts))
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not self.progress, leave=False) as bar:
            for names in self.pieces():
                yield self._bank(names, digests)
                bar.update(sum(self.kinds[name].nbytes for name in names) * (1 + len(self.experts)))
        self.digests = {task: digest.hexdigest() for task, digest in digests.items()}

    def _bank(self, names: list[str], digests: Mapping[str, StateDigest]) -> TaskVectors:
        own = set(names)
        base = {name: self.base[name] for name in names}
        stacks = [
            Stack([name for name in part if name in own], base, len(self.experts), dtype, widest)
            for part, dtype, widest in zip(
                (self.layout.parameters, self.layout.buffers), (self.dtype, None), self._widest, strict=True
            )
        ]
        for row, (task, state) in enumerate({"": base, **self.experts}.items()):
            where = f"expert {task!r}" if row else "base"
            for name in names:
                value = state[name]
                check_state(where, name, value)
                if digests:
                    digests[task].update(name, value)
                for stack in stacks if row else ():
                    stack.put(row - 1, name, value)
            aliases = {alias: name for alias, name in self.layout.tied.items() if alias in own}
            check_tied(where, self.base if not row else state, aliases)
        constants = {name: base[name] for name in self.layout.constants if name in own}
        return TaskVectors(tuple(self.experts), stacks[0], stacks[1], constants, {}, {}, self.names)


class _Pieces:
    """What a transform or rule sees of the network: task vectors after the transforms before it."""

    def __init__(self, names: tuple[str, ...], banks: Callable[[], Iterator[TaskVectors]]) -> None:
        self.names = names
        self._banks = banks

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for bank in self._banks():
            if bank.names:
                yield bank.deltas
            del bank  # before the next piece is read; so does everyone who reads


def _after(
    transform: Transform, names: tuple[str, ...], before: Callable[[str], Iterator[TaskVectors]]
) -> Callable[[str], Iterator[TaskVectors]]:
    """Return a reading of what a transform makes of another reading."""
    pieces = _Pieces(names, lambda: before(f"statistics of {type(transform).__name__}"))
    kept = transform.streamed(pieces) if transform.needs == "statistics" else None  # has no state, so it is taken once

    def banks(label: str) -> Iterator[TaskVectors]:
        apply = transform.streamed(pieces) if kept is None else kept
        for bank in before(label):
            mapped = bank.map(apply) if bank.names else bank
            del bank
            yield mapped
            del mapped

    return banks


@torch.no_grad()
def stream_merge(
    model: MergeModule,
    reader: PieceReader,
    folder: str | Path,
    facts: Mapping[str, Any] | None = None,
    *,
    stem: str = "model",
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Merge base and experts into safetensors and ``merge.json``.

    Beside one piece (the task vectors of one large tensor, or of many small ones) and what the rule makes of it,
    nothing is held. A merge that cannot go piece by piece is made of a single one, which is the whole network; see
    :func:`why_not_streamed`.

    Args:
        model: The merge; its own suite is not asked for anything.
        reader: Base and experts.
        folder: Where to; made if missing.
        facts: What ``merge.json`` says besides the hashes of base, experts and weights; plain data.
        stem: Name of the files, see :class:`~lit_merge.checkpoints.shards.ShardWriter`.
        shard_bytes: Most bytes per file.
        overwrite: Whether weights that are there may be replaced.

    Returns:
        Path of the weights: the file, or the index of several.

    Raises:
        MergeError: The merge learns, base and experts do not fit together, or there are weights already.
    """
    if model.needs == "data" or model.buffer_policy == "recalibrate":
        raise MergeError(f"{why_not_streamed(model)}; it needs a suite with images: lit-merge fit or merge --config …")
    last = False

    def read(label: str) -> Iterator[TaskVectors]:
        return reader.banks(label, hashed=last)

    whole = why_not_streamed(model) is not None
    if whole:
        reader.piece_bytes = 2**63
    writer = ShardWriter(folder, reader.kinds, stem=stem, shard_bytes=shard_bytes, overwrite=overwrite)
    with writer, _warn_once():
        banks: Callable[[str], Iterator[TaskVectors]] = read
        for transform in model.transforms:
            banks = _after(transform, reader.names, banks)
        rule = type(model).__name__
        merge = model.merge if whole else model.streamed(_Pieces(reader.names, lambda: banks(f"statistics of {rule}")))
        aliases: dict[str, list[str]] = {}
        for alias, name in reader.layout.tied.items():
            aliases.setdefault(name, []).append(alias)
        last = True
        for bank in banks(f"merging by {rule}"):
            merged = merge(bank) if bank.names else {}
            merged = bank.complete(merged, "base" if model.buffer_policy == "base" else "average")
            for name, value in merged.items():
                for every in (name, *aliases.get(name, ())):
                    writer.write(every, value)
                value = torch.empty(0)
            del bank, merged  # before the next piece is read
    weights = {"file": writer.path.name, "sha256": state_digest(read_state(writer.path))}
    hashes = {"base": reader.digests[""], "experts": {task: reader.digests[task] for task in reader.experts}}
    write_json(writer.folder / "merge.json", {**(facts or {}), **hashes, "streamed": not whole, "weights": weights})
    return writer.path


def stream_suite(
    model: MergeModule, folder: str | Path, facts: Mapping[str, Any] | None = None, *, progress: bool = False
) -> Path:
    """Merge base and experts of a merge's suite piece by piece, into ``merged.safetensors`` and ``merge.json``.

    Args:
        model: The merge; it is not configured.
        folder: Where to; weights of this name are replaced.
        facts: What ``merge.json`` says besides hashes.
        progress: Whether there is a progress bar.

    Returns:
        Path of the weights.

    Raises:
        MergeError: See :func:`stream_merge`; or base and network have different names.
    """
    suite = model.suite
    suite.prepare()
    skeleton, base = Skeleton(suite.network()), suite.base()
    check_keys("base", base, skeleton.keys, of="network", advice="give the state dict of this very network")
    reader = PieceReader(
        base,
        {task: suite.expert(task) for task in suite.tasks},
        buffers=skeleton.buffers_of,
        tied=skeleton.tied,
        dtype=None if model.storage_dtype is None else getattr(torch, model.storage_dtype),
        progress=progress,
    )
    return stream_merge(model, reader, folder, facts, stem="merged", overwrite=True)


@contextmanager
def _warn_once() -> Iterator[None]:
    """Say what pieces warn of once for each kind of place, not for every piece."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    places: dict[tuple[str, int], list[warnings.WarningMessage]] = {}
    for one in caught:
        places.setdefault((one.filename, one.lineno), []).append(one)
    for every in places.values():
        more = f" (and {len(every) - 1} more like this)" if len(every) > 1 else ""
        warnings.warn(f"{every[0].message}{more}", every[0].category, stacklevel=4)


def _widest(dtypes: Any) -> torch.dtype | None:  # noqa: ANN401 - an iterable of dtypes
    found: torch.dtype | None = None
    for dtype in dtypes:
        found = dtype if found is None else torch.promote_types(found, dtype)
    return found
