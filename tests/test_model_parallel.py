"""Runs with a bank that ranks share, under DDP and under a ModelParallelStrategy, are those of one rank."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from rank_group import gathered, in_ranks
from ranks import ALL, odd, trainer
from safetensors.torch import load_file
from toys import ToySuite

from lit_merge import AdaMerging, MergeError, MergeModule, TaskDataModule, main
from lit_merge.callbacks import ExportMerge, Report, ResumePoint
from lit_merge.methods import ConcreteMerging, TallMasks, TaskArithmetic
from lit_merge.storage import DenseStorage, sharded
from lit_merge.transforms import Ties

IMAGES = 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "WHOLE", 4)  # toys have no tensor that is worth a message


class Shared(L.Callback):
    """Fails if the bank is not shared, and may kill one rank."""

    def __init__(self, ranks: int, kill: int | None, step: int) -> None:
        self.ranks, self.kill, self.step = ranks, kill, step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, MergeModule)
        storage = pl_module.bank.storage
        assert getattr(storage, "group").size == self.ranks if self.ranks > 1 else type(storage) is DenseStorage  # noqa: B009
        if self.kill == trainer.global_rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    ranks: int = 1,
    mesh: tuple[int, int] | None = None,
    method: type[MergeModule] = AdaMerging,
    kill: int | None = None,
    steps: int = 6,
    **options: Any,
) -> dict[str, Any]:
    """What one of several ranks learns and reports; there is a checkpoint in the middle of the run."""
    folder.mkdir(exist_ok=True)
    suite = odd()
    model = method(suite=suite, storage="sharded", optimizer=partial(torch.optim.SGD, lr=0.05), **options)
    data = TaskDataModule(suite, batch_size=IMAGES // ranks, eval_batch_size=5, seed=3, steps_per_epoch=steps // 2)
    report = Report()
    callbacks = [report, ResumePoint(), ExportMerge(), Shared(mesh[1] if mesh else ranks, kill, steps // 2 + 1)]
    more: dict[str, Any] = {"strategy": "ddp"} if ranks > 1 else {}
    if mesh is not None:
        more["strategy"] = ModelParallelStrategy(*mesh)
    engine = trainer(folder, ranks, max_epochs=2, callbacks=callbacks, **more)
    engine.fit(model, datamodule=data, ckpt_path="last")
    engine.test(model, datamodule=data, verbose=False)
    learned = {name: value.detach() for name, value in model.state_dict().items()}
    content = {key: report.content[key] for key in ("tasks", "mean", "protocol")} | {"steps": engine.global_step}
    return {"learned": learned, "report": content}


def compare(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found["learned"], wanted["learned"], rtol=tolerance, atol=tolerance)
    assert found["report"]["tasks"] == wanted["report"]["tasks"]
    assert found["report"]["mean"] == pytest.approx(wanted["report"]["mean"], abs=1e-12)
    assert found["report"]["steps"] == wanted["report"]["steps"]


# teachers of which the ranks know different images at any moment, and with room for the outputs of none
@pytest.mark.parametrize(("cache", "steps"), [(2**30, 20), (0, 4)], ids=["cached", "uncached"])
def test_a_killed_rank_ends_the_run_and_the_next_run_goes_on(tmp_path: Path, cache: int, steps: int) -> None:
    options: dict[str, Any] = {"objective": ALL, "teacher_cache": cache, "steps": steps}
    wanted = run(tmp_path / "alone", **options)
    if cache:
        ended = in_ranks(2, lambda rank: run(tmp_path / "two", 2, kill=1, **options))
        assert ended[1].status == -signal.SIGKILL
        assert ended[0].status == 1
        assert torch.load(tmp_path / "two" / "last.ckpt", weights_only=True)["global_step"] == steps // 2
    for found in gathered(2, tmp_path / "ranks", lambda: run(tmp_path / "two", 2, **options)):
        compare(found, wanted)
    one, two = (load_file(tmp_path / name / "export" / "merged.safetensors") for name in ("alone", "two"))
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mesh", "method"), [((1, 2), ConcreteMerging), ((2, 2), AdaMerging)], ids=["1x2-concrete", "2x2-adamerging"]
)
def test_a_mesh_of_ranks_is_one_rank(tmp_path: Path, mesh: tuple[int, int], method: type[MergeModule]) -> None:
    options: dict[str, Any] = {"mask_steps": 4} if method is ConcreteMerging else {}
    wanted = run(tmp_path / "alone", method=method, **options)
    ranks = mesh[0] * mesh[1]
    again = {"kill": 0} if ranks == 2 else {}
    if again:
        ended = in_ranks(ranks, lambda rank: run(tmp_path / "mesh", ranks, mesh, method, **again, **options))
        assert ended[0].status == -signal.SIGKILL
    for found in gathered(ranks, tmp_path / "ranks", lambda: run(tmp_path / "mesh", ranks, mesh, method, **options)):
        compare(found, wanted)
    saved = torch.load(tmp_path / "mesh" / "last.ckpt", weights_only=True)["state_dict"]  # a file, not a folder
    torch.testing.assert_close(saved, wanted["learned"], rtol=1e-9, atol=1e-9)


def test_a_merge_without_a_fit_is_scored_and_written_by_all_ranks(tmp_path: Path) -> None:
    def merge(folder: Path, ranks: int) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        model = TaskArithmetic(suite=odd(), storage="sharded", transforms=[Ties()])
        report, more = Report(), {"strategy": "ddp"} if ranks > 1 else {}
        engine = trainer(folder, ranks, callbacks=[report], **more)
        path = engine.merge(model, datamodule=TaskDataModule(model.suite, eval_batch_size=5))
        with pytest.raises(MergeError, match="format: open_clip holds image towers"):  # on all ranks: none waits
            engine.export(model, format="open_clip")
        return {"tasks": report.content["tasks"], "state": load_file(path)}

    wanted = merge(tmp_path / "alone", 1)
    for found in gathered(2, tmp_path / "ranks", lambda: merge(tmp_path / "two", 2)):
        assert found["tasks"] == wanted["tasks"]
        torch.testing.assert_close(found["state"], wanted["state"], rtol=1e-12, atol=1e-12)


def test_the_command_takes_lightnings_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        *("fit", "--config", "adamerging.yaml", "--suite", "toys.ToySuite", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.steps_per_epoch", "2"),
        *("--model.storage", "sharded", "--trainer.strategy", "ModelParallelStrategy", "--trainer.devices", "2"),
    ]

    def command() -> int:
        cli = main(options)
        assert cli is not None
        return int(cli.model.bank.storage.group.size)

    assert gathered(2, tmp_path / "ranks", command) == [2, 2]
    folder = tmp_path / "runs" / "adamerging" / "version_0"
    assert (folder / "export" / "merged.safetensors").is_file()
    assert (folder / "report.json").is_file()


def test_what_cannot_be_sharded_is_refused_or_said(caplog: pytest.LogCaptureFixture) -> None:
    suite = ToySuite("mlp")
    with pytest.raises(MergeError, match="bank of TallMasks cannot be sharded: it makes a network per task"):
        TallMasks(suite=suite, storage="sharded")
    with pytest.raises(MergeError, match=r"model.storage: expected .*sharded.*, found 'disk'"):
        AdaMerging(suite=suite, storage="disk")
    model = AdaMerging(suite=suite, storage="sharded")
    with caplog.at_level("INFO"):
        model.configure_model()
    assert "there is one rank to hold the bank" in caplog.text
    assert type(model.bank.storage) is DenseStorage
