"""Whole modules out of pickles without running them: every class of the file becomes an inert stand-in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lit_merge.checkpoints.torch_files import load_inert, plain_tensor, unsafe_globals
from lit_merge.errors import MergeError

__all__ = ("StandIn", "flat_state", "read_tree", "walk")

# what an image encoder or a head of the task-vectors code base, saved whole, is made of; everything else is refused
_ALLOWED = re.compile(r"((src\.)?modeling|open_clip|torch\.nn\.modules|torchvision\.transforms)(\.[A-Za-z_]\w*)+")
_MOST_MODULES = 20_000  # the largest public image encoder has about a thousand
_DEEPEST = 64


class StandIn:
    """What is built in place of a class or function of a file: it keeps what it is given and does nothing.

    Attributes:
        name: Qualified name in the file, such as ``open_clip.model.QuickGELU``.
        state: What the file says about this object.
    """

    name: str = ""
    state: Any

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make an empty one, whatever the arguments."""
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Keep what the original would have been restored from."""
        self.state = state

    def attribute(self, name: str) -> Any:  # noqa: ANN401
        """Return what the file says about one attribute; ``None`` if nothing."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def table(self, name: str) -> dict[Any, Any]:
        """Return ``_parameters``, ``_buffers`` or ``_modules`` of a module; empty if it has none."""
        found = self.attribute(name)
        return dict(dict.items(found)) if isinstance(found, dict) else {}


def read_tree(path: Path) -> tuple[StandIn, list[str]]:
    """Read a whole module as a tree of stand-ins.

    Args:
        path: A file of ``torch.save`` in the zip format.

    Returns:
        The root, and the names of all classes and functions in the file.

    Raises:
        MergeError: The file names a class that image encoders and heads are not made of, is damaged, or is not a
            module.
    """
    names = unsafe_globals(path)
    if foreign := [name for name in names if not _ALLOWED.fullmatch(name)]:
        raise MergeError(
            f"{path}: it names {', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}, which could run code and "
            "is no part of an image encoder or head as torch.save(module) writes them; it was not opened. If you "
            "trust its author, save the state_dict() of the module in a sandbox without a network, and use that"
        )
    root = load_inert(path, {name: type("StandIn", (StandIn,), {"name": name}) for name in names})
    if not isinstance(root, StandIn):
        raise MergeError(f"{path}: expected a module, found {type(root).__name__}; save its state_dict()")
    return root, names


def walk(root: StandIn, where: Path) -> Iterator[tuple[str, StandIn]]:
    """Go through all modules with their paths, as ``nn.Module.named_modules`` does; the root has the empty path.

    Args:
        root: The root.
        where: The file, for messages.

    Raises:
        MergeError: Something else than a module stands among the modules, or they contain themselves.
    """
    todo = [("", root)]
    for _ in range(_MOST_MODULES):
        if not todo:
            return
        path, module = todo.pop()
        yield path, module
        for name, child in reversed(module.table("_modules").items()):
            if child is None:
                continue
            _check_name(where, path, name)
            if not isinstance(child, StandIn):
                raise MergeError(f"{where}: {path}: {name}: expected a module, found {type(child).__name__}")
            if path.count(".") > _DEEPEST:
                raise MergeError(f"{where}: {path[:40]}…: modules inside of modules without end; expected a tree")
            todo.append((f"{path}.{name}" if path else name, child))
    raise MergeError(f"{where}: more than {_MOST_MODULES} modules; expected a tree of a few hundred")


def flat_state(root: StandIn, where: Path) -> dict[str, Tensor]:
    """Return what ``state_dict()`` of the module would return: parameters and persistent buffers by name.

    Args:
        root: The root.
        where: The file, for messages.

    Raises:
        MergeError: Something is not a plain tensor, or the modules are not a tree.
    """
    state: dict[str, Tensor] = {}
    for path, module in walk(root, where):
        unsaved = module.attribute("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else ()
        buffers = [(name, value) for name, value in module.table("_buffers").items() if name not in unsaved]
        for name, value in [*module.table("_parameters").items(), *buffers]:
            if value is None:
                continue
            _check_name(where, path, name)
            key = f"{path}.{name}" if path else name
            if key in state:
                raise MergeError(f"{where}: {key} stands twice; expected every name once")
            state[key] = plain_tensor(where, key, value)
    return state


def _check_name(where: Path, path: str, name: object) -> None:
    if not isinstance(name, str) or "." in name:
        raise MergeError(f"{where}: {path}: expected names without dots, found {name!r}")
