"""Batches that are made, and brought to the device, before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ("copied_ahead", "made_ahead")


def made_ahead(batches: Iterator[Any], count: int, device: torch.device | None = None) -> Iterator[Any]:
    """Yield the same batches, made by a thread while earlier ones are being used.

    Decoding and copying let other Python code go on meanwhile. An error comes where its batch would have come. The
    thread ends with the iteration, also with one that is given up.

    Args:
        batches: What makes them; used by the thread alone.
        count: How many may wait, at least 1; one more is in the making.
        device: CUDA device that their memory is pinned for, if it is.

    >>> list(made_ahead(iter(range(5)), 2))
    [0, 1, 2, 3, 4]
    """
    ready: Queue[tuple[Any, BaseException | None]] = Queue(count)
    given_up = Event()

    def put(batch: Any, error: BaseException | None = None) -> bool:  # noqa: ANN401
        while not given_up.is_set():
            try:
                ready.put((batch, error), timeout=0.1)
            except Full:
                continue
            return True
        return False

    def work() -> None:
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the first one
        try:
            while put(next(batches)):
                pass
        except BaseException as error:
            put(None, error)

    thread = Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
    finally:
        given_up.set()
        thread.join()


def copied_ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield the same batches on a CUDA device; the next one is copied while this one is being used.

    The copies are made on a stream of their own, so they need not queue behind the step. Of pinned memory the host
    does not wait for them either.

    Args:
        batches: Batches on the host.
        device: Where they are wanted.
    """
    stream = torch.cuda.Stream(device)

    def copy() -> tuple[Any, torch.cuda.Event] | None:
        for batch in batches:
            with torch.cuda.stream(stream):
                return move_data_to_device(batch, device), stream.record_event()
        return None

    following = copy()
    while following is not None:
        batch, copied = following
        following = copy()
        user = torch.cuda.current_stream(device)
        user.wait_event(copied)
        for value in tree_leaves(batch):
            if isinstance(value, Tensor):
                value.record_stream(user)  # its memory is free again when the user, not the copy, is done with it
        yield batch
