from __future__ import annotations

from typing import ClassVar

from testers import MergeTester
from torch import Tensor

from lit_merge import SimpleAverage


class TestSimpleAverage(MergeTester):
    make = SimpleAverage
    unit: ClassVar = {}

    @staticmethod
    def reference(base: Tensor, deltas: Tensor) -> Tensor:
        return base + deltas.mean(0)
