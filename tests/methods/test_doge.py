"""DOGE and WUDI in the harness; what they minimise is tested in ``tests/functional/test_layer_problem.py``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from testers import TINY, MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import AdaMerging, MergeTrainer, TaskDataModule
from lit_merge.methods.doge import Doge
from lit_merge.methods.wudi import Wudi
from lit_merge.transforms.doge import Doge as DogeTransform


class DataFreeTester(MergeTester):
    """What is learned is as large as a network."""

    def test_checkpoint_is_small_and_comes_back(self, tmp_path: Path) -> None:
        module: Any = type(self).make(suite=ToySuite("vit"))
        trainer = MergeTrainer(**TINY)
        trainer.fit(module, datamodule=TaskDataModule(module.suite, steps_per_epoch=3))
        trainer.save_checkpoint(tmp_path / "merge.ckpt")
        size = sum(4 * value.numel() for value in module.learned().values())
        assert (tmp_path / "merge.ckpt").stat().st_size < 3 * size + 32 * 1024  # values, and Adam's two moments
        again = type(module).load_from_checkpoint(tmp_path / "merge.ckpt", suite=ToySuite("vit"))
        first, second = module.merged_state(), again.merged_state()
        assert all(torch.equal(first[name], second[name]) for name in first)


class TestDoge(DataFreeTester):
    make = partial(Doge, layers="matrices", density=1.0)
    unit: ClassVar[dict[str, Any] | None] = {"scale": 1.0, "relative": True, "others": "sum"}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        if base.ndim != 2:
            return base
        return base + torch.stack([0.07 * delta / delta.norm() for delta in deltas]).sum(0)  # before the first step


class TestWudi(DataFreeTester):
    make = Wudi
    unit: ClassVar[dict[str, Any] | None] = {}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + (deltas.sum(0) if base.ndim == 2 else deltas.mean(0))  # before the first step


def test_doge_before_adamerging_learns_coefficients_of_the_modified_task_vectors() -> None:
    suite = ToySuite("vit")
    module = AdaMerging(suite=suite, transforms=[DogeTransform(steps=3, rate=0.01)])
    MergeTrainer(**TINY).fit(module, datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=2))
    moved = (module.coefficients.detach() != 0.3).all(0)
    for live, (name, delta) in zip(moved, module.bank.deltas.items(), strict=True):
        assert bool(live) == bool(delta.any()) == ("resblocks" in name and delta.ndim == 3)
    density = torch.cat([d.flatten(1) for d in module.bank.deltas.values() if d.any()], 1).count_nonzero(1)
    total = sum(d[0].numel() for d in module.bank.deltas.values() if d.any())
    assert density.tolist() == [round(0.3 * total)] * 3
