"""Streams of experts: what comes out, what is refused, and orders that grow."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from streams import STEPS, Case
from toys import ToySuite

from lit_merge import AdaMerging, MergeModule, MergeTrainer, SimpleAverage, TaskDataModule
from lit_merge.callbacks import ExportMerge, Report, ResumePoint, SequentialMerging, sequential_merging
from lit_merge.errors import MergeError
from lit_merge.methods import Emr, TsvMerge
from lit_merge.transforms import Ties

SUITE = ToySuite("cnn")


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "matrix" not in request.node.name:  # one test is enough
        monkeypatch.setattr(sequential_merging, "draw", lambda *_: None)


class Sum(SimpleAverage):
    """θ + τ; notes what it is told."""

    def absorb(self, merged: Any, incoming: Any, stage: Any) -> dict[str, torch.Tensor]:
        stage.numbers["seen"] = [*stage.numbers.get("seen", []), stage.task]
        assert stage.history == tuple(stage.numbers["seen"][:-1])
        return {name: value + incoming[name] for name, value in merged.items()}


def fit(root: Path, model: MergeModule, callback: SequentialMerging, suite: ToySuite = SUITE, **options: Any) -> Any:
    """One fit and its test; the report's part about the stream."""
    callbacks = [Report(), callback, ResumePoint(), ExportMerge()]
    engine = Case().trainer(root, *callbacks, **options)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=STEPS, seed=1)
    engine.fit(model, datamodule=data, ckpt_path="last")
    engine.test(model, datamodule=data, verbose=False)
    report = json.loads((root / "report.json").read_text())
    return report["extra"]["continual"] | {"tasks_of_report": report["tasks"]}


def test_a_sum_of_experts_with_their_statistics(tmp_path: Path) -> None:
    found = fit(tmp_path, Sum(suite=SUITE), SequentialMerging(order=["task.c", "task.a", "task.b"], keep=None))
    base, experts = SUITE.base(), [SUITE.expert(task) for task in SUITE.tasks]
    merged = load_file(tmp_path / "export" / "merged.safetensors")
    for name, value in base.items():
        if not value.is_floating_point():
            expected = value
        elif "running" in name:
            expected = torch.stack([expert[name] for expert in experts]).mean(0)
        else:
            expected = value + sum(expert[name] - value for expert in experts)
        torch.testing.assert_close(merged[name], expected)
    assert found["order"] == found["tasks"] == ["task.c", "task.a", "task.b"]
    assert [stage["numbers"]["seen"] for stage in found["stages"]][1] == ["task.c", "task.a"]
    assert found["removal"]["task.a"]["needs"] == ["task.a"]
    assert found["removal"]["task.a"]["exact"]
    files = [f"stage_00{number}.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("stage*")) == files
    last = load_file(tmp_path / files[2])
    assert all(torch.equal(last[name], value) for name, value in merged.items())


def test_the_matrix_is_what_a_test_of_each_merge_says(tmp_path: Path) -> None:
    found = fit(tmp_path, Sum(suite=SUITE), SequentialMerging(evaluate="all", keep=None))
    data = TaskDataModule(SUITE, eval_batch_size=7)
    data.setup()
    model = SimpleAverage(suite=SUITE)
    model.configure_model()
    for row, stage in zip(found["matrix"], ("stage_001", "stage_002", "stage_003"), strict=True):
        state = load_file(tmp_path / f"{stage}.safetensors")
        for task, value in zip(found["tasks"], row, strict=True):
            hits = [model.outputs(state, task, b.images)[1].argmax(-1) == b.labels for b in data.val_dataloader()[task]]
            assert value == pytest.approx(float(torch.cat(hits).double().mean()))
    assert [row["accuracy"] for row in found["tasks_of_report"].values()] == found["matrix"][-1]
    assert [row["base_accuracy"] for row in found["tasks_of_report"].values()] == found["base_accuracy"]
    assert [row["expert_accuracy"] for row in found["tasks_of_report"].values()] == found["expert_accuracy"]
    assert found["matrix"][0][0] == found["expert_accuracy"][0]
    assert {path.name for path in tmp_path.glob("continual-*.png")} == {
        "continual-matrix.png",
        "continual-accuracy.png",
    }


def test_a_stage_is_a_fit_of_its_own(tmp_path: Path) -> None:
    """With two experts the second stage is AdaMerging of the two, from the first step to the last."""
    suite = ToySuite("vit", tasks=2)
    case = Case("ada", data="seen")
    given = case.model()
    options: dict[str, Any] = {"objective": given.objective, "optimizer": given.optimizer_factory}
    stream = AdaMerging(suite=suite, **options)
    fit(tmp_path, stream, SequentialMerging(2, data="seen", evaluate="none"), suite)
    alone = AdaMerging(suite=suite, **options)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=STEPS, seed=1)
    # the first two epochs of the stream have no steps, but their images
    data.tasks_at, data.setup = lambda epoch: suite.tasks, data.setup  # type: ignore[method-assign]
    engine = MergeTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_epochs=4,
        callbacks=[PassOver(2)], reload_dataloaders_every_n_epochs=1, limit_val_batches=0,
    )  # fmt: skip
    engine.fit(alone, datamodule=data)
    assert torch.equal(stream.coefficients, alone.coefficients)
    assert not torch.equal(stream.coefficients, torch.full_like(stream.coefficients, 0.3))


class PassOver(Report):
    """Leaves out steps of the first epochs."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        left_out = trainer.current_epoch < self.epochs
        pl_module.on_train_batch_start = lambda batch, batch_idx: -1 if left_out else None


def test_experts_that_are_gone_are_not_scored(tmp_path: Path) -> None:
    """Neither at their arrival nor after."""
    folder = tmp_path / "experts"
    folder.mkdir()
    for task in SUITE.tasks:
        save_file(dict(SUITE.expert(task)), folder / f"{task}.safetensors")
        found = fit(tmp_path, Sum(suite=SUITE), SequentialMerging(order=str(folder), evaluate="none"))
        (folder / f"{task}.safetensors").unlink()
    rows = found["tasks_of_report"]
    assert [task for task in SUITE.tasks if "expert_accuracy" in rows[task]] == [SUITE.tasks[-1]]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_order_that_grows(tmp_path: Path, kind: str) -> None:
    whole = fit(tmp_path, Sum(suite=SUITE), SequentialMerging())
    root, growing = tmp_path / "run", tmp_path / ("tasks.txt" if kind == "file" else "experts")
    root.mkdir()

    def more(task: str) -> None:
        if kind == "file":
            growing.write_text(f"{growing.read_text() if growing.exists() else '# in order'}\n{task}\n")
            return
        growing.mkdir(exist_ok=True)
        save_file(dict(SUITE.expert(task)), growing / f"{task}.safetensors.part")
        (growing / f"{task}.safetensors.part").rename(growing / f"{task}.safetensors")

    lengths = []
    for task in SUITE.tasks:
        more(task)
        if kind == "folder":
            (growing / "task.z.safetensors.part").write_bytes(b"half of it")
        found = fit(root, Sum(suite=SUITE), SequentialMerging(order=str(growing)))
        lengths.append(len(found["stages"]))
        for old in growing.glob("*.safetensors") if kind == "folder" else ():
            old.unlink()  # what was absorbed is not needed again
    assert lengths == [1, 2, 3]
    assert found["matrix"] == whole["matrix"]
    assert (root / "stage_003.safetensors").read_bytes() == (tmp_path / "stage_003.safetensors").read_bytes()


def test_a_stream_that_grew_is_exported_anew(tmp_path: Path) -> None:
    """Also by a run that has nothing left to merge: the one before was killed between its checkpoint and the export."""
    tasks = tmp_path / "tasks.txt"
    for known, last in ((1, [ExportMerge()]), (2, []), (2, [ExportMerge()])):
        tasks.write_text("".join(f"{task}\n" for task in SUITE.tasks[:known]))
        engine = Case().trainer(tmp_path, SequentialMerging(order=str(tasks), evaluate="none"), ResumePoint(), *last)
        engine.fit(Sum(suite=SUITE), ckpt_path="last")
    exported, stage = (load_file(tmp_path / f"{name}.safetensors") for name in ("export/merged", "stage_002"))
    assert all(torch.equal(exported[name], value) for name, value in stage.items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": ["task.b", "task.a", "task.c"]}, "task.a, task.b, task.c, in this run it is task.b, task.a"),
    "expert": ({"suite": "changed"}, "expert 'task.c' was sha256:[0-9a-f]{12}, this run has sha256:"),
    "base": ({"suite": "other"}, "base network was sha256:[0-9a-f]{12}, this run has sha256:"),
    "file": ({"spoil": True}, "stage_003.safetensors: expected sha256:[0-9a-f]{12}.*found sha256:"),
    "missing": ({"spoil": False}, r"goes on from stage_003.safetensors \(sha256:"),
}


def test_another_stream_is_refused(tmp_path: Path) -> None:
    def again(order: Any = "given", suite: str = "", seed: int | None = None) -> None:
        used = {"": SUITE, "changed": ToySuite("cnn", changed=True), "other": ToySuite("cnn", seed=5)}[suite]
        fit(tmp_path, Sum(suite=used), SequentialMerging(order=order, seed=seed), used)

    again()
    before = (tmp_path / "last.ckpt").read_bytes(), (tmp_path / "report.json").read_text()
    again()  # a finished run is left as it is
    assert (tmp_path / "last.ckpt").read_bytes() == before[0]
    for options, message in REFUSED.values():
        if "spoil" in options:
            stage = tmp_path / "stage_003.safetensors"
            stage.write_bytes(b"something else") if options["spoil"] else stage.unlink()
        with pytest.raises(MergeError, match=message):
            again(**{key: value for key, value in options.items() if key != "spoil"})


def test_only_an_expert_that_changed_stops_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be read is not needed again, whatever its error says."""
    fit(tmp_path, Sum(suite=SUITE), SequentialMerging())

    def broken(self: object, task: str) -> None:
        raise MergeError(f"checkpoint: {task} is half of a file")

    monkeypatch.setattr(Sum, "read_expert", broken)
    fit(tmp_path, Sum(suite=SUITE), SequentialMerging())


def test_another_seed_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Sum(suite=SUITE), SequentialMerging(order="shuffle", seed=1))
    with pytest.raises(MergeError, match="an order of seed 1, in this run it is 2"):
        fit(tmp_path, Sum(suite=SUITE), SequentialMerging(order="shuffle", seed=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs_per_task": 1}, "its epochs_per_task was 2, in this run it is 1"),
        ({"data": "seen"}, "data was current"),
    ],
)
def test_other_stages_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """The epoch would be one of another stage: experts would be left out without a word."""

    class Stopped(AdaMerging):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            if self.trainer.current_epoch == 3:
                raise KeyError("the power failed")
            return super().on_train_batch_start(batch, batch_idx)

    with pytest.raises(KeyError):
        fit(tmp_path, Stopped(suite=SUITE), SequentialMerging(epochs_per_task=2, evaluate="none"))
    with pytest.raises(MergeError, match=message):
        fit(
            tmp_path,
            AdaMerging(suite=SUITE),
            SequentialMerging(**{"epochs_per_task": 2, "evaluate": "none", **options}),
        )


@pytest.mark.parametrize(
    ("model", "callback", "options", "message"),
    [
        (AdaMerging, {"epochs_per_task": 0}, {}, "AdaMerging learns, so it needs at least 1"),
        (SimpleAverage, {"epochs_per_task": 2}, {}, "SimpleAverage has nothing to learn, so it must be 0"),
        (AdaMerging, {"epochs_per_task": 2, "data": "none"}, {}, "AdaMerging learns from images"),
        (AdaMerging, {"epochs_per_task": 2}, {"max_epochs": 5}, "3 tasks, 2 epochs each, are 6, found 5"),
        (AdaMerging, {"epochs_per_task": 2}, {"max_steps": 5}, "max_steps: a stream ends with its last expert"),
        (SimpleAverage, {"order": ["task.a", "nothing"]}, {}, "unknown task 'nothing'; toys has task.a"),
        (SimpleAverage, {"order": ["task.a", "task.a"]}, {}, "task 'task.a' is there twice"),
        (SimpleAverage, {"order": "no-such-file"}, {}, "no-such-file: no such file or folder; expected given, shuffle"),
        (SimpleAverage, {"order": "."}, {}, "there is no expert in . yet"),
        (partial(SimpleAverage, transforms=[Ties()]), {}, {}, "SimpleAverage: it cannot.*without the transforms"),
        (Emr, {}, {}, "Emr: it cannot merge a stream of experts: it is a network per task"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, model: Any, callback: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MergeError, match=message):
        fit(tmp_path, model(suite=SUITE), SequentialMerging(**callback), **options)


@pytest.mark.parametrize("merged", [{}, {"w": torch.zeros(2)}, None, "nan"])
def test_a_wrong_absorb_is_named(tmp_path: Path, merged: Any) -> None:
    class Wrong(SimpleAverage):
        def absorb(self, merged_: Any, incoming: Any, stage: Any) -> Any:
            return {n: v * torch.nan for n, v in incoming.items()} if merged == "nan" else merged

    with pytest.raises(MergeError, match=r"Wrong\.absorb: expert 'task.a'"):
        fit(tmp_path, Wrong(suite=SUITE), SequentialMerging(evaluate="none"))


def test_other_ways_to_the_same_network(tmp_path: Path) -> None:
    """A test and an export of the checkpoint, and a merge in one command."""
    found = fit(tmp_path, Sum(suite=SUITE), SequentialMerging())
    path = tmp_path / "last.ckpt"
    for callbacks in ([Report(), SequentialMerging()], [Report()]):
        engine = Case().trainer(tmp_path / "elsewhere", *callbacks)
        engine.test(Sum(suite=SUITE), datamodule=TaskDataModule(SUITE), ckpt_path=str(path), verbose=False)
        report = json.loads((tmp_path / "elsewhere" / "report.json").read_text())
        assert report["tasks"] == found["tasks_of_report"]
    exported = load_file(Case().trainer(tmp_path).export(Sum(suite=SUITE), ckpt_path=path, output=tmp_path / "a"))
    merged = load_file(
        Case().trainer(tmp_path / "b", SequentialMerging()).merge(Sum(suite=SUITE), TaskDataModule(SUITE))
    )
    for name, value in load_file(tmp_path / "export" / "merged.safetensors").items():
        assert torch.equal(exported[name], value)
        assert torch.equal(merged[name], value)
    with pytest.raises(MergeError, match="no expert was merged yet; run fit first"):
        Case().trainer(tmp_path, SequentialMerging()).test(Sum(suite=SUITE), datamodule=TaskDataModule(SUITE))


def test_a_fast_run_writes_nothing(tmp_path: Path) -> None:
    engine = Case().trainer(tmp_path, SequentialMerging(3, evaluate="all"), ResumePoint(), fast_dev_run=True)
    engine.fit(model := AdaMerging(suite=SUITE), datamodule=TaskDataModule(SUITE, batch_size=4))
    assert model.progress is not None
    assert model.progress.absorbed == 2
    assert engine.global_step == 1
    assert not list(tmp_path.iterdir())


def test_without_data(tmp_path: Path) -> None:
    engine = Case().trainer(tmp_path, SequentialMerging(evaluate="none"), ResumePoint())
    engine.fit(TsvMerge(suite=ToySuite("vit")))
    assert (tmp_path / "stage_003.safetensors").is_file()
