"""Did you mean …? Suggestions for names that a config or command line got wrong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lit_merge.module import MergeModule
from lit_merge.objectives import Objective
from lit_merge.suites import Suite
from lit_merge.transforms import Transform

__all__ = ("hint",)

_FAMILIES = (MergeModule, Objective, Transform, Suite, Callback, Logger, L.LightningDataModule)
_CLASS = re.compile(r"(?:import path string|Not a valid subclass name|class_path)[^:\n]*:\s*['\"]?([\w.]+)")
_OPTION = re.compile(r"(?:Option|option|arguments?:) '?(?:--)?([\w.]+?)'?(?: is not accepted|$|=|\s)")


def hint(message: str) -> str:
    """Return a suggestion for an error message of the parser, or nothing.

    >>> hint("Expected a dot import path string: AdaMergin")
    "\\n  did you mean AdaMerging?"
    >>> hint("Option 'granularty' is not accepted")
    "\\n  did you mean granularity?"
    """
    for pattern, candidates in ((_CLASS, class_names()), (_OPTION, argument_names())):
        for wrong in pattern.findall(message):
            name = wrong.rpartition(".")[2]
            if name not in candidates and (close := get_close_matches(name, candidates, n=1, cutoff=0.75)):
                return f"\n  did you mean {close[0]}?"
    return ""


def class_names() -> list[str]:
    """Names of all classes that a config may name, sorted."""
    return sorted({kind.__name__ for family in _FAMILIES for kind in _subclasses(family)})


def argument_names() -> list[str]:
    """Names of the arguments of all these classes and of the Trainer, sorted."""
    classes: Iterable[type] = (L.Trainer, *(kind for family in _FAMILIES for kind in (family, *_subclasses(family))))
    names = {"trainer", "model", "suite", "data", "config", "seed_everything", "ckpt_path", "init_args", "class_path"}
    for kind in classes:
        names.update(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    return sorted(names - {"self", "args", "kwargs"})


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        if not child.__name__.startswith("_"):
            yield child
        yield from _subclasses(child)
