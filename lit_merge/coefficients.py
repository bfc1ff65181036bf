"""The coefficient language: one number per tensor, given or tied, in the words of a config.

==================================================  ====================================================================
a fixed coefficient (``scale``, ``init``)           what it says
==================================================  ====================================================================
``0.3``                                             the same everywhere
``[0.1, 0.3, 0.5]``                                 over depth: in the first block, in the middle, in the last one, and
                                                    linear between; tensors outside of all blocks take the first
``[{filter: mlp, value: 0.4}, {value: 0.3}]``       by name: the first entry whose filter fits; a value is a number or a
                                                    list over depth. The last entry is the rest, and has no filter
==================================================  ====================================================================

==================================================  ====================================================================
a learned one (``granularity``)                     which coefficients of a task are one
==================================================  ====================================================================
``task``, ``block``, ``tensor`` (or ``layer``)      all; those of a numbered block, or of a module outside the blocks;
                                                    none
``3``                                               three over depth are learned, and the others linear between them
``[{filter: mlp, value: block}, {value: task}]``    by name, with one of the above as value; ``task`` if it has none
==================================================  ====================================================================

A filter with ``*``, ``?`` or ``[`` is a pattern for the whole name; any other fits a name that contains it. Blocks and
their depth are read off the names, see :func:`lit_merge.functional.lines.depths`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.lines import depths

__all__ = ("Coefficient", "Filtered", "Granularity", "Tied", "Tying", "per_tensor", "spread", "start_values", "tying")


class Filtered(TypedDict):
    """A coefficient for the tensors that a filter fits; without one for the rest."""

    filter: NotRequired[str]
    value: float | list[float]


Granularity = Literal["task", "block", "tensor", "layer"]


class Tied(TypedDict):
    """Which learned coefficients are one, of the tensors that a filter fits; without one of the rest."""

    filter: NotRequired[str]
    value: NotRequired[Granularity | int]


Coefficient = float | list[float] | list[Filtered]
Tying = Granularity | int | list[Tied]


def per_tensor(value: Coefficient, names: Sequence[str], label: str = "scale") -> dict[str, float]:
    """Return the coefficient of every tensor.

    Args:
        value: In the words above.
        names: Names of all tensors of the network.
        label: What it is, for messages.

    Raises:
        MergeError: Not in these words, not finite, a filter fits nothing, a tensor fits no filter, or a list over depth
            for names without block numbers.

    >>> names = ["stem.w", "h.0.mlp.w", "h.1.mlp.w", "h.1.attn.w", "h.2.mlp.w"]
    >>> per_tensor([0.1, 0.5], names)
    {'stem.w': 0.1, 'h.0.mlp.w': 0.1, 'h.1.mlp.w': 0.3, 'h.1.attn.w': 0.3, 'h.2.mlp.w': 0.5}
    >>> per_tensor([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.3}], names)
    {'stem.w': 0.3, 'h.0.mlp.w': 0.0, 'h.1.mlp.w': 0.5, 'h.1.attn.w': 0.3, 'h.2.mlp.w': 1.0}
    """
    if _is_number(value):
        return dict.fromkeys(names, _finite(value, label))
    if not isinstance(value, list | tuple) or not value:
        raise MergeError(f"{label}: expected a number, a list of numbers over depth or a list of filters with values, "
                         f"found {value!r}")  # fmt: skip
    if not any(isinstance(entry, Mapping) for entry in value):
        anchors = [_finite(entry, label) for entry in value]
        shares = _shares(len(anchors), names, label)
        return {name: math.fsum(a * share for a, share in zip(anchors, shares[name], strict=True)) for name in names}
    found: dict[str, float] = {}
    for entry, own in _sort(value, names, label):
        if "value" not in entry or any(isinstance(part, Mapping) for part in _listed(entry["value"])):
            raise MergeError(f"{label}: expected a number or a list of numbers as value, found {dict(entry)}")
        every = per_tensor(entry["value"], names, label)  # depth is that of the whole network
        found |= {name: every[name] for name in own}
    return {name: found[name] for name in names}


def tying(granularity: Tying, names: Sequence[str], label: str = "granularity") -> tuple[tuple[str, ...], Tensor]:
    """Say which coefficients are learned, and how they act on the tensors.

    Args:
        granularity: In the words above.
        names: Names of all tensors.
        label: What it is, for messages.

    Returns:
        Names of the G coefficients, and what share each has in that of each tensor, ``(G, L)``, float64: columns sum to
        1, and have a single 1 except between two coefficients over depth.

    Raises:
        MergeError: Not in these words, a filter fits nothing, or a tensor fits no filter.

    >>> groups, shares = tying([{"filter": "mlp", "value": 2}, {}], ["h.0.mlp", "h.1.mlp", "h.2.mlp", "norm"])
    >>> groups
    ('mlp: depth 0', 'mlp: depth 1', 'rest')
    >>> shares
    tensor([[1.0000, 0.5000, 0.0000, 0.0000],
            [0.0000, 0.5000, 1.0000, 0.0000],
            [0.0000, 0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    parts: list[tuple[str, Any, Sequence[str]]]
    if isinstance(granularity, list | tuple):
        entries = _sort(granularity, names, label)
        parts = [(entry.get("filter", "rest"), entry.get("value", "task"), own) for entry, own in entries]
    else:
        parts = [("", granularity, names)]
    order: dict[str, int] = {}
    cells: list[tuple[int, str, float]] = []
    for prefix, word, own in parts:
        for name, keys in _keys(word, own, names, label).items():
            for key, share in keys.items():
                full = f"{prefix}: {key}" if prefix and key != "all" else prefix or key
                cells.append((order.setdefault(full, len(order)), name, share))
    column = {name: number for number, name in enumerate(names)}
    shares = torch.zeros(len(order), len(names), dtype=torch.float64)
    for row, name, share in cells:
        shares[row, column[name]] = share
    return tuple(order), shares


def start_values(init: Coefficient, shares: Tensor, names: Sequence[str]) -> Tensor:
    """Return learned coefficients ``(G,)``, float64, that give every tensor its fixed one.

    Args:
        init: In the words above.
        shares: What :func:`tying` returned, ``(G, L)``.
        names: Names of the L tensors.

    Raises:
        MergeError: Coefficients that are one should start at different values.

    >>> names = ["h.0.w", "h.1.w", "h.2.w"]
    >>> start_values([0.0, 1.0], tying("tensor", names)[1], names)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    >>> start_values([0.0, 1.0], tying("task", names)[1], names)
    Traceback (most recent call last):
    ...
    lit_merge.errors.MergeError: init: h.0.w should start at 0.0, but it shares its coefficient with others that start \
elsewhere; give a granularity that is as fine as init
    """
    wanted = torch.tensor(list(per_tensor(init, names, "init").values()), dtype=torch.float64)
    if _is_number(init):
        return torch.full((len(shares),), float(init), dtype=torch.float64)  # type: ignore[arg-type]
    single = bool((shares.max(0).values == 1).all())
    weights = shares / shares.sum(1, keepdim=True).clamp(min=1e-300) if single else torch.linalg.pinv(shares).mT
    start = weights @ wanted
    off = (start @ shares - wanted).abs()
    if len(names) and float(off.max()) > 1e-9 * max(1.0, float(wanted.abs().max())):
        worst = int(off.argmax())
        raise MergeError(
            f"init: {names[worst]} should start at {float(wanted[worst])}, but it shares its coefficient with others "
            "that start elsewhere; give a granularity that is as fine as init"
        )
    return start


def block_of(name: str) -> str:
    """Return the numbered block of a tensor, or its module.

    >>> block_of("transformer.resblocks.3.mlp.weight"), block_of("conv1.weight"), block_of("token")
    ('transformer.resblocks.3', 'conv1', 'token')
    """
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: number + 1])
    return ".".join(parts[:-1]) or name


def _keys(word: object, own: Sequence[str], names: Sequence[str], label: str) -> dict[str, dict[str, float]]:
    """Coefficients of some tensors with their shares."""
    if word == "task":
        return {name: {"all": 1.0} for name in own}
    if word == "block":
        return {name: {block_of(name): 1.0} for name in own}
    if word in ("tensor", "layer"):
        return {name: {name: 1.0} for name in own}
    if isinstance(word, int) and not isinstance(word, bool) and word >= 2:
        shares = _shares(word, names, label)
        # every one is there, in order of depth, also where no tensor has a share in it
        return {name: {f"depth {place}": share for place, share in enumerate(shares[name])} for name in own}
    raise MergeError(f"{label}: expected task, block, tensor or layer, found {word!r}; or, from 2 on, a number of "
                     "coefficients over depth, or a list of filters with such values")  # fmt: skip


def _sort(entries: Sequence[Any], names: Sequence[str], label: str) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Give every name to the first entry that fits it."""
    left = list(names)
    sorted_out = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not set(entry) <= {"filter", "value"}:
            raise MergeError(f"{label}: expected entries such as {{filter: mlp, value: …}}, found {entry!r}")
        rest = entry.get("filter") in (None, "*")
        if rest != (place == len(entries) - 1):
            raise MergeError(f"{label}: expected exactly the last entry without a filter, for the rest; "
                             f"found {dict(entry)} as number {place + 1} of {len(entries)}")  # fmt: skip
        own = left if rest else [name for name in left if _fits(str(entry["filter"]), name)]
        if not own and not rest:
            some = ", ".join(list(names)[:4])
            raise MergeError(f"{label}: filter {entry['filter']!r} fits no tensor that is left for it, of {some} …; "
                             "expected part of a name, or a pattern for all of it")  # fmt: skip
        if own:
            sorted_out.append((entry, own))
        taken = set(own)
        left = [name for name in left if name not in taken]
    return sorted_out


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) if any(sign in pattern for sign in "*?[") else pattern in name


def _shares(anchors: int, names: Sequence[str], label: str) -> dict[str, list[float]]:
    """Share of each of some values over depth in that of every tensor; the first has tensors outside of the blocks."""
    found = depths(names)
    if names and all(depth is None for depth in found.values()):
        raise MergeError(f"{label}: no name has a block number, as in h.3.weight, so there is no depth: "
                         f"{', '.join(sorted(names)[:4])} …; use filters")  # fmt: skip
    shares = {}
    for name in names:
        place = (found[name] or 0.0) * (anchors - 1)
        shares[name] = [max(0.0, 1 - abs(place - anchor)) for anchor in range(anchors)]
    return shares


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else [value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any, label: str) -> float:  # noqa: ANN401 - from a config
    if not _is_number(value) or not math.isfinite(value):
        raise MergeError(f"{label}: expected finite numbers, found {value!r}")
    return float(value)


def spread(values: Tensor, tasks: int, tensors: int) -> Tensor:
    """Return coefficients of any of three shapes as one per task and tensor.

    Args:
        values: One number ``()``, one per task ``(T,)``, or one per task and tensor ``(T, L)``.
        tasks: T.
        tensors: L.

    Returns:
        ``(T, L)``, a view.

    Raises:
        MergeError: The shape is none of these.

    >>> spread(torch.tensor([0.25, 0.5]), 2, 3).tolist()
    [[0.25, 0.25, 0.25], [0.5, 0.5, 0.5]]
    """
    if values.ndim == 0:
        values = values.expand(tasks, tensors)
    elif values.shape == (tasks,):
        values = values.unsqueeze(1).expand(tasks, tensors)
    if values.shape != (tasks, tensors):
        raise MergeError(
            f"coefficients: expected a number, ({tasks},) or ({tasks}, {tensors}), found {tuple(values.shape)}"
        )
    return values
