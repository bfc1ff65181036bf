"""Supervised fine-tuning."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.encoders.heads import CosineHead
from lit_merge.errors import MergeError
from lit_merge.finetune import FineTuneModule, warmup_cosine


def network() -> nn.Module:
    """Return a tiny encoder of 2x2 images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


def heads() -> dict[str, nn.Module]:
    """Return two frozen heads, one of which has a dot in its name."""
    return {"a": CosineHead(torch.eye(4)[:2]), "b.c": CosineHead(torch.eye(4)[:3])}


def batch(size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Return a batch of both tasks; the mean of the first row tells the class of ``a``."""
    labels = torch.arange(size) % 2
    images = torch.randn(size, 3, 2, 2) + 2 * labels[:, None, None, None]
    return {"a": (images, labels), "b.c": (torch.randn(size, 3, 2, 2), torch.arange(size) % 3)}


def trainer(**kwargs: Any) -> L.Trainer:
    """Return a silent Trainer."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **kwargs)


def loaders(images: int = 32) -> CombinedLoader:
    """Return loaders of both tasks."""
    return CombinedLoader(
        {task: DataLoader(TensorDataset(*pair), batch_size=8) for task, pair in batch(images).items()}, "min_size"
    )


def test_loss_is_the_mean_over_images_then_tasks() -> None:
    module, data = FineTuneModule(network(), heads(), label_smoothing=0.1), batch()
    expected = [
        F.cross_entropy(module.heads[task](module.network(x)), y, label_smoothing=0.1) for task, (x, y) in data.items()
    ]
    torch.testing.assert_close(module.loss(data), sum(expected) / 2)


def test_exhausted_loaders_are_left_out() -> None:
    module, data = FineTuneModule(network(), heads()), batch()
    alone = module.loss({"a": data["a"]})
    torch.testing.assert_close(module.loss({"a": data["a"], "b.c": None}), alone)


def test_images_of_different_sizes() -> None:
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    module = FineTuneModule(pooled, heads())
    logits = module({"a": torch.randn(2, 3, 2, 2), "b.c": torch.randn(5, 3, 6, 6)})
    assert {task: tuple(value.shape) for task, value in logits.items()} == {"a": (2, 2), "b.c": (5, 3)}


def test_fit_lowers_the_loss_and_leaves_given_heads_alone() -> None:
    torch.manual_seed(0)
    given = heads()
    before = copy.deepcopy(given["a"].state_dict())
    module = FineTuneModule(network(), given, learning_rate=1e-2, warmup_steps=2)
    data = batch(32)
    first = module.loss(data).item()
    trainer(max_epochs=20).fit(module, loaders())
    assert module.loss(data).item() < first
    assert torch.equal(before["weight"], given["a"].get_parameter("weight"))
    assert torch.equal(before["weight"], module.heads["a"].get_parameter("weight"))


def test_heads_train_when_wanted() -> None:
    given = heads()
    module = FineTuneModule(network(), given, train_heads=True, learning_rate=1e-2, warmup_steps=0)
    trainer(max_epochs=1).fit(module, loaders())
    trained = module.heads["a"].get_parameter("weight")
    assert not torch.equal(trained, given["a"].get_parameter("weight"))
    assert not given["a"].get_parameter("weight").requires_grad


def test_network_is_put_into_training_mode_and_frozen_heads_into_evaluation() -> None:
    module = FineTuneModule(network().eval(), {"a": nn.Sequential(nn.Dropout(), nn.Linear(4, 2))})
    assert module.network.training
    assert not module.heads["a"].training


def test_validation_reports_accuracies() -> None:
    module = FineTuneModule(network(), heads())
    (measured,) = trainer().validate(module, loaders(), verbose=False)
    assert set(measured) == {"val/a/accuracy", "val/b.c/accuracy"}
    assert all(0 <= value <= 1 for value in measured.values())


def test_optimizer_and_schedule_follow_the_recipe() -> None:
    module = FineTuneModule(network(), heads(), learning_rate=0.1, warmup_steps=2)
    fit = trainer(max_steps=4)
    rates: list[float] = []

    class Watch(L.Callback):
        """Note the learning rate of each step."""

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            """Note it."""
            rates.append(optimizer.param_groups[0]["lr"])

    fit.callbacks.append(Watch())  # type: ignore[attr-defined]
    fit.fit(module, loaders())
    assert rates == pytest.approx([0.1 * warmup_cosine(step, 2, 4) for step in range(4)])
    group = fit.optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 2


def test_endless_training_has_no_cosine() -> None:
    with pytest.raises(MergeError, match="max_steps or max_epochs"):
        trainer(max_epochs=-1).fit(FineTuneModule(network(), heads()), loaders())


@pytest.mark.parametrize(("step", "factor"), [(0, 0.01), (99, 1.0), (100, 1.0), (150, 0.5), (200, 0.0), (900, 0.0)])
def test_warmup_cosine(step: int, factor: float) -> None:
    assert warmup_cosine(step, 100, 200) == pytest.approx(factor)


def test_unknown_task_in_a_batch_is_refused() -> None:
    with pytest.raises(MergeError, match=r"unknown tasks \['z'\].*a, b\.c"):
        FineTuneModule(network(), heads())({"z": torch.zeros(1, 3, 2, 2)})


@pytest.mark.parametrize(
    "numbers",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match=next(iter(numbers))):
        FineTuneModule(network(), heads(), **numbers)


def test_no_heads_are_refused() -> None:
    with pytest.raises(MergeError, match="at least one head"):
        FineTuneModule(network(), {})
