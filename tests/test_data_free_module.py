from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from kills import Kill, in_child
from lightning.pytorch.cli import ReduceLROnPlateau
from ranks import trainer
from testers import TINY
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from toys import ToySuite

from lit_merge import MergeError, MergeTrainer, TaskDataModule
from lit_merge import functional as F
from lit_merge.callbacks import ExportMerge, ResumePoint
from lit_merge.data_free_module import DataFreeModule
from lit_merge.functional.doge import doge
from lit_merge.functional.layer_problem import LayerProblem
from lit_merge.functional.wudi import wudi
from lit_merge.methods.doge import Doge
from lit_merge.methods.wudi import Wudi

ADAM = partial(torch.optim.Adam, lr=0.01, fused=True)


class Nearest(LayerProblem):
    """What a user writes."""

    def losses(self, value: Tensor) -> Tensor:
        return (value[:, None] - self.deltas).square().sum((1, 2, 3))


class NearestMerge(DataFreeModule):
    problem = Nearest


def fitted(module: DataFreeModule, steps: int, **kwargs: Any) -> Any:
    data = TaskDataModule(module.suite, steps_per_epoch=steps)
    MergeTrainer(**{**TINY, "limit_val_batches": 0, **kwargs}).fit(module, datamodule=data)
    return module


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


def test_a_method_is_its_objective_and_no_more() -> None:
    suite = ToySuite("vit")
    quarter = partial(torch.optim.SGD, lr=1 / 6)  # the curvature is 2 T = 6: one step is Newton's
    module = fitted(NearestMerge(suite=suite, optimizer=quarter), 1)
    average = F.mean_merge(module.bank.deltas)
    assert equal(module.merge(module.bank), module.bank.offset(average), 1e-6)
    assert float(module.trainer.callback_metrics["train/loss"]) == pytest.approx(
        sum(float(module.bank.deltas[name].square().sum()) for name in module.learned()), rel=1e-5
    )
    assert float(module.trainer.callback_metrics["train/gradient_norm"]) == pytest.approx(
        6 * float(torch.cat([average[name].flatten() for name in module.learned()]).norm()), rel=1e-5
    )


def test_a_fit_is_the_function_of_the_same_name() -> None:
    suite = ToySuite("vit")
    module = fitted(Wudi(suite=suite, optimizer=ADAM), 12)
    assert equal(module.merge(module.bank), module.bank.offset(wudi(module.bank.deltas, 12, 0.01)), 1e-6)
    for offsets in ("shared", "per_task"):
        options: dict[str, Any] = {"subspace": 3, "offsets": offsets, "density": 0.4, "scale": 0.8}
        module = fitted(Doge(suite=suite, optimizer=ADAM, others="sum", **options), 12)
        vectors = doge(module.bank.deltas, 12, 0.01, others="keep", **options)
        columns = module.coefficient_table()
        merged = {name: torch.einsum("t,t...->...", columns[:, i], vectors[name])
                  for i, name in enumerate(module.bank.names)}  # fmt: skip
        assert equal(module.merge(module.bank), module.bank.offset(merged), 1e-6)
        assert max(float(value.abs().max()) for value in module.learned().values()) > 0.05


class Watch(L.Callback):
    """Refuses to see an image."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.rates: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_no_image_is_looked_at_and_the_trainer_decides_on_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = ToySuite("vit")
    watch = Watch()
    module = Doge(suite=suite, optimizer=ADAM, scheduler=partial(StepLR, step_size=2, gamma=0.5))
    monkeypatch.setattr(TaskDataModule, "train_dataloader", lambda self: pytest.fail("asked for images"))
    fitted(module, 4, max_epochs=2, max_steps=7, callbacks=[watch])
    assert watch.batches == [0, 1, 2, 3, 0, 1, 2]
    assert watch.rates == [0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125]
    assert module.trainer.global_step == 7
    assert all(p.grad is None for p in module.parameters())
    monkeypatch.setattr(DataFreeModule, "steps", 3)
    engine = MergeTrainer(**TINY)
    engine.fit(Wudi(suite=suite, scheduler=partial(ReduceLROnPlateau, monitor="train/loss")))
    assert engine.global_step == 3


def test_half_precision_changes_nothing() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    states = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        plugins = None if scaler is None else MixedPrecision("16-mixed", "cpu", scaler)
        states.append(fitted(Doge(suite=ToySuite("vit"), optimizer=ADAM), 3, plugins=plugins).learned())
    assert equal(states[0], states[1], 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda suite: Wudi(suite=suite, layers="all"), "Wudi.layers: expected blocks or matrices, found 'all'"),
        (lambda suite: Wudi(suite=suite, exclude="embed").configure_model(), "exclude: expected a list of names"),
        (lambda suite: Wudi(suite=suite, others="keep"), "Wudi.others: expected base, mean or sum, found 'keep'"),
        (
            lambda suite: fitted(Wudi(suite=suite, optimizer=partial(torch.optim.SGD, lr=1e30)), 3),
            "Wudi: layers of shape 5x16 are not finite; lower the learning rate",
        ),
    ],
)  # fmt: skip
def test_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make(ToySuite("vit"))


def test_refuses_to_score_a_stream_that_it_does_not_look_at() -> None:
    suite = ToySuite()
    with pytest.raises(MergeError, match=r"data.protocol: online .* use transductive"):
        MergeTrainer(**TINY).fit(Wudi(suite=suite), datamodule=TaskDataModule(suite, protocol="online"))


def test_what_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    module = Wudi(suite=ToySuite("vit"), optimizer=partial(torch.optim.SGD, lr=1e30))
    with pytest.raises(MergeError, match="are not finite"):
        fitted(module, 3, callbacks=[ExportMerge(str(tmp_path / "merged"))])
    assert not (tmp_path / "merged").exists()


def test_no_rank_waits_for_one_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Wudi(suite=ToySuite("vit"))
    module.configure_model()
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda value, src: sent.append(value))
    monkeypatch.setattr(Wudi, "trainer", SimpleNamespace(world_size=2))
    with torch.no_grad():
        next(iter(module.values.values())).fill_(float("nan"))
    with pytest.raises(MergeError, match="are not finite"):
        module.on_train_epoch_end()
    assert len(sent) == len(module.values)


# Resuming; tests/test_ranks.py has several ranks ---------------------------------------------------------------------


class Write(L.Callback):
    """Writes what each rank has learned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DataFreeModule)
        torch.save((trainer.global_step, pl_module.learned()), self.folder / f"{trainer.global_rank}.pt")


def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    def fit(folder: Path, *kill: Kill) -> tuple[int, dict[str, Tensor]]:
        module = Doge(
            suite=ToySuite("vit"), optimizer=ADAM, scheduler=partial(StepLR, step_size=3, gamma=0.5), offsets="per_task"
        )
        engine = trainer(
            folder, 1, max_epochs=2, callbacks=[ResumePoint(2), Write(folder), *kill], limit_val_batches=0
        )  # fmt: skip
        engine.fit(module, datamodule=TaskDataModule(module.suite, steps_per_epoch=5), ckpt_path="last")
        return engine.global_step, module.learned()

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = fit(tmp_path / "whole")
    assert in_child(lambda: fit(tmp_path / "killed", Kill("end", 8))) == -signal.SIGKILL
    assert torch.load(tmp_path / "killed/last.ckpt", weights_only=True)["global_step"] == 6
    found = fit(tmp_path / "killed")
    assert found[0] == expected[0] == 10
    assert equal(found[1], expected[1])
