"""Cached images are the same images, in as much memory as was given."""

from __future__ import annotations

import pickle
import random
import shutil
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks_helpers import Batches, trainer_of
from PIL import Image
from testers import TINY
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as T
from toys import ToyData, network

from lit_merge import AdaMerging, MergeTrainer, TaskDataModule
from lit_merge.callbacks import ResumePoint
from lit_merge.data import image_cache
from lit_merge.data.corruptions import CorruptedImages, Corruption
from lit_merge.data.file_images import FolderImages
from lit_merge.data.hub_images import ImageSet
from lit_merge.data.image_cache import CachedImages, cache_images
from lit_merge.encoders.heads import CosineHead
from lit_merge.suites import NetworkSuite

CUT = T.Compose([T.Resize(10), T.CenterCrop(8), T.ToTensor(), T.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))])
WHOLE = T.Compose([T.ToTensor(), T.Resize((8, 8)), T.Normalize(0.5, 0.25)])  # cannot be cut: resizes tensors
BYTES = {"cut": 3 * 8 * 8 + 1, "whole": 4 * 3 * 8 * 8 + 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three sizes and two classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(10):
        path = root / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        size = (12 + number % 3, 16, 3)
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path, quality=90)
    return root


class Counting(FolderImages):
    """Counts the pictures that it decodes."""

    read_count = 0

    def read(self, index: int) -> tuple[object, object]:
        self.read_count += 1
        return super().read(index)


def suite_of(folder: Path, transform: Any = CUT) -> NetworkSuite:
    base = network("mlp")
    tasks = ("x", "y")
    return NetworkSuite(
        network=base,
        experts={task: {n: v + 0.1 * k for n, v in base.state_dict().items()} for k, task in enumerate(tasks)},
        heads={task: CosineHead(torch.eye(2, 4)) for task in tasks},
        test={task: Counting(folder, transform=transform) for task in tasks},
    )


@pytest.mark.parametrize("kind", ["cut", "whole", "corrupted", "float dataset"])
def test_images_are_the_same_and_are_decoded_once(folder: Path, kind: str) -> None:
    pictures = Counting(folder, transform=WHOLE if kind == "whole" else CUT)
    data: Any = pictures
    if kind == "corrupted":
        data = CorruptedImages(pictures, Corruption("gaussian_noise"))
    elif kind == "float dataset":
        data = Wrapped(pictures)
    expected = [data[position][0] for position in range(10)]
    (cache,) = cache_images({"x": data}, {"x": range(10)}, budget=2**20).values()
    assert cache.reserved == 10 * BYTES["cut" if kind in ("cut", "corrupted") else "whole"]
    first = [cache[position].clone() for position in range(10)]
    assert cache.kept == 10
    before = pictures.read_count
    for one, other, wanted in zip(first, (cache[position] for position in range(10)), expected, strict=True):
        assert torch.equal(one, wanted)
        assert torch.equal(other, wanted)
    assert pictures.read_count == before


class Wrapped:
    """A dataset that only gives tensors."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index]


def test_a_budget_goes_to_the_smallest_tasks_first_and_is_kept_to(folder: Path) -> None:
    data = dict.fromkeys(("large", "small", "last"), FolderImages(folder, transform=CUT))
    positions = {"large": range(6), "small": range(7, 10), "last": range(10)}
    budget = 5 * BYTES["cut"] + 100
    caches = cache_images(data, positions, budget)
    assert {task: cache.reserved // BYTES["cut"] for task, cache in caches.items()} == {"large": 2, "small": 3}
    for task, cache in caches.items():
        for position in positions[task]:
            assert torch.equal(cache[position], data[task][position][0])
    assert [cache.kept for cache in caches.values()] == [2, 3]
    assert sum(cache.reserved for cache in caches.values()) <= budget


def test_what_is_in_memory_or_random_is_left_out(folder: Path) -> None:
    """Half of all flips leave two images alike; and to find out draws nothing that others will draw."""
    transforms = {
        "noise": T.Lambda(lambda image: image + torch.rand(())),
        "torch": T.RandomHorizontalFlip(0.01),
        "python": T.Lambda(lambda image: image + (random.random() < 0.01)),
        "numpy": T.Lambda(lambda image: image + (np.random.rand() < 0.01)),  # noqa: NPY002
    }
    data: dict[str, Any] = {
        name: FolderImages(folder, transform=T.Compose([CUT, step])) for name, step in transforms.items()
    }
    data["memory"] = ToyData(9, 3, seed=0)
    states = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    assert cache_images(data, dict.fromkeys(data, range(9)), 2**20) == {}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == states[1:]  # noqa: NPY002


def test_processes_of_a_machine_leave_room_in_shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12 * BYTES["cut"]))
    monkeypatch.setattr(image_cache, "_SHARED", folder)
    data = {"x": FolderImages(folder, transform=CUT)}
    found = [
        cache_images(data, {"x": range(10)}, 2**20, *more)["x"].reserved for more in ((True,), (True, 2), (False,))
    ]
    assert [size // BYTES["cut"] for size in found] == [6, 3, 10]


def test_workers_fill_one_cache(folder: Path) -> None:
    cache = CachedImages(FolderImages(folder, transform=CUT), range(10), shared=True)
    cache.reserve(8 * BYTES["cut"])
    images = torch.cat(list(DataLoader(_Items(cache), batch_size=5, num_workers=2)))  # type: ignore[arg-type]
    assert cache.kept == 8
    assert torch.equal(images, torch.stack([FolderImages(folder, transform=CUT)[k][0] for k in range(10)]))


def test_a_spawned_worker_has_the_same_memory(folder: Path) -> None:
    cache = CachedImages(FolderImages(folder, transform=CUT), range(10), shared=True)
    cache.reserve(2**20)
    sent: CachedImages = pickle.loads(ForkingPickler.dumps(cache))  # how a dataset gets to it
    assert torch.equal(sent[4], cache.data[4][0])
    assert cache.kept == 1


class _Items:
    """A cache as a dataset."""

    def __init__(self, cache: CachedImages) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return self.cache[index]


class Stop(L.Callback):
    """Ends a run before its fourth step, as a crash would."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise InterruptedError


def fitted(folder: Path, run: Path, *callbacks: L.Callback, **options: Any) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Batches and coefficients of two epochs of five steps, or of what is left of them."""
    suite, batches = suite_of(folder), Batches()
    data = TaskDataModule(suite, batch_size=5, steps_per_epoch=5, seed=1, **options)
    model = AdaMerging(suite=suite)
    hooks = [*callbacks, batches, ResumePoint(1)]
    trainer = trainer_of(*hooks, max_epochs=2, default_root_dir=run, enable_checkpointing=True)
    with nullcontext() if not callbacks else pytest.raises(InterruptedError):
        trainer.fit(model, datamodule=data, ckpt_path="last")
    assert [cache.kept for cache in (data._caches or {}).values()] == ([] if data.image_cache == 0 else [10, 10])
    return batches.seen, model.coefficient_table()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fit_and_its_resumption_see_the_same_images(folder: Path, tmp_path: Path, workers: int) -> None:
    plain, expected = fitted(folder, tmp_path / "plain", image_cache=0)
    cached, found = fitted(folder, tmp_path / "cached", num_workers=workers)
    begun, _ = fitted(folder, tmp_path / "parts", Stop(), num_workers=workers)
    rest, resumed = fitted(folder, tmp_path / "parts", num_workers=workers)
    for other in (cached, begun + rest):
        for one, same in zip(plain, other, strict=True):
            assert all(torch.equal(one[task], same[task]) for task in one)
    assert torch.equal(expected, found)
    assert torch.equal(expected, resumed)


def test_only_what_comes_again_is_kept(folder: Path) -> None:
    for steps, epochs, protocol, kept in (
        (3, 1, "transductive", 0),
        (3, 2, "transductive", 2),
        (3, 1, "split", 2),
        (3, 1, "online", 0),
    ):
        data = TaskDataModule(suite_of(folder), batch_size=3, steps_per_epoch=steps, protocol=protocol)  # type: ignore[arg-type]
        data.trainer = MergeTrainer(**{**TINY, "max_epochs": epochs})
        data.setup("fit")
        data.train_dataloader()
        assert len(data._caches or {}) == kept
