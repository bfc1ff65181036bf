"""Processes that are the ranks of one group, without a launcher that looks after them, as under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from kills import _fork

Moment = Literal["step", "validation", "test"]
How = Literal["kill", "raise"]


class Ended(NamedTuple):
    """How a rank ended: 0, 1 for an error, or minus a signal; and when, in seconds since the group began."""

    status: int
    seconds: float


def in_ranks(world: int, work: Callable[[int], object], deadline: float = 240.0) -> list[Ended]:
    """Run something on every rank of a group, each in a fork that inherits all imports.

    Args:
        world: Number of ranks.
        work: What a rank does, by its number.
        deadline: Seconds after which whatever still runs is killed.

    Raises:
        AssertionError: A rank hangs.
    """
    port = free_port()
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


def free_port() -> int:
    """A port on which a group can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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


class Fate(L.Callback):
    """What happens to one rank; the others may be kept busy, so that they notice nothing by themselves.

    Args:
        rank: Which one.
        moment: ``step``, or an evaluation from that step on.
        how: ``kill`` or ``raise``.
        step: Number of the step.
        busy: What the others do is to sleep.
    """

    def __init__(self, rank: int, moment: Moment, how: How, step: int = 3, busy: bool = False) -> None:
        self.rank, self.moment, self.how, self.step, self.busy = rank, moment, how, step, busy

    def _now(self, trainer: L.Trainer, moment: Moment) -> None:
        if moment != self.moment or trainer.global_step < self.step:
            return
        root = Path(trainer.default_root_dir)
        (root / f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.global_rank != self.rank:
            time.sleep(1000 * self.busy)
            return
        while self.busy and len(list(root.glob("pid-*"))) < trainer.world_size:
            time.sleep(0.01)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank has a problem of its own")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._now(trainer, "step")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._now(trainer, "validation")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._now(trainer, "test")


def lives(process: int) -> bool:
    """Whether a process is there and is not a zombie that nobody has asked after."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # a system without /proc


def ends(process: int, seconds: float) -> bool:
    """Whether a process that is no child of this one ends in time; it is killed if not."""
    began = time.monotonic()
    while lives(process):
        if time.monotonic() - began > seconds:
            os.kill(process, signal.SIGKILL)
            return False
        time.sleep(0.05)
    return True
