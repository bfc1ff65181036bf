"""``lit-merge convert``: pickled checkpoints to safetensors, without executing them."""

from __future__ import annotations

import sys
from pathlib import Path

from lit_merge.checkpoints.convert import MAX_BYTES, convert
from lit_merge.commands import run_functions
from lit_merge.errors import MergeError

__all__ = ("convert_files", "main")


def convert_files(source: Path, target: Path, overwrite: bool = False, max_bytes: int = MAX_BYTES) -> None:
    """Turn a pickled checkpoint, or every .pt file below a folder, into safetensors with a JSON sidecar.

    Whole image encoders and heads of the task-vectors code base and plain state dicts are known; everything else is
    refused. Nothing in the files is executed.

    Args:
        source: File (.pt, .pth, .bin, .ckpt), or folder.
        target: File (.safetensors), or folder, in which the files keep their relative paths.
        overwrite: Whether files that are there may be replaced.
        max_bytes: Most bytes of a file, and of its tensors.
    """
    if not source.is_dir():
        _say(str(convert(source, target, max_bytes=max_bytes, overwrite=overwrite)))
        return
    files = sorted(path for path in source.rglob("*.pt") if path.is_file())
    if not files:
        raise MergeError(f"{source}: expected files that end in .pt below it, found none")
    refused = []
    for file in files:
        new = (target / file.relative_to(source)).with_suffix(".safetensors")
        try:
            _say(str(convert(file, new, max_bytes=max_bytes, overwrite=overwrite)))
        except MergeError as error:
            refused.append(str(error))
    if refused:
        what = "\n  ".join(refused)
        raise MergeError(f"{source}: {len(refused)} of {len(files)} files were not converted:\n  {what}")


def main(args: list[str]) -> None:
    """Run the command.

    Args:
        args: Its arguments, without its name.
    """
    run_functions(convert_files, args, "lit-merge convert")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
