"""How far a stream of experts has come: a few numbers and names, in every checkpoint of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from lit_merge.errors import MergeError

__all__ = ("Progress",)


@dataclass
class Progress:
    """Counters and records of a stream; plain data.

    Whatever happens next in a stream is a function of these and of the Trainer's epoch.

    Attributes:
        order: Tasks in the order in which their experts arrive, as far as it is known.
        ordering: How it was decided on: ``given``, ``shuffle``, ``list`` or ``file``.
        seed: Of a shuffled order.
        epochs: Epochs of a stage; the Trainer's epoch says with it which stage it is.
        data: Whose images a stage adapts on.
        started: Stages that were begun.
        absorbed: Stages that are over: the first so many tasks of the order are in the merge.
        first_step: Step of the run at which the stage that was begun last began.
        numbers: What the method keeps between stages.
        digests: SHA-256 of every expert that was read.
        base: Correct predictions and images of the base, by task.
        experts: The same of every expert on its own task, at its arrival.
        stages: Records of the stages that are over.
        file: Name and SHA-256 of the file with the merge after the newest of them.
        folder: Where that file is.
    """

    order: list[str] = field(default_factory=list)
    ordering: str = "given"
    seed: int = 0
    epochs: int = 1
    data: str = "current"
    started: int = 0
    absorbed: int = 0
    first_step: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    base: dict[str, list[int]] = field(default_factory=dict)
    experts: dict[str, list[int]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    file: dict[str, str] = field(default_factory=dict)
    folder: str = ""

    @property
    def history(self) -> tuple[str, ...]:
        """Tasks whose experts are in the merge, in order."""
        return tuple(self.order[: self.absorbed])

    @property
    def known(self) -> tuple[str, ...]:
        """Tasks whose experts have arrived, in order."""
        return tuple(self.order[: max(self.started, self.absorbed)])

    def plain(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """Return what a checkpoint has.

        Raises:
            MergeError: It is not that of a stream.
        """
        names = {each.name for each in fields(cls)}
        if set(content) != names:
            raise MergeError(f"checkpoint: expected the state of a stream with {', '.join(sorted(names))}, found "
                             f"{', '.join(sorted(content)) or 'nothing'}; it is of another version")  # fmt: skip
        return cls(**content)

    def check_stages(self, epochs: int, data: str) -> None:
        """Compare with the stages of the fit that goes on from here.

        Args:
            epochs: Epochs of a stage.
            data: Whose images a stage adapts on.

        Raises:
            MergeError: They are others.

        >>> Progress(epochs=2).check_stages(1, "current")
        Traceback (most recent call last):
        ...
        lit_merge.errors.MergeError: checkpoint: its epochs_per_task was 2, in this run it is 1; give that of the \
checkpoint, or start without --ckpt_path
        """
        for name, saved, now in (("epochs_per_task", self.epochs, epochs), ("data", self.data, data)):
            if saved != now:
                raise MergeError(
                    f"checkpoint: its {name} was {saved}, in this run it is {now}; give that of the checkpoint, "
                    "or start without --ckpt_path"
                )

    def check_alike(self, order: list[str], ordering: str, seed: int) -> None:
        """Compare with the order of the run that goes on from here.

        Args:
            order: Its order, or what is known of it.
            ordering: How it was decided on.
            seed: Of a shuffled order.

        Raises:
            MergeError: It is another one.

        >>> Progress(["a", "b"], "given").check_alike(["b", "a"], "given", 0)
        Traceback (most recent call last):
        ...
        lit_merge.errors.MergeError: checkpoint: its experts came in the order a, b, in this run it is b, a; give the \
order of the checkpoint, or start without --ckpt_path
        """
        advice = "give the order of the checkpoint, or start without --ckpt_path"
        if ordering == self.ordering == "shuffle" and seed != self.seed:
            raise MergeError(
                f"checkpoint: its experts came in an order of seed {self.seed}, in this run it is {seed}; {advice}"
            )
        if "file" in (ordering, self.ordering) and ordering != self.ordering:
            raise MergeError(
                f"checkpoint: its order was decided by {self.ordering}, in this run by {ordering}; {advice}"
            )
        if order[: len(self.order)] != self.order or (ordering != "file" and len(order) != len(self.order)):
            raise MergeError(
                f"checkpoint: its experts came in the order {', '.join(self.order)}, in this run it is "
                f"{', '.join(order)}; {advice}"
            )
