from __future__ import annotations

from typing import Any, ClassVar

from testers import MergeTester
from torch import Tensor

from lit_merge import SimpleAverage


class TestSimpleAverage(MergeTester):
    make = SimpleAverage
    unit: ClassVar[dict[str, Any] | None] = {}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + deltas.mean(0)
