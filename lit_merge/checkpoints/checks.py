"""Do base and experts fit together? Every disagreement is one clear error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("Layout", "check_finite", "check_keys", "check_state", "check_tied", "common_layout", "shared_memory")

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How the names of a state dict are dealt with."""

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    constants: tuple[str, ...]
    tied: dict[str, str]


def common_layout(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    buffers: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> Layout:
    """Compare keys, shapes and dtypes of all experts with the base and sort the names.

    Integer and boolean tensors become constants: an expert may only differ from the base there if the tensor is a
    buffer or a counter (``num_batches_tracked``).

    Raises:
        MergeError: No expert, no tensor, or a disagreement.
    """
    if not experts:
        raise MergeError("experts: expected at least one, found none")
    if not base:
        raise MergeError("base: expected tensors, found an empty state dict")
    for name, value in base.items():
        _check_kind("base", name, value)
    for task, state in experts.items():
        where = f"expert {task!r}"
        check_keys(where, state, base)
        for name, value in base.items():
            _check_alike(where, name, state[name], value, free=name in buffers or name.endswith("num_batches_tracked"))
    aliases = shared_memory(base) if tied is None else dict(tied)
    own = [name for name in base if name not in aliases]
    return Layout(
        parameters=tuple(n for n in own if base[n].is_floating_point() and n not in buffers),
        buffers=tuple(n for n in own if base[n].is_floating_point() and n in buffers),
        constants=tuple(n for n in own if not base[n].is_floating_point()),
        tied=aliases,
    )


def check_keys(
    where: str,
    found: Iterable[str],
    expected: Iterable[str],
    of: str = "base",
    advice: str = "all experts must be fine-tuned from the same base network",
) -> None:
    """Refuse missing and extra names, naming the first few of each.

    Args:
        where: Whose names these are.
        found: The names.
        expected: What they should be.
        of: Whose names are expected.
        advice: What to do about it.

    Raises:
        MergeError: The names differ.
    """
    found, expected = set(found), set(expected)
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise MergeError(
            f"{where}: its tensors are not those of the {of}: {len(missing)} missing{_some(missing)}, "
            f"{len(extra)} extra{_some(extra)}; {advice}"
        )


def check_finite(where: str, name: str, value: Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        MergeError: There is one.
    """
    if value.is_floating_point() and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise MergeError(
            f"{where}: {name}: {bad} of {value.numel()} values are NaN or infinite; expected finite weights"
        )


def check_state(where: str, name: str, value: Tensor) -> None:
    """Check one tensor as it is read: a plain tensor of a usable dtype with finite values.

    Raises:
        MergeError: It is not.
    """
    _check_kind(where, name, value)
    check_finite(where, name, value)


def check_tied(where: str, state: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Refuse tied tensors that differ: one name would silently win.

    Raises:
        MergeError: They differ.
    """
    for alias, name in tied.items():
        if not torch.equal(state[alias], state[name]):
            raise MergeError(f"{where}: {alias} and {name} are tied in the base network but have different values")


def shared_memory(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Find names that are views of the same memory: ``{alias: first name}``.

    >>> w = torch.ones(2)
    >>> shared_memory({"embed": w, "norm": torch.ones(2), "head": w})
    {'head': 'embed'}
    """
    if not isinstance(state, dict):  # a lazy state gives other memory at every reading
        return dict(getattr(state, "tied", {}))
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for name, value in state.items():
        if value.numel() == 0 or value.device.type == "meta":
            continue
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def _check_kind(where: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise MergeError(f"{where}: {name}: expected a tensor, found {type(value).__name__}")
    if value.layout is not torch.strided or value.is_quantized or value.is_complex():
        raise MergeError(f"{where}: {name}: expected a dense real tensor, found {value.dtype} ({value.layout})")
    if value.is_floating_point() and value.dtype not in _FLOATS:
        raise MergeError(
            f"{where}: {name}: expected float64, float32, bfloat16 or float16, found {value.dtype}; cast it first"
        )


def _check_alike(where: str, name: str, value: object, base: Tensor, *, free: bool) -> None:
    _check_kind(where, name, value)
    assert isinstance(value, Tensor)
    if value.shape != base.shape:
        raise MergeError(f"{where}: {name}: expected shape {tuple(base.shape)}, found {tuple(value.shape)}")
    if value.dtype != base.dtype:
        raise MergeError(
            f"{where}: {name}: expected {base.dtype} as in the base, found {value.dtype}; cast one of them"
        )
    if not value.is_floating_point() and not free and not torch.equal(value.cpu(), base.cpu()):
        raise MergeError(
            f"{where}: {name}: integer tensors cannot be merged, and this one differs from the base; "
            "expected equal values"
        )


def _some(names: list[str], most: int = 3) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:most])}{', …' if len(names) > most else ''})"
