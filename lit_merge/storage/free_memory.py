"""How much memory may still be used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ("free_memory", "host_memory", "in_memory")


def free_memory(device: torch.device) -> int:
    """Return bytes that are free on a device, before anything is kept back."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def host_memory(root: Path = Path("/")) -> int:
    """Return bytes that this process may still use of the host's memory.

    The least of: what the system says is available, what the control groups of the process leave, whose reclaimable
    cache counts as free, and what its own limits leave (``ulimit -v``, ``ulimit -d``). Where the system does not say,
    half of the memory.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    bounds = [*_available(root), *_groups(root), *_limits(root)]
    return max(0, min(bounds)) if bounds else _half()


def in_memory(folder: Path, root: Path = Path("/")) -> bool:
    """Whether files of a folder are in memory and not on a disk, as far as the system says.

    Args:
        folder: The folder.
        root: Where ``proc`` is.
    """
    own, nearest, kind = folder.resolve(), "", ""
    for line in _text(root / "proc/self/mounts").splitlines():
        _, place, found, *_ = line.split(" ")
        if own.is_relative_to(place) and len(place) >= len(nearest):  # a later one hides an earlier one
            nearest, kind = place, found
    return kind in ("tmpfs", "ramfs")


def _available(root: Path) -> Iterator[int]:
    yield from _kilobytes(root / "proc/meminfo", "MemAvailable:")


def _kilobytes(path: Path, key: str) -> Iterator[int]:
    for line in _text(path).splitlines():
        if line.startswith(key):
            yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What each control group leaves, that of the process and those around it."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, usage, cache = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                stat = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
                yield int(most) - int(used) + int(stat.get(cache, 0))


def _limits(root: Path) -> Iterator[int]:
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return
    for limit, key in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield from (most - used for used in _kilobytes(root / "proc/self/status", key))


def _half() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
