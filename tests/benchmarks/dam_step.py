"""Time and memory of one outer step of DAM, at the shapes of CLIP ViT-B/32 or of a smaller network.

    python tests/benchmarks/dam_step.py --shape vit-b-32 --tasks 8 --images 16

Time is that of a whole training step (three merges, two ways back to the masks, five encoder passes) over that of the
five passes alone, with ordinary leaf weights and the same numbers of images: forward and backward for the inner step,
forward for the predictions, forward and backward to the perturbations, forward and backward twice for the masks. Both
are measured in turn in one process; the median of the ratios is printed. Memory is the largest resident set during
steps beyond that before the networks were read, in units of one network in float32, in a process of its own with one
image per pass, so that activations hardly count, and with an allocator that gives freed memory back (glibc's, told to
map every tensor); the bound is T task vectors and six networks.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_merge import MergeTrainer, TaskDataModule
from lit_merge.data.pixels import PixelScale
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.vit import small_vit
from lit_merge.methods import DAM
from lit_merge.suites import Suite

SHAPES: dict[str, dict[str, Any]] = {
    "vit-b-32": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "heads": 12, "output_dim": 512},
    "small": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 4, "heads": 4, "output_dim": 64},
}
CLASSES = 10


class Values(Mapping[str, Tensor]):
    """Random weights that exist only while they are read."""

    def __init__(self, shapes: Mapping[str, torch.Size], seed: int) -> None:
        self.shapes, self.seed = shapes, seed

    def __getitem__(self, name: str) -> Tensor:
        def noise(seed: int) -> Tensor:
            place = list(self.shapes).index(name)
            return torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(1000 * seed + place))

        return 0.02 * noise(0) + (1e-3 * noise(self.seed) if self.seed else 0.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Images(Dataset[tuple[Tensor, int]]):
    """A few random images."""

    pixels = PixelScale((0.5,), (0.25,))

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % CLASSES


class RandomSuite(Suite):
    """Networks of random weights."""

    def __init__(self, shape: str, tasks: int, images: int) -> None:
        self.options = SHAPES[shape]
        with torch.device("meta"):
            self.shapes = {name: value.shape for name, value in self.network().state_dict().items()}
        self._tasks = tuple(f"task{number}" for number in range(tasks))
        data = [Images(3 * images, self.options["image_size"], number) for number in range(tasks)]
        self._data = dict(zip(self._tasks, data, strict=True))

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    def network(self) -> nn.Module:
        with torch.device("meta"):
            network: nn.Module = small_vit(**self.options, mlp_ratio=4.0)
        return network

    def base(self) -> Mapping[str, Tensor]:
        return Values(self.shapes, 0)

    def expert(self, task: str) -> Mapping[str, Tensor]:
        return Values(self.shapes, 1 + self._tasks.index(task))

    def head(self, task: str) -> nn.Module:
        generator = torch.Generator().manual_seed(self._tasks.index(task))
        return CosineHead(torch.randn(CLASSES, self.options["output_dim"], generator=generator), scale=10.0)

    def num_classes(self, task: str) -> int:
        return CLASSES

    def dataset(self, task: str, split: str) -> Any:
        return self._data[task]


def floor(model: DAM, images: int) -> float:
    """Seconds of five encoder passes."""
    bank = model.bank
    weights = {name: value.clone().requires_grad_() for name, value in bank.complete(bank.contract(0.3)).items()}
    stack = torch.cat([torch.stack([model.suite.dataset(t, "test")[i][0] for i in range(images)]) for t in bank.tasks])
    still = {name: value.detach() for name, value in weights.items()}

    def learn(state: dict[str, Tensor], x: Tensor, of: list[Tensor]) -> None:
        torch.autograd.grad(model.skeleton(state, x).square().mean(), of)

    start = time.perf_counter()
    learn(weights, stack, list(weights.values()))
    with torch.no_grad():
        model.skeleton(still, stack)
    shaken = stack.clone().requires_grad_()
    learn(still, shaken, [shaken])
    learn(weights, stack, list(weights.values()))
    learn(weights, stack, list(weights.values()))
    return time.perf_counter() - start


class Watch(L.Callback):
    """Times steps, and the floor after each."""

    def __init__(self, images: int, memory: bool) -> None:
        self.images, self.memory = images, memory
        self.steps: list[float] = []
        self.floors: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        if self.memory:
            Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append(time.perf_counter() - self._start)
        if not self.memory:
            self.floors.append(floor(pl_module, self.images))


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(given: argparse.Namespace, preset: str, memory: bool) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    images = 1 if memory else given.images
    suite = RandomSuite(given.shape, given.tasks, images)
    model = DAM(suite=suite, preset=preset, mask_steps=100, max_images=1 if memory else None)  # type: ignore[arg-type]
    watch = Watch(images, memory)
    trainer = MergeTrainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, callbacks=[watch],
    )  # fmt: skip
    before = resident("VmRSS")
    trainer.fit(model, datamodule=TaskDataModule(suite, batch_size=3 * images, steps_per_epoch=given.steps + 1))
    if memory:
        return {"models": (resident("VmHWM") - before) / (4 * sum(model.bank.sizes))}
    ratios = [step / floor for step, floor in zip(watch.steps[1:], watch.floors[1:], strict=True)]
    return {"step": median(watch.steps[1:]), "floor": median(watch.floors[1:]), "ratio": median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task and encoder pass")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--presets", nargs="+", default=["paper", "released"])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given, given.measure[0], given.measure[1] == "memory")))
        return
    print(f"{given.shape}, {given.tasks} tasks, {given.images} images each, {torch.get_num_threads()} threads")
    print("| preset | step, s | five passes, s | ratio | bound | memory, models | bound |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for preset in given.presets:
        found: dict[str, float] = {}
        for what in ("time", "memory"):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", preset, what]
            settings = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "memory" else {})
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=settings).stdout
            found |= json.loads(output.splitlines()[-1])
        print(
            f"| {preset} | {found['step']:.2f} | {found['floor']:.2f} | {found['ratio']:.2f} | 1.30 | "
            f"{found['models']:.2f} | {given.tasks + 6} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
