"""``--ckpt_path last`` starts, resumes or finishes a run, whatever is due."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import STEPS, Case, in_child, report, side_by_side
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_merge import AdaMerging, main

# The command line ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """The same command every time."""
    return [
        *("fit", "--config", "adamerging.yaml", "--suite", "toys.ToySuite", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "2", "--data.steps_per_epoch", "4", "--data.batch_size", "4"),
        *("--trainer.enable_progress_bar", "false", "--ckpt_path", "last"),
        *("--trainer.callbacks+", "ResumePoint", "--trainer.callbacks.every_n_steps", "1"),
        *arguments,
    ]


def killed(arguments: list[str], step: int) -> None:
    """Run the command and die in a step."""
    adapt, taken = AdaMerging.training_step, 0

    def training_step(self: AdaMerging, *args: Any) -> dict[str, Any]:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return adapt(self, *args)

    AdaMerging.training_step = training_step  # type: ignore[method-assign, assignment]
    main(arguments)


LOGGERS: dict[str, tuple[list[str], str]] = {
    "csv": ([], "runs/adamerging/version_0"),
    "csv version 0": (["--trainer.logger.version", "0"], "runs/adamerging/version_0"),
    "csv by name": (["--trainer.logger.version", "mine"], "runs/adamerging/mine"),
    "csv without a name": (["--trainer.logger.name", "null"], "runs/version_0"),
    "tensorboard": (["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb"],
                    "tb/adamerging/version_0"),
    "none": (["--trainer.logger", "false", "--trainer.default_root_dir", "here"], "here"),
    "wandb": (["--config", "wandb.yaml"], ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the command without a kill."""
    folder = tmp_path_factory.mktemp("straight")

    def work() -> None:
        os.chdir(folder)
        main(command())

    assert in_child(work) == 0
    return folder / "runs/adamerging/version_0"


def learned(folder: Path) -> Tensor:
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    coefficients: Tensor = checkpoint["state_dict"]["coefficients"]
    return coefficients


def starts_resumes_and_finishes(logger: str, root: Path, expected: Path) -> None:
    """What the one command must do; it takes three forks in a folder of its own."""
    root.mkdir()
    os.chdir(root)
    options, place = LOGGERS[logger]
    arguments = command(*options)
    assert in_child(lambda: killed(arguments, 7)) == -signal.SIGKILL
    points = list(root.rglob("last.ckpt"))
    assert len(points) == 1, logger
    folder = points[0].parent
    assert folder == root / place or logger == "wandb"
    assert in_child(lambda: main(arguments)) == 0
    assert list(root.rglob("last.ckpt")) == points  # resumed in the same folder, under the same W&B id
    assert torch.equal(learned(folder), learned(expected))
    assert report(folder) == report(expected)
    before = points[0].read_bytes()
    (folder / "report.json").unlink()
    assert in_child(lambda: main(arguments)) == 0
    assert points[0].read_bytes() == before
    assert report(folder) == report(expected)
    assert json.loads((folder / "report.json").read_text())["extra"]["steps"] == 8
    assert [path.parent for path in root.rglob("report.json")] == [folder]


@pytest.mark.slow
@pytest.mark.parametrize("loggers", [list(LOGGERS)[:4], list(LOGGERS)[4:]], ids=["csv", "others"])
def test_one_command_starts_resumes_and_finishes(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, loggers: list[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    side_by_side([partial(starts_resumes_and_finishes, name, tmp_path / name, straight) for name in loggers])


def test_the_default_logger_of_lightning_is_found_again(tmp_path: Path, straight: Path) -> None:
    arguments = command("--trainer.logger", "true")
    assert in_child(lambda: killed(arguments, 7)) == -signal.SIGKILL
    assert in_child(lambda: main(arguments)) == 0
    folders = sorted(path.parent for path in tmp_path.rglob("last.ckpt"))  # it cannot be told its version
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    assert torch.equal(learned(folders[1]), learned(straight))


def test_a_fixed_version_is_not_mixed_up_with_a_newer_one(tmp_path: Path) -> None:
    for version in ("0", "1"):
        assert in_child(lambda: killed(command("--trainer.logger.version", version), 3)) == -signal.SIGKILL  # noqa: B023
    assert in_child(lambda: main(command("--trainer.logger.version", "0"))) == 0
    runs = tmp_path / "runs" / "adamerging"
    assert learned(runs / "version_0").shape == (3, 10)
    assert torch.load(runs / "version_1" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_without_a_logger_other_folders_are_not_taken_for_the_run(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "last.ckpt").write_bytes(b"not a checkpoint")
    assert in_child(lambda: main(command("--trainer.logger", "false"))) == 0
    assert len(learned(tmp_path)) == 3


def test_last_without_a_run_is_an_error_for_what_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["test", *command()[1:]])
    assert exit_.value.code == 1
    assert "ckpt_path: last: no last.ckpt below runs/adamerging; run fit first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found|no such|not exist"),
        (b"", "no data|empty|Ran out|EOF"),
        (b"not a checkpoint", "invalid|pickle|Unpickl"),
    ],
)
def test_an_unusable_checkpoint_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "broken.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main([*command(), "--ckpt_path", str(path)])
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    assert "broken.ckpt" in text
    assert "Traceback" not in text


def test_python_resumes_from_a_fixed_version(tmp_path: Path) -> None:
    case = Case()
    for epochs in (1, 2):
        model = case.model()
        trainer = case.trainer(tmp_path, logger=CSVLogger(tmp_path, "runs", version=3), max_epochs=epochs)
        trainer.fit(model, datamodule=case.data(model.suite), ckpt_path="last")
        assert trainer.global_step == epochs * STEPS
    assert [path.parent.name for path in tmp_path.rglob("last.ckpt")] == ["version_3"]
