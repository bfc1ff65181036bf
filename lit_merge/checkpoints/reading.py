"""Reading state dicts from files without ever running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("SafetensorsFile", "read_checkpoint", "read_state")


class SafetensorsFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping; a tensor is read when it is asked for.

    Args:
        path: The file.

    Raises:
        MergeError: The file is missing, truncated or not in the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as file:
            self._keys = tuple(file.keys())

    def _open(self) -> safe_open:
        _check_exists(self.path)
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise MergeError(
                f"{self.path}: not a complete safetensors file ({error}); fetch or save it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            raise KeyError(name)
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_state(path: str | Path) -> Mapping[str, Tensor]:
    """Open a state dict.

    Args:
        path: ``.safetensors``, read lazily; or ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` that holds nothing but
            tensors by name. Pickled objects are refused, never executed.

    Returns:
        Tensors by name.

    Raises:
        MergeError: The file is missing, damaged, of another kind, or holds anything else than tensors.
    """
    path = Path(path)
    _check_exists(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise MergeError(f"{path}: expected .safetensors, .pt, .pth, .bin or .ckpt, found {path.suffix or 'no suffix'}")
    state = _load_weights_only(path)
    if not isinstance(state, dict) or not state:
        raise MergeError(f"{path}: expected a state dict, found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise MergeError(
                f"{path}: {name}: expected a tensor, found {type(value).__name__}; save the state dict itself, "
                "not a checkpoint that contains it"
            )
    return state


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
    checkpoint = _load_weights_only(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        found = ", ".join(map(str, list(checkpoint)[:3])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise MergeError(f"{path}: expected a checkpoint of lit-merge with state_dict, found {found}")
    return checkpoint


def _load_weights_only(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MergeError(
            f"{path}: it holds pickled objects, which could run code, and was not opened; save its state_dict() as "
            "safetensors instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MergeError(f"{path}: not a complete torch file ({reason}); fetch or save it again") from error


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise MergeError(f"{path}: no such file; expected a state dict (.safetensors, .pt)")
