"""What a bank that ranks share takes of memory, time and messages, beside one that each of them holds.

    python tests/benchmarks/sharded.py --model ViT-B-32 --tasks 8 --ranks 1 2 4 --output sharded.json
    python tests/benchmarks/sharded.py --quick

Every number of ranks is a run of ``AdaMerging`` (tensor granularity) under DDP over gloo with one process per rank, on
networks of random weights and images that are in memory; all ranks together have the same number of images. One rank
holds the bank alone; for more of them there is a row ``sharded`` and a row ``device``, in which each holds all of it.

* bank: bytes that each rank keeps of base and task vectors, in networks of float32: (T + 1) / W and small tensors.
* peak: largest resident set of a rank beyond that before anything was read, likewise in networks, with an allocator
  that gives freed memory back (glibc's, told to map every tensor). Merged weights, gradients and activations are in it.
* step: median over steps of the slowest rank, the first one left out.
* sent: bytes that a rank sends per step on behalf of the bank, counted call by call as a ring of W ranks would send
  them: (W − 1)/W of what is gathered or scattered, and twice that of a sum.

The ranks share the machine, so a step of several ranks says what messages cost on it, and not how fast W machines are.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from lit_merge.data.batches import UnlabelledBatch
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.vit import small_vit
from lit_merge.methods import AdaMerging
from lit_merge.storage import RankGroup
from lit_merge.suites import Suite
from lit_merge.trainer import MergeTrainer

# image size, patch size, width, blocks, heads, MLP ratio, features
MODELS = {
    "tiny": (16, 8, 192, 2, 2, 2.0, 16),
    "ViT-S-32": (224, 32, 384, 12, 6, 4.0, 512),
    "ViT-B-32": (224, 32, 768, 12, 12, 4.0, 512),
    "ViT-L-14": (224, 14, 1024, 24, 16, 4.0, 768),
}


class Plan(NamedTuple):
    """One run."""

    model: str
    layers: int | None
    tasks: int
    images: int
    steps: int
    ranks: int
    storage: str
    storage_dtype: str | None
    merge_by: str = "network"


class Values(Mapping[str, Tensor]):
    """Random weights that exist only while they are read: the base, and with a seed above 0 the base and noise."""

    def __init__(self, shapes: Mapping[str, torch.Size], seed: int) -> None:
        self.shapes, self.seed = shapes, seed

    def __getitem__(self, name: str) -> Tensor:
        def noise(seed: int) -> Tensor:
            place = list(self.shapes).index(name)
            return torch.randn(self.shapes[name], generator=torch.Generator().manual_seed(10_000 * seed + place))

        value = noise(0).mul_(0.02)
        return value.add_(noise(self.seed), alpha=1e-3) if self.seed else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class RandomSuite(Suite):
    """A vision transformer with random weights, and heads in random directions."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.shapes = {name: value.shape for name, value in self.network().state_dict().items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(f"task{number}" for number in range(self.plan.tasks))

    def network(self) -> nn.Module:
        size, patch, width, layers, heads, ratio, features = MODELS[self.plan.model]
        with torch.device("meta"):
            network: nn.Module = small_vit(size, patch, width, self.plan.layers or layers, heads, ratio, features)
        return network

    def base(self) -> Mapping[str, Tensor]:
        return Values(self.shapes, 0)

    def expert(self, task: str) -> Mapping[str, Tensor]:
        return Values(self.shapes, 1 + self.tasks.index(task))

    def head(self, task: str) -> nn.Module:
        generator = torch.Generator().manual_seed(self.tasks.index(task))
        return CosineHead(torch.randn(10, MODELS[self.plan.model][-1], generator=generator), scale=10.0)

    def num_classes(self, task: str) -> int:
        return 10

    def dataset(self, task: str, split: str) -> Any:
        return range(self.plan.images)

    def batch(self, rank: int) -> dict[str, UnlabelledBatch]:
        size, count = MODELS[self.plan.model][0], self.plan.images // self.plan.ranks
        generator = torch.Generator().manual_seed(rank)
        return {
            task: UnlabelledBatch(torch.randn(count, 3, size, size, generator=generator), torch.arange(count))
            for task in self.tasks
        }


class Again:
    """The same batch over and over; Lightning takes a list for several loaders."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.times)


class Sent:
    """Counts what a rank sends on behalf of the bank."""

    def __init__(self) -> None:
        self.bytes = self.messages = 0
        for name, times in (("gather", 1), ("scatter_mean", 1), ("total", 2)):
            setattr(RankGroup, name, self._counted(getattr(RankGroup, name), name, times))

    def _counted(self, method: Any, name: str, times: int) -> Any:
        def counted(group: RankGroup, value: Tensor, *more: Any) -> Tensor:
            whole = value.nbytes * (group.size if name == "gather" else 1)
            self.bytes += times * whole * (group.size - 1) // group.size
            self.messages += 1
            found: Tensor = method(group, value, *more)
            return found

        return counted


class Steps(L.Callback):
    """Notes the seconds of each step, and what was sent in it."""

    def __init__(self, sent: Sent) -> None:
        self.sent, self.seconds, self.bytes, self.messages = sent, list[float](), 0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.sent.bytes = self.sent.messages = 0
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.bytes, self.messages = self.sent.bytes, self.sent.messages


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def rank(plan: Plan) -> dict[str, Any]:
    """Run what one rank does."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    number = int(os.environ.get("LOCAL_RANK", "0"))
    suite = RandomSuite(plan)
    options: dict[str, Any] = {"storage": plan.storage, "storage_dtype": plan.storage_dtype}
    options["merge_by"] = plan.merge_by
    module = AdaMerging(suite=suite, optimizer=partial(torch.optim.Adam, lr=1e-3), **options)
    watch, batch = Steps(Sent()), suite.batch(number)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64, requires_grad=True)).sum().backward()  # libraries
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
    with TemporaryDirectory() as folder:
        more: dict[str, Any] = {"strategy": "ddp"} if plan.ranks > 1 else {}
        trainer = MergeTrainer(
            accelerator="cpu", devices=plan.ranks, max_epochs=1, callbacks=[watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, **more,
        )  # fmt: skip
        trainer.fit(module, Again(batch, plan.steps + 1))
    return {
        "bank": sum(value.nbytes for value in module.bank.storage.buffers()),
        "network": 4 * sum(shape.numel() for shape in suite.shapes.values()),
        "peak": resident("VmHWM") - before,
        "seconds": watch.seconds[1:],
        "sent": watch.bytes,
        "messages": watch.messages,
        "coefficients": module.coefficients.detach().flatten().tolist(),
    }


def run(plan: Plan) -> list[dict[str, Any]]:
    """Run all ranks, each in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(plan.ranks), "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    command = [sys.executable, __file__, "--plan", json.dumps(plan._asdict())]
    processes = [
        subprocess.Popen(command, env=shared | {"LOCAL_RANK": str(number)}, stdout=subprocess.PIPE, text=True)
        for number in range(plan.ranks)
    ]
    answers = [process.communicate()[0] for process in processes]
    if failed := [process.returncode for process in processes if process.returncode]:
        raise SystemExit(f"{plan}: a rank ended with status {failed[0]}")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of all rows; bank, peak and what is sent are those of one rank."""
    lines = [
        "| ranks | storage | bank, networks | peak, networks | step, s | sent in a step, MB | messages |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['ranks']} | {row['storage']} | {row['bank']:.3f} | {row['peak']:.2f} | {row['seconds']:.3f} "
        f"| {row['sent'] / 1e6:.1f} | {row['messages']} |"
        for row in rows
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="ViT-B-32")
    parser.add_argument("--layers", type=int, help="blocks, to cut the model down")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=4, help="per task and step, on all ranks together")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--storage", nargs="+", choices=("device", "sharded"), default=["device", "sharded"])
    parser.add_argument("--storage-dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--merge-by", choices=("network", "block"), default="network")
    parser.add_argument("--quick", action="store_true", help="a tiny network on one and two ranks")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    if given.plan:
        print(json.dumps(rank(Plan(**json.loads(given.plan)))))
        return
    plan = Plan(given.model, given.layers, given.tasks, given.images, given.steps, 1, "device", given.storage_dtype)
    plan = plan._replace(merge_by=given.merge_by)
    if given.quick:
        plan, given.ranks = plan._replace(model="tiny", tasks=2, steps=2), [1, 2]
    rows: list[dict[str, Any]] = []
    for ranks in given.ranks:
        for storage in given.storage if ranks > 1 else ["device"]:
            each = run(plan._replace(ranks=ranks, storage=storage))
            network = each[0]["network"]
            rows.append(
                {
                    "ranks": ranks, "storage": storage, "bank": max(one["bank"] for one in each) / network,
                    "peak": max(one["peak"] for one in each) / network,
                    "seconds": median(map(max, zip(*(one["seconds"] for one in each), strict=True))),
                    "sent": max(one["sent"] for one in each), "messages": each[0]["messages"],
                    "coefficients": each[0]["coefficients"],
                }
            )  # fmt: skip
    print(f"{plan.model}, {plan.tasks} tasks, {plan.images} images each on all ranks together")
    print(table(rows))
    for ranks in sorted({row["ranks"] for row in rows}):
        same = [row["coefficients"] for row in rows if row["ranks"] == ranks]
        if len(same) == 2:
            off = max(abs(a - b) for a, b in zip(*same, strict=True))
            print(f"{ranks} ranks: largest difference of a coefficient between the two storages: {off:.1e}")
    if given.output:
        given.output.write_text(json.dumps({"plan": plan._asdict(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
