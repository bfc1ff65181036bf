"""What the tests of callbacks share."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_merge.trainer import MergeTrainer


def trainer_of(*callbacks: L.Callback, **options: Any) -> MergeTrainer:
    """A trainer for one epoch that is quiet and logs nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 1} | quiet
    return MergeTrainer(callbacks=list(callbacks), **(defaults | options))
