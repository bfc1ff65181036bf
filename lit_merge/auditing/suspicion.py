"""What the signals of an audit add up to: which experts to point at, and why; and how right that was."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from lit_merge.errors import MergeError

__all__ = ("THRESHOLDS", "precision_recall", "suspicion")

THRESHOLDS: Mapping[str, float] = MappingProxyType({"inversion": 0.3})
"""From which value on a signal makes an expert suspicious; signals that are not named here have no weight.

Chosen on seed 0 of the embedded suite (``tests/benchmarks/audit_experts.py``), about midway between clean and poisoned
experts. Networks of another kind may need another one: audit experts that you trust beside those that you do not.
"""


def suspicion(
    signals: Mapping[str, Mapping[str, float]], thresholds: Mapping[str, float] = THRESHOLDS
) -> dict[str, dict[str, Any]]:
    """Point at experts: the score is the largest ratio of a signal to its threshold, and from 1 on it is suspicious.

    Args:
        signals: Values per expert and signal; a signal of one expert may be missing.
        thresholds: Positive threshold per signal that has weight.

    Returns:
        Per expert: ``score``, ``suspicious``, and ``reasons``, the signals that reach their threshold.

    Raises:
        MergeError: A threshold is not above 0, a value is not finite, or no expert has a signal of a threshold.

    >>> suspicion({"a": {"z": 5.25, "rate": 0.1}, "b": {"z": 0.7}}, {"z": 3.5, "rate": 0.5})["a"]
    {'score': 1.5, 'suspicious': True, 'reasons': ['z']}
    """
    for name, threshold in thresholds.items():
        if not threshold > 0:
            raise MergeError(f"suspicion: thresholds: {name}: expected a number above 0, found {threshold}")
        if not any(name in row for row in signals.values()):
            known = sorted({key for row in signals.values() for key in row})
            raise MergeError(f"suspicion: thresholds: no expert has the signal {name!r}; there are {', '.join(known)}")
    found: dict[str, dict[str, Any]] = {}
    for task, row in signals.items():
        if wrong := [name for name, value in row.items() if not math.isfinite(value)]:
            raise MergeError(f"suspicion: {task}: {wrong[0]}: expected a finite number, found {row[wrong[0]]}")
        ratios = {name: row[name] / threshold for name, threshold in thresholds.items() if name in row}
        reasons = sorted((name for name, ratio in ratios.items() if ratio >= 1), key=lambda name: -ratios[name])
        found[task] = {"score": max(ratios.values(), default=0.0), "suspicious": bool(reasons), "reasons": reasons}
    return found


def precision_recall(pointed: Collection[str], poisoned: Collection[str]) -> dict[str, Any]:
    """Compare the experts that were pointed at with those that are poisoned.

    Args:
        pointed: Experts that were pointed at.
        poisoned: Experts that are poisoned.

    Returns:
        ``hits``, ``misses`` and ``false_alarms``, sorted names; ``precision``, the share of hits among those pointed
        at, and ``recall``, their share among the poisoned; ``None`` where there are none to divide by.

    >>> precision_recall(["a", "b"], ["b", "c", "d"])
    {'hits': ['b'], 'misses': ['c', 'd'], 'false_alarms': ['a'], 'precision': 0.5, 'recall': 0.3333333333333333}
    """
    hits = sorted(set(pointed) & set(poisoned))
    return {
        "hits": hits,
        "misses": sorted(set(poisoned) - set(pointed)),
        "false_alarms": sorted(set(pointed) - set(poisoned)),
        "precision": len(hits) / len(set(pointed)) if pointed else None,
        "recall": len(hits) / len(set(poisoned)) if poisoned else None,
    }
