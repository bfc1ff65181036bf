"""The command line at the size of toys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb

from lit_merge.cli import MergeCLI, main

TINY = (
    "--suite=toys.ToySuite",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--data.steps_per_epoch=3",
)


def run(subcommand: str, config: str, *more: str) -> MergeCLI:
    """Run a subcommand on toys; ``more`` comes last and wins."""
    cli = main([subcommand, "--config", config, *TINY, *more])
    assert cli is not None
    return cli


def refused(capsys: pytest.CaptureFixture[str], *args: str, status: int) -> str:
    """Run a command line that must fail, and return what it says on standard error."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert exit_.value.code == status
    return capsys.readouterr().err


@contextmanager
def wandb_mode(mode: str) -> Iterator[None]:
    """W&B without an account, as if in a process of its own: its first run decides mode and working folder of all."""
    settings = {"MODE": mode, "SILENT": "true", "DIR": ".", "ERROR_REPORTING": "false"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(f"WANDB_{key}", value)
        patch.delenv("WANDB_API_KEY", raising=False)
        _forget_wandb()  # whatever was used outside of here
        try:
            yield
        finally:
            _forget_wandb()


def _forget_wandb() -> None:
    wandb.finish()  # also a disabled run, of which the next does not know
    wandb.teardown()  # the settings, and the service with its working folder


def report(folder: Path | str) -> dict[str, Any]:
    """The report of the run in a folder."""
    content: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    return content
