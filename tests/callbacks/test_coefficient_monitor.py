"""Pictures and tables of coefficients."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from callbacks_helpers import trainer_of
from PIL import Image
from toys import ToySuite

from lit_merge.callbacks import CoefficientMonitor
from lit_merge.callbacks.coefficient_monitor import draw_heat_map
from lit_merge.data import TaskDataModule
from lit_merge.loggers import RunLogger
from lit_merge.methods import AdaMerging, TaskArithmetic

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("granularity", ["task", "tensor"])
def test_table_and_picture(granularity: str) -> None:
    suite = ToySuite("cnn")
    model = AdaMerging(granularity=granularity, suite=suite)  # type: ignore[arg-type]
    logger = RunLogger("runs", "here", version=0)
    data = TaskDataModule(suite=suite, steps_per_epoch=2)
    trainer_of(CoefficientMonitor(), logger=logger).fit(model, datamodule=data)
    with Path("runs/here/version_0/coefficients.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert header == ["tensor", *suite.tasks]
    assert [row[0] for row in rows] == list(model.bank.names)
    found = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    assert torch.equal(found.T, model.coefficient_table())
    assert not torch.equal(found, torch.full_like(found, 0.3))
    with Image.open("runs/here/version_0/coefficients.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**20) or []) > 5
    with Path("runs/here/version_0/metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["coefficients/task.a"]]
    assert float(logged[-1]["coefficients/task.a"]) == pytest.approx(float(found[:, 0].mean()), rel=1e-5)


def test_now_and_then_while_adapting(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monitor = CoefficientMonitor(every_n_epochs=2)
    monkeypatch.setattr(monitor, "_draw", lambda trainer, *_: drawn.append(trainer.current_epoch))
    suite = ToySuite("mlp")
    data = TaskDataModule(suite=suite, steps_per_epoch=1)
    trainer_of(monitor, max_epochs=5).fit(AdaMerging(suite=suite), datamodule=data)
    assert drawn == [1, 3, 5]  # after two and four epochs, and at the end


def test_methods_without_coefficients_are_left_alone() -> None:
    suite = ToySuite("mlp")
    trainer = trainer_of(CoefficientMonitor())
    trainer.fit(TaskArithmetic(suite=suite), datamodule=TaskDataModule(suite=suite))
    trainer.test(TaskArithmetic(suite=suite), datamodule=TaskDataModule(suite=suite), verbose=False)
    assert not list(Path().rglob("coefficients.*"))


def test_a_picture_of_many_tensors_and_of_zeros() -> None:
    names = tuple(f"block.{i}.weight" for i in range(200))
    draw_heat_map(Path("new/map.png"), torch.zeros(2, 200), ("a", "b"), names)
    with Image.open("new/map.png") as image:
        assert image.width > image.height
