"""Where a result comes from: versions, configuration and hashes."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import lightning as L

from lit_merge import __version__
from lit_merge.module import MergeModule

__all__ = ("described", "provenance", "versions")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on.

    >>> sorted(versions())
    ['lightning', 'lit-merge', 'python', 'torch']
    """
    return {
        "lit-merge": __version__,
        "lightning": version("lightning"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def described(model: MergeModule) -> dict[str, Any]:
    """Return what of :meth:`~lit_merge.MergeModule.fingerprint` is known before anything is read."""
    return {"tasks": list(model.suite.tasks), "transforms": [repr(transform) for transform in model.transforms]}


def provenance(trainer: L.Trainer, model: MergeModule, *, merged: bool = True) -> dict[str, Any]:
    """Return what ``merge.json`` says: method, suite, hashes, versions and, from the command line, the config.

    Args:
        trainer: Whose callbacks know the config.
        model: The merge.
        merged: Whether networks have been read, so that their hashes are known.
    """
    from lit_merge.callbacks.log_config import LogConfig

    lost = model.bank.storage_report() if merged else {}
    configs = [c.text() for c in trainer.callbacks if isinstance(c, LogConfig)]  # type: ignore[attr-defined]
    return {
        "schema": 1,
        "method": type(model).__name__,
        "suite": model.suite.name,
        **(model.fingerprint() if merged else described(model)),
        "sources": model.suite.sources(),
        "hyperparameters": {key: value for key, value in model.hparams.items() if not key.startswith("_")},
        **({"storage": lost} if lost else {}),
        "steps": trainer.global_step,
        "versions": versions(),
        "config": configs[0] if configs else None,
    }
