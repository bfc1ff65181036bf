"""Which run ``--ckpt_path last`` means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lit_merge.errors import MergeError

__all__ = ("continue_last_run", "newest_run")

# the argument of each logger that names the folder of its runs, below save_dir
_NAMES = {"CSVLogger": "name", "RunLogger": "name", "TensorBoardLogger": "name", "WandbLogger": "project"}


def newest_run(root: Path) -> Path | None:
    """Return the folder below ``root`` whose ``last.ckpt`` was written last, or ``None``."""
    points = sorted(root.glob("*/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return points[-1].parent if points else None


def continue_last_run(config: Any, *, fresh: bool) -> None:  # noqa: ANN401 - a parsed namespace
    """Point logger and ``ckpt_path`` of a parsed config to the newest run that can be resumed.

    Args:
        config: Parsed config of a subcommand; it is changed.
        fresh: Without such a run start a fresh one; otherwise it is an error.

    Raises:
        MergeError: There is no run to go on with.
    """
    logger = config.trainer.logger
    if isinstance(logger, list):
        logger = logger[0] if logger else False
    root = Path(config.trainer.default_root_dir or ".")
    run: Path | None = root  # without a logger, and with one that has no folders, that is the only run
    if logger is None or logger is True:  # Lightning's own choice of a logger
        run = newest_run(root := root / "lightning_logs")
    elif logger and (kind := logger.class_path.rpartition(".")[2]) in _NAMES:
        options = logger.init_args
        root = _root(options, _NAMES[kind], root)
        version = next((v for v in (options.get("version"), options.get("id")) if v is not None), None)
        if version is not None:
            run = root / (f"version_{version}" if isinstance(version, int) else str(version))
        elif (run := newest_run(root)) is not None:
            number = run.name.removeprefix("version_")
            options["version"] = int(number) if number != run.name and number.isdecimal() else run.name
    if run is None or not (run / "last.ckpt").is_file():
        if not fresh:
            raise MergeError(f"ckpt_path: last: no last.ckpt below {root}; run fit first, or give a path")
        config.ckpt_path = None
    else:
        config.ckpt_path = str(run / "last.ckpt")


def _root(options: Any, key: str, folder: Path) -> Path:  # noqa: ANN401
    name = options.get(key, "lightning_logs")
    if name is None and key == "project":
        name = os.environ.get("WANDB_PROJECT", "lightning_logs")
    return Path(options.get("save_dir") or folder) / (name or "")
