"""What a checkpoint of a merge remembers of the networks it was learned with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lit_merge.errors import MergeError
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Transform

__all__ = ("check_fingerprint", "fingerprint")


def fingerprint(bank: TaskVectors, heads: Mapping[str, str], transforms: Sequence[Transform]) -> dict[str, Any]:
    """Return hashes of base, experts, heads and tensor names, and the transforms; a few hundred bytes."""
    return {
        "tasks": list(bank.tasks),
        "base": bank.digests[""],
        "experts": {task: bank.digests[task] for task in bank.tasks if task in bank.digests},
        "heads": dict(heads),
        "names": hashlib.sha256("\n".join(bank.names).encode()).hexdigest(),
        "transforms": [repr(transform) for transform in transforms],
    }


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was learned with other networks.

    Raises:
        MergeError: Something differs; the message says what, with both values.
    """
    if not saved:
        raise MergeError("checkpoint: it is not one of lit-merge: it does not say which experts it was learned with")
    for key, label in (("tasks", "tasks"), ("base", "base network"), ("transforms", "transforms")):
        _compare(label, saved[key], current[key])
    for task, digest in saved["experts"].items():
        _compare(f"expert {task!r}", digest, current["experts"][task])
    for task, digest in saved["heads"].items():
        _compare(f"head of {task!r}", digest, current["heads"][task])
    _compare("order of the tensors", saved["names"], current["names"])


def _compare(label: str, saved: object, current: object) -> None:
    if saved != current:
        raise MergeError(
            f"checkpoint: its {label} was {_short(saved)}, this run has {_short(current)}; coefficients mean nothing "
            "for other networks: give the suite and transforms of the checkpoint, or start without --ckpt_path"
        )


def _short(value: object) -> str:
    return f"sha256:{value[:12]}" if isinstance(value, str) else str(value)
