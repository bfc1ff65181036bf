"""Two ranks with half the batch each do what one rank does: in every gradient, and in every number of the report."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from kills import in_child
from rank_group import ends
from ranks import ALL, OneRank, Record, close, odd, run, trainer
from torch.multiprocessing.spawn import ProcessExitedException
from toys import ToySuite, expert_state, network

import lit_merge
from lit_merge import AdaMerging, MergeTrainer, TaskDataModule, main
from lit_merge.callbacks import CoefficientMonitor, CollapseMonitor, ExportMerge, Report, ResumePoint
from lit_merge.methods import TaskArithmetic
from lit_merge.objectives import Diversity, Entropy, Objective
from lit_merge.sinks import run_dir


@pytest.mark.parametrize(
    ("protocol", "objective"),  # the gradient of the sum has those of all terms in it
    [("transductive", ALL), ("split", ALL), ("online", ALL), ("online", Entropy()), ("split", Diversity())],
    ids=["transductive-all", "split-all", "online-all", "online-entropy", "split-diversity"],
)
def test_two_ranks_are_one(tmp_path: Path, protocol: str, objective: Objective) -> None:
    suite = odd(single=protocol != "split")  # one image cannot be split
    (alone,), expected = run(tmp_path / "1", 1, suite, objective, protocol)
    ranks, report = run(tmp_path / "2", 2, suite, objective, protocol)
    steps = len(alone["gradients"])
    assert steps >= 3
    for rank in ranks:
        assert len(rank["gradients"]) == steps
        for got, wanted in zip(rank["gradients"], alone["gradients"], strict=True):
            close(got, wanted)
        close(rank["coefficients"], alone["coefficients"])
        assert rank["test"] == ranks[0]["test"]
    assert torch.stack(alone["gradients"]).abs().amax() > 1e-3  # there was something to compare
    for seen, *parts in zip(alone["images"], *(rank["images"] for rank in ranks), strict=True):
        for task, images in seen.items():
            assert sorted(chain.from_iterable(part[task] for part in parts)) == sorted(images)
    assert report["tasks"] == expected["tasks"]
    assert report["mean"] == pytest.approx(expected["mean"], abs=1e-12)
    assert report["protocol"] == protocol
    for task, row in report["tasks"].items():
        size = len(suite.dataset(task, "test"))
        assert row["n"] == (size - round(0.5 * size) if protocol == "split" else size)
        assert ("final_accuracy" in row) == (protocol == "online")


def test_validation_inside_a_fit_is_exact_and_has_no_references(tmp_path: Path) -> None:
    (alone,), _ = run(tmp_path / "1", 1, epochs=3)
    ranks, _ = run(tmp_path / "2", 2, epochs=3)
    assert len(alone["validation"]) == 3
    for rank in ranks:
        assert rank["validation"] == alone["validation"]
    first = alone["validation"][0]
    assert {task: row["n"] for task, row in first["tasks"].items()} == {"task.a": 13, "task.b": 1, "task.c": 22}
    assert set(first["mean"]) == {"accuracy"}


def test_recalibrated_statistics_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    options = {"buffers": "recalibrate"}
    (alone,), expected = run(tmp_path / "1", 1, epochs=1, model_options=options)
    ranks, report = run(tmp_path / "2", 2, epochs=1, model_options=options)
    assert len(alone["statistics"]) == 4
    for rank in ranks:
        for name, value in alone["statistics"].items():
            close(rank["statistics"][name], value)
    assert report["tasks"] == expected["tasks"]


def test_accumulated_gradients_are_those_of_one_rank(tmp_path: Path) -> None:
    (alone,), _ = run(tmp_path / "1", 1, epochs=2, accumulate_grad_batches=2, objective=ALL)
    ranks, _ = run(tmp_path / "2", 2, epochs=2, accumulate_grad_batches=2, objective=ALL)
    for rank in ranks:
        close(torch.stack(rank["gradients"]), torch.stack(alone["gradients"]))


def test_a_method_that_learns_nothing_is_scored_by_all_ranks(tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        suite = odd()
        engine = trainer(folder, ranks, callbacks=[Report(), Record(folder)])
        model = TaskArithmetic(suite=suite, scale=0.3)
        engine.validate(model, datamodule=TaskDataModule(suite, eval_batch_size=4), verbose=False)
        reports.append(json.loads((folder / "report.json").read_text())["tasks"])
    assert reports[0] == reports[1]
    assert sum(row["n"] for row in reports[1].values()) == 36


def test_files_are_written_by_rank_zero_only(tmp_path: Path) -> None:
    suite = odd()
    model = AdaMerging(suite=suite)
    callbacks = [OneRank(), Report(), CollapseMonitor(2), CoefficientMonitor(1), ResumePoint(1), ExportMerge()]
    engine = trainer(tmp_path, 2, max_epochs=1, callbacks=callbacks)
    engine.fit(model, datamodule=TaskDataModule(suite, batch_size=4))
    engine.test(model, datamodule=TaskDataModule(suite, batch_size=4), verbose=False)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found >= {"last.ckpt", "report.json", "coefficients.csv", "coefficients.png"}
    assert not [name for name in found if "tmp" in name]


class Unequal(ToySuite):
    """What happens when one machine has another file."""

    def expert(self, task: str) -> Any:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return expert_state(network("cnn"), 77 + rank) if task == self.tasks[0] else super().expert(task)


def test_banks_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    suite = Unequal("cnn")
    engine = trainer(tmp_path, 2, max_epochs=1)
    with pytest.raises(Exception, match=r"ranks differ: expert 'task.a' is .* all ranks must read the same files"):
        engine.fit(AdaMerging(suite=suite), datamodule=TaskDataModule(suite, batch_size=4))


@pytest.mark.parametrize("protocol", ["transductive", "split", "online"])
def test_the_plain_trainer_leaves_the_samplers_alone(tmp_path: Path, protocol: str) -> None:
    suite = ToySuite("mlp")
    folder = tmp_path / "plain"
    folder.mkdir()
    # use_distributed_sampler is on by default: Lightning would replace samplers that it does not know
    engine = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, callbacks=[Record(folder)],
    )  # fmt: skip
    data = TaskDataModule(suite, batch_size=4, seed=3, protocol=protocol)  # type: ignore[arg-type]
    model = AdaMerging(suite=suite, optimizer=partial(torch.optim.SGD, lr=0.05))
    engine.fit(model, datamodule=data)
    engine.test(model, datamodule=data, verbose=False)
    (alone,), _ = run(tmp_path / "1", 1, suite, protocol=protocol, epochs=1)
    close(model.coefficients.detach(), alone["coefficients"], 1e-6)
    recorded = [torch.load(folder / f"fit-{rank}.pt") for rank in range(2)]
    for seen, *parts in zip(alone["images"], *(rank["images"] for rank in recorded), strict=True):
        for task, images in seen.items():
            assert sorted(chain.from_iterable(part[task] for part in parts)) == sorted(images)
    for rank in range(2):
        assert torch.load(folder / f"test-{rank}.pt")["results"]["tasks"] == alone["test"]["tasks"]


def arguments(*more: str) -> list[str]:
    return [
        *("fit", "--config", "adamerging.yaml", "--suite", "toys.ToySuite", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--data.steps_per_epoch", "4"),
        *("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.05"),
        *more,
    ]


@pytest.mark.slow
def test_the_real_command_with_two_processes_that_are_killed_once(tmp_path: Path) -> None:
    main(arguments("--data.batch_size", "8"))
    alone = tmp_path / "runs" / "adamerging" / "version_0"
    paths = [str(Path(__file__).parent), str(Path(lit_merge.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    (tmp_path / "ddp").mkdir()
    options = arguments("--data.batch_size", "4", "--trainer.strategy", "ddp", "--trainer.devices", "2")

    def command(*more: str) -> None:
        """What ``python -m lit_merge`` does, in a fork that has imported everything; Lightning starts the other."""
        os.chdir(tmp_path / "ddp")
        os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
        for number, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1))
        sys.argv = ["lit_merge", *options, *more]
        runpy.run_module("lit_merge", run_name="__main__", alter_sys=True)
        with suppress(ChildProcessError):  # Lightning has waited for it, and looked at its status
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 0

    fate = {"rank": "0", "moment": "step", "how": "kill", "step": "5", "busy": "true"}
    given = [text for key, value in fate.items() for text in (f"--trainer.callbacks.{key}", value)]
    assert in_child(lambda: command("--trainer.callbacks+", "rank_group.Fate", *given)) == -signal.SIGKILL
    assert ends(int((tmp_path / "ddp" / "pid-1").read_text()), 30)  # it was busy, and was told by nobody
    assert "error: rank 1 ends" in (tmp_path / "ddp" / "stderr").read_text()
    status = in_child(lambda: command("--ckpt_path", "last"))
    stdout, stderr = ((tmp_path / "ddp" / name).read_text() for name in ("stdout", "stderr"))
    assert status == 0, stderr[-3000:]
    assert "Traceback" not in stderr
    assert stdout.count("AdaMerging on toys") == 1  # one table
    folder = tmp_path / "ddp" / "runs" / "adamerging" / "version_0"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in alone.iterdir())
    reports = [json.loads((path / "report.json").read_text()) for path in (alone, folder)]
    for key in ("method", "suite", "protocol", "seed", "versions"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["tasks"] == reports[1]["tasks"]
    assert reports[0]["mean"] == pytest.approx(reports[1]["mean"], abs=1e-12)
    states = [torch.load(path / "last.ckpt", weights_only=True) for path in (alone, folder)]
    one, two = (state["state_dict"]["coefficients"] for state in states)
    close(one, two, 1e-6)
    assert states[0]["global_step"] == states[1]["global_step"] == 8


def test_every_process_looks_for_its_run_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # ckpt_path="last" is looked up before the processes of the strategy can ask one another
    engine = MergeTrainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path)
    monkeypatch.setattr(MergeTrainer, "is_global_zero", property(lambda _: False))
    assert run_dir(engine) == tmp_path


class Die(L.Callback):
    """Kills each rank at the start of a step."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def test_two_killed_ranks_go_on_with_their_stream(tmp_path: Path) -> None:
    def fit(folder: Path, *more: L.Callback) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        suite = odd()
        engine = trainer(folder, 2, max_epochs=1, callbacks=[Report(), ResumePoint(1), *more])
        data = TaskDataModule(suite, batch_size=2, protocol="online", seed=3)
        engine.fit(AdaMerging(suite=suite, objective=ALL), datamodule=data, ckpt_path="last")
        content: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
        return content

    expected = fit(tmp_path / "straight")
    with pytest.raises(ProcessExitedException):
        fit(tmp_path / "killed", Die())
    assert torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["global_step"] in (2, 3)
    got = fit(tmp_path / "killed")
    assert got["global_step"] == expected["global_step"] == 6
    assert torch.equal(got["state_dict"]["coefficients"], expected["state_dict"]["coefficients"])
    counts = got["lit_merge_stream"]
    assert counts == expected["lit_merge_stream"]
    assert {task: total for task, (_, total) in counts.items()} == {"task.a": 13, "task.b": 1, "task.c": 22}
