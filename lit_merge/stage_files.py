"""The one file that a stream keeps between stages: the merged network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.reading import file_digest
from lit_merge.errors import MergeError

__all__ = ("clean_stages", "find_stage", "write_stage")

_NAME = re.compile(r"stage_(\d{3,})\.safetensors")


def write_stage(folder: Path, number: int, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the merge after a stage at once: a reader sees the whole file or none.

    Args:
        folder: Where to; made if missing.
        number: Of the stage, from 1.
        state: Complete state dict.

    Returns:
        ``name`` and ``sha256`` of the file, the latter as ``sha256sum`` shows it.
    """
    name = f"stage_{number:03d}.safetensors"
    # with more than one entry of metadata the bytes would not be a function of the weights
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with atomic_path(folder / name) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
        digest = file_digest(temporary)
    return {"name": name, "sha256": digest}


def find_stage(file: Mapping[str, str], folders: Iterable[Path]) -> Path:
    """Return where a stage's file is, after it was compared with its hash.

    Args:
        file: What :func:`write_stage` returned.
        folders: Where to look, the likeliest first.

    Raises:
        MergeError: It is nowhere, or has changed.
    """
    candidates = [folder / file["name"] for folder in dict.fromkeys(folders)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        places = " or ".join(str(path.parent) for path in candidates)
        raise MergeError(
            f"checkpoint: it goes on from {file['name']} (sha256:{file['sha256'][:12]}), which is not in {places}; "
            "put it beside the checkpoint, or start without --ckpt_path"
        )
    if (found := file_digest(path)) != file["sha256"]:
        raise MergeError(
            f"{path}: expected sha256:{file['sha256'][:12]}, as its checkpoint says, found sha256:{found[:12]}; "
            "put the file of that run there, or start without --ckpt_path"
        )
    return path


def clean_stages(folder: Path, absorbed: int, keep: int | None) -> None:
    """Delete files of older stages, and what killed writers left behind.

    Args:
        folder: Where they are.
        absorbed: Number of the newest stage that counts.
        keep: How many stages to keep; ``None`` for all.
    """
    for path in folder.glob(".stage_*.safetensors.*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob("stage_*.safetensors"):
        if keep is not None and (found := _NAME.fullmatch(path.name)) and int(found[1]) <= absorbed - keep:
            path.unlink(missing_ok=True)
