"""The errors that lit-merge raises on bad input."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ("ChangedExpertError", "MergeError", "MissingExtraError", "require")


class MergeError(ValueError):
    """Bad input: names the file or key, what was expected, what was found and what to do."""


class ChangedExpertError(MergeError):
    """An expert is not the one that was read before under its name, as a checkpoint knows by its hash."""


class MissingExtraError(ImportError):
    """An optional package is needed; the message says which extra brings it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Dotted name of the module.
        extra: The extra of lit-merge that brings it.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module is not installed.

    >>> require("json", "demo").dumps([1])
    '[1]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there and broken: its own message is the right one
        raise MissingExtraError(f'{module} is not installed; pip install "lit-merge[{extra}]" brings it') from error
