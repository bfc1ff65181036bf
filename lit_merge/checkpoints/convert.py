"""From pickled checkpoints to safetensors, once and for all, without executing anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge import __version__
from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.checks import check_state
from lit_merge.checkpoints.export import write_json
from lit_merge.checkpoints.files import FileGuard, digest
from lit_merge.checkpoints.inert import read_tree
from lit_merge.checkpoints.pickled_clip import Found, encoder_of, head_of
from lit_merge.checkpoints.torch_files import PickledObjectsError, TorchFile, is_zip, unsafe_globals
from lit_merge.errors import MergeError

__all__ = ("MAX_BYTES", "ConvertReport", "convert")

MAX_BYTES = 8 * 2**30
_KINDS = {"ImageEncoder": ("encoder", encoder_of), "ClassificationHead": ("head", head_of)}


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        source: The file that was read.
        target: The safetensors file that was written; its sidecar has the suffix ``.json``.
        kind: ``encoder``, ``head`` or ``state_dict``.
        tensors: How many tensors were written.
        sidecar: What the sidecar says.
    """

    source: Path
    target: Path
    kind: str
    tensors: int
    sidecar: dict[str, Any]

    def __str__(self) -> str:
        facts = {name: self.sidecar.get(name) for name in ("architecture", "activation", "classes", "normalize")}
        told = "".join(f", {name} {value}" for name, value in facts.items() if value is not None)
        return f"{self.target}: {self.kind}, {self.tensors} tensors{told}"


def convert(source: Path, target: Path, *, max_bytes: int = MAX_BYTES, overwrite: bool = False) -> ConvertReport:
    """Turn a torch file into safetensors and a JSON sidecar; nothing in the file is executed.

    Three kinds are known, and everything else is refused:

    * ``encoder``: a whole ``ImageEncoder`` of the task-vectors code base (also AdaMerging's and Surgery's). Its vision
      tower is written with open_clip's names, ``visual.*``; what is left of the text tower is dropped. The activation
      has no weights, so the sidecar tells which one it was.
    * ``head``: a whole ``ClassificationHead``: ``weight`` ``(C, D)`` with the logit scale in it, ``bias`` ``(C,)``.
      :func:`~lit_merge.encoders.heads.read_head` reads it.
    * ``state_dict``: tensors by name; the names are kept.

    Tensors are kept bit for bit. Whole modules are rebuilt from inert stand-ins by torch's own restricted unpickler,
    after the names of all their classes were compared with a fixed list.

    Args:
        source: ``.pt``, ``.pth``, ``.bin`` or ``.ckpt``.
        target: ``.safetensors``; the sidecar is written beside it.
        max_bytes: Most bytes of the file, and of its tensors.
        overwrite: Whether files that are there may be replaced.

    Returns:
        What was done.

    Raises:
        MergeError: The file is of another kind, damaged or too large, has a value that is not finite, or the target
            exists. Nothing is written then.
    """
    source, target = Path(source), Path(target)
    sidecar = target.with_suffix(".json")
    _check_paths(source, target, max_bytes)
    for path in (target, sidecar):
        if path.exists() and not overwrite:
            raise MergeError(f"{path}: it exists; give another name or --overwrite true")
    guard = FileGuard(source)
    before = digest(source)
    kind, found, names = _read(source, max_bytes)
    total = sum(value.numel() * value.element_size() for value in found.state.values())
    if total > max_bytes:
        raise MergeError(f"{source}: its tensors take {total} bytes; expected at most {max_bytes}")
    guard.check()
    said = {
        "schema": 1,
        "kind": kind,
        "source": {"file": source.name, "bytes": guard.size, "sha256": before},
        **found.facts,
        "globals": names,
        "versions": {"lit-merge": __version__, "torch": torch.__version__},
    }
    said = _write(target, sidecar, found.state, said)
    return ConvertReport(source, target, kind, len(found.state), said)


def _check_paths(source: Path, target: Path, max_bytes: int) -> None:
    if source.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise MergeError(f"{source}: expected .pt, .pth, .bin or .ckpt, found {source.suffix or 'no suffix'}")
    if target.suffix != ".safetensors":
        raise MergeError(f"{target}: expected a name that ends in .safetensors, found {target.suffix or 'no suffix'}")
    if (size := FileGuard(source).size) > max_bytes:
        raise MergeError(f"{source}: it has {size} bytes; expected at most {max_bytes} (--max_bytes)")


def _read(source: Path, max_bytes: int) -> tuple[str, Found, list[str]]:
    if not is_zip(source) or not unsafe_globals(source):
        return "state_dict", _plain(source, max_bytes), []
    root, names = read_tree(source)
    kind, extract = _KINDS.get(root.name.rpartition(".")[2], (None, None))
    if kind is None or extract is None or root.name.startswith(("torch", "open_clip")):
        raise MergeError(
            f"{source}: it holds a {root.name}; expected an ImageEncoder or a ClassificationHead of the task-vectors "
            "code base, or a state dict; save the state_dict() of the module"
        )
    return kind, extract(root, source), names


def _plain(source: Path, max_bytes: int) -> Found:
    try:
        state = dict(TorchFile(source, max_bytes))
    except PickledObjectsError as error:
        if is_zip(source):
            raise
        raise MergeError(
            f"{source}: it holds pickled objects in the format from before torch 1.6 (or of pickle.dump), whose "
            "classes cannot be listed without running it, and was not opened; in a sandbox without a network, load it "
            "with torch.load(..., weights_only=False) and torch.save() its state_dict(), or the module itself, again"
        ) from error
    for name, value in state.items():
        check_state(str(source), name, value)
    return Found(state, {})


def _write(target: Path, sidecar: Path, state: dict[str, Tensor], said: dict[str, Any]) -> dict[str, Any]:
    """Write both files, the weights last; the header repeats what a reader of the weights alone must know."""
    facts = {
        name: said.get(name) for name in ("kind", "layout", "architecture", "activation", "normalize", "logit_scale")
    }
    text = {name: json.dumps(value).strip('"') for name, value in facts.items() if value is not None}
    metadata = {"format": "pt", "producer": "lit-merge", **text, "source_sha256": said["source"]["sha256"]}
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    with atomic_path(target) as temporary:
        save_file(plain, temporary, metadata=metadata)
        weights = {"file": target.name, "bytes": temporary.stat().st_size, "sha256": digest(temporary)}
        said = {**said, "weights": weights}
        write_json(sidecar, said)
    return said
