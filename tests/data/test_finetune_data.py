"""Labelled training batches: which images, in which order, with which random numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import SIZE, ToyData, ToySuite

from lit_merge.data.finetune_data import FineTuneDataModule
from lit_merge.errors import MergeError

TASK = "task.b"


class Suite(ToySuite):
    """Toys with training sets; each image tells its position."""

    def __init__(self, size: int = 10) -> None:
        super().__init__("mlp")
        for t, name in enumerate(self.tasks):
            data = ToyData(size, 3 + t, t)
            data.images = torch.arange(size).float().reshape(-1, 1, 1, 1).expand(-1, 3, SIZE, SIZE)
            self._data["train"][name] = data


class Draws(nn.Module):
    """An augmentation that shows the next number of every global generator."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())])  # noqa: NPY002


class Place:
    """What a data module asks a Trainer for."""

    max_steps, max_epochs, accumulate_grad_batches = -1, 1, 1

    def __init__(self, rank: int = 0, world: int = 1, **facts: Any) -> None:
        self.global_rank, self.world_size = rank, world
        self.strategy = type("", (), {"root_device": torch.device("cpu")})
        self.fit_loop = type("", (), {"epoch_progress": type("", (), {"current": type("", (), {"processed": 0})})})
        for name, value in facts.items():
            setattr(self, name, value)


def module(place: Place | None = None, **options: Any) -> FineTuneDataModule:
    made = FineTuneDataModule(Suite(), TASK, **{"batch_size": 4, "num_workers": 0, "seed": 0, **options})
    made.trainer = place or Place()  # type: ignore[assignment]
    made.prepare_data()
    made.setup("fit")
    return made


def positions(data: FineTuneDataModule) -> list[list[int]]:
    return [batch[TASK][0][:, 0, 0, 0].int().tolist() for batch in data.train_dataloader()]


def test_batches_are_full_and_passes_complete() -> None:
    data = module(Place(max_steps=5, max_epochs=-1))
    batches = positions(data)
    assert [len(batch) for batch in batches] == [4] * 5
    flat = [place for batch in batches for place in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    labels = [label for batch in data.train_dataloader() for label in batch[TASK][1].tolist()]
    assert labels == [place % 4 for place in flat]


@pytest.mark.parametrize(
    ("facts", "steps"),
    [
        ({}, 3),
        ({"max_steps": 7, "max_epochs": None}, 7),
        ({"max_steps": 7}, 3),
        ({"max_steps": 7, "max_epochs": -1, "accumulate_grad_batches": 2}, 14),
    ],
)
def test_a_run_counted_in_steps_is_one_epoch(facts: dict[str, Any], steps: int) -> None:
    assert len(module(Place(**facts)).train_dataloader()) == steps


def test_seed_decides_the_order_and_processes_share_it() -> None:
    alone = positions(module())
    assert alone == positions(module())
    assert alone != positions(module(seed=1))
    ranks = [positions(module(Place(rank, 2))) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]


def test_random_numbers_belong_to_the_batch() -> None:
    def drawn(data: FineTuneDataModule) -> Tensor:
        return torch.cat([batch[TASK][0] for batch in data.train_dataloader()])

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index] # noqa: NPY002

    data = module(augment=Draws())
    before = state()
    data.train_dataloader().dataset[{TASK: ([3, 1], 1.0)}]
    assert state() == before
    first = drawn(data)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    assert torch.equal(first, drawn(data))
    assert len(first.unique()) == first.numel()  # no batch repeats another
    assert not torch.equal(first, drawn(module(augment=Draws(), seed=1)))


def test_test_images_come_once_in_order_and_unchanged() -> None:
    data = module(augment=Draws(), eval_batch_size=5)
    expected = data.suite.dataset(TASK, "test")
    batches = [batch[TASK] for batch in data.test_dataloader()]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([image for image, _ in expected]))  # type: ignore[attr-defined]
    assert torch.cat([labels for _, labels in batches]).tolist() == [label for _, label in expected]  # type: ignore[attr-defined]
    ranks = [module(Place(rank, 2)) for rank in range(2)]
    assert sum(len(batch[TASK][1]) for rank in ranks for batch in rank.test_dataloader()) == len(expected)


def test_experts_are_not_asked_for() -> None:
    class WithoutExperts(Suite):
        def expert(self, task: str) -> dict[str, Tensor]:
            raise AssertionError

        def prepare(self) -> None:
            raise AssertionError

    data = FineTuneDataModule(WithoutExperts(), TASK)
    data.prepare_data()
    data.setup("fit")


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        (None, {"batch_size": 0}, r"data\.batch_size: expected at least 1"),
        (None, {"eval_batch_size": 0}, r"data\.eval_batch_size: expected at least 1"),
        (None, {"num_workers": -1}, r"data\.num_workers: expected at least 0"),
        (Place(0, 3), {}, "4 images a step cannot be divided among 3 processes"),
    ],
)
def test_refused(place: Place | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        module(place, **options)


def test_unusable_data_is_refused() -> None:
    with pytest.raises(MergeError, match="unknown task 'cars'"):
        FineTuneDataModule(Suite(), "cars").prepare_data()
    with pytest.raises(MergeError, match="its training set is empty"):
        FineTuneDataModule(Suite(0), TASK).setup("fit")
    data = module()
    data.suite.dataset(TASK, "train").labels[:] = 9  # type: ignore[attr-defined]
    with pytest.raises(MergeError, match=r"task\.b \(train\): image \d+: label 9 is out of range"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize(("option", "key"), [({"seed": 1}, "seed"), ({"batch_size": 2}, "batch_size")])
def test_other_images_than_those_of_the_checkpoint_are_refused(option: dict[str, Any], key: str) -> None:
    module().load_state_dict(module().state_dict())
    with pytest.raises(MergeError, match=f"checkpoint: its {key} was"):
        module(**option).load_state_dict(module().state_dict())
