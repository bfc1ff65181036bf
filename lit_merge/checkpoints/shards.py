"""Writing safetensors tensor by tensor: a network that is never whole in memory, in one file or in several."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # no POSIX: leftovers of killed writers stay
    fcntl = None  # type: ignore[assignment, unused-ignore]

from lit_merge.checkpoints.export import write_json
from lit_merge.errors import MergeError

__all__ = ("Kind", "ShardWriter")

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


_TOKEN = "?" * 8


class Kind(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * self.numel


class _Shard:
    """One file under a temporary name, with its header; tensors are put at their places in any order.

    The file is locked as long as its writer lives, so that the next one knows what a killed one has left.
    """

    def __init__(self, path: Path, kinds: Mapping[str, Kind]) -> None:
        self.path = path
        self.missing = {name: kind.numel for name, kind in kinds.items()}
        self.places: dict[str, int] = {}
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._file: BinaryIO | None = None
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": "lit-merge"}}
        start = 0
        for name in sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name)):  # so that all are aligned
            kind, end = kinds[name], start + kinds[name].nbytes
            header[name] = {"dtype": _CODES[kind.dtype], "shape": list(kind.shape), "data_offsets": [start, end]}
            self.places[name], start = start, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._opening, self._size = len(text).to_bytes(8, "little") + text, 8 + len(text) + start

    def write(self, name: str, value: Tensor, first: int) -> None:
        """Put entries of a tensor to their places; after the last ones everything is in the file."""
        if self._file is None:
            self._file = self._temporary.open("xb")
            _lock(self._file)
            self._file.write(self._opening)
            self._file.truncate(self._size)
        self._file.seek(len(self._opening) + self.places[name] + first * value.dtype.itemsize)
        flat = value.detach().cpu().contiguous().flatten()
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)
        self.missing[name] -= flat.numel()
        if not self.missing[name]:
            del self.missing[name]
        if not self.missing:
            self._file.flush()

    def commit(self) -> None:
        """Give the file its name."""
        self._close()
        self._temporary.replace(self.path)

    def drop(self) -> None:
        """Remove what is there under the temporary name."""
        self._close()
        self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


def _lock(file: BinaryIO) -> bool:
    """Lock a file as long as it is open; say whether that was possible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another one has it, or the disk has no locks
        return False
    return True


def _sweep(folder: Path, stem: str) -> None:
    """Remove what writers that were killed left of weights of this stem."""
    for name in (f".{stem}.safetensors.{_TOKEN}.tmp", f".{stem}-*-of-*.safetensors.{_TOKEN}.tmp"):
        for path in folder.glob(name):
            with suppress(OSError), path.open("rb") as file:
                if _lock(file):
                    path.unlink()


class ShardWriter:
    """Files of a network as the Hugging Face libraries lay them out, written while the network is being made.

    Names, types and shapes are known before, so headers are written first and every tensor goes to its place on disk:
    nothing is kept. All files have temporary names until the last tensor is there; then they are renamed, the index
    last. After an error none of them is left, nor a folder that was made for them; what a killed process left is
    removed by the next writer.

    Args:
        folder: Where to; made if missing.
        kinds: Type and shape of every tensor.
        stem: ``model`` for ``model.safetensors``, or ``model-00001-of-00003.safetensors`` … with
            ``model.safetensors.index.json``.
        shard_bytes: Most bytes of tensors per file; a larger tensor has one for itself.
        overwrite: Whether weights of this stem that are there may be replaced.
        describing: Names of files in the folder that describe the weights: removed when these are replaced.

    Attributes:
        path: The file, or the index.

    Raises:
        MergeError: There are such weights already, the disk is too small, or a type has no place in the format; at the
            end, tensors are missing.

    >>> import tempfile
    >>> from lit_merge.checkpoints.reading import read_state
    >>> kinds = {name: Kind(torch.float32, (2,)) for name in ("a", "b")}
    >>> with ShardWriter(tempfile.mkdtemp(), kinds, shard_bytes=8) as writer:
    ...     writer.write("b", torch.ones(2))
    ...     writer.write("a", torch.zeros(2))
    >>> writer.path.name, read_state(writer.path)["b"]
    ('model.safetensors.index.json', tensor([1., 1.]))
    """

    def __init__(
        self,
        folder: str | Path,
        kinds: Mapping[str, Kind],
        *,
        stem: str = "model",
        shard_bytes: int = 5 * 10**9,
        overwrite: bool = False,
        describing: Sequence[str] = (),
    ) -> None:
        if shard_bytes < 1:
            raise MergeError(f"shard size: expected at least 1 byte, found {shard_bytes}")
        if odd := [name for name, kind in kinds.items() if kind.dtype not in _CODES]:
            raise MergeError(f"{odd[0]}: {kinds[odd[0]].dtype} is not written to safetensors; cast it first")
        self.folder, self._kinds = Path(folder), dict(kinds)
        if self.folder.exists() and not self.folder.is_dir():
            raise MergeError(f"{self.folder}: expected a folder for the weights, found a file; give another path")
        self._index = self.folder / f"{stem}.safetensors.index.json"
        self._old = [*self.folder.glob(f"{stem}.safetensors"), *self.folder.glob(f"{stem}-*-of-*.safetensors")]
        self._old += [self._index] if self._index.exists() else []
        if self._old and not overwrite:
            raise MergeError(f"{self._old[0]}: there are weights already; give another folder, or --overwrite")
        self._old += [self.folder / name for name in describing]
        self._total = sum(kind.nbytes for kind in kinds.values())
        here = (self.folder, *self.folder.parents)
        self._made = [folder for folder in here if not folder.exists()]
        _sweep(self.folder, stem)
        if (free := shutil.disk_usage(here[len(self._made)]).free) < self._total:
            raise MergeError(f"{self.folder}: expected {self._total} bytes of free disk, found {free}")
        parts = _split(self._kinds, shard_bytes)
        names = [f"{stem}.safetensors"]
        if len(parts) > 1:
            names = [f"{stem}-{number + 1:05d}-of-{len(parts):05d}.safetensors" for number in range(len(parts))]
        self._shards = [_Shard(self.folder / name, part) for name, part in zip(names, parts, strict=True)]
        self._home = {name: shard for shard in self._shards for name in shard.places}
        self.path = self._index if len(parts) > 1 else self._shards[0].path
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, value: Tensor, first: int | None = None) -> None:
        """Write one tensor to disk, or some of its entries.

        Args:
            name: Its name.
            value: The tensor; or entries, ``(n,)``.
            first: Place of the first of these entries, in the order of memory; every entry is written once.

        Raises:
            MergeError: It is not of the type and shape that were announced.
        """
        kind = self._kinds[name]
        shape = kind.shape if first is None else (min(value.numel(), kind.numel - first),)
        if (value.dtype, tuple(value.shape)) != (kind.dtype, shape):
            raise MergeError(f"{name}: expected {kind.dtype} {shape}, found {value.dtype} {tuple(value.shape)}")
        self._home[name].write(name, value, first or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            for shard in self._shards:
                shard.drop()
            with suppress(OSError):  # weights are there, or something of another process
                for folder in self._made:
                    folder.rmdir()

    def _commit(self) -> None:
        if missing := sorted(name for shard in self._shards for name in shard.missing):
            raise MergeError(f"{self.folder}: {len(missing)} tensors were not written, such as {missing[0]}")
        self._index.unlink(missing_ok=True)  # of now on it would name the wrong files
        new = {shard.path for shard in self._shards}
        for path in self._old:
            if path not in new:
                path.unlink(missing_ok=True)
        for shard in self._shards:
            shard.commit()
        if len(self._shards) > 1:
            files = {name: self._home[name].path.name for name in sorted(self._home)}
            write_json(self._index, {"metadata": {"total_size": self._total}, "weight_map": files})


def _split(kinds: Mapping[str, Kind], most: int) -> list[dict[str, Kind]]:
    """Cut the sorted names into files."""
    parts: list[dict[str, Kind]] = [{}]
    size = 0
    for name in sorted(kinds):
        if parts[-1] and size + kinds[name].nbytes > most:
            parts.append({})
            size = 0
        parts[-1][name] = kinds[name]
        size += kinds[name].nbytes
    return parts
