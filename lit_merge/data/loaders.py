"""Samplers whose order is a pure function of (seed, step, rank), and a loader that resumes in the middle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_merge.data.prefetch import copied_ahead, made_ahead

__all__ = ("EvaluationSampler", "ResumableLoader", "StreamSampler")

# positions of the images, and the weight of this rank's mean (see UnlabelledBatch.share)
Draw = tuple[list[int], float]


# A DistributedSampler in name, so that Lightning keeps it as it is and calls ``set_epoch``.
class StreamSampler(DistributedSampler[Any]):
    """Endless shuffled stream of every task, cut into steps; ranks take turns within a step.

    Each task's stream is one permutation of its images after the other, the k-th drawn from (seed, task, k). Global
    step s takes the next ``batch_size * world`` images of every stream; a run with W ranks therefore sees in each step
    the images of a one-rank run with W times the batch size.

    Where a step's images cannot be dealt evenly (at the end of a stream that is shown once), each rank gets the share
    that makes the mean over ranks the mean over images. A rank without an image borrows one with share 0, so that all
    ranks have the same tasks in every step.

    Args:
        positions: Positions of the images per task.
        batch_size: Images per task, step and rank.
        steps: Steps per epoch.
        seed: Seed of the order.
        rank: Rank of this process.
        world: Number of processes.
        once: Keep the given order and show each image once (the last batch is shorter); ``steps`` is then derived.

    Attributes:
        start: Steps that the next iteration leaves out, for resuming.
    """

    def __init__(
        self,
        positions: Mapping[str, list[int]],
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        once: bool = False,
    ) -> None:
        self.positions = dict(positions)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.once = once
        self.epoch = 0
        self.start = 0
        self._orders: dict[str, tuple[int, list[int]]] = {}
        longest = max(len(p) for p in self.positions.values())
        self.steps = -(-longest // (batch_size * world)) if once else steps

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Draw]]:
        start, self.start = self.start, 0
        for step in range(start, self.steps):
            yield self.step(self.epoch * self.steps + step)

    def step(self, number: int) -> dict[str, Draw]:
        """Positions and share per task in global step ``number``, on this rank; used up tasks are left out."""
        size = self.batch_size * self.world
        drawn = {}
        for task, positions in self.positions.items():
            span = range(number * size, (number + 1) * size)
            if self.once:
                span = range(min(span.start, len(positions)), min(span.stop, len(positions)))
            if span:
                own = span[self.rank :: self.world]
                share = len(own) * self.world / len(span)
                drawn[task] = [self._draw(task, place) for place in own or span[:1]], share
        return drawn

    def _draw(self, task: str, place: int) -> int:
        positions = self.positions[task]
        if self.once:
            return positions[place]
        number, offset = divmod(place, len(positions))
        return positions[self._permutation(task, number)[offset]]

    def _permutation(self, task: str, number: int) -> list[int]:
        if self._orders.get(task, (-1, []))[0] != number:
            digest = hashlib.sha256(f"{self.seed}/{task}/{number}".encode()).digest()  # does not depend on other tasks
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            order = torch.randperm(len(self.positions[task]), generator=generator).tolist()
            self._orders[task] = (number, order)
        return self._orders[task][1]


class EvaluationSampler(DistributedSampler[Any]):
    """Every image exactly once over all ranks; nothing is padded, so the last ranks may have one image less.

    Args:
        size: Number of images.
        rank: Rank of this process.
        world: Number of processes.

    >>> [list(EvaluationSampler(5, rank, 2)) for rank in range(2)]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.own = range(rank, size, world)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)


class ResumableLoader(DataLoader[Any]):
    """Counts the batches that were consumed; Lightning saves the count and gives it back on resume.

    Batches that were made ahead, by workers or by a thread, do not count.

    Args:
        dataset: Understands the items of the sampler.
        sampler: Where to begin after a resume.
        ahead: Batches that a thread makes ahead, if there are no workers, which do so anyway; 0 for none.
        device: CUDA device that one of them is copied to ahead; by default none is.
        **kwargs: Further arguments of ``DataLoader``.
    """

    sampler: StreamSampler

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401
        sampler: StreamSampler,
        *,
        ahead: int = 0,
        device: torch.device | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(dataset, sampler=sampler, batch_size=None, **kwargs)
        self.ahead = ahead
        self.device = device
        self.seen = 0
        self._skip = 0

    def state_dict(self) -> dict[str, int]:
        """Batches consumed in this epoch."""
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that were consumed."""
        self._skip = self.sampler.start = state["seen"] % len(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped, self._skip = self._skip, 0
        batches: Iterator[Any] = super().__iter__()
        if self.ahead and not self.num_workers:
            batches = made_ahead(batches, self.ahead, self.device)
        if self.device is not None:
            batches = copied_ahead(batches, self.device)
        return self._count(batches, skipped)

    def _count(self, batches: Iterator[Any], seen: int) -> Iterator[Any]:
        for batch in batches:
            seen += 1
            self.seen = seen
            yield batch
