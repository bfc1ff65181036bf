"""All callbacks together, in one run of the command on one rank and on two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rank_group import gathered

from lit_merge import MergeModule, MergeTrainer, callbacks, main

OPTIONS: dict[str, dict[str, Any]] = {
    "SequentialMerging": {"epochs_per_task": 1, "evaluate": "all", "data": "seen"},
    "Report": {},
    "CoefficientMonitor": {"every_n_epochs": 1},
    "CollapseMonitor": {"every_n_steps": 2},
    "BackdoorMonitor": {"every_n_validations": 1},
    "ResumePoint": {"every_n_steps": 1},
    "ExportMerge": {},
}
BY_THE_COMMAND = {"LogConfig"}


def config(ranks: int) -> dict[str, Any]:
    listed = [{"class_path": f"lit_merge.callbacks.{name}", "init_args": options} for name, options in OPTIONS.items()]
    return {
        "trainer": {
            **{"accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"},
            **{"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False},
            "logger": {"class_path": "lit_merge.loggers.RunLogger", "init_args": {"name": "all"}},
            "callbacks": [{"class_path": "ranks.OneRank"}, *listed],
        },
        "suite": {"class_path": "laboratory.TinyLaboratory"},
        "model": {
            "class_path": "lit_merge.AdaMerging",
            "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}},
        },
        "data": {
            "class_path": "lit_merge.TaskDataModule",
            "init_args": {"batch_size": 6 // ranks, "eval_batch_size": 4, "steps_per_epoch": 3},
        },
    }


def command() -> str:
    """Fit, test, and an export by hand; what this rank says on standard output."""
    sys.stdout = Path(f"said-{os.environ.get('LOCAL_RANK', 0)}").open("w")  # noqa: SIM115
    cli = main(["fit", "--config", "all.yaml"])
    assert cli is not None
    assert isinstance(cli.trainer, MergeTrainer)
    assert isinstance(cli.model, MergeModule)
    path = cli.trainer.export(cli.model, output="by-hand")
    assert path.is_file()
    sys.stdout.close()
    return Path(sys.stdout.name).read_text()


def content(root: Path) -> dict[str, Any]:
    """What a run left: names of files, and the report without times."""
    report = json.loads((root / "runs" / "all" / "version_0" / "report.json").read_text())
    for stage in report["extra"]["continual"]["stages"]:
        del stage["seconds"], stage["file"]
    kept = {key: report[key] for key in ("tasks", "mean")}
    kept |= {key: report["extra"][key] for key in ("backdoor", "continual", "steps")}
    names = {path.relative_to(root).as_posix() for name in ("runs", "by-hand") for path in (root / name).rglob("*.*")}
    return {"report": kept, "files": names}


def test_all_callbacks_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(callbacks.__all__) == {*OPTIONS, *BY_THE_COMMAND}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        (tmp_path / str(ranks) / "all.yaml").write_text(yaml.safe_dump(config(ranks)))
    monkeypatch.chdir(tmp_path / "1")
    with monkeypatch.context() as kept:
        kept.setattr(sys, "stdout", sys.stdout)
        alone = command()
    monkeypatch.chdir(tmp_path / "2")
    zero, one = gathered(2, tmp_path / "said", command)
    one_rank, two_ranks = content(tmp_path / "1"), content(tmp_path / "2")
    assert two_ranks["files"] == one_rank["files"]
    assert {Path(name).name for name in two_ranks["files"]} >= {
        *("config.yaml", "metrics.csv", "last.ckpt", "report.json", "coefficients.csv", "coefficients.png"),
        *("predictions-histogram.csv", "continual-matrix.csv", "merged.safetensors", "merge.json", "backdoor.csv"),
    }
    assert two_ranks["report"] == one_rank["report"]  # counts of images, and so every rate
    assert {task: row["n"] for task, row in two_ranks["report"]["tasks"].items()} == {
        "task.a": 21, "task.b": 14, "task.c": 1,
    }  # fmt: skip
    assert zero.count("AdaMerging on toys") == alone.count("AdaMerging on toys") == 1
    assert one == ""  # the other rank has nothing to say
    states = [torch.load(tmp_path / n / "runs/all/version_0/last.ckpt", weights_only=True) for n in ("1", "2")]
    first, second = (state["state_dict"]["coefficients"] for state in states)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
