from __future__ import annotations

import torch
from torch import Tensor

from lit_merge.data import UnlabelledBatch
from lit_merge.teachers import TeacherCache


class Expert:
    """Counts the images it is asked for."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(images)
        return images.flatten(1), 2 * images.flatten(1)[:, :2]


def batch(*positions: int) -> UnlabelledBatch:
    index = torch.tensor(positions)
    return UnlabelledBatch(index.float().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), index)


def test_each_image_is_computed_once() -> None:
    cache, expert = TeacherCache(), Expert()
    for positions in ((0, 1, 2), (3, 4, 5), (5, 0, 3), (1, 1)):
        features, logits = cache.outputs("a", batch(*positions), lambda: 6, expert)
        expected = Expert()(batch(*positions).images)
        assert torch.equal(features, expected[0])
        assert torch.equal(logits, expected[1])
    assert expert.images == 6


def test_tasks_are_apart() -> None:
    cache, expert = TeacherCache(), Expert()
    cache.outputs("a", batch(0), lambda: 1, expert)
    cache.outputs("b", batch(0), lambda: 1, expert)
    assert expert.images == 2


def test_a_task_beyond_the_budget_is_computed_anew() -> None:
    cache, expert = TeacherCache(budget=6 * 24), Expert()  # 4 features and 2 logits of 4 bytes for 6 images
    for task in ("fits", "does not"):
        for _ in range(2):
            cache.outputs(task, batch(0, 1), lambda: 6, expert)
    assert expert.images == 2 + 4
    assert cache.budget == 0
