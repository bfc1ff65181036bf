"""Merging piece by piece: networks of any size, in the memory of one large tensor or less.

A rule says by ``needs`` what it has to see at once, and so does a transform:

==============  ========================================================================================================
``tensor``      one tensor of all experts: task arithmetic, TSV-M, the spherical means …; every file is read once
``statistics``  besides, numbers that are taken over the whole network, such as the thresholds of TIES: further readings
``network``     everything at once, which is what a rule of your own has until it says otherwise
``data``        images
==============  ========================================================================================================

Of a tensor that is ``entrywise`` for the rule and all transforms, as all are for task arithmetic and TIES, only a part
has to be there at once: then memory does not grow with the largest tensor either. The result is that of a merge in
memory, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_finite, check_keys
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.export import write_json
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.shards import ShardWriter
from lit_merge.coefficients import per_tensor
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.pieces import Part, PieceReader
from lit_merge.skeleton import Skeleton
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Transform

__all__ = ("PieceReader", "check_weights_suffice", "stream_merge", "stream_suite", "why_not_streamed")


def why_not_streamed(model: MergeModule) -> str | None:
    """Say why a merge cannot go piece by piece; nothing if it can.

    Args:
        model: The merge, configured or not.
    """
    if (reason := _why_not_from_weights(model)) is not None:
        return reason
    parts: tuple[MergeModule | Transform, ...] = (model, *model.transforms)
    for part in parts:
        if part.needs not in ("tensor", "statistics"):
            return f"{type(part).__name__}, as it is set, has to see all tensors at once"
    return None


def check_weights_suffice(model: MergeModule) -> None:
    """Refuse a merge that base and experts alone do not decide.

    Args:
        model: The merge, configured or not.

    Raises:
        MergeError: It learns, is calibrated with images, or merges something else than the experts.
    """
    if (reason := _why_not_from_weights(model)) is not None:
        if model.storage == "low_rank" and model.needs != "data":
            raise MergeError(f"{reason}, which a merge of files has no need of; leave it out")
        raise MergeError(f"{reason}; it needs a suite with images: lit-merge fit or merge --config …")


def _why_not_from_weights(model: MergeModule) -> str | None:
    name = type(model).__name__
    if model.needs == "data":
        return f"{name} learns its merge" if model.learnable else f"{name} is calibrated with images"
    if model.buffer_policy == "recalibrate":
        return "buffers: recalibrate runs the merged network"
    if type(model).read_bank is not MergeModule.read_bank:
        return f"{name} reads its own task vectors"
    if model.storage == "low_rank":
        return "storage: low_rank merges what is left of the task vectors"
    return None


def _entrywise(model: MergeModule) -> Callable[[str, Sequence[int]], bool]:
    """Say of a tensor whether rule and transforms all take it entry by entry."""
    parts: tuple[MergeModule | Transform, ...] = (model, *model.transforms)
    return lambda name, shape: all(part.entrywise(name, shape) for part in parts)


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

    def pairs(self, *, base: bool) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]:
        for bank in self._banks():
            if bank.names:
                yield bank.deltas, bank.base if base else None
            del bank


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

    Beside one piece (the task vectors of a large tensor, of a part of one, or of many small ones) and what the rule
    makes of it, nothing is held. A merge that cannot go piece by piece is made of a single one, which is the whole
    network; see :func:`why_not_streamed`.

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
        MergeError: See :func:`check_weights_suffice`; or base and experts do not fit together, there are weights
            already, or a merged value is too large for the type of the base.
    """
    check_weights_suffice(model)
    whole = why_not_streamed(model) is not None
    scale = getattr(model, "scale", None)
    if isinstance(scale, list | tuple) and any(isinstance(entry, Mapping) for entry in scale):
        per_tensor(list(scale), reader.names)  # a filter that fits nothing is said before anything is read
    pieces = [[Part(name) for name in sorted(reader.kinds)]] if whole else reader.pieces(_entrywise(model))
    last = False

    def read(label: str) -> Iterator[TaskVectors]:
        return reader.banks(label, pieces, hashed=last)

    writer = ShardWriter(
        folder, reader.kinds, stem=stem, shard_bytes=shard_bytes, overwrite=overwrite, describing=["merge.json"]
    )
    with writer, _warn_once():
        banks: Callable[[str], Iterator[TaskVectors]] = read
        for transform in model.transforms:
            banks = _after(transform, reader.names, banks)
        rule = type(model).__name__
        merge = model.merge if whole else model.streamed(_Pieces(reader.names, lambda: banks(f"statistics of {rule}")))
        aliases: dict[str, list[str]] = {}
        for alias, name in reader.layout.tied.items():
            aliases.setdefault(name, []).append(alias)
        last, order = True, iter(pieces)
        for bank in banks(f"merging by {rule}"):
            merged = merge(bank) if bank.names else {}
            merged = bank.complete(merged, "base" if model.buffer_policy == "base" else "average")
            for part in next(order):
                if part.name not in merged:  # an alias
                    continue
                value = merged.pop(part.name)
                check_finite("merged network", part.name, value)
                for name in (part.name, *aliases.get(part.name, ())):
                    writer.write(name, value, None if part.entries is None else part.entries.start)
                del value
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
        dtype=model.bank_dtype,
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
