"""Tasks that are scored but not merged: no row in the bank, no image in adaptation, results of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from callbacks_helpers import trainer_of
from torch import Tensor, nn
from toys import ToySuite

from lit_merge.callbacks import Report
from lit_merge.data import TaskDataModule
from lit_merge.methods import AdaMerging, SimpleAverage
from lit_merge.suites import Split, Suite


class Partly(Suite):
    """Toys of which the last task is not merged."""

    def __init__(self, with_expert: bool) -> None:
        self.inner = ToySuite("mlp")
        self.with_expert = with_expert

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.inner.tasks[:2]

    @property
    def unseen(self) -> tuple[str, ...]:
        return self.inner.tasks[2:]

    def has_expert(self, task: str) -> bool:
        return self.with_expert or task in self.tasks

    def network(self) -> nn.Module:
        return self.inner.network()

    def base(self) -> Mapping[str, Tensor]:
        return self.inner.base()

    def expert(self, task: str) -> Mapping[str, Tensor]:
        assert self.has_expert(task)
        return self.inner.expert(task)

    def head(self, task: str) -> nn.Module:
        return self.inner.head(task)

    def num_classes(self, task: str) -> int:
        return self.inner.num_classes(task)

    def dataset(self, task: str, split: Split) -> Any:
        return self.inner.dataset(task, split)


@pytest.mark.parametrize("with_expert", [True, False])
@pytest.mark.parametrize("protocol", ["transductive", "split", "online"])
def test_scored_apart_and_never_adapted_on(protocol: Any, with_expert: bool) -> None:
    suite, report = Partly(with_expert), Report()
    seen, (unseen,) = suite.tasks, suite.unseen
    data = TaskDataModule(suite=suite, steps_per_epoch=2, batch_size=4, protocol=protocol)
    model = AdaMerging(suite=suite)
    trainer = trainer_of(report)
    trainer.fit(model, datamodule=data)
    assert model.bank.tasks == seen
    assert all(set(batch) <= set(seen) for batch in data.train_dataloader())
    trainer.test(model, datamodule=data, verbose=False)
    found = report.content
    assert tuple(found["tasks"]) == seen
    row = found["extra"]["unseen"]["tasks"][unseen]
    assert row["n"] == len(suite.dataset(unseen, "test"))  # all of them, under every protocol
    assert ("expert_accuracy" in row) == with_expert
    images, labels = zip(*(suite.dataset(unseen, "test")[i] for i in range(row["n"])), strict=True)
    right = model(torch.stack(images), unseen).argmax(-1) == torch.tensor(labels)
    assert row["accuracy"] == pytest.approx(float(right.float().mean()))
    own = [found["tasks"][task]["accuracy"] for task in seen]
    assert found["mean"]["accuracy"] == pytest.approx(sum(own) / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-10), ("float32", 0.0)])
def test_storage_halves_the_bank_and_rounds_task_vectors_only(dtype: Any, tolerance: float) -> None:
    suite = ToySuite("vit")
    exact, stored = (SimpleAverage(suite=suite, storage_dtype=given) for given in (None, dtype))
    for model in (exact, stored):
        model.configure_model()
    assert next(iter(stored.bank.deltas.values())).dtype == getattr(torch, dtype)
    assert all(torch.equal(value, stored.bank.base[name]) for name, value in exact.bank.base.items())
    for name, delta in exact.bank.deltas.items():
        error = (stored.bank.deltas[name].float() - delta).abs()
        assert bool((error <= tolerance * delta.abs() + 1e-7 * (tolerance > 0)).all())
    assert stored.merged_state()["proj"].dtype == torch.float32
