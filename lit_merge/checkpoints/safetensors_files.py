"""Safetensors: single files and sharded ones, checked when they are opened and read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.files import FileGuard, disguise, strict_json
from lit_merge.errors import MergeError

__all__ = ("SafetensorsFile", "ShardedSafetensors")


class SafetensorsFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; a tensor is read when it is asked for, and freed when it is dropped.

    The file is opened anew for every tensor: that takes a quarter of a millisecond, while one mapping kept open
    would hold every page that was ever touched. Nothing but the names is held, so it can be pickled and forked.

    Args:
        path: The file.

    Attributes:
        path: The file.
        metadata: The free text of its header, by name.

    Raises:
        MergeError: The file is missing, truncated or not in the format: a header that is too long or not JSON, a name
            twice, offsets that overlap, leave holes or go beyond the end; later, if the file changes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._guard = FileGuard(self.path)
        header = _header(self.path, self._guard.size)
        with self._open() as file:  # the library checks types, shapes and offsets
            self._keys = dict.fromkeys(file.keys())
        metadata = header.get("__metadata__")
        self.metadata: dict[str, str] = dict(metadata) if isinstance(metadata, dict) else {}

    def _open(self) -> safe_open:
        self._guard.check()
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _incomplete(self.path, str(error)) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            raise KeyError(name)
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class ShardedSafetensors(Mapping[str, Tensor]):
    """A state dict in several safetensors files that an index names, as the Hugging Face libraries write it.

    Args:
        path: The index, ``*.safetensors.index.json``, with ``weight_map``: the file of every tensor.

    Attributes:
        path: The index.
        shards: The files by name, in sorted order.

    Raises:
        MergeError: The index is damaged, names a file outside its folder, or does not agree with the files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        FileGuard(self.path, "an index of shards (.safetensors.index.json)")
        found = strict_json(self.path, self.path.read_bytes()).get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
            raise MergeError(f"{self.path}: expected weight_map, the file of every tensor; fetch or save it again")
        self._home: dict[str, str] = found
        self.shards = {name: SafetensorsFile(_shard(self.path, name)) for name in sorted(set(found.values()))}
        for name, shard in self.shards.items():
            expected = [key for key, home in found.items() if home == name]
            advice = "fetch the index and all shards again, from one revision"
            check_keys(str(shard.path), shard, expected, f"index {self.path}", advice)

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[self._home[name]][name]

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def _header(path: Path, size: int) -> dict[str, object]:
    """Read the header as the format lays it down: eight bytes of length, little-endian, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            reason = f"its header should have {length} bytes, the file has {size}" if size >= 8 else f"{size} bytes"
            raise _incomplete(path, reason)
        text = file.read(length)
    return strict_json(path, text, "header")


def _incomplete(path: Path, reason: str) -> MergeError:
    return MergeError(f"{path}: not a complete safetensors file ({disguise(path) or reason}); fetch or save it again")


def _shard(index: Path, name: str) -> Path:
    """Return the path of a shard, which must lie beside its index, or in the blobs of the same hub cache."""
    if PurePosixPath(name).name != name or "\\" in name or ":" in name or not name.endswith(".safetensors"):
        raise MergeError(
            f"{index}: {name!r} is not the plain name of a .safetensors file; an index may only name files beside it"
        )
    path = index.parent / name
    if not path.is_file():
        raise MergeError(f"{index}: its shard {name} is not there; fetch it into the same folder")
    folder = index.parent.absolute()
    allowed = {folder.resolve()}
    # the hub's cache keeps snapshots/COMMIT/FILE as links to blobs/HASH of the same repository
    allowed |= {
        (parent.parent / "blobs").resolve() for parent in (folder, *folder.parents) if parent.name == "snapshots"
    }
    if path.resolve().parent not in allowed:
        raise MergeError(f"{index}: its shard {name} is a link to {path.resolve()}, outside the folder; copy it there")
    return path
