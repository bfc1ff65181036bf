"""Files of ``torch.save``: checked before torch sees them, never executed, and mapped instead of read."""

from __future__ import annotations

import pickle
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.checks import shared_memory
from lit_merge.checkpoints.files import FileGuard, disguise
from lit_merge.errors import MergeError

__all__ = ("PickledObjectsError", "TorchFile", "is_zip", "load_inert", "plain_tensor", "unsafe_globals")

_MAX_PICKLE = 64 * 2**20  # a state dict of ten thousand tensors takes about two megabytes
_WINDOW = 64 * 2**20
_ALONE = threading.RLock()  # what may be unpickled is said for the whole process


class PickledObjectsError(MergeError):
    """A file holds objects that could run code, and was not opened."""


class TorchFile(Mapping[str, Tensor]):
    """A state dict of ``torch.save`` as a mapping; tensors are read when they are touched.

    A file of today's format is mapped into memory, and mapped anew after every 64 MiB, so that what was read and
    dropped does not pile up. A file from before torch 1.6 is read at once.

    Args:
        path: The file; it may hold nothing but tensors by name.
        max_bytes: Most bytes of all tensors together; by default there is no limit.

    Attributes:
        path: The file.
        tied: Second names of tensors that the file holds once, ``{alias: name}``.

    Raises:
        MergeError: The file is missing or damaged, holds objects, compressed data or tensors that are larger than
            their data, or is too large.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self._guard = FileGuard(self.path)
        content = load_inert(self.path)
        if not isinstance(content, dict) or not content:
            raise MergeError(f"{self.path}: expected a state dict, found {type(content).__name__}")
        checked = {name: plain_tensor(self.path, name, value) for name, value in dict.items(content)}
        if is_zip(self.path):
            _check_storages(self.path, checked)
        self._bytes = {name: value.numel() * value.element_size() for name, value in checked.items()}
        if max_bytes is not None and sum(self._bytes.values()) > max_bytes:
            total = sum(self._bytes.values())
            raise MergeError(f"{self.path}: its tensors take {total} bytes; expected at most {max_bytes}")
        self.tied = shared_memory(checked)
        self._state: dict[str, Tensor] | None = checked
        self._whole = not is_zip(self.path)
        self._touched = 0

    def __getitem__(self, name: str) -> Tensor:
        size, state = self._bytes[name], self._state  # another thread may map anew at any moment
        if state is None or (self._touched + size > _WINDOW and self._touched and not self._whole):
            self._guard.check()
            content = load_inert(self.path)
            assert isinstance(content, dict)
            state = self._state = dict(content)
            self._touched = 0
        self._touched += size
        return Tensor.detach(state[name])

    def __contains__(self, name: object) -> bool:
        return name in self._bytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._bytes)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getstate__(self) -> dict[str, Any]:
        """Leave mapped memory behind: another process maps the file itself."""
        return self.__dict__ if self._whole else {**self.__dict__, "_state": None, "_touched": 0}


def is_zip(path: Path) -> bool:
    """Whether a file is of the format of torch 1.6 and later; the same four bytes decide in torch itself."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def unsafe_globals(path: Path) -> list[str]:
    """List the classes and functions of a zip file beyond plain tensors and containers; nothing is imported.

    Args:
        path: A file of the zip format.

    Raises:
        MergeError: The file is damaged.
    """
    _check_zip(path)
    with _only([]):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except pickle.UnpicklingError as error:
            raise PickledObjectsError(
                f"{path}: its pickle is not of the protocol of torch.save ({error}), so that nobody can tell what it "
                "would do, and was not opened; save its state_dict() as safetensors instead"
            ) from error
        except Exception as error:  # a damaged pickle can fail in any way
            raise _incomplete(path, error) from error


def load_inert(path: Path, stand_ins: Mapping[str, type] | None = None, *, mapped: bool = True) -> object:
    """Load a file with torch's restricted unpickler, which builds tensors and plain containers and nothing else.

    What the process allowed elsewhere by ``torch.serialization.add_safe_globals`` is not allowed here.

    Args:
        path: The file.
        stand_ins: Classes to build in place of named ones, by qualified name. They must be inert.
        mapped: Whether tensors are mapped where the format allows; they then need the file to stay.

    Raises:
        PickledObjectsError: It holds other objects.
        MergeError: It is damaged.
    """
    FileGuard(path)
    if zipped := is_zip(path):
        _check_zip(path)
    with _only([(stand_in, name) for name, stand_in in (stand_ins or {}).items()]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that are either read or refused with a better message
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipped)
        except pickle.UnpicklingError as error:
            if what := _no_pickle(path):
                raise MergeError(f"{path}: not a complete torch file ({what}); fetch or save it again") from error
            raise PickledObjectsError(
                f"{path}: it holds pickled objects{_some_names(path, zipped)}, which could run code, and was not "
                "opened; save its state_dict() as safetensors instead"
            ) from error
        except Exception as error:  # hostile bytes can make the unpickler fail in any way
            raise _incomplete(path, error) from error


def plain_tensor(where: Path, name: object, value: object) -> Tensor:
    """Return a tensor without anything that a pickle may have hung on it.

    Args:
        where: The file.
        name: Its name.
        value: What stands there.

    Returns:
        The tensor; it shares memory with ``value``.

    Raises:
        MergeError: Not a name, not a dense tensor in main memory, or one with more elements than its storage holds
            (a few bytes with stride 0 can stand for terabytes).
    """
    if not isinstance(name, str):
        raise MergeError(f"{where}: expected names of tensors, found {name!r}; save the state dict itself")
    if type(value) not in (Tensor, nn.Parameter):
        raise MergeError(
            f"{where}: {name}: expected a tensor, found {type(value).__name__}; save the state dict itself, "
            "not a checkpoint that contains it"
        )
    assert isinstance(value, Tensor)
    tensor = Tensor.detach(value)  # a pickle can give a tensor attributes, even some that hide its methods
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise MergeError(
            f"{where}: {name}: expected a dense tensor with values, found {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}; save it dense"
        )
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise MergeError(
            f"{where}: {name}: {tuple(tensor.shape)} of {tensor.dtype} with strides {tensor.stride()}, but its storage "
            f"holds only {held} bytes; expected every element in the file; save contiguous tensors"
        )
    return tensor


@contextmanager
def _only(stand_ins: list[tuple[type, str]]) -> Iterator[None]:
    """Allow these names and torch's own, and nothing that was allowed elsewhere in this process; a thread at a time."""
    with _ALONE:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type] # pairs are allowed since 2.6
                yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _check_zip(path: Path) -> None:
    """Refuse archives that unpack to more than they are, or in which two readers may see two things."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _incomplete(path, error) from error
    if any(entry.filename.rpartition("/")[2] == "constants.pkl" for entry in entries):
        raise MergeError(
            f"{path}: it is a TorchScript archive, which is a program, and was not opened; expected a state dict: "
            "save the state_dict() of its module as safetensors"
        )
    size = path.stat().st_size
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise MergeError(f"{path}: {packed[0]} is compressed; torch.save never compresses; save it again with torch")
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise MergeError(
            f"{path}: its entries claim {total} bytes, the file has {size}; expected no more; do not use it"
        )
    if twice := [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]:
        raise MergeError(f"{path}: it has two entries {twice[0]}; expected every name once; do not use it")
    pickled = [entry.file_size for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
    if any(length > _MAX_PICKLE for length in pickled):
        raise MergeError(f"{path}: data.pkl has {max(pickled)} bytes; expected at most {_MAX_PICKLE}; do not use it")


def _check_storages(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse storages that are not an entry of the archive: mapped, they would run into their neighbours."""
    with zipfile.ZipFile(path) as archive:
        entries = [e.file_size for e in archive.infolist() if e.filename.rpartition("/")[0].endswith("/data")]
    storages = {s.data_ptr(): s.nbytes() for s in (value.untyped_storage() for value in state.values())}
    for name, value in state.items():
        if (held := value.untyped_storage().nbytes()) and (
            held not in entries or sum(storages.values()) > sum(entries)
        ):
            raise MergeError(
                f"{path}: {name}: its storage claims {held} bytes, and the archive has no such entry; fetch it again"
            )


def _some_names(path: Path, listed: bool) -> str:
    """Name the first few classes, if the file can be asked."""
    names = unsafe_globals(path) if listed else []
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def _no_pickle(path: Path) -> str:
    """Return what is wrong with a file that cannot even be a pickle."""
    with path.open("rb") as file:
        if file.read(1) == b"\x80" or is_zip(path):
            return ""
    return disguise(path, torch_file=True) or "it is neither a zip archive nor a pickle"


def _incomplete(path: Path, error: Exception) -> MergeError:
    reason = _no_pickle(path) or (str(error).splitlines()[0] if str(error) else type(error).__name__)
    return MergeError(f"{path}: not a complete torch file ({reason}); fetch or save it again")
