"""Which tasks go through the encoder together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from testers import TINY
from torch.multiprocessing.reductions import StorageWeakRef
from toys import ToySuite

from lit_merge import AdaMerging, MergeTrainer, TaskDataModule
from lit_merge.adaptation import chunks
from lit_merge.data import UnlabelledBatch
from lit_merge.data.loaders import StreamSampler
from lit_merge.data.parts import split_batches
from lit_merge.functional.activation_memory import saved_bytes
from lit_merge.methods import AWM
from lit_merge.objectives import Entropy


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


def _fitted(suite: ToySuite, **kwargs: Any) -> tuple[AdaMerging, list[int]]:
    """A module after two steps, and the bytes that were kept for the way back of each pass."""
    module, kept = AdaMerging(suite=suite, **kwargs), list[int]()
    original = module.all_outputs

    def watched(state: Any, images: Any) -> Any:
        found: list[Any] = []
        kept.append(saved_bytes(lambda: found.append(original(state, images))))
        return found[0]

    module.all_outputs = watched  # type: ignore[method-assign]
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=2)
    MergeTrainer(**TINY).fit(module, datamodule=data)
    return module, kept


def test_as_many_images_as_the_budget_is_enough_for() -> None:
    suite = ToySuite("cnn", tasks=5)
    together, kept = _fitted(suite)
    assert len(kept) == 2  # one pass a step
    everything = max(kept)
    budget = everything // 2
    auto, kept = _fitted(suite, max_images="auto", activation_budget=budget)
    weights = sum(value.nbytes for value in auto.bank.base.values())
    (each,) = auto._image_bytes.values()
    assert len(kept) == 2 * -(-20 // (budget // each // 4 * 4))
    assert max(kept) <= budget + weights
    assert 20 * each == pytest.approx(everything - weights, rel=0.05)  # heads differ in size
    torch.testing.assert_close(auto.coefficients, together.coefficients, rtol=1e-5, atol=1e-6)
    assert len(_fitted(suite, max_images="auto")[1]) == 2  # the default is plenty
    assert len(_fitted(suite, max_images="auto", activation_budget=1)[1]) == 10  # a task is not split


def test_measuring_keeps_nothing() -> None:
    x, seen = torch.ones(5, requires_grad=True), []

    def run() -> torch.Tensor:
        result = x.exp()
        seen.append(StorageWeakRef(result.untyped_storage()))
        return result.sigmoid()

    assert saved_bytes(run) == 40
    assert seen[0].expired()


def test_every_shape_of_images_has_a_limit_of_its_own() -> None:
    sizes = {"a": 4, "b": 4, "c": 8, "d": 8}
    batch = {t: UnlabelledBatch(torch.zeros(2, 1, n, n), torch.arange(2)) for t, n in sizes.items()}
    limits = {torch.Size([1, 4, 4]): 4, torch.Size([1, 8, 8]): 3}
    assert chunks(batch, limits) == [["a", "b"], ["c"], ["d"]]


def test_what_goes_once_more_and_what_is_made_again_is_counted() -> None:
    found: list[int] = []
    for make, merge_by in ((AdaMerging, "network"), (AWM, "network"), (AdaMerging, "block")):
        module = make(suite=ToySuite("vit"), merge_by=merge_by, max_images="auto")
        MergeTrainer(**TINY).fit(module, datamodule=TaskDataModule(module.suite, batch_size=2, steps_per_epoch=1))
        found += module._image_bytes.values()
    plain, perturbed, by_block = found
    assert perturbed == 2 * plain
    assert plain / 2 < by_block < plain * 2 / 3  # the inside of one block of two


class _Greedy(Entropy):
    def __call__(self, output: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def test_advice_when_memory_is_short() -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        _fitted(ToySuite("mlp"), objective=_Greedy())
    assert "max_images auto" in caught.value.__notes__[0]
