"""What benchmarks/adaptation_step.py measures: one step of a merge, of its floor, and of the naive way."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import open_clip
import torch
from open_clip.model import _build_vision_tower
from torch import Tensor, nn

from lit_merge import MergeTrainer
from lit_merge.data.batches import UnlabelledBatch
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.vit import small_vit
from lit_merge.methods import AdaMerging
from lit_merge.objectives import Entropy, ExpertAlignment, Objective, TaskOutput
from lit_merge.skeleton import Skeleton
from lit_merge.suites import Suite

CLASSES = 10
OBJECTIVES: dict[str, Callable[[], Objective]] = {"entropy": Entropy, "alignment": ExpertAlignment}
ROWS = ("ours", "floor", "naive")


class Plan(NamedTuple):
    """What one row runs."""

    row: str = "ours"
    model: str = "ViT-B-32"
    layers: int | None = None
    tasks: int = 8
    images: int = 16
    granularity: str = "tensor"
    storage_dtype: str = "float32"
    precision: str = "32-true"
    max_images: int | str | None = None
    device: str = "cpu"
    threads: int = 2
    objective: str = "entropy"
    steps: int = 3  # the first is a warm-up
    memory: bool = False


class Turn(Protocol):
    """How a row waits for its turn, and says how long a step took."""

    def wait(self) -> None: ...
    def answer(self, seconds: float, cpu: float) -> None: ...


class Values(Mapping[str, Tensor]):
    """Random weights that exist only while they are read: the base, and with a seed above 0 the base and noise."""

    def __init__(self, shapes: Mapping[str, torch.Size], seed: int) -> None:
        self.shapes, self.seed = shapes, seed
        self.places = {name: place for place, name in enumerate(shapes)}

    def __getitem__(self, name: str) -> Tensor:
        def noise(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(10_000 * seed + self.places[name])
            return torch.randn(self.shapes[name], generator=generator)

        value = noise(0).mul_(0.02)
        return value.add_(noise(self.seed), alpha=1e-3) if self.seed else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class RandomSuite(Suite):
    """The image tower of an architecture with random weights, and heads in random directions."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        network = self.network()
        self.shapes = {name: value.shape for name, value in network.state_dict().items()}
        size = network.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        self.width = int(network.output_dim)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"task{number}" for number in range(self.plan.tasks))

    def network(self) -> Any:
        with torch.device("meta"):
            if self.plan.model == "tiny":
                return small_vit(image_size=16, patch_size=8, width=32, layers=self.plan.layers or 2, heads=2)
            config = open_clip.get_model_config(self.plan.model)
            assert config is not None, f"{self.plan.model}: not an architecture of open_clip"
            vision = config["vision_cfg"] | ({} if self.plan.layers is None else {"layers": self.plan.layers})
            return _build_vision_tower(config["embed_dim"], vision, bool(config.get("quick_gelu", False)))

    def base(self) -> Mapping[str, Tensor]:
        return Values(self.shapes, 0)

    def expert(self, task: str) -> Mapping[str, Tensor]:
        return Values(self.shapes, 1 + self.tasks.index(task))

    def head(self, task: str) -> nn.Module:
        generator = torch.Generator().manual_seed(self.tasks.index(task))
        return CosineHead(torch.randn(CLASSES, self.width, generator=generator), scale=10.0)

    def num_classes(self, task: str) -> int:
        return CLASSES

    def dataset(self, task: str, split: str) -> Any:
        return range(self.plan.images)  # teachers want to know its length

    def batch(self, device: str) -> dict[str, UnlabelledBatch]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.plan.images, 3, self.image_size, self.image_size)
        index = torch.arange(self.plan.images, device=device)
        return {task: UnlabelledBatch(torch.randn(shape, generator=generator).to(device), index) for task in self.tasks}


class Step:
    """Times a step and keeps its peak memory."""

    def __init__(self, plan: Plan, turn: Turn) -> None:
        self.plan, self.turn = plan, turn
        self.peak = 0
        self.cuda = plan.device == "cuda"
        self.before = 0 if self.cuda else resident("VmRSS")

    def begin(self) -> None:
        self.turn.wait()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM") - self.before)
        self.turn.answer(seconds, cpu)


class Watch(L.Callback):
    """Times the steps of a fit."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def on_train_batch_start(self, *_: Any) -> None:
        self.step.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.step.end()


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def run(plan: Plan, turn: Turn) -> dict[str, Any]:
    """Take the steps of one row; returns its peak memory and, for a merge, how fast the contraction is."""
    suite = RandomSuite(plan)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64, requires_grad=True)).sum().backward()  # libraries
    step = Step(plan, turn)
    more = {"ours": _ours, "floor": _floor, "naive": _naive}[plan.row](suite, step)
    return {"peak": step.peak, "network": 4 * sum(shape.numel() for shape in suite.shapes.values()), **more}


class _Again:
    """The same batch over and over; Lightning takes a list for several loaders."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.times)


def _module(suite: RandomSuite) -> AdaMerging:
    plan = suite.plan
    return AdaMerging(
        suite=suite, granularity=plan.granularity, objective=OBJECTIVES[plan.objective](),  # type: ignore[arg-type]
        max_images=plan.max_images, storage_dtype=plan.storage_dtype,
    )  # fmt: skip


def _ours(suite: RandomSuite, step: Step) -> dict[str, Any]:
    plan, model = suite.plan, _module(suite)
    trainer = MergeTrainer(
        max_epochs=1, accelerator="gpu" if step.cuda else "cpu", devices=1, precision=plan.precision,  # type: ignore[arg-type]
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        limit_val_batches=0, callbacks=[Watch(step)],
    )  # fmt: skip
    trainer.fit(model, train_dataloaders=_Again(suite.batch(plan.device), plan.steps))
    return {} if plan.memory else {"bandwidth": bandwidth(model.to(plan.device))}


def _autocast(plan: Plan) -> Any:
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    dtype = kinds.get(plan.precision)
    return torch.autocast(plan.device, dtype or torch.bfloat16, enabled=dtype is not None)


def _losses(
    suite: RandomSuite, features: Tensor, sizes: list[int], heads: Mapping[str, nn.Module], known: list[TaskOutput]
) -> list[Tensor]:
    """Losses per task; what is learned from experts is, for the floor, known from the start."""
    objective = OBJECTIVES[suite.plan.objective]()
    outputs = [TaskOutput(head(part), part) for head, part in zip(heads.values(), features.split(sizes), strict=True)]
    if not known:
        known += [TaskOutput(one.logits.detach() + 1, one.features.detach() + 1) for one in outputs]
    return [
        objective(one._replace(expert_logits=other.logits, expert_features=other.features))
        for one, other in zip(outputs, known, strict=True)
    ]


def _heads(suite: RandomSuite) -> dict[str, nn.Module]:
    return {task: suite.head(task).to(suite.plan.device) for task in suite.tasks}


def _floor(suite: RandomSuite, step: Step) -> dict[str, Any]:
    """Encoder and heads forward and backward, with leaves for weights."""
    plan = suite.plan
    skeleton, heads, batch = Skeleton(suite.network()).to(plan.device), _heads(suite), suite.batch(plan.device)
    weights = {name: value.to(plan.device).requires_grad_() for name, value in suite.base().items()}
    known: list[TaskOutput] = []
    for _ in range(plan.steps):
        step.begin()
        for weight in weights.values():
            weight.grad = None
        with _autocast(plan):
            images = torch.cat([part.images for part in batch.values()])
            features = skeleton(weights, images)
            loss = torch.stack(_losses(suite, features, [plan.images] * plan.tasks, heads, known)).sum()
        del images, features
        loss.backward()
        del loss
        step.end()
    return {}


def _naive(suite: RandomSuite, step: Step) -> dict[str, Any]:
    """Weights merged by autograd; the tasks one by one, each with its way back through the merge."""
    plan, model = suite.plan, _module(suite)
    model.configure_model()
    model.to(plan.device)
    bank, heads, batch = model.bank, _heads(suite), suite.batch(plan.device)
    coefficients = nn.Parameter(torch.full((plan.tasks, len(bank.names)), 0.3, device=plan.device))
    optimizer = torch.optim.Adam([coefficients], lr=1e-3)
    known: dict[str, list[TaskOutput]] = {task: [] for task in suite.tasks}
    base = dict(bank.base)
    for _ in range(plan.steps):
        step.begin()
        optimizer.zero_grad()
        merged = {
            name: base[name] + sum(coefficients[t, column] * bank.deltas[name][t].float() for t in range(plan.tasks))
            for column, name in enumerate(bank.names)
        }
        for task, part in batch.items():
            with _autocast(plan):
                features = model.skeleton(merged, part.images)
                (loss,) = _losses(suite, features, [plan.images], {task: heads[task]}, known[task])
            loss.backward(retain_graph=task != suite.tasks[-1])
            del features, loss
        optimizer.step()
        del merged
        step.end()
    return {}


@torch.no_grad()
def bandwidth(model: AdaMerging, repeats: int = 5) -> dict[str, float]:
    """Bytes per second of both products with the bank, beside those of a copy."""
    bank, cuda = model.bank, model.device.type == "cuda"
    coefficients = torch.full((len(bank.tasks), len(bank.names)), 0.3, device=model.device)
    merged = bank.contract(coefficients)
    gradients = list(merged.values())
    numbers = sum(bank.sizes)
    rows = numbers * len(bank.tasks) * next(iter(bank.deltas.values())).element_size()

    def best(work: Callable[[], object]) -> float:
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return min(found)

    source = torch.ones(2**28 if cuda else 2**26, device=model.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source))
    forward = best(lambda: bank.contract(coefficients))
    backward = best(lambda: bank._weights.inner_products(gradients))
    speeds = {"forward": (rows + 8 * numbers) / forward, "backward": (rows + 4 * numbers) / backward}
    shares = {f"{way}_share": speed / copy for way, speed in speeds.items()}
    return {"forward_s": forward, "backward_s": backward, "copy": copy, **speeds, **shares}


class Pipe:
    """Turns that a parent process gives, a line at a time."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # nothing else may come in between

    def wait(self) -> None:
        sys.stdin.readline()

    def answer(self, seconds: float, cpu: float) -> None:
        self.say({"seconds": seconds, "cpu": cpu})

    def say(self, found: dict[str, Any]) -> None:
        print(json.dumps(found), file=self.out, flush=True)
