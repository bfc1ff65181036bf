"""Streams of experts that are killed, and what they should have come to."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import lightning as L
import torch
from kills import Kill, in_child
from toys import Kind, ToySuite

from lit_merge import DAM, AdaMerging, Doge, MergeModule, MergeTrainer, SimpleAverage, TaskDataModule
from lit_merge.callbacks import (
    CoefficientMonitor,
    CollapseMonitor,
    ExportMerge,
    Report,
    ResumePoint,
    SequentialMerging,
    sequential_merging,
)
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.reading import read_state
from lit_merge.objectives import Entropy, ExpertAlignment, WeightedSum
from lit_merge.transforms import Ties

STEPS = 3
Method = Literal["average", "ada", "ada++", "dam", "doge"]
Moment = Literal[
    "start", "end", "epoch_end", "before_save", "in_save", "after_save",
    "open", "before_file", "in_file", "after_file", "score",
]  # fmt: skip
Adam = partial(torch.optim.Adam, lr=0.05)
Step = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)


@dataclass(frozen=True)
class Case:
    """What is merged, and how."""

    method: Method = "average"
    workers: int = 0
    kind: Kind = "cnn"
    every: int = 1
    epochs: int = 2
    data: Literal["current", "seen", "none"] = "current"
    ranks: int = 1

    def model(self) -> MergeModule:
        suite = ToySuite("vit" if self.method == "doge" else self.kind)
        if self.method == "average":
            return SimpleAverage(suite=suite)
        if self.method == "doge":
            return Doge(suite=suite, scheduler=Step)
        if self.method == "dam":
            return DAM(suite=suite, mask_steps=4, optimizer=Adam)
        objective = WeightedSum([Entropy(), ExpertAlignment("kl")], [0.5, 1.0])
        transforms = [Ties()] if self.method == "ada++" else None
        return AdaMerging(suite=suite, objective=objective, optimizer=Adam, scheduler=Step, transforms=transforms)

    def callback(self, **options: Any) -> SequentialMerging:
        given = {"order": "shuffle", "seed": 3, "data": self.data, "evaluate": "all"}
        return SequentialMerging(0 if self.method == "average" else self.epochs, **{**given, **options})

    def trainer(self, root: Path, *callbacks: L.Callback, **options: Any) -> MergeTrainer:
        ranks = {"devices": self.ranks, "strategy": "ddp_fork"} if self.ranks > 1 else {}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return MergeTrainer(
            default_root_dir=root, accelerator="cpu", callbacks=list(callbacks),
            limit_val_batches=0, **{**quiet, **ranks, **options},
        )  # fmt: skip

    def run(self, root: Path, kill: L.Callback | None = None) -> None:
        """One run of the same command."""
        monitors = [Report(), CoefficientMonitor(), CollapseMonitor(2), ResumePoint(self.every)]
        trainer = self.trainer(root, *monitors, ExportMerge(), self.callback(), *([kill] if kill else []))
        model = self.model()
        data = TaskDataModule(model.suite, batch_size=4, steps_per_epoch=STEPS, seed=1, num_workers=self.workers)
        trainer.fit(model, datamodule=data, ckpt_path="last")
        data.num_workers = 0
        if self.ranks == 1:
            trainer.test(model, datamodule=data, verbose=False)
            return
        alone = Case(self.method, kind=self.kind)  # the state of other processes does not come back
        engine = alone.trainer(root, Report(), alone.callback())
        engine.test(alone.model(), datamodule=data, ckpt_path=str(root / "last.ckpt"), verbose=False)


class StreamKill(Kill):
    """Kills its own process at the n-th moment of a kind, also while a stage's file is being written."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        super().setup(trainer, pl_module, stage)
        here: Any = sequential_merging
        write, score, module = here.write_stage, here.count_hits, pl_module
        save_file = here.write_stage.__globals__["save_file"]

        def torn(plain: Any, path: Path, **options: Any) -> None:
            save_file(plain, path, **options)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        def written(*args: Any) -> Any:
            self._now("before_file")  # type: ignore[arg-type]
            if self.when == "in_file":  # type: ignore[comparison-overlap]
                self.left -= 1
                if self.left == 0:
                    write.__globals__["save_file"] = torn
            found = write(*args)
            self._now("after_file")  # type: ignore[arg-type]
            return found

        def scored(*args: Any) -> Any:
            self._now("score")  # type: ignore[arg-type]
            return score(*args)

        opened = pl_module.open_stage

        def watched(*args: Any, **options: Any) -> None:
            opened(*args, **options)  # type: ignore[operator]
            self._now("open")  # type: ignore[arg-type]

        here.write_stage, here.count_hits = written, scored
        module.open_stage = watched  # type: ignore[assignment]


def final(root: Path) -> dict[str, Any]:
    """Everything that a run leaves, without times."""
    report = json.loads((root / "report.json").read_text())
    continual = report["extra"]["continual"]
    for stage in continual["stages"]:
        del stage["seconds"]
    files = [*root.glob("stage_*"), root / "continual-matrix.csv"]
    return {
        "export": state_digest(read_state(root / "export" / "merged.safetensors")),  # its header may come in any order
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)},
        "report": {key: report[key] for key in ("tasks", "mean")} | {"continual": continual},
        "hidden": sorted(path.name for path in root.glob(".stage*")),
    }


@cache
def uninterrupted(case: Case) -> dict[str, Any]:
    root = Path(mkdtemp())
    case.run(root)  # in this process: it warms up what the forks inherit
    return final(root)


def killed(case: Case, root: Path, kill: Callable[[], L.Callback]) -> bool:
    """Run in a fork until the kill; whether it came to that."""
    status = in_child(lambda: case.run(root, kill()))
    assert status in (0, -signal.SIGKILL), (case, status)
    return status != 0


def check(case: Case, root: Path) -> None:
    """Run to the end and compare every bit."""
    assert in_child(lambda: case.run(root)) == 0
    assert final(root) == uninterrupted(case)
