"""Files as they come: whether they are there, stayed the same, and are what their name says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lit_merge.errors import MergeError

__all__ = ("FileGuard", "digest", "disguise", "strict_json")

_MAX_JSON = 16 * 2**20  # headers and indices of the largest public networks are a few megabytes
_ELSEWHERE = {
    b"<!doctype": "it is a web page, so the download went wrong",
    b"<html": "it is a web page, so the download went wrong",
    b"<?xml": "it is an XML page, so the download went wrong",
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: run git lfs pull",
}
_TORCH = {
    b"pk\x03\x04": "it is a zip archive, such as torch.save writes: name it .pt",
    b"\x80\x02": "it is a pickle, such as old torch.save wrote: name it .pt",
}


class FileGuard:
    """A file that is opened again and again, and must stay the file that was checked.

    Args:
        path: The file.
        expected: What should be there, for the message.

    Raises:
        MergeError: There is no such file.
    """

    def __init__(self, path: Path, expected: str = "a state dict (.safetensors, .pt)") -> None:
        self.path = path
        self._expected = expected
        self.size, self._time = self._stamp()

    def check(self) -> None:
        """Look again.

        Raises:
            MergeError: The file is gone or is another one.
        """
        if self._stamp() != (self.size, self._time):
            raise MergeError(f"{self.path}: the file changed while it was in use; expected it to stay; start again")

    def _stamp(self) -> tuple[int, int]:
        if not self.path.is_file():
            raise MergeError(f"{self.path}: no such file; expected {self._expected}")
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns


def disguise(path: Path, *, torch_file: bool = False) -> str:
    """Return what a file that could not be read seems to be instead; empty if nobody knows.

    Args:
        path: The file.
        torch_file: Whether it was meant to be a file of ``torch.save``.
    """
    openings = _ELSEWHERE if torch_file else {**_ELSEWHERE, **_TORCH}
    with path.open("rb") as file:
        opening = file.read(64)
    if not opening:
        return "it is empty"
    return next((what for how, what in openings.items() if opening.lstrip().lower().startswith(how)), "")


def digest(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strict_json(where: Path, text: bytes, what: str = "file") -> dict[str, Any]:
    """Parse a JSON object in which no name stands twice.

    Python and most parsers let the last of two equal names win, so that two readers of one file may see two networks.

    Args:
        where: The file, for the message.
        text: UTF-8, at most 16 MiB.
        what: What the text is, for the message.

    Raises:
        MergeError: Too long, not a JSON object, or a name stands twice.

    >>> strict_json(Path("a.json"), b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ...
    lit_merge.errors.MergeError: a.json: 'a' stands twice in its JSON; expected every name once; fetch or save it again
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise MergeError(
                f"{where}: {twice!r} stands twice in its JSON; expected every name once; fetch or save it again"
            )
        return found

    if len(text) > _MAX_JSON:
        raise MergeError(f"{where}: {len(text)} bytes of JSON; expected at most {_MAX_JSON}: no network has that many")
    try:
        content = json.loads(text.decode(), object_pairs_hook=once)
    except MergeError:
        raise
    except (ValueError, RecursionError) as error:
        reason = disguise(where) or f"its {what} is not JSON ({error})"
        raise MergeError(f"{where}: {reason}; fetch or save it again") from error
    if not isinstance(content, dict):
        raise MergeError(f"{where}: expected a JSON object, found {type(content).__name__}; fetch or save it again")
    return content
