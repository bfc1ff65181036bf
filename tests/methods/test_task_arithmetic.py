from __future__ import annotations

from typing import Any, ClassVar

from testers import MergeTester
from torch import Tensor

from lit_merge import TaskArithmetic


class TestTaskArithmetic(MergeTester):
    make = TaskArithmetic
    unit: ClassVar[dict[str, Any] | None] = {"scale": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.3 * deltas.sum(0)
