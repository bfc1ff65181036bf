"""What an expert's ``finetune.json`` says of it, compared with the base and the way it is about to be run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoints.adapters import is_adapter
from lit_merge.checkpoints.digests import state_digest
from lit_merge.encoders.json_files import read_json
from lit_merge.errors import MergeError

__all__ = ("check_origin", "expecting", "read_origin")

_NAME = "finetune.json"
_METHODS: ContextVar[tuple[str, ...]] = ContextVar("methods", default=("full", "lora"))


def check_origin(path: Path, base: Mapping[str, Tensor], where: str, *, methods: Collection[str] | None = None) -> None:
    """Refuse an expert that was made otherwise, or from another base, as far as a ``finetune.json`` says so.

    Args:
        path: The expert's weights: a file, a folder, or an adapter, whose ``finetune.json`` may be one folder up.
        base: State dict of the base with the network's own keys, as :class:`~lit_merge.expert.ExpertModule` had it.
        where: What the expert is, for the message.
        methods: Which methods of fine-tuning are fine; by default ``full`` and ``lora``, or those of :func:`expecting`.

    Raises:
        MergeError: The file is damaged, or names another method or base. Without a file nothing is checked.
    """
    if (origin := read_origin(path)) is None:
        return
    facts, found = origin
    allowed = _METHODS.get() if methods is None else tuple(methods)
    if (method := found.get("method")) not in allowed:
        raise MergeError(
            f"{facts}: {where}: expected method {' or '.join(allowed)}, found {method}; {_remedy(method, allowed)}"
        )
    if (digest := found.get("base")) != (expected := state_digest(base)):
        raise MergeError(
            f"{facts}: {where}: expected base {expected}, found {digest}; an expert goes with the base that it was "
            "fine-tuned from: give that base, or make the expert again"
        )


def read_origin(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the ``finetune.json`` of an expert and what it says, or ``None`` if there is none.

    Args:
        path: As for :func:`check_origin`.

    Raises:
        MergeError: The file is damaged.

    >>> read_origin(Path("nowhere/model.safetensors")) is None
    True
    """
    folder = path if path.is_dir() else path.parent
    folders = [folder, folder.absolute().parent] if is_adapter(folder) else [folder]
    facts = next((place / _NAME for place in folders if (place / _NAME).is_file()), None)
    return None if facts is None else (facts, read_json(facts))


@contextmanager
def expecting(*methods: str) -> Iterator[None]:
    """Let :func:`check_origin` take experts of these methods by default, in suites that other suites are made of.

    >>> with expecting("linearized"):
    ...     _METHODS.get()
    ('linearized',)
    """
    token = _METHODS.set(methods)
    try:
        yield
    finally:
        _METHODS.reset(token)


def _remedy(method: object, allowed: Collection[str]) -> str:
    if "linearized" in allowed:
        return "the tangent is for linearised experts: run these without LinearizedSuite, or make linearised ones"
    if method in ("linearized", "lora_linearized"):
        return "linearised experts are run in the tangent: use LinearizedSuite"
    return "make the expert again, or remove the file if it is not about these weights"
