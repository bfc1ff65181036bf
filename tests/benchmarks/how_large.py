"""How large a merge can be: memory and time from a few constants, checked against a scaled-down run.

    python tests/benchmarks/how_large.py --check --output how_large.json
    python tests/benchmarks/how_large.py --parameters 7e9 --blocks 40 --tasks 8 --ranks 8 --tokens 257 --images 16

``--check`` measures the constants on this machine in small runs of one rank and of two (a transformer of few blocks,
two experts), and predicts with them runs that are larger in every respect (more blocks, more experts, a bank that
ranks share, weights merged by block); then it runs these. Otherwise it prints the plan for a network of that size,
with the constants of ``--flops``, ``--memory`` and ``--link``: by default what 40 %, 70 % and 50 % of an H100's data
sheet are (989 TFLOP/s in bf16, 3.35 TB/s, 900 GB/s both ways), which have not been measured.

Formulas, in bytes and seconds for one rank; P parameters, of which P_b in the largest block and P_o outside of blocks;
T experts, W ranks that share the bank, s bytes per value of a task vector, 4 of the base, c per merged weight:

* bank: (T s + 4) P / W
* merged weights and their gradients: 2 c P, or by block 2 c (P_o + P_b)
* activations: A bytes an image and pass, or by block A / blocks + the blocks' inputs
* encoder: 6 P n FLOP for n tokens, or by block 8 P n, as blocks run forward twice
* task vectors are read twice, or by block three times: (T s + 4) P / W bytes each
* between ranks: (W - 1) / W of c P bytes to gather what was merged (by block twice) and of 4 P to scatter the gradient
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sharded import MODELS, Plan, RandomSuite, run  # type: ignore[import-not-found]

from lit_merge.block_by_block import numbered_blocks
from lit_merge.functional.activation_memory import bytes_per_image


@dataclass(frozen=True)
class Job:
    """A step of adaptation, as one of several ranks sees it."""

    parameters: float
    block: float
    outside: float
    blocks: int
    tokens: int
    width: int
    images: float
    """On this rank, of all tasks together."""
    activations: float
    """Bytes that an image keeps for the way back, without recomputation."""
    tasks: int
    ranks: int
    by_block: bool
    shared: bool = True
    value_bytes: int = 4
    weight_bytes: int = 4

    @property
    def bank(self) -> float:
        holders = self.ranks if self.shared else 1
        return (self.tasks * self.value_bytes + 4) * self.parameters / holders

    def memory(self) -> dict[str, float]:
        """Bytes by what they are for."""
        live = self.outside + self.block if self.by_block else self.parameters
        kept = self.activations
        if self.by_block:
            kept = kept / self.blocks + self.blocks * self.tokens * self.width * self.weight_bytes
        return {
            "bank": self.bank,
            "weights, gradients": 2 * self.weight_bytes * live,
            "activations": kept * self.images,
        }

    def flops(self) -> float:
        return (8 if self.by_block else 6) * self.parameters * self.tokens * self.images

    def read(self) -> float:
        return (3 if self.by_block else 2) * self.bank

    def sent(self) -> float:
        each = (2 if self.by_block else 1) * self.weight_bytes + 4
        return each * self.parameters * (self.ranks - 1) / self.ranks if self.shared else 0.0


@dataclass(frozen=True)
class Machine:
    """Rates of one rank: FLOP/s in the encoder, bytes/s of the contraction and between ranks."""

    flops: float
    memory: float
    link: float

    def seconds(self, job: Job) -> dict[str, float]:
        return {
            "encoder": job.flops() / self.flops,
            "task vectors": job.read() / self.memory,
            "between ranks": job.sent() / self.link,
        }


def job_of(plan: Plan) -> Job:
    """Describe a run of :mod:`sharded`."""
    suite = RandomSuite(plan)
    network = suite.network()
    sizes = {name: shape.numel() for name, shape in suite.shapes.items()}
    blocks = [sum(n for name, n in sizes.items() if name.startswith(f"{b}.")) for b in numbered_blocks(network)]
    image, patch, width, *_ = MODELS[plan.model]
    alive = suite.network().to_empty(device="cpu")
    kept = bytes_per_image(lambda x: alive(x), torch.zeros(1, 3, image, image))
    total = sum(sizes.values())
    return Job(
        parameters=total, block=max(blocks), outside=total - sum(blocks), blocks=len(blocks),
        tokens=(image // patch) ** 2 + 1, width=width, images=plan.tasks * (plan.images // plan.ranks),
        activations=kept, tasks=plan.tasks, ranks=plan.ranks, by_block=plan.merge_by == "block",
        shared=plan.storage == "sharded",
    )  # fmt: skip


def measured(plan: Plan) -> tuple[float, float]:
    """Seconds of a step and peak bytes, of the slowest and the largest rank."""
    each = run(plan)
    seconds = median(map(max, zip(*(one["seconds"] for one in each), strict=True)))
    return seconds, max(one["peak"] for one in each)


def constants(plan: Plan) -> Machine:
    """Solve three small runs for three rates: fewer and more images, fewer and more experts, one rank and two."""
    few, many = plan.images, 4 * plan.images
    base = measured(plan)[0]
    images = measured(plan._replace(images=many))[0]
    tasks = plan._replace(tasks=4 * plan.tasks, images=max(1, few // 4))
    experts = measured(tasks)[0]
    one, more = job_of(plan), job_of(plan._replace(images=many))
    flops = (more.flops() - one.flops()) / (images - base)
    memory = (job_of(tasks).read() - one.read()) / (experts - base)
    two = plan._replace(ranks=2, storage="sharded", images=2 * few)  # each rank has what one had
    extra = measured(two)[0] - Machine(flops, memory, 1).seconds(one)["encoder"] - job_of(two).read() / memory
    return Machine(flops, memory, job_of(two).sent() / extra)


def check(given: argparse.Namespace) -> dict[str, Any]:
    small = Plan("ViT-B-32", 2, 2, 8, given.steps, 1, "device", None, "network")
    machine = constants(small)
    print(", ".join(f"{name} {rate / 1e9:.2f} G/s" for name, rate in asdict(machine).items()))
    large = small._replace(layers=6, tasks=6, images=4, ranks=2, storage="sharded")
    rows = []
    print("| run | bank | peak: predicted, MB | measured | ratio | step: predicted, s | measured | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for plan in (large._replace(ranks=1, storage="device"), large, large._replace(merge_by="block")):
        job = job_of(plan)
        peak, step = sum(job.memory().values()), sum(machine.seconds(job).values())
        seconds, found = measured(plan)
        name = f"{plan.ranks} rank(s), {plan.storage}, by {plan.merge_by}"
        print(f"| {name} | {job.bank / 1e6:.0f} | {peak / 1e6:.0f} | {found / 1e6:.0f} | {found / peak:.2f} "
              f"| {step:.2f} | {seconds:.2f} | {seconds / step:.2f} |", flush=True)  # fmt: skip
        rows.append({"run": name, "predicted": [peak, step], "measured": [found, seconds]})
    return {"machine": asdict(machine), "rows": rows}


def plan_for(given: argparse.Namespace) -> dict[str, Any]:
    """Print memory and time for a network of any size."""
    inside = given.parameters * (1 - given.outside)
    width = (inside / given.blocks / 12) ** 0.5  # 4 d² of attention and 8 d² of the MLP
    job = Job(
        parameters=given.parameters, block=inside / given.blocks, outside=given.parameters * given.outside,
        blocks=given.blocks, tokens=given.tokens, width=round(width), images=given.tasks * given.images / given.ranks,
        activations=given.blocks * given.tokens * width * 17 * 2, tasks=given.tasks, ranks=given.ranks, by_block=True,
        value_bytes=2, weight_bytes=4,
    )  # fmt: skip
    machine = Machine(given.flops, given.memory, given.link)
    rows = []
    print("| merge_by | bank, GB | weights, gradients | activations | peak, GB | encoder, s | task vectors | between "
          "ranks | step, s |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in (replace(job, by_block=False), job):
        memory, seconds = one.memory(), machine.seconds(one)
        parts: Sequence[float] = [*(value / 1e9 for value in memory.values()), sum(memory.values()) / 1e9]
        times: Sequence[float] = [*seconds.values(), sum(seconds.values())]
        print(f"| {'block' if one.by_block else 'network'} | " + " | ".join(f"{x:.1f}" for x in parts) + " | "
              + " | ".join(f"{x:.3f}" for x in times) + " |")  # fmt: skip
        rows.append({"merge_by": "block" if one.by_block else "network", "memory": memory, "seconds": seconds})
    return {"job": asdict(job), "machine": asdict(machine), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure, predict and measure again")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--outside", type=float, default=0.02, help="share of the parameters outside of blocks")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task, on all ranks together")
    parser.add_argument("--tokens", type=int, default=257, help="per image")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--flops", type=float, default=0.4 * 989e12, help="FLOP/s of a rank in the encoder")
    parser.add_argument("--memory", type=float, default=0.7 * 3.35e12, help="bytes/s of the contraction")
    parser.add_argument("--link", type=float, default=0.5 * 450e9, help="bytes/s between ranks, one way")
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    found = check(given) if given.check else plan_for(given)
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
