"""MagMax, Breadcrumbs, Della, Sce, Pcb: the methods; the rules are tested in tests/functional."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from testers import MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, TaskArithmetic, Ties
from lit_merge.functional.sce import sce_merge
from lit_merge.methods.breadcrumbs import Breadcrumbs
from lit_merge.methods.della import Della
from lit_merge.methods.magmax import MagMax
from lit_merge.methods.pcb import Pcb
from lit_merge.methods.sce import Sce
from lit_merge.transforms import Transform
from lit_merge.transforms.breadcrumbs import Breadcrumbs as BreadcrumbsTransform
from lit_merge.transforms.magprune import MagPrune


class TestMagMax(MergeTester):
    make = MagMax
    unit: ClassVar[dict[str, Any] | None] = {"scale": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.5 * deltas.gather(0, deltas.abs().argmax(0, keepdim=True))[0]


class TestBreadcrumbs(MergeTester):
    make = Breadcrumbs
    unit: ClassVar[dict[str, Any] | None] = {"bottom": 0.0, "top": 0.0, "scale": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    @pytest.mark.parametrize("per", ["tensor", "network"])
    def test_is_task_arithmetic_after_the_transform(self, per: Any) -> None:
        suite = ToySuite("cnn")
        composed = TaskArithmetic(suite=suite, transforms=[BreadcrumbsTransform(0.6, 0.1, per)])
        composed.configure_model()
        ours, theirs = self.state(suite, bottom=0.6, top=0.1, per=per), composed.merged_state()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


class TestDella(MergeTester):
    make = Della
    permutable = False  # the tasks draw from one generator, one after the other
    unit: ClassVar[dict[str, Any] | None] = {"drop": 0.0, "window": 0.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def test_is_ties_without_trimming_or_a_sum_after_the_transform(self) -> None:
        suite, drop = ToySuite("cnn"), MagPrune(0.6, 0.2, seed=3)
        for reduce, other in (("elect", Ties(density=1.0, suite=suite, transforms=[drop])),
                              ("sum", TaskArithmetic(1.0, suite=suite, transforms=[drop]))):  # fmt: skip
            other.configure_model()
            ours = self.state(suite, drop=0.6, window=0.2, mask_seed=3, reduce=reduce)
            theirs = other.merged_state()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name])
        with pytest.raises(MergeError, match=r"Della\.reduce: expected elect or sum, found 'mean'"):
            Della(suite=suite, reduce="mean")  # type: ignore[arg-type]


class TestSce(MergeTester):
    make = Sce
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + sce_merge({"w": deltas}, 0.1)["w"]


class TestPcb(MergeTester):
    make = Pcb
    unit: ClassVar[dict[str, Any] | None] = {"density": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    @pytest.mark.parametrize("formula", ["paper", "released"])
    def test_all_tensors_compete(self, formula: Any) -> None:
        suite = ToySuite("vit")
        base = suite.base()
        for per, survives in (("network", False), ("tensor", True)):  # one that changed little loses against the others
            merged = self.state(suite, formula=formula, per=per, transforms=[Quiet("proj")])
            assert bool((merged["proj"] != base["proj"]).any()) is survives
            assert (merged["conv1.weight"] != base["conv1.weight"]).any()


class Quiet(Transform):
    """One tensor changes little."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, deltas: Any) -> Any:
        return {name: 1e-3 * delta if name == self.name else delta for name, delta in deltas.items()}


del MergeTester  # pytest would collect it
