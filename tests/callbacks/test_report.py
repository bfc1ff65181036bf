"""The report says what was measured, in the agreed schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks_helpers import trainer_of
from toys import ToySuite

import lit_merge
from lit_merge.callbacks import Report
from lit_merge.data import TaskDataModule
from lit_merge.methods import AdaMerging, TaskArithmetic
from lit_merge.module import MergeModule

SCORES = {"accuracy", "expert_accuracy", "base_accuracy", "normalized_accuracy"}


def accuracy(model: MergeModule, state: dict[str, torch.Tensor], task: str) -> float:
    """Accuracy over the whole test set, by hand."""
    data = model.suite.dataset(task, "test")
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    with torch.no_grad():
        predictions = model.outputs(state, task, torch.stack(images))[1].argmax(-1)
    return float((predictions == torch.tensor(labels)).double().mean())


def evaluated(report: Report, suite: ToySuite, **options: Any) -> TaskArithmetic:
    """Evaluate task arithmetic."""
    model = TaskArithmetic(suite=suite)
    trainer_of(report, **options).test(model, datamodule=TaskDataModule(suite=suite), verbose=False)
    return model


def test_schema_and_numbers() -> None:
    report, suite = Report(), ToySuite("mlp")
    model = evaluated(report, suite)
    found = json.loads(Path("report.json").read_text())
    assert list(found) == [
        *("schema", "method", "suite", "protocol", "seed", "versions", "seconds", "peak_memory_bytes"),
        *("tasks", "mean", "extra"),
    ]
    assert (found["schema"], found["method"], found["suite"]) == (1, "TaskArithmetic", "toys")
    assert (found["protocol"], found["seed"]) == ("transductive", 0)
    assert set(found["versions"]) == {"lit-merge", "lightning", "torch", "python"}
    assert found["versions"]["lit-merge"] == lit_merge.__version__
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 2**20
    assert list(found["tasks"]) == list(suite.tasks)
    for task, row in found["tasks"].items():
        assert set(row) == {"n"} | SCORES
        assert row["n"] == len(suite.dataset(task, "test"))
        assert row["accuracy"] == pytest.approx(accuracy(model, model.merged_state(), task))
        assert row["expert_accuracy"] == pytest.approx(accuracy(model, dict(model.bank.expert(task)), task))
        assert row["base_accuracy"] == pytest.approx(accuracy(model, dict(model.bank.base), task))
        assert row["normalized_accuracy"] == pytest.approx(row["accuracy"] / row["expert_accuracy"])
    assert set(found["mean"]) == SCORES
    for key in SCORES:
        assert found["mean"][key] == pytest.approx(sum(row[key] for row in found["tasks"].values()) / 3)
    assert found == report.content


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report, suite = Report(), ToySuite("mlp")
    evaluated(report, suite)
    said = capsys.readouterr().out
    assert "TaskArithmetic on toys (transductive, seed 0)\n" in said
    assert f"report: {Path.cwd() / 'report.json'}" in said
    for task, row in report.content["tasks"].items():
        (line,) = [line for line in said.splitlines() if task in line]
        keys = ("base_accuracy", "expert_accuracy", "accuracy", "normalized_accuracy")
        assert [cell.strip() for cell in line.strip("│").split("│")[1:]] == [f"{100 * row[key]:.1f}" for key in keys]
    assert any(line.startswith("│ mean") for line in said.splitlines())


def test_extra_of_methods_and_callbacks() -> None:
    report = Report()
    report.extra["attack_success"] = {"task.a": 0.25}
    evaluated(report, ToySuite("mlp"))
    found = json.loads(Path("report.json").read_text())["extra"]
    assert found["attack_success"] == {"task.a": 0.25}
    assert found["steps"] == 0
    assert found["adaptation_seconds"] == 0


def test_validate_reports_and_validation_within_a_fit_does_not() -> None:
    report, suite = Report(), ToySuite("mlp")
    data = TaskDataModule(suite=suite, steps_per_epoch=2)
    trainer_of(report).fit(AdaMerging(suite=suite), datamodule=data)
    assert report.content == {}
    trainer_of(report).validate(TaskArithmetic(suite=suite), datamodule=data, verbose=False)
    assert set(report.content["mean"]) == SCORES


def test_the_seed_is_that_of_the_run() -> None:
    L.seed_everything(5, verbose=False)
    report = Report()
    evaluated(report, ToySuite("mlp"))
    assert report.content["seed"] == 5


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(Report(), ToySuite("mlp"), fast_dev_run=True)
    assert "TaskArithmetic on toys" in capsys.readouterr().out
    assert not list(Path().rglob("*.json"))


def test_split_scores_only_images_that_were_not_adapted_on() -> None:
    report, suite = Report(), ToySuite("mlp")
    data = TaskDataModule(suite=suite, protocol="split", adapt_fraction=0.25, steps_per_epoch=1)
    trainer = trainer_of(report)
    model = AdaMerging(suite=suite)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert report.content["protocol"] == "split"
    sizes = {task: len(positions) for task, positions in data.positions("score").items()}
    assert {task: row["n"] for task, row in report.content["tasks"].items()} == sizes
    for task, positions in data.positions("adapt").items():
        assert not set(positions) & set(data.positions("score")[task])


class Recorder(L.Callback):
    """Predicts each image by hand with the weights of the moment, before the step changes them."""

    def __init__(self) -> None:
        self.hits: dict[str, list[bool]] = {}
        self._state: dict[str, torch.Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MergeModule)
        state = pl_module.merged_state()
        for task, part in batch.items():
            labels = [pl_module.suite.dataset(task, "test")[int(i)][1] for i in part.index]
            with torch.no_grad():
                predicted = pl_module.outputs(state, task, part.images)[1].argmax(-1).tolist()
            self.hits.setdefault(task, []).extend(p == t for p, t in zip(predicted, labels, strict=True))


def test_online_scores_each_image_when_it_arrives() -> None:
    report, recorder, suite = Report(), Recorder(), ToySuite("mlp")
    data = TaskDataModule(suite=suite, protocol="online", batch_size=4)
    model = AdaMerging(suite=suite, optimizer=lambda p: torch.optim.SGD(p, lr=2.0))  # so large that it matters
    trainer = trainer_of(report, recorder)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    found = json.loads(Path("report.json").read_text())
    assert found["protocol"] == "online"
    for task, row in found["tasks"].items():
        hits = recorder.hits[task]
        assert row["n"] == len(hits) == len(suite.dataset(task, "test"))
        assert row["accuracy"] == pytest.approx(sum(hits) / len(hits))
        assert row["final_accuracy"] == pytest.approx(accuracy(model, model.merged_state(), task))
        assert row["normalized_accuracy"] == pytest.approx(row["accuracy"] / row["expert_accuracy"])
    assert any(row["accuracy"] != row["final_accuracy"] for row in found["tasks"].values())
    assert set(found["mean"]) == SCORES | {"final_accuracy"}
    assert found["extra"]["steps"] == 9  # 33 images of the largest task, 4 at a time


def test_what_it_remembers_goes_through_a_checkpoint() -> None:
    report, suite = Report(), ToySuite("mlp")
    data = TaskDataModule(suite=suite, protocol="online", batch_size=4)
    trainer, model = trainer_of(report), AdaMerging(suite=suite)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint("last.ckpt", weights_only=False)
    trainer.test(model, datamodule=data, verbose=False)
    again = Report()
    trainer_of(again).test(AdaMerging(suite=suite), datamodule=data, ckpt_path="last.ckpt", verbose=False)
    assert again.content["tasks"] == report.content["tasks"]
    assert again.content["extra"] == report.content["extra"]
