"""Cutting the images of one step into parts, for methods that want fresh images several times in a step."""

from __future__ import annotations

from collections.abc import Mapping

from lit_merge.data.batches import UnlabelledBatch

__all__ = ("split_batches",)


def split_batches(
    batch: Mapping[str, UnlabelledBatch], count: int, rank: int = 0, world: int = 1
) -> list[dict[str, UnlabelledBatch]]:
    """Cut each task's images into consecutive parts, in the order that the images have over all ranks.

    Rank r of W has the images r, r + W, r + 2W, … of a step (:class:`~lit_merge.data.loaders.StreamSampler`). The
    parts of all ranks together are those of one rank with all images, also where they are uneven: a rank without an
    image of a part borrows one with share 0. A part that no rank has an image of is the whole batch.

    Args:
        batch: Images per task.
        count: Number of parts.
        rank: Rank of this process.
        world: Number of processes.

    Returns:
        The parts, of as equal size as can be, the larger ones first.

    >>> import torch
    >>> batch = {"a": UnlabelledBatch(torch.zeros(5, 1, 2, 2), torch.arange(5))}
    >>> [part["a"].index.tolist() for part in split_batches(batch, 2)]
    [[0, 1, 2], [3, 4]]
    """
    parts: list[dict[str, UnlabelledBatch]] = [{} for _ in range(count)]
    for task, whole in batch.items():
        total = round(len(whole.images) * world / whole.share) if whole.share else 0
        cuts = [-(-total * k // count) for k in range(count + 1)]
        for part, low, high in zip(parts, cuts, cuts[1:], strict=False):
            before, upto = (len(range(rank, cut, world)) for cut in (low, high))
            if low == high:
                part[task] = whole
            else:
                own = slice(before, upto) if upto > before else slice(0, 1)
                share = (upto - before) * world / (high - low)
                part[task] = UnlabelledBatch(whole.images[own], whole.index[own], share, whole.positions[own])
    return parts
