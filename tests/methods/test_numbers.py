"""No method and no transform takes a number that would only make a network of NaN."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from math import inf, nan
from typing import Any

import pytest
from toys import ToySuite

from lit_merge import MergeError, methods, transforms

FINITE = ("float", "Coefficient", "TaskWeights")
UNBOUNDED = {("DAM", "epsilon"), ("AdaMerging", "bounds"), ("SingularAdaMerging", "bounds")}  # infinity means something


KINDS = [getattr(module, name) for module in (methods, transforms) for name in module.__all__]
SUITE = ToySuite("mlp")


def numbers(kind: Any) -> Iterator[str]:
    """Every argument that is made of floating numbers."""
    mine = [k for k in kind.__mro__ if k.__module__.startswith("lit_merge.") and "__init__" in vars(k)]
    found = {name: str(p.annotation) for k in mine for name, p in inspect.signature(k.__init__).parameters.items()}
    for argument, annotation in found.items():
        if any(word in annotation for word in FINITE) and "bfloat16" not in annotation:
            yield argument


@pytest.mark.parametrize("kind", [k for k in KINDS if inspect.isclass(k) and not inspect.isabstract(k)])
def test_numbers_are_finite(kind: Any) -> None:
    suite = {} if kind.__module__.startswith("lit_merge.transforms") else {"suite": SUITE}
    for argument, bad in product(numbers(kind), (nan, inf)):
        if bad == inf and (kind.__name__, argument) in UNBOUNDED:
            continue
        value = {"bounds": (0.0, bad), "weights": [1.0, bad, 1.0]}.get(argument, bad)
        with pytest.raises(MergeError, match=f"{argument.removeprefix('ascent_')}.*found"):
            kind(**{argument: value}, **suite)
