"""From one library's names of CLIP's tensors to another's, by the tables of :mod:`lit_merge.checkpoints.clip_keys`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.clip_keys import (
    LAYOUTS,
    MARKERS,
    TABLES,
    KeyTable,
    Leftover,
    Rename,
    Row,
    Thirds,
    Transposed,
    Under,
)
from lit_merge.checkpoints.lazy import Selected
from lit_merge.errors import MergeError

__all__ = ("PROJECTION", "ConvertedState", "convert_layout", "detect_layout")

PROJECTION = "visual_projection.weight"
"""Name of the image tower's projection ``(D_out, D_in)`` in Hugging Face's layouts."""

_WITHOUT_PROJECTION = ("hugging_face", "hugging_face_5")


class _Recipe(NamedTuple):
    """Which tensors of the source make one of the target, and how."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[Tensor]], Tensor]


class ConvertedState(Mapping[str, Tensor]):
    """A state dict under other names; a tensor is read, and made, when it is asked for.

    Args:
        source: The state dict, which may itself be lazy.
        recipes: For each new name which tensors it is made of, and how.
    """

    def __init__(self, source: Mapping[str, Tensor], recipes: Mapping[str, _Recipe]) -> None:
        self._source = source
        self._recipes = dict(recipes)

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        return recipe.make([self._source[source] for source in recipe.sources])

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)


def detect_layout(keys: Iterable[str], where: str = "state dict") -> str:
    """Tell the layout of a state dict from the names of its tensors.

    Args:
        keys: The names.
        where: What it is, for the message.

    Returns:
        One of :data:`~lit_merge.checkpoints.clip_keys.LAYOUTS`.

    Raises:
        MergeError: It is none of them.

    >>> detect_layout(["visual.proj", "visual.class_embedding"])
    'open_clip'
    >>> detect_layout(["visual.proj", "token_embedding.weight", "logit_scale"])
    'open_clip_full'
    """
    keys = tuple(keys)
    for layout, beginnings in MARKERS:
        if all(any(key.startswith(beginning) for key in keys) for beginning in beginnings):
            return layout
    found = ", ".join(sorted(keys)[:3]) or "no tensor"
    raise MergeError(
        f"{where}: expected the tensors of a CLIP image tower in one of the layouts {', '.join(LAYOUTS)}; found {found}"
    )


def convert_layout(
    state: Mapping[str, Tensor],
    target: str,
    *,
    source: str | None = None,
    projection: Tensor | None = None,
    drop_projection: bool = False,
    where: str = "state dict",
) -> Mapping[str, Tensor]:
    """Give the tensors of a CLIP the names, shapes and stacking of another library, bit for bit.

    A tensor is read from ``state`` when one that is made of it is asked for, and nothing is kept. What a full CLIP
    has beyond the image tower is left out if ``target`` is a layout of image towers, and so are the integer constants
    that old files hold. Between layouts that differ by a prefix only, every architecture converts; between Hugging
    Face and open_clip those of CLIP's vision transformers.

    Args:
        state: Tensors by name; nothing is changed.
        target: Layout to convert to, see :mod:`~lit_merge.checkpoints.clip_keys`.
        source: Layout of ``state``; by default told from its names.
        projection: The projection ``(D_out, D_in)`` where ``state`` is a Hugging Face tower without one, and
            ``target`` has one. It is ``visual_projection.weight`` of the full CLIP that the tower comes from.
        drop_projection: Whether a Hugging Face tower is to have no ``visual_projection.weight``.
        where: What ``state`` is, for messages.

    Returns:
        Tensors by their new names, read when they are asked for, in the order of open_clip's modules.

    Raises:
        MergeError: An unknown layout, one that cannot be made from the other, unknown, missing or extra names, or a
            projection that is missing or too much. When a tensor is read: a shape that cannot be split or stacked.

    >>> tower = {"visual.proj": torch.ones(4, 2)}
    >>> list(convert_layout(tower, "task_vectors"))
    ['model.visual.proj']
    """
    for layout in (target, *([source] if source else [])):
        if layout not in LAYOUTS:
            raise MergeError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    source = source or detect_layout(state, where)
    if drop_projection and target not in _WITHOUT_PROJECTION:
        raise MergeError(
            f"{where}: drop_projection: the layout {target} has its projection as a part; only "
            f"{' and '.join(_WITHOUT_PROJECTION)} can be without"
        )
    state = _with_projection(Selected(state, _kept(state, source)), source, target, projection, where)
    for table, forward in _path(source, target, where):
        state = ConvertedState(state, _plan(table, forward, state, where))
    return Selected(state, [name for name in state if name != PROJECTION]) if drop_projection else state


def _with_projection(
    state: Mapping[str, Tensor], source: str, target: str, projection: Tensor | None, where: str
) -> Mapping[str, Tensor]:
    """Add the projection to a tower that has none."""
    if projection is not None:
        if source not in _WITHOUT_PROJECTION or PROJECTION in state:
            raise MergeError(f"{where}: it has a projection of its own; leave out projection=")
        if projection.ndim != 2:
            raise MergeError(f"{where}: projection: expected a matrix (D_out, D_in), found {tuple(projection.shape)}")
        recipes = {name: _Recipe((name,), _same) for name in state}
        return ConvertedState(state, recipes | {PROJECTION: _Recipe((), partial(_given, projection))})
    if source in _WITHOUT_PROJECTION and target not in _WITHOUT_PROJECTION and PROJECTION not in state:
        raise MergeError(
            f"{where}: the layout {target} has a projection, and a Hugging Face vision model has none; give "
            f"projection= the {PROJECTION} of the full CLIP it was fine-tuned from"
        )
    return state


def _kept(keys: Iterable[str], layout: str) -> list[str]:
    """All names but the constants that a layout may hold and nobody needs."""
    spare = [
        row.name
        for table in TABLES
        if not table.one_way
        for row in table.rows
        if isinstance(row, Leftover) and getattr(table, row.side) == layout
    ]
    return [key for key in keys if not _is_leftover(key, spare)]


def _is_leftover(key: str, names: Collection[str]) -> bool:
    return any(key.startswith(name) if name.endswith(".") else key == name for name in names)


def _path(source: str, target: str, where: str) -> list[tuple[KeyTable, bool]]:
    """The shortest way from one layout to another, as tables and directions."""
    ways: dict[str, list[tuple[KeyTable, bool]]] = {source: []}
    todo = [source]
    while todo and target not in ways:
        here = todo.pop(0)
        for table in TABLES:
            for start, end, forward in ((table.left, table.right, True), (table.right, table.left, False)):
                if start == here and end not in ways and (forward or not table.one_way):
                    ways[end] = [*ways[here], (table, forward)]
                    todo.append(end)
    if target not in ways:
        raise MergeError(
            f"{where}: an image tower ({source}) cannot become a full CLIP ({target}): it has no text tower"
        )
    return ways[target]


def _plan(table: KeyTable, forward: bool, keys: Collection[str], where: str) -> dict[str, _Recipe]:
    """Work out the new names and check the old ones."""
    source, target = (table.left, table.right) if forward else (table.right, table.left)
    side = "left" if forward else "right"
    spare = [row.name for row in table.rows if isinstance(row, Leftover) and row.side == side]
    left = [key for key in keys if not _is_leftover(key, spare)]
    recipes: dict[str, _Recipe] = {}
    for mark, rows in groupby(table.rows, key=_mark):
        for row in list(rows) if mark is None else _blocks(list(rows), mark, forward, left):
            if isinstance(row, Under):
                recipes |= _under(row, forward, left, recipes)
            elif not isinstance(row, Leftover):
                recipes |= _recipes(row, forward, left)
    check_keys(
        where,
        left,
        {name for recipe in recipes.values() for name in recipe.sources},
        of=f"layout {source}",
        advice=f"only a complete CLIP converts to the layout {target}; other architectures need the other library",
    )
    return recipes


def _mark(row: Row) -> str | None:
    """The placeholder of a row."""
    text = "" if isinstance(row, Leftover) else str(row.left)
    return next((mark for mark in ("{v}", "{t}") if mark in text), None)


def _blocks(rows: list[Row], mark: str, forward: bool, keys: Collection[str]) -> Iterator[Row]:
    """The rows of every block, one block after the other."""
    first = rows[0]
    assert isinstance(first, Rename)  # a block begins with its first normalisation
    pattern = first.left if forward else first.right
    stack = re.compile(re.escape(pattern.partition(mark)[0]) + r"([0-9]{1,6})\.")
    numbers = {int(found[1]) for key in keys if (found := stack.match(key))}
    depth = max(numbers, default=0) + 1
    if depth > len(keys):  # a made-up number must not cost memory
        depth = len(numbers)
    return (_filled(row, mark, str(block)) for block in range(depth) for row in rows)


def _filled(row: Row, mark: str, block: str) -> Row:
    match row:
        case Rename() | Transposed():
            return row._replace(left=row.left.replace(mark, block), right=row.right.replace(mark, block))
        case Thirds((q, k, v), right):
            parts = (q.replace(mark, block), k.replace(mark, block), v.replace(mark, block))
            return Thirds(parts, right.replace(mark, block))
    return row


def _names(row: Rename | Transposed | Thirds) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of both sides."""
    return (row.left, (row.right,)) if isinstance(row, Thirds) else ((row.left,), (row.right,))


def _under(row: Under, forward: bool, keys: Collection[str], known: Mapping[str, _Recipe]) -> dict[str, _Recipe]:
    """The recipes of everything under a prefix that has none yet."""
    old, new = (row.left, row.right) if forward else (row.right, row.left)
    done = {name for recipe in known.values() for name in recipe.sources}
    return {new + key[len(old) :]: _Recipe((key,), _same) for key in keys if key.startswith(old) and key not in done}


def _recipes(row: Rename | Transposed | Thirds, forward: bool, keys: Collection[str]) -> dict[str, _Recipe]:
    left, right = _names(row)
    sources, targets = (left, right) if forward else (right, left)
    if isinstance(row, Rename):
        return {} if row.optional and sources[0] not in keys else {targets[0]: _Recipe(sources, _same)}
    if isinstance(row, Transposed):
        return {targets[0]: _Recipe(sources, partial(_transposed, sources[0]))}
    if len(sources) == 3:
        return {targets[0]: _Recipe(sources, partial(_stacked, sources))}
    return {name: _Recipe(sources, partial(_third, sources[0], number)) for number, name in enumerate(targets)}


def _same(values: Sequence[Tensor]) -> Tensor:
    return values[0]


def _given(value: Tensor, values: Sequence[Tensor]) -> Tensor:
    return value


def _transposed(name: str, values: Sequence[Tensor]) -> Tensor:
    if values[0].ndim != 2:
        raise MergeError(f"{name}: expected a matrix, found shape {tuple(values[0].shape)}")
    return values[0].t().contiguous()


def _stacked(names: Sequence[str], values: Sequence[Tensor]) -> Tensor:
    if len({(value.shape, value.dtype) for value in values}) > 1 or values[0].ndim == 0:
        found = ", ".join(f"{n} {v.dtype} {tuple(v.shape)}" for n, v in zip(names, values, strict=True))
        raise MergeError(f"expected queries, keys and values of one shape and dtype, found {found}")
    return torch.cat(list(values))


def _third(name: str, number: int, values: Sequence[Tensor]) -> Tensor:
    """One third of the rows, as a copy: a view would keep all three in memory."""
    if values[0].ndim == 0 or len(values[0]) % 3:
        raise MergeError(f"{name}: expected stacked queries, keys and values (3D, ...), found {tuple(values[0].shape)}")
    rows = len(values[0]) // 3
    return values[0][number * rows : (number + 1) * rows].clone()
