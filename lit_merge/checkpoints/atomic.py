"""Files that are either there and whole or not there at all, and the folder where built things are kept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ("atomic_path", "cache_root")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name next to ``path``, and rename it to ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never a part. After an error or an interrupt nothing is left; after
    SIGKILL at most a hidden ``.*.tmp`` file, which nothing reads. Writers at the same time do not disturb each other:
    the last one to finish wins.

    Args:
        path: Where the file shall be; missing folders are made.

    Yields:
        The temporary path, in the same folder; it does not exist yet.

    Raises:
        FileNotFoundError: The block wrote nothing.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("1 2 3")
    >>> target.read_text()
    '1 2 3'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder where built suites and downloads are kept; it may not exist yet.

    Args:
        cache_dir: Takes precedence if given. Otherwise ``$LIT_MERGE_CACHE``, ``$XDG_CACHE_HOME/lit-merge`` or
            ``~/.cache/lit-merge``, the first that is set.

    >>> cache_root("somewhere").name
    'somewhere'
    """
    chosen = cache_dir or os.environ.get("LIT_MERGE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lit-merge"
