"""Did you mean …? Suggestions for names that a config or command line got wrong."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_merge.finetune import SupervisedModule
from lit_merge.module import MergeModule
from lit_merge.objectives import Objective
from lit_merge.suites import Suite
from lit_merge.transforms import Transform

__all__ = ("hint", "memory_hint", "shortened")

_FAMILIES = (
    MergeModule,
    SupervisedModule,
    Objective,
    Transform,
    Suite,
    Callback,
    Logger,
    L.LightningDataModule,
    Optimizer,
    LRScheduler,
)
_OF_KEY: dict[str, type] = {"method": MergeModule, "model": MergeModule, "objective": Objective, "suite": Suite}
_TOP = {"trainer", "model", "suite", "data", "config", "seed_everything", "ckpt_path", "init_args", "class_path"}
_CLASS = re.compile(r"(?:import path string|Not a valid subclass name|class_path)[^:\n]*:[ ]*['\"]?([\w.]+)")
_OPTION = re.compile(r"(?:Option|option|arguments?:) '?(?:--)?([\w.]+?)'?(?: is not accepted|$|=|\s)")
_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
_UNKNOWN = re.compile(r"unknown (\w+) '(\w+)'(?:; .+)?")
_LITERAL = re.compile(r"Literal\[(.*)\]\. Got value: (\w+)")

_ONE_OF_UNION = re.compile(r"Expected a (?:typing\.)?Literal\[([^\]]*)\](?:.*\n)+?\s*Given value: (\w+)")
_NO_CLASS = re.compile(r'Parser key "(\w+)":\s+- Expected a path but (\w+) either not accessible')


def shortened(message: str) -> str:
    r"""Return one line instead of the parser's list of all that a class's bare name is not; other messages unchanged.

    >>> shortened('Parser key "method":\n\n  - Expected a path but ties either not accessible or …')
    "unknown method 'ties'"
    """
    if (inner := _UNKNOWN.search(message)) is not None:  # said before of an argument of the class that this is about
        return inner[0]
    found = _NO_CLASS.match(message)
    return message if found is None else f"unknown {found[1]} {found[2]!r}"


def hint(message: str) -> str:
    r"""Return a suggestion for an error message of the parser, or nothing if there is none or the message has one.

    >>> from lit_merge.methods import AdaMerging
    >>> hint("Expected a dot import path string: AdaMergin")
    '\n  did you mean AdaMerging?'
    >>> hint("Option 'granularty' is not accepted")
    '\n  did you mean granularity?'
    >>> hint("unknown method 'adamerging'")
    '; did you mean AdaMerging?'
    >>> hint("argument subcommand: invalid choice: 'tets' (choose from 'fit', 'test')")
    '\n  did you mean test?'
    """
    if "did you mean" in message or "; there are " in message:
        return ""
    if "required: " in message and message.endswith(".model"):
        return "\n  give a config that names one, such as --config adamerging.yaml, or --model AdaMerging"
    between = "; " if _UNKNOWN.fullmatch(message) else "\n  "
    for wrong, candidates in _mistakes(message):
        plain = {candidate.lower(): candidate for candidate in candidates}
        if wrong not in candidates and (close := get_close_matches(wrong.lower(), plain, n=1, cutoff=0.65)):
            return f"{between}did you mean {plain[close[0]]}?"
    if (unknown := _UNKNOWN.fullmatch(message)) and (family := _OF_KEY.get(unknown[1])):
        usable = sorted({kind.__name__ for kind in _subclasses(family) if not inspect.isabstract(kind)})
        return f"; there are {', '.join(usable)}"
    return ""


def memory_hint() -> str:
    """Return what to do when a device's memory is not enough."""
    return (
        "to adapt in less memory: --model.max_images auto (and a lower --model.activation_budget) for what grows with "
        "the images, --model.storage_dtype bfloat16 or --model.storage host for what grows with the experts, "
        "--trainer.precision bf16-mixed for both"
    )


def _mistakes(message: str) -> Iterator[tuple[str, Collection[str]]]:
    """Names that may be wrong, each with those that would be right."""
    for _, wrong in _UNKNOWN.findall(message):
        yield wrong, class_names()
    for path in _CLASS.findall(message):
        yield path.rpartition(".")[2], class_names()
    for path in _OPTION.findall(message):
        first, *rest = path.split(".")
        yield first, _TOP
        for part in rest or [first]:
            yield part, argument_names()
    for wrong, choices in _CHOICE.findall(message):
        yield wrong, re.findall(r"\w+", choices)
    for choices, wrong in _LITERAL.findall(message) + _ONE_OF_UNION.findall(message):
        yield wrong, re.findall(r"\w+", choices)


def class_names() -> list[str]:
    """Names of all classes that a config may name, sorted."""
    return sorted({kind.__name__ for family in _FAMILIES for kind in _subclasses(family)})


def argument_names() -> list[str]:
    """Names of the arguments of all these classes and of the Trainer, sorted."""
    classes: Iterable[type] = (L.Trainer, *(kind for family in _FAMILIES for kind in (family, *_subclasses(family))))
    names = set(_TOP)
    for kind in classes:
        names.update(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    return sorted(names - {"self", "args", "kwargs"})


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_"):
            yield child
        yield from _subclasses(child)
