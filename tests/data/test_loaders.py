"""The order of images is a pure function of seed, task and step."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler

from lit_merge.data import EvaluationSampler, ResumableLoader, StreamSampler

POSITIONS = {"a": list(range(7)), "b": list(range(100, 103)), "c": [5]}


def stream(steps: int = 30, batch_size: int = 2, **kwargs: Any) -> list[dict[str, list[int]]]:
    """Positions of all steps of one epoch."""
    sampler = StreamSampler(kwargs.pop("positions", POSITIONS), batch_size, steps, **kwargs)
    return [{task: draw[0] for task, draw in step.items()} for step in sampler]


def of(task: str, steps: list[dict[str, list[int]]]) -> list[int]:
    return list(chain.from_iterable(step.get(task, []) for step in steps))


class Positions(Dataset[dict[str, list[int]]]):
    """Gives back what it is asked for."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, draws: dict[str, tuple[list[int], float]]) -> dict[str, list[int]]:
        return {task: positions for task, (positions, _) in draws.items()}


def test_every_step_has_a_full_batch_of_every_task() -> None:
    for step in stream():
        assert {task: len(drawn) for task, drawn in step.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize("task", POSITIONS)
def test_each_pass_over_a_task_is_a_permutation_and_no_two_are_alike(task: str) -> None:
    size = len(POSITIONS[task])
    drawn = of(task, stream(steps=140))
    passes = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
    assert len(passes) >= 40
    assert all(sorted(one) == POSITIONS[task] for one in passes)
    assert len(set(map(tuple, passes))) > (0 if size == 1 else 5)


def test_the_order_depends_on_the_seed_and_on_the_task() -> None:
    same = {"x": list(range(50)), "y": list(range(50))}
    one, other = stream(positions=same, seed=1), stream(positions=same, seed=2)
    assert one == stream(positions=same, seed=1)
    assert of("x", one) != of("x", other)
    assert of("x", one) != of("y", one)


def test_the_order_of_a_task_does_not_depend_on_the_other_tasks() -> None:
    full, turned = stream(), stream(positions=dict(reversed(POSITIONS.items())))
    alone = stream(positions={"b": POSITIONS["b"]})
    assert of("b", full) == of("b", turned) == of("b", alone)


def test_neither_torch_nor_its_seed_has_a_part_in_it() -> None:
    torch.manual_seed(0)
    first = stream()
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert stream() == first
    torch.manual_seed(0)
    stream()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("once", [False, True])
def test_ranks_share_the_global_batch(world: int, once: bool) -> None:
    steps = 12
    alone = list(StreamSampler(POSITIONS, 2 * world, steps, seed=3, once=once))
    ranks = [list(StreamSampler(POSITIONS, 2, steps, seed=3, rank=r, world=world, once=once)) for r in range(world)]
    for together, *parts in zip(alone, *ranks, strict=True):
        for task, (positions, share) in together.items():
            dealt = [part[task] for part in parts]  # every rank has every task of the step
            own = [image for images, weight in dealt for image in images if weight > 0]
            assert share == 1
            assert Counter(own) == Counter(positions)
            assert sum(weight for _, weight in dealt) == pytest.approx(world)
            for images, weight in dealt:
                assert weight == pytest.approx(len(images) * world / len(positions)) or (weight, len(images)) == (0, 1)
            assert once or {weight for _, weight in dealt} == {1.0}


def test_once_shows_each_image_once_in_the_given_order() -> None:
    positions = {"a": [4, 1, 3, 0, 2], "b": [9]}
    sampler = StreamSampler(positions, 2, steps=99, once=True)
    steps = list(sampler)
    assert len(sampler) == len(steps) == 3
    assert steps == [{"a": ([4, 1], 1.0), "b": ([9], 1.0)}, {"a": ([3, 0], 1.0)}, {"a": ([2], 1.0)}]


def test_epochs_follow_one_another_without_a_gap() -> None:
    sampler = StreamSampler(POSITIONS, 2, 4)
    parts = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        parts += [{task: draw[0] for task, draw in step.items()} for step in sampler]
    assert parts == stream(steps=12)


def loader(workers: int = 0, ahead: int = 0) -> ResumableLoader:
    return ResumableLoader(Positions(), StreamSampler(POSITIONS, 2, 6, seed=4), num_workers=workers, ahead=ahead)


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 0), (0, 1), (0, 9)])
def test_a_loader_goes_on_in_the_middle(workers: int, ahead: int) -> None:
    everything = list(loader())
    assert len(everything) == len(loader()) == 6
    for seen in (0, 1, 4, 5):
        first = loader(workers, ahead)
        assert list(islice(iter(first), seen)) == everything[:seen]
        assert first.state_dict() == {"seen": seen}  # what was consumed, not what workers have fetched
        second = loader(workers, ahead)
        second.load_state_dict(first.state_dict())
        rest = iter(second)
        assert [next(rest) for _ in range(6 - seen)] == everything[seen:]
        assert second.state_dict() == {"seen": 6}
        assert list(second) == everything  # only the first iteration is shortened


def test_a_loader_at_the_end_of_an_epoch_begins_the_next() -> None:
    first = loader()
    everything = list(first)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert list(second) == everything


@pytest.mark.parametrize("size", [0, 1, 2, 5, 16, 17])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_has_each_image_once(size: int, world: int) -> None:
    samplers = [EvaluationSampler(size, rank, world) for rank in range(world)]
    assert sorted(chain.from_iterable(samplers)) == list(range(size))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    assert max(map(len, samplers)) - min(map(len, samplers)) <= 1


def test_lightning_takes_them_for_distributed_samplers() -> None:
    # it replaces what it does not know, also if use_distributed_sampler is left at its default
    assert lightning.__version__ >= "2.6"
    assert isinstance(StreamSampler(POSITIONS, 2, 3), DistributedSampler)
    assert isinstance(EvaluationSampler(3), DistributedSampler)
