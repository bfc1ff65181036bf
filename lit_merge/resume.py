"""Which run ``--ckpt_path last`` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_merge.errors import MergeError

__all__ = ("continue_last_run", "newest_run")

# per logger: where its runs lie below save_dir, and its default
_NAMES = {"CSVLogger": ("name", "lightning_logs"), "TensorBoardLogger": ("name", "lightning_logs"),
          "WandbLogger": ("project", "lightning_logs"), "RunLogger": ("name", "lit-merge")}  # fmt: skip


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
    logger = logger[0] if isinstance(logger, list) and logger else logger
    root, run = _root(config), None
    if logger is None or isinstance(logger, bool):
        run = root if (root / "last.ckpt").is_file() else newest_run(root)
    elif (version := _get(logger, "version") or _get(logger, "id")) is not None:
        folder = root / (f"version_{version}" if isinstance(version, int) else str(version))
        run = folder if (folder / "last.ckpt").is_file() else None
    elif (run := newest_run(root)) is not None:
        _, _, number = run.name.partition("version_")
        logger.init_args["version"] = int(number) if number.isdecimal() else run.name
    if run is None and not fresh:
        raise MergeError(f"ckpt_path: last: no last.ckpt below {root}; run fit first, or give a path")
    config.ckpt_path = None if run is None else str(run / "last.ckpt")


def _root(config: Any) -> Path:  # noqa: ANN401
    logger = config.trainer.logger
    logger = logger[0] if isinstance(logger, list) and logger else logger
    folder = Path(config.trainer.default_root_dir or ".")
    if logger is None or isinstance(logger, bool):
        return folder
    key, default = _NAMES.get(logger.class_path.rpartition(".")[2], ("name", ""))
    return Path(_get(logger, "save_dir") or folder) / str(_get(logger, key) or default)


def _get(logger: Any, key: str) -> Any:  # noqa: ANN401
    return logger.get("init_args", {}).get(key)
