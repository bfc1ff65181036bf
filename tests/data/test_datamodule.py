"""Which images are adapted on, which are scored, and what a run may not do."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import lightning as L
import pytest
import torch
from testers import Permuted
from torch import Tensor
from torch.utils.data import Dataset
from toys import ToyData, ToySuite, network

from lit_merge import MergeTrainer, TaskDataModule
from lit_merge.data import LabelledBatch, UnlabelledBatch
from lit_merge.errors import MergeError
from lit_merge.suites import NetworkSuite

SIZES = {"task.a": 21, "task.b": 27, "task.c": 33}


def module(suite: NetworkSuite | None = None, **kwargs: Any) -> TaskDataModule:
    data = TaskDataModule(**{"suite": suite or ToySuite(), "batch_size": 4, "seed": 1, **kwargs})
    data.prepare_data()
    data.setup("test")
    return data


def sized(**sizes: int) -> NetworkSuite:
    """Tasks of any size, with three classes."""
    base = network("mlp")
    return NetworkSuite(
        network=base,
        experts={task: base.state_dict() for task in sizes},
        test={task: ToyData(size, 3, seed=0) for task, size in sizes.items()},
        num_classes=dict.fromkeys(sizes, 3),
        name="sized",
    )


def indices(batches: list[dict[str, UnlabelledBatch]]) -> list[dict[str, list[int]]]:
    return [{task: part.index.tolist() for task, part in batch.items()} for batch in batches]


# Protocols -----------------------------------------------------------------------------------------------------------


def test_transductive_adapts_on_and_scores_everything() -> None:
    data = module(protocol="transductive")
    for part in (data.positions("adapt"), data.positions("score")):
        assert part == {task: list(range(size)) for task, size in SIZES.items()}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_split_is_disjoint_complete_and_seeded(fraction: float) -> None:
    data = module(protocol="split", adapt_fraction=fraction)
    adapt, score = data.positions("adapt"), data.positions("score")
    for task, size in SIZES.items():
        assert len(adapt[task]) == round(fraction * size)
        assert sorted(adapt[task] + score[task]) == list(range(size))
    assert module(protocol="split", adapt_fraction=fraction).positions("adapt") == adapt
    assert module(protocol="split", adapt_fraction=fraction, seed=2).positions("adapt") != adapt


def test_split_adapts_on_no_image_that_it_scores() -> None:
    data = module(protocol="split", steps_per_epoch=40)
    seen: dict[str, set[int]] = {task: set() for task in SIZES}
    for batch in data.train_dataloader():
        for task, part in batch.items():
            seen[task].update(part.index.tolist())
    for task, loader in data.test_dataloader().items():
        scored = set(chain.from_iterable(batch.index.tolist() for batch in loader))
        assert not seen[task] & scored
        assert seen[task] | scored == set(range(SIZES[task]))


def test_split_does_not_depend_on_the_other_tasks() -> None:
    three, two = (module(ToySuite(tasks=tasks), protocol="split").positions("adapt") for tasks in (3, 2))
    assert two == {task: three[task] for task in two}


def test_online_shows_each_image_once_in_a_seeded_order() -> None:
    data = module(protocol="online")
    batches = indices(list(data.train_dataloader()))
    assert len(batches) == 9  # 33 images by 4
    for task, size in SIZES.items():
        order = list(chain.from_iterable(batch.get(task, []) for batch in batches))
        assert sorted(order) == list(range(size))
        assert order == data.positions("adapt")[task] != sorted(order)
    assert indices(list(module(protocol="online").train_dataloader())) == batches
    assert indices(list(module(protocol="online", seed=2).train_dataloader())) != batches
    assert data.positions("score") == {task: list(range(size)) for task, size in SIZES.items()}


@pytest.mark.parametrize("epochs", [2, -1])
def test_online_is_one_epoch(epochs: int) -> None:
    data = TaskDataModule(ToySuite(), protocol="online")
    data.trainer = L.Trainer(max_epochs=epochs, logger=False)
    with pytest.raises(MergeError, match=f"trainer.max_epochs: protocol online .* must be 1, found {epochs}"):
        data.setup("fit")
    data.setup("test")  # the number of epochs says nothing about an evaluation
    data.trainer = L.Trainer(max_epochs=1, logger=False)
    data.setup("fit")


# Batches -------------------------------------------------------------------------------------------------------------


def test_adaptation_batches_have_no_labels() -> None:
    suite = ToySuite()
    data = module(suite)
    images = {task: torch.stack([suite.dataset(task, "test")[i][0] for i in range(n)]) for task, n in SIZES.items()}
    for batch in chain(data.train_dataloader(), data.adaptation_batches(3)):
        assert tuple(batch) == suite.tasks
        for task, part in batch.items():
            assert type(part) is UnlabelledBatch
            assert part._fields == ("images", "index", "share", "positions")
            assert part.share == 1.0
            assert torch.equal(part.images, images[task][part.index])


def test_evaluation_batches_have_every_image_once_with_its_label() -> None:
    suite = ToySuite()
    data = module(suite, eval_batch_size=10)
    for loaders in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert tuple(loaders) == suite.tasks
        for task, loader in loaders.items():
            batches = list(loader)
            assert all(type(batch) is LabelledBatch for batch in batches)
            assert [len(batch.index) for batch in batches[:-1]] == [10] * (len(batches) - 1)
            index = torch.cat([batch.index for batch in batches])
            assert index.tolist() == list(range(SIZES[task]))
            expected = torch.tensor([suite.dataset(task, "test")[i][1] for i in index.tolist()])
            assert torch.equal(torch.cat([batch.labels for batch in batches]), expected)
            assert torch.equal(data.labels(task, index.tolist()), expected)


@pytest.mark.parametrize("protocol", ["transductive", "split", "online"])
def test_workers_change_nothing(protocol: str) -> None:
    alone, helped = (module(protocol=protocol, num_workers=workers) for workers in (0, 2))
    for one, other in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        for task, part in one.items():
            assert torch.equal(part.images, other[task].images)
            assert torch.equal(part.index, other[task].index)
            assert part.share == other[task].share


def test_the_order_of_the_tasks_changes_no_image() -> None:
    suite = ToySuite()
    for one, other in zip(module(suite).train_dataloader(), module(Permuted(suite)).train_dataloader(), strict=True):
        assert tuple(one) == tuple(other)[::-1] == suite.tasks
        for task in suite.tasks:
            assert torch.equal(one[task].index, other[task].index)


def test_by_default_an_epoch_is_one_pass_over_the_largest_task() -> None:
    assert len(module().train_dataloader()) == 9
    assert len(module(steps_per_epoch=4).train_dataloader()) == 4


def test_the_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert TaskDataModule(ToySuite()).seed == 17
    assert TaskDataModule(ToySuite(), seed=0).seed == 0
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert TaskDataModule(ToySuite()).seed == 0


def test_adaptation_batches_are_the_first_ones_of_the_stream() -> None:
    data = module(steps_per_epoch=5)
    assert indices(list(data.adaptation_batches(5))) == indices(list(data.train_dataloader()))
    assert len(list(data.adaptation_batches())) == 50


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: expected at least 1, found 0"),
        ({"eval_batch_size": -3}, "data.eval_batch_size: expected at least 1, found -3"),
        ({"steps_per_epoch": 0}, "data.steps_per_epoch: expected at least 1, found 0"),
        ({"adapt_fraction": 0.0}, "data.adapt_fraction: expected a share in (0, 1), found 0.0"),
        ({"adapt_fraction": 1.0}, "data.adapt_fraction: expected a share in (0, 1), found 1.0"),
        ({"adapt_fraction": 50}, "data.adapt_fraction: expected a share in (0, 1), found 50"),
        ({"protocol": "onlne"}, "data.protocol: expected transductive, split or online, found 'onlne'"),
        ({"num_workers": -1}, "data.num_workers: expected at least 0, found -1"),
    ],
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=re.escape(message)):
        TaskDataModule(ToySuite(), **options)


def test_an_empty_test_set_is_refused() -> None:
    data = TaskDataModule(sized(full=5, empty=0))
    with pytest.raises(MergeError, match="sized: task 'empty': its test set is empty; expected images"):
        data.setup("fit")


@pytest.mark.parametrize(("size", "fraction", "cut"), [(1, 0.5, 0), (2, 0.1, 0), (3, 0.9, 3)])
def test_a_test_set_that_cannot_be_split_is_refused(size: int, fraction: float, cut: int) -> None:
    data = TaskDataModule(sized(large=50, small=size), protocol="split", adapt_fraction=fraction)
    with pytest.raises(MergeError, match=f"sized: task 'small': {size} test images cannot be split at {cut}"):
        data.setup("fit")


def test_a_wrong_label_is_found_by_evaluation_and_not_by_adaptation() -> None:
    class Mislabelled(ToyData):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            image, label = super().__getitem__(index)
            return image, 9 if index == 4 else label

    base = network("mlp")
    suite = NetworkSuite(
        network=base,
        experts={"svhn": base.state_dict()},
        test={"svhn": Mislabelled(6, 3, seed=0)},
        num_classes={"svhn": 3},
    )
    data = module(suite)
    assert len(list(data.train_dataloader())) == 2
    with pytest.raises(MergeError, match=r"svhn \(test\): image 4: label 9 is out of range; .* labels must be 0 to 2"):
        list(data.test_dataloader()["svhn"])


def test_a_dataset_without_a_length_is_refused() -> None:
    class Endless(Dataset[tuple[Tensor, int]]):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(3, 8, 8), 0

    base = network("mlp")
    suite = NetworkSuite(network=base, experts={"x": base.state_dict()}, test={"x": Endless()})
    with pytest.raises(MergeError, match="expected a dataset with a length, found Endless"):
        TaskDataModule(suite).setup("fit")


def test_a_checkpoint_of_a_run_on_other_images_is_refused() -> None:
    data = module()
    state = data.state_dict()
    assert state == {
        "protocol": "transductive",
        "seed": 1,
        "adapt_fraction": None,
        "images per task and step": 4,
        "steps_per_epoch": 9,
    }
    trainer = MergeTrainer(logger=False)
    trainer.state.fn = "fit"  # type: ignore[assignment]
    for options, message in (
        ({"seed": 2}, "seed 1, this run has 2"),
        ({"batch_size": 5}, "images per task and step 4, this run has 5"),
        ({"steps_per_epoch": 3}, "steps_per_epoch 9, this run has 3"),
        ({"protocol": "online"}, "protocol transductive, this run has online"),
    ):
        other = module(**options)
        other.trainer = trainer
        with pytest.raises(MergeError, match=f"checkpoint: its data had {message}; give the --data"):
            other.load_state_dict(state)
    same = module(num_workers=2, eval_batch_size=3)
    same.trainer = trainer
    same.load_state_dict(state)
    module(seed=2, batch_size=5).load_state_dict(state)  # it makes no difference to an evaluation of all images
