"""Reading several networks at the same time: disks, copies and SHA-256 do not hold Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ("MOST_THREADS", "in_threads")

Result = TypeVar("Result")

MOST_THREADS = 4
"""More than these wait for one another's memory and disk."""


def in_threads(jobs: Sequence[Callable[[], Result]], threads: int | None = None) -> list[Result]:
    """Run jobs in a few threads, with the grad and inference modes of this one.

    Args:
        jobs: What to run; each is run by one thread, and they are begun in their order.
        threads: How many threads, at least 1, which is this one; by default as many as there are jobs and cores, at
            most :data:`MOST_THREADS`.

    Returns:
        What they returned, in the order of the jobs.

    Raises:
        BaseException: That of the first job, in the order of jobs and not of time, that raised one; jobs that have not
            begun by then are left out.

    >>> in_threads([lambda: 1, lambda: 2], threads=2)
    [1, 2]
    """
    threads = min(len(jobs), MOST_THREADS, os.cpu_count() or 1) if threads is None else min(len(jobs), threads)
    if threads <= 1:
        return [job() for job in jobs]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(job: Callable[[], Result]) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # both belong to a thread
            return job()

    with ThreadPoolExecutor(threads, thread_name_prefix="lit-merge") as pool:
        return list(pool.map(run, jobs))  # an error leaves out what has not begun, and waits for the rest
