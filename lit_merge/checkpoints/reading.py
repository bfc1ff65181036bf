"""Reading state dicts from files without ever running code from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoints.files import FileGuard, digest
from lit_merge.checkpoints.safetensors_files import SafetensorsFile, ShardedSafetensors
from lit_merge.checkpoints.torch_files import PickledObjectsError, TorchFile, load_inert
from lit_merge.errors import MergeError

__all__ = ("SafetensorsFile", "ShardedSafetensors", "TorchFile", "file_digest", "read_checkpoint", "read_state")

_INDEX = ".safetensors.index.json"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def read_state(path: str | Path, *, sha256: str | None = None, max_bytes: int | None = None) -> Mapping[str, Tensor]:
    """Open a state dict; its tensors are read when they are asked for.

    Args:
        path: ``.safetensors``; the ``.safetensors.index.json`` of a sharded one; or ``.pt``, ``.pth``, ``.bin`` or
            ``.ckpt`` that holds nothing but tensors by name. Pickled objects are refused, never executed.
        sha256: What :func:`file_digest` must be, ``sha256:`` and 64 hex digits, or the digits alone.
        max_bytes: Most bytes of all tensors of a torch file together; by default there is no limit.

    Returns:
        Tensors by name.

    Raises:
        MergeError: The file is missing, damaged, of another kind or hash, or holds anything else than tensors.
    """
    path = Path(path)
    FileGuard(path)
    index = path.name.endswith(_INDEX)
    if not index and path.suffix not in (".safetensors", *_TORCH):
        raise MergeError(
            f"{path}: expected .safetensors, {_INDEX}, .pt, .pth, .bin or .ckpt, found {path.suffix or 'no suffix'}"
        )
    if sha256 is not None:
        _check_digest(path, sha256)
    if index:
        return ShardedSafetensors(path)
    if path.suffix in _TORCH:
        return _torch_file(path, max_bytes)
    state = SafetensorsFile(path)
    if not state:
        raise MergeError(f"{path}: expected a state dict, found no tensor")
    return state


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex: what ``sha256sum`` and the Hugging Face hub show.

    For the index of a sharded network: that of what ``sha256sum`` prints for its shards, sorted by name, so that
    ``sha256sum *.safetensors | sha256sum`` in their folder shows it too.

    Args:
        path: Any file, or a ``.safetensors.index.json``.

    Raises:
        MergeError: The file or a shard is missing.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.bin"
    >>> _ = path.write_bytes(b"abc")
    >>> file_digest(path)[:16]
    'ba7816bf8f01cfea'
    """
    path = Path(path)
    FileGuard(path, "a file to hash")
    if not path.name.endswith(_INDEX):
        return digest(path)
    shards = ShardedSafetensors(path).shards
    lines = "".join(f"{digest(shard.path)}  {name}\n" for name, shard in shards.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that Lightning wrote for a merge.

    Args:
        path: A local file with plain data and tensors. Pickled objects are refused, never executed.

    Returns:
        Its content, with ``state_dict``.

    Raises:
        MergeError: The file is missing, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise MergeError(f"{path}: no such checkpoint; expected a local file, such as the last.ckpt of a fit")
    checkpoint = load_inert(path, mapped=False)  # a run may write the file again while it resumes from it
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        found = ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise MergeError(f"{path}: expected a checkpoint of lit-merge with state_dict, found {found}")
    return checkpoint


def _torch_file(path: Path, max_bytes: int | None) -> TorchFile:
    try:
        return TorchFile(path, max_bytes)
    except PickledObjectsError as error:
        raise PickledObjectsError(
            f"{error}; `lit-merge convert {path} NEW.safetensors` turns known whole-module checkpoints into safetensors"
        ) from error


def _check_digest(path: Path, sha256: str) -> None:
    expected = sha256.removeprefix("sha256:").lower()
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise MergeError(f"{path}: expected sha256: and 64 hex digits as its hash, found {sha256!r}")
    if (found := file_digest(path)) != expected:
        raise MergeError(
            f"{path}: expected sha256:{expected}, found sha256:{found}; it is another file or a damaged one: fetch it "
            "again, or correct the hash if the change is meant"
        )
