"""What differs between ranks is named before anything is learned from it or scored with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_group import gathered
from ranks import odd, trainer
from toys import ToySuite

from lit_merge import AdaMerging, ConcreteMerging, MergeError, MergeModule, TaskDataModule
from lit_merge.agreement import described
from lit_merge.objectives import Diversity, Entropy, WeightedSum


class Drawn(ConcreteMerging):
    """Logits that start somewhere else on every rank."""

    def make_parameters(self, bank: Any) -> None:
        super().make_parameters(bank)
        with torch.no_grad():
            self.logits.add_(torch.distributed.get_rank())


def objective(rank: int) -> WeightedSum:
    return WeightedSum([Entropy(), Diversity()], [1.0, 0.5 + rank])


SGD = torch.optim.SGD
MLP = partial(ToySuite, "mlp")
DIFFERENT: dict[str, Callable[[int], MergeModule]] = {
    r"images of 'task.b' to adapt is 1 .* and 9 on rank 1": lambda r: AdaMerging(suite=odd(single=r == 0)),
    r"head of 'task.a' is sha256": lambda r: AdaMerging(suite=MLP(heads=r)),
    r"differ: expert 'task.c' is sha256:\w+ on": lambda r: AdaMerging(suite=MLP(changed=r == 1)),
    r"tasks is \[\['task.a', 'task.b'\], \[\]\] on rank 0": lambda r: AdaMerging(suite=MLP(tasks=2 + r)),
    r"differ: model.bounds is \[0, 1\] on rank 0 and \[0, 2\]": lambda r: AdaMerging(suite=MLP(), bounds=(0, 1 + r)),
    r"differ: model.mask_seed is 0 on rank 0 and 1": lambda r: ConcreteMerging(suite=MLP(), mask_seed=r),
    r"differ: model.objective is .*0\.5.* on rank 0": lambda r: AdaMerging(suite=MLP(), objective=objective(r)),
    r"differ: optimizer 0 is SGD .*'lr': 0\.1": lambda r: AdaMerging(suite=MLP(), optimizer=partial(SGD, lr=0.1 + r)),
    r"differ: values of logits is sha256": lambda r: Drawn(suite=MLP()),
    r"differ: method is .*AdaMerging on rank 0 and .*Drawn": lambda r: (AdaMerging, Drawn)[r](suite=MLP()),
}  # fmt: skip


def test_what_differs_is_named_on_all_ranks(tmp_path: Path) -> None:
    def attempt(number: int, module: MergeModule, seed: int = 0, fn: str = "fit") -> str:
        engine = trainer(tmp_path / str(number), 2, max_epochs=1, strategy="ddp", enable_checkpointing=False)
        data = TaskDataModule(module.suite, batch_size=2, steps_per_epoch=1, seed=seed)
        try:
            getattr(engine, fn)(module, datamodule=data)
        except MergeError as error:
            return str(error)
        return ""

    def work() -> list[str]:
        same = attempt(0, AdaMerging(suite=MLP(), objective=objective(0)))  # makes the group, too
        rank = torch.distributed.get_rank()
        found = [same, attempt(1, AdaMerging(suite=MLP()), seed=rank)]
        read_before = AdaMerging(suite=MLP(changed=rank == 1))
        read_before.configure_model()
        found.append(attempt(2, read_before, fn="test"))
        return found + [attempt(3 + n, make(rank)) for n, make in enumerate(DIFFERENT.values())]

    first, second = gathered(2, tmp_path / "ranks", work)
    assert first == second
    same, seed, scored, *others = first
    assert same == ""
    assert "data: seed is 0 on rank 0 and 1 on rank 1; all ranks must" in seed
    assert "expert 'task.c'" in scored
    for pattern, message in zip(DIFFERENT, others, strict=True):
        assert re.search(pattern, message), (pattern, message)


@pytest.mark.parametrize("value", [object(), AdaMerging, torch.nn.ReLU(), [lambda: 0], Entropy(), {1: {object()}}])
def test_settings_are_described_without_addresses(value: object) -> None:
    assert "0x" not in described(value)
