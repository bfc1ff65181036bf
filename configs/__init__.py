"""The configs that come with lit-merge, found by bare name from any folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ("find", "names")


def find(name: str) -> Path | None:
    r"""Return the path of a bundled config, or ``None``.

    Args:
        name: Its name, with or without ``.yaml``; overlays have a folder, as in ``suites/NAME.yaml``.

    >>> find("adamerging").name
    'adamerging.yaml'
    >>> find("nothing") is None
    True
    >>> find("model:\n  class_path: Ties\n" * 100) is None  # a config, not its name
    True
    """
    if "\n" in name:
        return None
    root = resources.files(__name__)
    for candidate in (name, f"{name}.yaml"):
        if candidate.endswith(".yaml") and (path := root.joinpath(candidate)).is_file():
            return Path(str(path))
    return None


def names() -> list[str]:
    """Return the names of all bundled configs, sorted."""
    root = Path(str(resources.files(__name__)))
    return sorted(str(path.relative_to(root).as_posix()) for path in root.rglob("*.yaml"))
