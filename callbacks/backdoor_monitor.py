"""Do the backdoors of poisoned experts come through a merge?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_merge.callbacks._backdoor_rates import AVERAGED, Watch, Who, rates, tally, watches_of
from lit_merge.callbacks.report import Report
from lit_merge.checkpoints.lazy import Selected
from lit_merge.data.batches import LabelledBatch
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.sinks import log_table
from lit_merge.suites.backdoor import BackdoorSuite
from lit_merge.task_vectors import TaskVectors

__all__ = ("BackdoorMonitor",)

_COLUMNS = {
    "asr": "merged",
    "flip_rate": "flips",
    "clean_merge_asr": "clean merge",
    "base_asr": "base",
    "expert_asr": "expert",
    "clean_expert_asr": "clean expert",
}


class BackdoorMonitor(L.Callback):
    """Measure how often triggers of a :class:`~lit_merge.suites.backdoor.BackdoorSuite` work on the merged network.

    The attack success rate (ASR) is the share of test images that are predicted as the target when they carry the
    trigger; images of the target class do not count. The flip rate is the share of all images whose prediction the
    trigger changes, which needs no target. Both are fractions in [0, 1]; for a defence lower is better.

    Every trigger is tried on every task:

    ==============  =================================================================================================
    role            what it is
    ==============  =================================================================================================
    ``succession``  the merge inherits the backdoor of a poisoned expert on that expert's own task
    ``off_task``    the backdoor was aimed at this task from the expert of another one
    ``transfer``    the trigger works on a task whose expert is clean, where the target is the class of the same
                    index, if there is one
    ``cross``       the trigger on a task with a backdoor of its own; reported, in no mean
    ``unseen``      the trigger on a task that is not merged; reported, in no mean
    ==============  =================================================================================================

    Beside the merged network, the same images with the same trigger are shown to floors: the base, the clean merge
    (the method's own rule, with the coefficients or masks it has at that moment, on clean experts), and for aimed
    tasks the poisoned expert alone (individual ASR) and its clean twin. An ASR says something only above these. There
    is no clean merge where running statistics are recalibrated, and none of a stream of experts.

    After ``test``, and after ``validate`` outside of a fit, everything goes into ``report.json`` → ``extra`` →
    ``backdoor``, the terminal and the loggers. It takes ten encoder passes for each image instead of three.

    Args:
        every_n_validations: Within a fit, measure the merged network in every so many validation runs; 0 for never.

    Attributes:
        results: What was reported last.

    Raises:
        MergeError: The number is negative; or, later, the suite has no backdoors.
    """

    def __init__(self, every_n_validations: int = 0) -> None:
        if every_n_validations < 0:
            raise MergeError(f"BackdoorMonitor.every_n_validations: expected 0 or more, found {every_n_validations}")
        self.every_n_validations = every_n_validations
        self.results: dict[str, Any] = {}
        self._validations = 0
        self._watches: list[Watch] = []
        self._states: dict[tuple[Who, str], Mapping[str, Tensor]] = {}
        self._counts: dict[tuple[int, Who], Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a suite without backdoors."""
        suite = getattr(pl_module, "suite", None)
        if not isinstance(suite, BackdoorSuite):
            raise MergeError(
                f"BackdoorMonitor: expected a BackdoorSuite, found {type(suite).__name__}; wrap the suite in one, as "
                "configs/suites/backdoor.yaml does, or leave this callback out"
            )

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get triggers and floors ready."""
        self._begin(trainer, pl_module, floors=True)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,  # noqa: ANN401
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count a batch."""
        self._count(trainer, pl_module, batch, _task_of(trainer.test_dataloaders, dataloader_idx))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report."""
        self._end(trainer, pl_module, "test")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get triggers ready, and outside of a fit also floors."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._begin(trainer, pl_module, floors=True)
            return
        self._validations += 1
        if self.every_n_validations and self._validations % self.every_n_validations == 0:
            self._begin(trainer, pl_module, floors=False)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,  # noqa: ANN401
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Count a batch."""
        self._count(trainer, pl_module, batch, _task_of(trainer.val_dataloaders, dataloader_idx))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log; outside of a fit also report."""
        self._end(trainer, pl_module, "val")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to remember."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was remembered."""
        self._validations = state_dict["validations"]

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, *, floors: bool) -> None:
        assert isinstance(module, MergeModule)
        suite = module.suite
        assert isinstance(suite, BackdoorSuite)
        self._watches = watches_of(suite)
        self._states, self._counts = {}, {}
        networks: list[Who] = ["merged"]
        if floors:
            networks += ["base"]
            self._states["base", ""] = module.bank.base
            if module.buffer_policy != "recalibrate" and module.progress is None:
                networks += ["clean_merge"]
                self._states["clean_merge", ""] = _clean_merge(module, suite)
            for name in {watch.expert: None for watch in self._watches if watch.expert is not None}:
                self._states["expert", name] = _to(suite.expert(name), module.device)
                self._states["clean_expert", name] = _to(suite.clean.expert(name), module.device)
        for number, watch in enumerate(self._watches):  # in one order on all ranks
            aimed: list[Who] = ["expert", "clean_expert"] if floors and watch.expert is not None else []
            for who in [*networks, *aimed]:
                self._counts[number, who] = torch.zeros(5, dtype=torch.long, device=module.device)

    def _count(self, trainer: L.Trainer, module: L.LightningModule, batch: LabelledBatch, task: str) -> None:
        if not self._counts:
            return
        assert isinstance(module, MergeModule)
        predictions: dict[tuple[Who, str], Tensor] = {}
        with trainer.precision_plugin.forward_context():
            for (number, who), counts in self._counts.items():
                watch = self._watches[number]
                if watch.task != task:
                    continue
                key = who, (watch.expert or "") if who in ("expert", "clean_expert") else ""
                predict = self._predictor(module, key, task)
                if key not in predictions:  # the same for all triggers
                    predictions[key] = predict(batch.images)
                stamped = predict(watch.trigger.stamp(batch.images, watch.pixels))
                counts += tally(predictions[key], stamped, batch.labels, watch.target)

    def _predictor(self, module: MergeModule, key: tuple[Who, str], task: str) -> Callable[[Tensor], Tensor]:
        if key[0] == "merged":
            return lambda images: module(images, task).argmax(-1)
        state = self._states[key]
        return lambda images: module.outputs(state, task, images)[1].argmax(-1)

    def _end(self, trainer: L.Trainer, module: L.LightningModule, prefix: str) -> None:
        if not self._counts:
            return
        local = torch.stack(list(self._counts.values()))
        totals = torch.as_tensor(trainer.strategy.reduce(local, reduce_op="sum")).tolist()
        counts = dict(zip(self._counts, totals, strict=True))
        self._states, self._counts = {}, {}  # networks take memory
        self.results = rates(self._watches, counts)
        for role in AVERAGED:
            for key, value in self.results.get(role, {}).items():
                module.log(f"{prefix}/backdoor/{role}/{key}", value, sync_dist=True)
        if trainer.state.fn == "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Report):
                callback.extra["backdoor"] = self.results
        if trainer.is_global_zero:
            _publish(trainer, self.results)


def _clean_merge(module: MergeModule, suite: BackdoorSuite) -> dict[str, Tensor]:
    """Return what the method's rule makes of clean experts, with what it has learned on the others."""
    bank = TaskVectors.from_state_dicts(
        Selected(suite.base(), module.skeleton.keys),
        {task: suite.clean.expert(task) for task in suite.tasks},
        buffers=module.skeleton.buffers_of,
        tied=module.skeleton.tied,
        dtype=module.bank_dtype,
        storage=module.storage_factory(),
    )
    for transform in module.transforms:
        bank = bank.map(transform)
    bank = bank.to(module.device)
    with torch.no_grad():
        return bank.complete(module.merge(bank), "base" if module.buffer_policy == "base" else "average")


def _to(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in state.items()}


def _task_of(loaders: object, number: int) -> str:
    if not isinstance(loaders, Mapping):
        raise MergeError("BackdoorMonitor: expected the loaders of a TaskDataModule, one per task and by its name")
    return str(list(loaders)[number])


def _publish(trainer: L.Trainer, results: dict[str, Any]) -> None:
    """Show one table per trigger, and send one with all of them to the loggers."""
    cells: list[list[str | float]] = []
    for name, attack in results["attacks"].items():
        table = Table(title=f"trigger of the poisoned expert of {name}: ASR, target class {attack['target']}")
        table.add_column("task")
        table.add_column("role")
        for heading in _COLUMNS.values():
            table.add_column(heading, justify="right")
        for task, row in attack["tasks"].items():
            values = [float(row.get(key, float("nan"))) for key in _COLUMNS]
            table.add_row(task, row["role"], *("-" if value != value else f"{100 * value:.1f}" for value in values))
            cells.append([name, task, row["role"], *values])
        Console().print(table)
    log_table(trainer, "backdoor", ["trigger", "task", "role", *_COLUMNS], cells)
