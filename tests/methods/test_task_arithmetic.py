from __future__ import annotations

from typing import ClassVar

from testers import MergeTester
from torch import Tensor

from lit_merge import TaskArithmetic


class TestTaskArithmetic(MergeTester):
    make = TaskArithmetic
    unit: ClassVar = {"scale": 1.0}
    zero: ClassVar = {"scale": 0.0}

    @staticmethod
    def reference(base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.3 * deltas.sum(0)
