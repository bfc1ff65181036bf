"""DAM on two ranks, and after a kill."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from kills import Case, Kill, When, check, fit, in_child, uninterrupted
from ranks import close, odd, trainer
from toys import ToySuite

from lit_merge import TaskDataModule
from lit_merge.methods import DAM
from lit_merge.suites import Suite

SGD = partial(torch.optim.SGD, lr=0.05)


class Write(L.Callback):
    """Writes what each rank has learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = {name: value.detach() for name, value in pl_module.named_parameters()}
        deltas = {task: pl_module.perturbations.delta(task) for task in pl_module.suite.tasks}
        torch.save(state | deltas, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("options", [{}, {"preset": "released", "inner_step": "sgd"}], ids=["paper", "released"])
def test_two_ranks_are_one(tmp_path: Path, options: dict[str, Any]) -> None:
    found: list[Any] = []
    for ranks in (1, 2):
        (folder := tmp_path / str(ranks)).mkdir()
        suite = odd()  # sizes 13, 1 and 22, in double precision
        module = DAM(suite=suite, optimizer=SGD, mask_rate=0.3, mask_update="normalized", mask_steps=2, **options)
        data = TaskDataModule(suite, batch_size=6 // ranks, steps_per_epoch=4, seed=3)
        trainer(folder, ranks, max_epochs=1, callbacks=[Write(folder)]).fit(module, datamodule=data)
        found += [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    alone, first, second = found
    assert first.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        close(first[key], value, 1e-6)  # the perturbations are in single precision
        assert value.abs().max() > 0


@dataclass(frozen=True)
class Defended(Case):
    """A run of both stages, with everything that has a state."""

    preset: str = "paper"

    def model(self, suite: Suite | None = None, **kwargs: Any) -> Any:
        return DAM(
            suite=suite or ToySuite("mlp"), preset=self.preset, mask_steps=8, mask_rate=0.3,  # type: ignore[arg-type]
            optimizer=partial(torch.optim.Adam, lr=0.01), coefficient_stage="safe", **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize(("preset", "when", "number"), [("released", "start", 9), ("paper", "in_save", 5)])
def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, preset: str, when: When, number: int) -> None:
    case = Defended(preset=preset)  # coefficients learned under masks and perturbations: what differs there, differs
    uninterrupted(case)
    assert in_child(lambda: fit(case, tmp_path, Kill(when, number))) == -signal.SIGKILL
    check(case, tmp_path)
