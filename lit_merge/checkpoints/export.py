"""Writing a merged network as a plain state dict with its provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.digests import state_digest

__all__ = ("write_card", "write_json", "write_merged")


def write_merged(folder: str | Path, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Path:
    """Write ``merged.safetensors`` and ``merge.json``.

    The file loads into the plain network: ``network.load_state_dict(safetensors.torch.load_file(path))``. Tied
    tensors stand under all their names. Each file is written under a temporary name and renamed, the weights last.

    Args:
        folder: Where to; made if missing.
        state: Complete state dict.
        provenance: What ``merge.json`` says besides the hash of the weights; plain data.

    Returns:
        Path of ``merged.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    digest = state_digest(plain)
    write_json(folder / "merge.json", {**provenance, "weights": {"file": "merged.safetensors", "sha256": digest}})
    with atomic_path(folder / "merged.safetensors") as temporary:
        save_file(plain, temporary, metadata={"format": "pt", "producer": "lit-merge", "sha256": digest})
    return folder / "merged.safetensors"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file at once: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_card(folder: str | Path, card: str) -> Path:
    """Write ``README.md``, the model card, at once.

    Args:
        folder: Where to; made if missing.
        card: Its text.

    Returns:
        Its path.
    """
    path = Path(folder) / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return path
