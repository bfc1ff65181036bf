"""The same run on one rank and on several."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from toys import ToyData, ToySuite

from lit_merge import AdaMerging, MergeModule, MergeTrainer, TaskDataModule
from lit_merge.callbacks import CoefficientMonitor, CollapseMonitor, ExportMerge, Report, ResumePoint
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, Objective, WeightedSum
from lit_merge.suites import NetworkSuite, Suite

ALL = WeightedSum([Entropy(), Diversity(), ExpertAlignment("kl"), ExpertAlignment("l1")], [1.0, 0.5, 1.0, 0.3])


def odd(single: bool = True) -> NetworkSuite:
    """Tasks of odd sizes, and one of a single image, in double precision."""
    toys = ToySuite("cnn", dtype="float64")  # so that nothing but a wrong weight can make a difference
    sizes = dict(zip(toys.tasks, (13, 1, 22) if single else (13, 9, 22), strict=True))
    data = {task: ToyData(size, toys.num_classes(task), seed=t) for t, (task, size) in enumerate(sizes.items())}
    for images in data.values():
        images.images = images.images.double()
    return NetworkSuite(
        network=toys.network(),
        experts={task: dict(toys.expert(task)) for task in toys.tasks},
        heads={task: toys.head(task) for task in toys.tasks},
        test=data,  # type: ignore[arg-type]
        name="odd",
    )


class Record(L.Callback):
    """Writes what each rank has seen; callbacks of other processes do not come back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gradients: list[Any] = []
        self.images: list[Any] = []
        self.validation: list[Any] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        gradient = pl_module.get_parameter("coefficients").grad
        assert gradient is not None
        self.gradients.append(gradient.clone())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images.append({task: index.tolist() for task, index in outputs["index"].items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation.append(pl_module.results)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "fit")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, MergeModule)
        content = {
            "gradients": self.gradients,
            "images": self.images,
            "validation": self.validation,
            "results": pl_module.results,
            "coefficients": pl_module.get_parameter("coefficients").detach() if pl_module.learnable else None,
            "statistics": {
                name: value.clone() for name, value in pl_module.merged_state().items() if "running" in name
            },
        }
        torch.save(content, self.folder / f"{stage}-{trainer.global_rank}.pt")


class OneRank(L.Callback):
    """Fails if another rank than the first writes a file, or has something of ours to say to a logger."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank == 0:
            return
        paths: Any = Path
        system: Any = os
        inherited = Path.open

        def refuse(*args: Any, **_: Any) -> None:
            raise AssertionError(f"rank {trainer.global_rank} writes {args}")

        def reading(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            return refuse(path) if set(mode) & set("wax+") else inherited(path, mode, *args, **kwargs)

        paths.open, paths.replace = reading, refuse
        system.replace = system.rename = refuse
        for logger in trainer.loggers:  # which by themselves ignore other ranks
            vars(logger)["log_metrics"] = partial(self._listen, logger.log_metrics)

    @staticmethod
    def _listen(log: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("lit_merge"), f"{caller} logs {args}"
        log(*args, **kwargs)


def trainer(folder: Path, ranks: int, **kwargs: Any) -> MergeTrainer:
    kwargs.setdefault("callbacks", [])
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    if ranks > 1:
        options["strategy"] = "ddp_fork"
    return MergeTrainer(
        default_root_dir=folder, accelerator="cpu", devices=ranks, **{**options, **kwargs},
    )  # fmt: skip


def run(
    folder: Path,
    ranks: int,
    suite: Suite | None = None,
    objective: Objective | None = None,
    protocol: str = "transductive",
    epochs: int = 2,
    model_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fit and test with a global batch of 8; what each rank recorded in both, and the report."""
    folder.mkdir()
    suite = suite or odd()
    model = AdaMerging(
        suite=suite, objective=objective, optimizer=partial(torch.optim.SGD, lr=0.05), **(model_options or {})
    )
    data = TaskDataModule(
        suite, batch_size=8 // ranks, eval_batch_size=5, protocol=protocol, seed=3,  # type: ignore[arg-type]
    )  # fmt: skip
    callbacks = [Report(), CollapseMonitor(2), CoefficientMonitor(), ResumePoint(2), ExportMerge(), Record(folder)]
    engine = trainer(folder, ranks, max_epochs=1 if protocol == "online" else epochs, callbacks=callbacks, **kwargs)
    engine.fit(model, datamodule=data)
    if protocol != "online" or ranks == 1:
        engine.test(model, datamodule=data, verbose=False)
    else:
        # the callbacks of a fork do not come back, so the stream is read from the checkpoint, as a resumed run would
        engine = trainer(folder, ranks, max_epochs=1, callbacks=[Resumed(), Record(folder)])
        engine.test(model, datamodule=data, verbose=False)
    recorded = [
        {**fitted, "test": tested["results"], "statistics": tested["statistics"]}
        for fitted, tested in (
            (torch.load(folder / f"fit-{rank}.pt"), torch.load(folder / f"test-{rank}.pt")) for rank in range(ranks)
        )
    ]
    return recorded, json.loads((folder / "report.json").read_text())


class Resumed(Report):
    """A report that reads the score of the stream back when it is used for a test."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "last.ckpt"
        self.on_load_checkpoint(trainer, pl_module, torch.load(path, weights_only=True))
        super().on_test_start(trainer, pl_module)


def close(one: Any, other: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
