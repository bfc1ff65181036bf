from __future__ import annotations

import pytest
import torch

from lit_merge.data import UnlabelledBatch
from lit_merge.data.parts import split_batches


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_cut_a_batch_as_one_would(total: int, world: int, count: int) -> None:
    def whole(rank: int) -> dict[str, UnlabelledBatch]:
        own = torch.arange(total)[rank::world]
        index = own if len(own) else torch.tensor([0])  # borrowed
        return {"a": UnlabelledBatch(index.float(), index, len(own) * world / total)}

    alone = {"a": UnlabelledBatch(torch.arange(total).float(), torch.arange(total))}
    wanted = [part["a"] for part in split_batches(alone, count)]
    for number, part in enumerate(wanted):
        pieces = [split_batches(whole(rank), count, rank, world)[number]["a"] for rank in range(world)]
        seen = [i for piece in pieces if piece.share for i in piece.index.tolist()]
        assert sorted(seen) == part.index.tolist()
        mean = sum(piece.images.mean() * piece.share for piece in pieces) / world
        assert float(mean) == pytest.approx(float(part.images.mean()))
