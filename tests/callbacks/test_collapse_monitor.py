"""A collapse of predictions is seen without labels."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks_helpers import trainer_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_merge.callbacks import CollapseMonitor
from lit_merge.errors import MergeError
from lit_merge.loggers import RunLogger

CLASSES = 4
Logits = Callable[[int], Tensor]


def spread(step: int) -> Tensor:
    """Eight images, two of each class."""
    return 9.0 * torch.eye(CLASSES)[torch.arange(8) % CLASSES]


def collapsing(step: int) -> Tensor:
    """All images in class 2 from the fourth step on."""
    return spread(step) if step < 4 else 9.0 * torch.eye(CLASSES)[torch.full((8,), 2)]


class Scripted(L.LightningModule):
    """Predicts what it is told to."""

    def __init__(self, **tasks: Logits) -> None:
        super().__init__()
        self.tasks = tasks
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        logits = {task: make(self.trainer.global_step) for task, make in self.tasks.items()}
        return {"loss": self.weight.square(), "logits": logits, "index": {}}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader_of(steps: int) -> DataLoader[Tensor]:
    """As many batches."""
    return DataLoader(torch.zeros(steps, 1), batch_size=1)  # type: ignore[arg-type]


def run(monitor: CollapseMonitor, steps: int = 8, options: dict[str, Any] | None = None, **tasks: Logits) -> list[str]:
    """Train for some steps; return the warnings about collapse."""
    logger = RunLogger("runs", "here", version=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(monitor, logger=logger, **(options or {})).fit(Scripted(**tasks), loader_of(steps))
    return [str(w.message) for w in caught if "collapse" in str(w.message)]


def logged(key: str) -> list[float]:
    """Values of a metric."""
    with Path("runs/here/version_0/metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_a_collapse_names_the_task_once() -> None:
    (said,) = run(CollapseMonitor(every_n_steps=2), good=spread, bad=collapsing)
    assert said.startswith("the predictions of task 'bad' collapse: 1.0 effective classes after 4.0, 100% in one class")
    assert "ExpertAlignment" in said
    assert "Diversity" in said


def test_no_collapse_no_warning() -> None:
    assert run(CollapseMonitor(every_n_steps=2), good=spread, fine=spread) == []


def test_few_classes_from_the_beginning_are_no_collapse() -> None:
    assert run(CollapseMonitor(every_n_steps=2), bad=lambda step: collapsing(9)) == []


def test_threshold() -> None:
    assert run(CollapseMonitor(2, threshold=0.2), bad=collapsing) == []  # a quarter of the classes is left
    assert len(run(CollapseMonitor(2, threshold=0.3), bad=collapsing)) == 1


def test_a_part_of_a_window_is_not_compared() -> None:
    def rare(step: int) -> Tensor:
        return spread(step)[step % 8 : step % 8 + 1]  # one image a step: few classes in few steps

    assert run(CollapseMonitor(every_n_steps=4), steps=9, rare=rare) == []
    assert len(logged("predictions/marginal_entropy/rare")) == 3


def test_histogram_and_entropy_are_logged() -> None:
    run(CollapseMonitor(every_n_steps=2), good=spread, bad=collapsing)
    with Path("runs/here/version_0/predictions-histogram.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header == ["task", "class", "predictions"]
    counts = {task: [int(n) for t, _, n in rows if t == task] for task in ("good", "bad")}
    assert counts == {"good": [4, 4, 4, 4], "bad": [0, 0, 16, 0]}
    entropies = logged("predictions/marginal_entropy/bad")
    assert len(entropies) == 4
    assert entropies[0] == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-3)
    assert entropies[-1] < 0.01


def test_accumulated_batches_are_one_window() -> None:
    options = {"accumulate_grad_batches": 2}
    run(CollapseMonitor(every_n_steps=2), steps=8, options=options, good=spread)
    with Path("runs/here/version_0/predictions-histogram.csv").open() as file:
        assert [int(row["predictions"]) for row in csv.DictReader(file)] == [8, 8, 8, 8]
    assert len(logged("predictions/marginal_entropy/good")) == 2


def test_a_resumed_run_remembers() -> None:
    first = trainer_of(CollapseMonitor(2), max_steps=3, max_epochs=-1)
    first.fit(Scripted(bad=collapsing), loader_of(8))
    monitor = first.callbacks[0]  # type: ignore[attr-defined]
    monitor._sums = {"bad": torch.ones(2, CLASSES)}  # a window is open
    first.save_checkpoint("last.ckpt", weights_only=False)
    second = CollapseMonitor(2)
    trainer = trainer_of(second, max_steps=3, max_epochs=-1)
    trainer.fit(Scripted(bad=collapsing), loader_of(8), ckpt_path="last.ckpt")
    assert second._largest == monitor._largest
    assert second.state_dict() == monitor.state_dict()
    content = torch.load("last.ckpt", weights_only=True)
    assert torch.equal(content["lit_merge_predictions"]["bad"], torch.ones(2, CLASSES))


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"threshold": 0.0}, {"threshold": 1.0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match="expected every_n_steps of at least 1 and a threshold in"):
        CollapseMonitor(**options)
