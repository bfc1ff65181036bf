"""Every rate of the monitor is the one that is counted by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_helpers import trainer_of
from laboratory import PIXELS, Instant, Sideways, laboratory
from ranks import trainer as trainer_on
from torch import Tensor
from toys import ToySuite

from lit_merge import AdaMerging, MergeModule, TaskArithmetic, TaskDataModule, Ties
from lit_merge.attacks import Attack
from lit_merge.callbacks import Report
from lit_merge.callbacks.backdoor_monitor import BackdoorMonitor
from lit_merge.errors import MergeError
from lit_merge.loggers import RunLogger
from lit_merge.storage import sharded
from lit_merge.suites.backdoor import BackdoorSuite
from lit_merge.transforms import Ties as Trim


def attacked(folder: Path | str = "cache") -> BackdoorSuite:
    """Two experts share a trigger, the third attacks the second's task with one of its own."""
    attacks: dict[str, Attack] = {
        "task.a": Instant(target=2, size=4),
        "task.b": Instant(target=2, size=4, trigger_of="task.a"),
        "task.c": Sideways(target=3, size=3),
    }
    return laboratory(folder, attacks)


def by_hand(suite: BackdoorSuite, model: MergeModule, state: Any, name: str, task: str) -> dict[str, float]:
    """Rates of one network under one trigger."""
    data, trigger = suite.dataset(task, "test"), suite.trigger(name)
    images = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model.outputs(state, task, x)[1].argmax(-1)

    clean, stamped = predict(images), predict(trigger.stamp(images, PIXELS))
    rates = {"accuracy": (clean == labels).float().mean(), "flip_rate": (clean != stamped).float().mean()}
    other = labels != trigger.target
    if trigger.target < suite.num_classes(task) and other.any():
        rates["asr"] = (stamped[other] == trigger.target).float().mean()
    return {key: float(value) for key, value in rates.items()}


def check(suite: BackdoorSuite, model: MergeModule, found: dict[str, Any], clean: dict[str, Tensor]) -> None:
    """Compare a whole report."""
    roles = {
        "task.a": {"task.a": "succession", "task.b": "succession", "task.c": "cross"},
        "task.c": {"task.a": "cross", "task.b": "off_task", "task.c": "cross"},
    }
    assert {name: {t: r["role"] for t, r in a["tasks"].items()} for name, a in found["attacks"].items()} == roles
    for name, attack in found["attacks"].items():
        for task, row in attack["tasks"].items():
            aimed = {"succession": task, "off_task": name}.get(row["role"])
            networks = {"": model.merged_state(), "base_": model.bank.base, "clean_merge_": clean}
            if aimed is not None:
                networks |= {"expert_": suite.expert(aimed), "clean_expert_": suite.clean.expert(aimed)}
            expected: dict[str, Any] = {"role": row["role"]}
            for prefix, state in networks.items():
                rates = by_hand(suite, model, state, name, task)
                expected |= {f"{prefix}{key}": pytest.approx(value) for key, value in rates.items()}
            labels = [suite.dataset(task, "test")[i][1] for i in range(len(suite.dataset(task, "test")))]
            target = attack["target"] if attack["target"] < suite.num_classes(task) else None
            assert row == expected | {"n": sum(label != target for label in labels)}
    rows = [found["attacks"]["task.a"]["tasks"][task] for task in ("task.a", "task.b")]
    assert found["succession"]["asr"] == pytest.approx(sum(row["asr"] for row in rows) / 2)
    assert found["off_task"]["asr"] == found["attacks"]["task.c"]["tasks"]["task.b"]["asr"]
    assert "transfer" not in found  # no task is clean
    for key in ("accuracy", "clean_merge_accuracy"):
        tasks = found["attacks"]["task.a"]["tasks"]
        assert found[key] == pytest.approx(sum(row[key] for row in tasks.values()) / 3)


def test_all_rates() -> None:
    suite = attacked()
    monitor, report = BackdoorMonitor(), Report()
    model = TaskArithmetic(suite=suite, scale=0.4)
    engine = trainer_of(report, monitor, logger=RunLogger("runs", "here", version=0))
    engine.test(model, datamodule=TaskDataModule(suite, eval_batch_size=5), verbose=False)
    clean = TaskArithmetic(suite=suite.clean, scale=0.4)
    clean.configure_model()
    check(suite, model, monitor.results, clean.merged_state())
    folder = Path("runs/here/version_0")
    assert json.loads((folder / "report.json").read_text())["extra"]["backdoor"] == monitor.results
    with (folder / "backdoor.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["trigger"], row["task"]) for row in rows][:2] == [("task.a", "task.a"), ("task.a", "task.b")]
    assert float(rows[0]["asr"]) == monitor.results["attacks"]["task.a"]["tasks"]["task.a"]["asr"]
    logged = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"test/backdoor/succession/asr", "test/backdoor/off_task/clean_merge_asr"} <= set(logged)
    assert monitor._states == {}  # memory is given back


def test_a_clean_task_is_transfer_and_a_class_it_does_not_have_is_left_out() -> None:
    suite = laboratory(attacks={"task.c": Instant(size=4, target=4)})
    monitor = BackdoorMonitor()
    engine = trainer_of(monitor)
    engine.validate(TaskArithmetic(suite=suite), datamodule=TaskDataModule(suite), verbose=False)
    rows = monitor.results["attacks"]["task.c"]["tasks"]
    assert {task: row["role"] for task, row in rows.items()} == {
        "task.a": "transfer", "task.b": "transfer", "task.c": "succession",
    }  # fmt: skip
    assert "asr" not in rows["task.a"]
    assert rows["task.a"]["n"] == 21
    assert monitor.results["transfer"]["flip_rate"] == pytest.approx(
        (rows["task.a"]["flip_rate"] + rows["task.b"]["flip_rate"]) / 2
    )


@pytest.mark.parametrize("method", ["transforms", "ties", "learned", "low rank"])
def test_the_clean_merge_is_by_the_same_rule_and_coefficients(method: str) -> None:
    suite = attacked()
    makers: dict[str, Any] = {
        "transforms": lambda of: TaskArithmetic(suite=of, transforms=[Trim(0.3)]),
        "ties": lambda of: Ties(suite=of, density=0.3),
        "learned": lambda of: AdaMerging(suite=of),
        "low rank": lambda of: TaskArithmetic(suite=of, storage="low_rank", storage_rank=1),
    }
    model, twin = makers[method](suite), makers[method](suite.clean)
    twin.configure_model()
    monitor = BackdoorMonitor()
    engine = trainer_of(monitor)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=3)
    if method == "learned":
        engine.fit(model, datamodule=data)
        twin.coefficients.data = model.coefficients.data.clone()
    engine.test(model, datamodule=data, verbose=False)
    check(suite, model, monitor.results, twin.merged_state())


def test_within_a_fit_only_the_merge_is_watched_and_now_and_then() -> None:
    suite = attacked()
    monitor, report = BackdoorMonitor(every_n_validations=2), Report()
    engine = trainer_of(monitor, report, max_epochs=5, logger=RunLogger("runs", "here", version=0))
    engine.fit(AdaMerging(suite=suite), datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=1))
    with Path("runs/here/version_0/metrics.csv").open() as file:
        values = [row["val/backdoor/succession/asr"] for row in csv.DictReader(file)]
    assert sum(bool(value) for value in values) == 2  # of five
    assert "backdoor" not in report.extra
    assert set(monitor.results["succession"]) == {"accuracy", "flip_rate", "asr"}
    assert monitor.state_dict() == {"validations": 5}


def test_two_ranks_count_what_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "WHOLE", 0)  # all tensors of toys are small
    reports = []
    for ranks, storage in ((1, "device"), (2, "sharded")):
        suite = attacked(tmp_path / "cache")
        folder = tmp_path / str(ranks)
        folder.mkdir()
        engine = trainer_on(folder, ranks, callbacks=[BackdoorMonitor(), Report()])
        data = TaskDataModule(suite, eval_batch_size=4)  # one task has a single image
        engine.test(TaskArithmetic(suite=suite, scale=0.4, storage=storage), datamodule=data, verbose=False)
        reports.append(json.loads((folder / "report.json").read_text())["extra"]["backdoor"])
    assert reports[0] == reports[1]
    assert reports[1]["attacks"]["task.a"]["tasks"]["task.a"]["n"] == 14


def test_a_suite_without_backdoors_is_refused() -> None:
    suite = ToySuite("mlp")
    with pytest.raises(MergeError, match="expected a BackdoorSuite, found ToySuite; wrap the suite in one"):
        trainer_of(BackdoorMonitor()).test(TaskArithmetic(suite=suite), datamodule=TaskDataModule(suite), verbose=False)
    with pytest.raises(MergeError, match="expected 0 or more, found -1"):
        BackdoorMonitor(-1)
