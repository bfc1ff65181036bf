"""Small networks that are merged piece by piece and in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge import MergeModule, TaskVectors, methods
from lit_merge.checkpoints.reading import read_state
from lit_merge.streaming import PieceReader, stream_merge
from lit_merge.suites import WeightsSuite

SHAPES = {
    "embed.weight": (67, 6), "h.0.attn.weight": (6, 6), "h.0.mlp.weight": (8, 6), "h.0.mlp.bias": (8,),
    "h.1.attn.weight": (6, 6), "h.1.mlp.weight": (8, 33), "h.1.mlp.bias": (8,), "norm.running_mean": (6,),
    "temperature": (),
}  # fmt: skip
TASKS = "abcdefgh"  # eight: sums over them have an order
BUFFERS = ("norm.running_mean",)


@cache
def states(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Base (key "") and experts: signs tie often in the attention, and elsewhere sums depend on their order."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in ("", *TASKS):
        made[name] = {k: torch.randn(s, generator=generator).to(dtype) for k, s in SHAPES.items()}
        made[name] |= {k: (4 * v).round().div(8) for k, v in made[name].items() if "attn" in k or "bias" in k}
        made[name]["steps"] = torch.tensor([3, 1, 2])
    return made


def make(method: str, tasks: int, options: dict[str, Any]) -> MergeModule:
    made: MergeModule = getattr(methods, method)(suite=WeightsSuite("base", list(TASKS[:tasks])), **options)
    return made


def in_memory(model: MergeModule, every: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The merge of a bank of the whole network, as a run without streaming makes it."""
    experts = {task: every[task] for task in model.suite.tasks}
    bank = TaskVectors.from_state_dicts(every[""], experts, buffers=BUFFERS)
    for transform in model.transforms:
        bank = bank.map(transform)
    return bank.complete(model.merge(bank))


def streamed(model: MergeModule, every: dict[str, dict[str, Tensor]], folder: Path, **more: Any) -> dict[str, Tensor]:
    reader = PieceReader(every[""], {task: every[task] for task in model.suite.tasks}, buffers=BUFFERS, piece_bytes=1)
    return dict(read_state(stream_merge(model, reader, folder, **more)))


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong
    assert all(found[name].dtype == expected[name].dtype for name in expected)
