"""Ranks that go away: the others end too, and say why."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

__all__ = ("ParentWatch", "is_lost_peer", "stop_watching", "watch_parent")

_LOST = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket closed",
    "remote process", "ncclremoteerror", "ncclsystemerror",
)  # fmt: skip
_watch: ParentWatch | None = None  # of a process there is one parent


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is no more than the echo of another rank's end: that rank has said what happened, if it could.

    Args:
        error: What was raised, with what it was raised from.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    inner: BaseException | None = error
    while inner is not None:
        text = str(inner).lower()
        if isinstance(inner, RuntimeError) and any(part in text for part in _LOST):
            return True
        inner = inner.__cause__ or inner.__context__
    return False


class ParentWatch(threading.Thread):
    """Ends this process when the one that started it is gone.

    Under the strategy ``ddp`` rank zero starts the others. Lightning ends rank zero when one of them dies, but nothing
    ends them when rank zero is killed: they notice at their next collective operation if that fails, as those of gloo
    do, and those of NCCL may wait for half an hour and keep their GPU.

    Args:
        parent: Process id of the parent.
        grace: Seconds that a process has to end by itself, with a better message.
        period: Seconds between two looks.
    """

    def __init__(self, parent: int, grace: float = 5.0, period: float = 0.5) -> None:
        super().__init__(daemon=True, name="lit-merge-parent-watch")
        self.parent = parent
        self.grace = grace
        self.period = period
        self._over = threading.Event()

    def run(self) -> None:
        """Look until the parent is gone or :meth:`stop` is called."""
        left: float | None = None
        while not self._over.wait(self.period):
            if os.getppid() == self.parent:
                continue
            left = time.monotonic() if left is None else left
            if time.monotonic() - left >= self.grace:
                sys.stderr.write(f"error: rank {_rank()} ends, because the rank that started it is gone\n")
                sys.stderr.flush()
                os._exit(1)  # an exception would not reach a main thread that waits in a collective operation

    def stop(self) -> None:
        """Look no longer: nothing is left that needs the other ranks."""
        self._over.set()


def watch_parent(trainer: Any) -> bool:  # noqa: ANN401 - a Trainer, or what stands for one in a test
    """Watch the parent of this process, if that is another rank of the run, until :func:`stop_watching`.

    All ranks call this together. Processes that torchrun, SLURM or a fork has started are looked after by these.

    Args:
        trainer: Whose ranks there are.

    Returns:
        Whether the parent is watched.
    """
    global _watch
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return False
    ranks: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(ranks, (socket.gethostname(), os.getpid()))
    if (socket.gethostname(), os.getppid()) not in ranks:
        return False
    if _watch is None:
        _watch = ParentWatch(os.getppid())
        _watch.start()
    return True


def stop_watching() -> None:
    """Watch the parent no longer: a run is over, and rank zero may end first."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else -1
