"""What taking an expert out of a stream leaves, and needs."""

from __future__ import annotations

from collections.abc import Sequence

from lit_merge.errors import MergeError
from lit_merge.stages import Removal

__all__ = ("others_of", "replay")


def others_of(task: str, history: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks of a stream without one of them, in order.

    Args:
        task: The one.
        history: Tasks absorbed so far, in order.

    Raises:
        MergeError: It is not among them.

    >>> others_of("b", ["a", "b", "c"])
    ('a', 'c')
    """
    if task not in history:
        raise MergeError(f"remove: expected a task that was merged, one of {', '.join(history) or 'none'}; "
                         f"found {task!r}")  # fmt: skip
    return tuple(name for name in history if name != task)


def replay(method: str, task: str, history: Sequence[str], why: str) -> Removal:
    """Say that taking an expert out means to merge again from the stage at which it came.

    Args:
        method: Name of the method.
        task: Task of the expert.
        history: All tasks, in order.
        why: What later stages depend on.

    Raises:
        MergeError: The task is not among them.

    >>> replay("Opcm", "b", ("a", "b", "c"), "later experts were projected away from it").needs
    ('c',)
    """
    others_of(task, history)
    place = history.index(task)
    before, later = history[:place], tuple(history[place + 1 :])
    start = f"start from the merge of {', '.join(before)} (or merge these again)" if before else "start from the base"
    then = f"merge {', '.join(later)} again" if later else "nothing has to be merged again"
    return Removal(False, later, f"{method} needs a replay, as {why}: {start}, then {then}")
