"""Finds what makes the host wait for the device, on a machine that has none.

A fit runs on the ``meta`` device, whose tensors have shapes but no values. Whatever reads a value, or copies between
host and device, passes by a dispatch mode that sees it; on CUDA each of them waits for all that the device has to do,
unless the memory is pinned.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from testers import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_merge import MergeModule, MergeTrainer, TaskDataModule

ROOT = Path(__file__).parent.parent
META = torch.device("meta")
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim"}
READS |= {"unique_consecutive", "histc", "lift_fresh"}  # the last is torch.tensor(numbers, device=...)


class Waits(TorchDispatchMode):
    """Notes each operation that waits as ``operation at place``; our own and those of libraries apart.

    What is read is made up: numbers are 1. So a fit gets through what it checks before its first step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ours: list[str] = []
        self.theirs: list[str] = []
        self.watching = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        flat = (value for arg in args for value in (arg if isinstance(arg, list | tuple) else (arg,)))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        here = any(value.device == META for value in tensors)
        to = kwargs.get("device") or (META if here else torch.device("cpu"))
        # a single number of the host is passed along with a kernel
        mixed = here and any(value.device != META and value.ndim for value in tensors)
        masked = name in ("index", "index_put", "index_put_") and any(
            value.dtype == torch.bool for value in tensors[1:]
        )
        away = name == "_to_copy" and (to != META) == here
        if (name in READS and here) or mixed or (masked and here) or away:
            if self.watching:
                self._note(name)
            if name == "_local_scalar_dense":
                return 1.0
            if away and here:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)

    def _note(self, name: str) -> None:
        for frame in reversed(traceback.extract_stack()[:-2]):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path != Path(__file__):
                self.ours.append(f"{name} at {path.relative_to(ROOT)}:{frame.lineno}: {frame.line}")
                return
            if path.parts[-2:] != ("torch", "_tensor.py") and {"lightning", "torchmetrics", "optim"} & set(path.parts):
                self.theirs.append(f"{name} at {path.name}:{frame.lineno}: {frame.line}")
                return
        self.ours.append(f"{name} at {traceback.format_stack()[-8:-2]}")


class _Watch(L.Callback):
    """Watches from the first hook of a batch to the last one, and ends the fit after some steps."""

    def __init__(self, waits: Waits, last: bool, steps: int) -> None:
        self.waits, self.last, self.steps = waits, last, steps

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.last:
            self.waits.watching = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.last:
            self.waits.watching = False
            if batch_idx + 1 == self.steps:
                raise _DoneError


class _LastWatch(_Watch, Checkpoint):
    """Comes after all others: Lightning puts checkpoints last."""


class _DoneError(Exception):
    """The steps are done."""


class _Meta(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class _OnMeta(SingleDeviceStrategy):
    def teardown(self) -> None:
        """Leave what has no values where it is."""


def waits_of(
    model: MergeModule, data: TaskDataModule, patch: pytest.MonkeyPatch, *callbacks: L.Callback, steps: int = 2
) -> Waits:
    """Run the first steps of a fit; what waits between the first and the last hook of a batch.

    Args:
        model: What is fitted.
        data: Its images.
        patch: Does without generators and autocast, which the device does not have, and lets optimizers be fused.
        *callbacks: Whose hooks are watched too.
        steps: How many.
    """
    host = torch.Generator
    patch.setattr(torch, "Generator", lambda device="cpu": host())
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    patch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda *_, **__: None)
    waits = Waits()
    hooks = [_Watch(waits, False, steps), *callbacks, _LastWatch(waits, True, steps)]
    options = {**TINY, "accelerator": "auto", "enable_checkpointing": True, "limit_val_batches": 0}
    trainer = MergeTrainer(**options, strategy=_OnMeta(META, accelerator=_Meta()), callbacks=hooks)
    with waits, pytest.raises(_DoneError):
        trainer.fit(model, datamodule=data)
    return waits
