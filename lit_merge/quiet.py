"""Advice of Lightning that does not apply to merging, kept out of the terminal while the command line runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_module

__all__ = ("quiet",)

_WARNINGS = (
    "does not have many workers",  # image sets are small
    "exists and is not empty",  # a resumed run is meant to
    "LightningCLI's args parameter",  # main() is called from Python as well
    "smaller than the logging interval",
    "`max_epochs` was not set",  # SequentialMerging sets it
    "in eval mode at the start of training",  # frozen networks are
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # lightning 2.6 with torch 2.15
)
_MESSAGES = (
    "Tip: For seamless cloud",  # advertisement
    "`weights_only` was not set, defaulting to",  # about writing a checkpoint, and only confusing
)
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector")


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out some warnings and messages while the block runs; nothing else changes."""
    loggers = {logging.getLogger(name) for name in _LOGGERS} | {rank_zero_module.log}
    with warnings.catch_warnings():
        for text in _WARNINGS:
            warnings.filterwarnings("ignore", f".*{text}.*")
        for logger in loggers:
            logger.addFilter(_applies)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_applies)


def _applies(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in _MESSAGES)
