"""Reading the configuration files of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_merge.checkpoints.files import strict_json

__all__ = ("read_json",)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; without the file it is empty.

    Raises:
        MergeError: The file holds something else.
    """
    if not path.is_file():
        return {}
    return strict_json(path, path.read_bytes())
