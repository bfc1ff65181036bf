from __future__ import annotations

from typing import Any, ClassVar

import torch
from testers import MergeTester
from toys import ToySuite

from lit_merge import Dare, TaskArithmetic, transforms


class TestDare(MergeTester):
    make = Dare
    permutable = False  # the tasks draw from one generator, one after the other
    unit: ClassVar[dict[str, Any] | None] = {"drop": 0.0, "scale": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def test_is_task_arithmetic_after_the_transform(self) -> None:
        suite = ToySuite("cnn")
        composed = TaskArithmetic(suite=suite, transforms=[transforms.Dare(0.5, seed=3)])
        composed.configure_model()
        ours, theirs = self.state(suite, mask_seed=3), composed.merged_state()
        assert all(torch.allclose(ours[name].double(), theirs[name].double()) for name in ours)

    def test_seed_changes_the_mask(self) -> None:
        first, second = self.state(mask_seed=0), self.state(mask_seed=1)
        assert any(not torch.equal(first[name], second[name]) for name in first)
