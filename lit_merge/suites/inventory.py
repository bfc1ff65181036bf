"""What a suite is made of: the pieces that ``lit-merge suite show`` lists."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("Piece",)


@dataclass(frozen=True)
class Piece:
    """One network or dataset of a suite.

    Attributes:
        kind: ``base``, ``expert`` or ``images``.
        name: What it is in the suite, such as the task.
        where: File, folder or repository.
        revision: Commit or tag, where known.
        here: Whether it is on this disk already.
        size: Bytes on disk, or to be fetched, where known.
        licence: As its authors state it, where known.
        note: Anything else that a user should see.
    """

    kind: str
    name: str
    where: str
    revision: str | None = None
    here: bool = True
    size: int | None = None
    licence: str = ""
    note: str = ""
