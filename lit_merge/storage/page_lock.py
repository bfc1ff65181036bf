"""Memory that a CUDA device can read by itself."""

from __future__ import annotations

import os
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ("PageLock",)


class PageLock:
    """Locks the pages of a tensor where they are, as long as this object lives; see :attr:`held`.

    ``Tensor.pin_memory`` would hold everything twice, and rounds up to a power of two.

    Args:
        tensor: On the CPU.
        device: The CUDA device that reads it.

    Attributes:
        size: Bytes.
        held: Whether the system allowed it. If not, copies go by way of a small buffer of the driver.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor, self._device, self._process = tensor, device, os.getpid()
        self.size = tensor.untyped_storage().nbytes()
        pointer = tensor.untyped_storage().data_ptr()
        self.held = self.size > 0 and int(torch.cuda.cudart().cudaHostRegister(pointer, self.size, 0)) == 0
        if self.size and not self.held:
            with suppress(RuntimeError):  # the next thing that CUDA does would report it as its own failure
                torch.zeros((), device=self._device)

    def __del__(self) -> None:
        if getattr(self, "held", False) and self._process == os.getpid():  # a fork has no CUDA of its own
            torch.cuda.synchronize(self._device)  # copies that are queued still read it
            torch.cuda.cudart().cudaHostUnregister(self._tensor.untyped_storage().data_ptr())
