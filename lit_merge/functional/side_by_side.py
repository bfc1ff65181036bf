"""Independent computations side by side: one LAPACK call does not keep many cores busy, several do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

__all__ = ("side_by_side",)

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device | None = None
) -> list[Result]:
    """Map in as many threads as torch has; where there are fewer items, each gets its share of the threads.

    With at least as many items as threads each is computed by one thread, so the results do not depend on how many run
    at once. No more computations than threads are in memory. Afterwards torch has as many threads as before. Within,
    gradients are recorded if they are outside, and autocasting is off.

    Args:
        function: Called from several threads at once.
        items: What it is called with.
        device: Where it computes; on anything but a CPU, the calls are made one after the other.

    Returns:
        Results in the order of the items.

    Raises:
        Exception: The first that a call raises, in the order of the items.

    >>> [float(x) for x in side_by_side(torch.trace, [torch.eye(2), torch.eye(3)])]
    [2.0, 3.0]
    """
    given, threads = list(items), torch.get_num_threads() if device is None or device.type == "cpu" else 1
    call = partial(_call, function, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    workers = min(threads, len(given))
    if workers < 2:
        return [call(item) for item in given]
    try:  # a thread asks for its own number, and a new one begins with what was asked for last
        share = threads // workers
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            return list(pool.map(call, given))
    finally:
        torch.set_num_threads(threads)


def _call(function: Callable[[Item], Result], gradients: bool, inference: bool, item: Item) -> Result:
    with (
        torch.inference_mode(inference),
        torch.set_grad_enabled(gradients and not inference),
        torch.autocast("cpu", enabled=False),
    ):
        return function(item)
