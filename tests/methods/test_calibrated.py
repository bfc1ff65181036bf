"""FisherMerging, RegMean, RegMeanPlusPlus, Svc: the methods; the rules are tested in tests/functional."""

from __future__ import annotations

from typing import Any, ClassVar

from testers import MergeTester
from torch import Tensor

from lit_merge.functional.svc import svc
from lit_merge.methods.fisher_merging import FisherMerging
from lit_merge.methods.regmean import RegMean
from lit_merge.methods.regmean_plus_plus import RegMeanPlusPlus
from lit_merge.methods.svc import Svc


class TestFisherMerging(MergeTester):
    make = FisherMerging
    train = True
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"at_base": ["*"]}


class TestRegMean(MergeTester):
    make = RegMean
    train = True
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"at_base": ["*"]}


class TestRegMeanPlusPlus(MergeTester):
    make = RegMeanPlusPlus
    train = True
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"at_base": ["*"]}


class TestSvc(MergeTester):
    make = Svc
    unit: ClassVar[dict[str, Any] | None] = {"scale": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + svc({"w": 0.3 * deltas.sum(0)}, {"w": deltas})["w"]


del MergeTester  # pytest would collect it
