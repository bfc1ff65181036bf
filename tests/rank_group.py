"""Processes that are the ranks of one group, without a launcher that looks after them, as under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kills import _fork


class Ended(NamedTuple):
    """How a rank ended: 0, 1 for an error, or minus a signal; and when, in seconds since the group began."""

    status: int
    seconds: float


def in_ranks(world: int, work: Callable[[int], object], deadline: float = 60.0) -> list[Ended]:
    """Run something on every rank of a group, each in a fork that inherits all imports.

    Args:
        world: Number of ranks.
        work: What a rank does, by its number.
        deadline: Seconds after which whatever still runs is killed.

    Raises:
        AssertionError: A rank hangs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    running = {_fork(lambda rank=rank: _join(rank, world, port, work)): rank for rank in range(world)}  # type: ignore[misc]
    ended: dict[int, Ended] = {}
    while running and time.monotonic() - began < deadline:
        for child, rank in list(running.items()):
            if (found := os.waitpid(child, os.WNOHANG))[0]:
                ended[rank] = Ended(os.waitstatus_to_exitcode(found[1]), time.monotonic() - began)
                del running[child]
        time.sleep(0.01)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not running, f"ranks {sorted(running.values())} hang; the others: {ended}"
    return [ended[rank] for rank in range(world)]


def _join(rank: int, world: int, port: int, work: Callable[[int], object]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), NODE_RANK="0")
    os.environ["LOCAL_RANK"] = str(rank)  # with it, Lightning starts no processes of its own
    torch.set_num_threads(1)
    work(rank)


def gathered(world: int, folder: Path, work: Callable[[], Any]) -> list[Any]:
    """Run something on every rank and return what each of them returned; an error there is one here."""
    folder.mkdir()
    ended = in_ranks(world, lambda rank: torch.save(work(), folder / f"{rank}.pt"))
    assert [each.status for each in ended] == [0] * world, "a rank failed; its traceback is on standard error"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
