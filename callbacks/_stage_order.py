"""In which order experts come, and where from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from lit_merge.checkpoints.reading import read_state
from lit_merge.errors import MergeError
from lit_merge.suites.base import Suite

__all__ = ("StageOrder",)

_ROUND = 10.0  # seconds between two words among the ranks while they wait; far less than a collective may take
_GLANCE = 0.2  # seconds between two looks at the disk


class StageOrder:
    """The order of a stream: of the suite, shuffled, listed, or that of a file or folder that grows.

    Args:
        order: See :class:`~lit_merge.callbacks.SequentialMerging`.
        seed: Of a shuffled order.
        wait: Seconds to wait for another expert.
    """

    def __init__(self, order: str | Path | Sequence[str], seed: int, wait: float) -> None:
        self.seed = seed
        self.wait = wait
        self._listed = () if isinstance(order, str | Path) else tuple(order)
        self.path: Path | None = None
        if not isinstance(order, str | Path):
            self.kind = "list"
        elif order in ("given", "shuffle"):
            self.kind = str(order)
        else:
            self.kind, self.path = "file", Path(order)

    @property
    def grows(self) -> bool:
        """Whether there may be more later."""
        return self.path is not None

    def reader(self) -> Callable[[str], Mapping[str, Tensor]] | None:
        """Return what reads the expert of a task; ``None`` if the suite does."""
        folder = self.path
        if folder is None or not folder.is_dir():
            return None
        return lambda task: read_state(folder / f"{task}.safetensors")

    def tasks(self, suite: Suite, known: Sequence[str] = ()) -> list[str]:
        """Return the tasks in their order, as far as they are known now.

        Args:
            suite: Has the tasks.
            known: Those that came before, of a folder that grows.

        Raises:
            MergeError: There is no such file, or a task is unknown or there twice.
        """
        if self.kind == "given":
            return list(suite.tasks)
        if self.kind == "shuffle":
            generator = torch.Generator().manual_seed(self.seed)
            return [suite.tasks[place] for place in torch.randperm(len(suite.tasks), generator=generator).tolist()]
        found = list(self._listed) if self.path is None else self._look(self.path, suite.tasks, known)
        where = "SequentialMerging.order" if self.path is None else str(self.path)
        if unknown := [task for task in found if task not in suite.tasks]:
            raise MergeError(f"{where}: unknown task {unknown[0]!r}; {suite.name} has {', '.join(suite.tasks)}")
        if twice := [task for task in found if found.count(task) > 1]:
            raise MergeError(f"{where}: task {twice[0]!r} is there twice; expected every expert to come once")
        if not found and self.path is None:
            raise MergeError(f"{where}: expected at least one task, found none")
        return found

    def _look(self, path: Path, tasks: Sequence[str], known: Sequence[str]) -> list[str]:
        if path.is_dir():
            there = [file.name.removesuffix(".safetensors") for file in path.glob("[!.]*.safetensors")]
            return [*known, *sorted(set(there) - set(known))]
        if not path.is_file():
            raise MergeError(
                f"SequentialMerging.order: {path}: no such file or folder; expected given, shuffle, a list of tasks, "
                "a text file with one task per line, or a folder in which experts appear"
            )
        *lines, last = path.read_text(encoding="utf-8").split("\n")
        whole = [*lines, last] if last.strip() in tasks else lines  # the last line may not be there to its end yet
        return [line.strip() for line in whole if line.strip() and not line.startswith("#")]

    def wait_for_more(self, trainer: L.Trainer, suite: Suite, known: Sequence[str]) -> list[str]:
        """Return the order as soon as it is longer than what is known, or as it is when the time is up.

        Rank zero looks, and all ranks get the same answer.

        Args:
            trainer: Says who is rank zero.
            suite: Has the tasks.
            known: Order so far.
        """
        end = time.monotonic() + self.wait
        while True:
            found, error, over = list(known), "", True
            if trainer.is_global_zero:
                pause = min(end, time.monotonic() + _ROUND)
                try:
                    while len(found := self.tasks(suite, known)) <= len(known) and time.monotonic() < pause:
                        if trainer.received_sigterm:
                            end = 0.0
                            break
                        time.sleep(_GLANCE)
                except MergeError as raised:
                    error = str(raised)
                over = len(found) > len(known) or time.monotonic() >= end
            found, error, over = trainer.strategy.broadcast((found, error, over))
            if error:
                raise MergeError(error)
            if over:
                return found
