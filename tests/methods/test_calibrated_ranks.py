"""Two ranks, each with its share of the images, make the merge that one rank makes of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from ranks import close, trainer
from toys import ToySuite

from lit_merge import MergeModule, TaskDataModule
from lit_merge.calibrated_module import CalibratedModule
from lit_merge.methods import FisherMerging, RegMean, RegMeanPlusPlus


class Merges(L.Callback):
    """Writes what every method makes on this rank, and how many images this rank has read for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, MergeModule)
        found: dict[str, Any] = {"RegMean": pl_module.merged_state()}
        options: dict[str, Any] = {"suite": pl_module.suite, "image_batch": 4}
        for other in (RegMeanPlusPlus(**options), FisherMerging(target="sampled", **options)):
            other.configure_model()
            data = Reads(other)
            other.calibrate(None)
            found[type(other).__name__] = other.merged_state()
            found[f"{type(other).__name__} reads"] = data.count
        torch.save(found, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


class Reads:
    """Counts the images that a module reads."""

    def __init__(self, module: CalibratedModule) -> None:
        self.count, self.batches = 0, module.batches
        module.batches = self.counted  # type: ignore[method-assign]

    def counted(self, task: str) -> Any:
        for number, batch in self.batches(task):
            self.count += len(batch.images)
            yield number, batch


def test_two_ranks_are_one(tmp_path: Path) -> None:
    suite = ToySuite("vit", dtype="float64", train=True)
    for data in suite._data["test"].values():
        data.images = data.images.double()  # type: ignore[attr-defined]
    for ranks in (1, 2):
        engine = trainer(tmp_path, ranks, callbacks=[Merges(tmp_path)])
        engine.test(RegMean(suite=suite, image_batch=4), datamodule=TaskDataModule(suite), verbose=False)
    alone, *shared = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for rank in shared:
        for method in ("RegMean", "RegMeanPlusPlus", "FisherMerging"):
            for name, value in alone[method].items():
                close(rank[method][name], value)
    for method in ("RegMeanPlusPlus reads", "FisherMerging reads"):  # 11, 13 and 15 images in batches of four
        assert (alone[method], [rank[method] for rank in shared]) == (39, [23, 16])
