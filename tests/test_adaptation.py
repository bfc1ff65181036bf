"""Which tasks go through the encoder together."""

from __future__ import annotations

import pytest
import torch

from lit_merge.adaptation import chunks
from lit_merge.data import UnlabelledBatch
from lit_merge.data.loaders import StreamSampler
from lit_merge.data.parts import split_batches


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("most", [1, 4, 5, 6, 9])
def test_all_ranks_group_tasks_alike(world: int, most: int) -> None:
    # ranks that climb in other groups would reduce the gradient of one task with that of another
    positions = {task: list(range(size)) for task, size in zip("abcd", (13, 1, 22, 9), strict=True)}
    uneven = 0
    samplers = [StreamSampler(positions, 3, 0, rank=rank, world=world, once=True) for rank in range(world)]
    for step in range(samplers[0].steps):
        every = []
        for rank, sampler in enumerate(samplers):
            drawn = sampler.step(step).items()
            batch = {t: UnlabelledBatch(torch.zeros(len(p), 1, 1, 1), torch.tensor(p), s) for t, (p, s) in drawn}
            every.append([batch, *split_batches(batch, 2, rank, world)])
        for parts in zip(*every, strict=True):
            groups = [chunks(part, most) for part in parts]
            assert all(group == groups[0] for group in groups)
            for part in parts:
                assert all(len(g) == 1 or sum(len(part[t].images) for t in g) <= most for g in groups[0])
            uneven += len({tuple(len(one.images) for one in part.values()) for part in parts}) > 1
    assert uneven
