"""Accuracies are what a few lines of plain PyTorch say they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import Kind, ToyData, ToySuite, network

from lit_merge import AdaMerging, MergeModule, MergeTrainer, TaskDataModule
from lit_merge.data.datamodule import _labelled
from lit_merge.data.datasets import Indexed
from lit_merge.errors import MergeError
from lit_merge.methods import TaskArithmetic
from lit_merge.metrics import Hits, TaskScores
from lit_merge.suites import NetworkSuite, Suite
from lit_merge.transforms import Dare, Ties

KINDS: tuple[Kind, ...] = ("cnn", "vit", "tied", "mlp")


def trainer(**kwargs: Any) -> MergeTrainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return MergeTrainer(accelerator="cpu", enable_checkpointing=False, **{**quiet, **kwargs})


def images_of(suite: Suite, task: str) -> tuple[Tensor, Tensor]:
    data = suite.dataset(task, "test")
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(images), torch.tensor(labels)


@torch.no_grad()
def by_hand(suite: ToySuite, task: str, state: Mapping[str, Tensor]) -> Tensor:
    """Predictions of a plain network with the given weights."""
    net = suite.network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(dict(state))
    predictions: Tensor = suite.head(task)(net.eval()(images_of(suite, task)[0])).argmax(-1)
    net.load_state_dict(before)  # the base of the suite is this network's
    return predictions


def accuracy(suite: ToySuite, task: str, state: Mapping[str, Tensor]) -> float:
    return float((by_hand(suite, task, state) == images_of(suite, task)[1]).double().mean())


def arithmetic(suite: ToySuite, scale: float) -> dict[str, Tensor]:
    """θ0 + scale · Σ (θ_t − θ0) for parameters, and the mean over the experts for running statistics."""
    base = {name: value.clone() for name, value in suite.base().items()}
    parameters = {name for name, _ in suite.network().named_parameters(remove_duplicate=False)}
    merged = {}
    for name, value in base.items():
        experts = torch.stack([suite.expert(task)[name] for task in suite.tasks])
        if not value.is_floating_point():
            merged[name] = value
        elif name in parameters:
            merged[name] = value + scale * (experts - value).sum(0)
        else:
            merged[name] = experts.mean(0)
    return merged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_base_expert_and_merge_equal_a_computation_by_hand(kind: Kind, stage: str) -> None:
    suite = ToySuite(kind)
    model = TaskArithmetic(suite=suite, scale=0.3)
    getattr(trainer(), stage)(model, datamodule=TaskDataModule(suite, eval_batch_size=8), verbose=False)
    merged = arithmetic(suite, 0.3)
    rows = model.results["tasks"]
    assert tuple(rows) == suite.tasks
    for task, row in rows.items():
        assert row["n"] == len(suite.dataset(task, "test"))
        assert row["accuracy"] == pytest.approx(accuracy(suite, task, merged))
        assert row["expert_accuracy"] == pytest.approx(accuracy(suite, task, suite.expert(task)))
        assert row["base_accuracy"] == pytest.approx(accuracy(suite, task, suite.base()))
        assert row["normalized_accuracy"] == pytest.approx(row["accuracy"] / row["expert_accuracy"])
    for key, value in model.results["mean"].items():
        assert value == pytest.approx(sum(row[key] for row in rows.values()) / 3)  # each task counts the same
    assert len({row["accuracy"] for row in rows.values()} | {row["base_accuracy"] for row in rows.values()}) > 2


def test_metrics_have_names_that_say_what_they_are() -> None:
    suite = ToySuite("mlp")
    model, engine = TaskArithmetic(suite=suite), trainer()
    engine.test(model, datamodule=TaskDataModule(suite), verbose=False)
    logged = {key: float(value) for key, value in engine.callback_metrics.items()}
    expected = {f"test/{key}": value for key, value in model.results["mean"].items()}
    expected |= {f"test/accuracy/{task}": row["accuracy"] for task, row in model.results["tasks"].items()}
    assert logged == pytest.approx(expected)
    assert set(logged) == {
        *("test/accuracy", "test/expert_accuracy", "test/base_accuracy", "test/normalized_accuracy"),
        *("test/accuracy/task.a", "test/accuracy/task.b", "test/accuracy/task.c"),
    }


@pytest.mark.parametrize("batch", [1, 4, 1000])
def test_the_size_of_the_batches_does_not_matter(batch: int) -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite)
    trainer().test(model, datamodule=TaskDataModule(suite, eval_batch_size=batch), verbose=False)
    for task, row in model.results["tasks"].items():
        assert row["accuracy"] == pytest.approx(accuracy(suite, task, arithmetic(suite, model.hparams["scale"])))


def test_a_second_evaluation_starts_from_nothing() -> None:
    suite = ToySuite("mlp")
    model, data, engine = TaskArithmetic(suite=suite), TaskDataModule(suite), trainer()
    engine.test(model, datamodule=data, verbose=False)
    first = model.results
    engine.validate(model, datamodule=data, verbose=False)
    engine.test(model, datamodule=data, verbose=False)
    assert model.results == first
    assert model._merged is None


@pytest.mark.parametrize("transform", [Ties(density=0.1), Dare(drop=0.9)])
@pytest.mark.parametrize("kind", ["cnn", "tied"])
def test_references_are_the_experts_as_they_were_before_the_transforms(kind: Kind, transform: Any) -> None:
    suite = ToySuite(kind)
    model = TaskArithmetic(suite=suite, transforms=[transform])
    trainer().test(model, datamodule=TaskDataModule(suite, eval_batch_size=5), verbose=False)
    for task, row in model.results["tasks"].items():
        assert row["expert_accuracy"] == pytest.approx(accuracy(suite, task, suite.expert(task)))
        assert row["base_accuracy"] == pytest.approx(accuracy(suite, task, suite.base()))
    state = model.bank.expert(suite.tasks[0])
    assert any(not torch.equal(value, suite.expert(suite.tasks[0])[name]) for name, value in state.items())


def test_validation_inside_a_fit_shows_progress_without_references() -> None:
    suite = ToySuite("cnn")
    model, engine = AdaMerging(suite=suite), trainer(max_epochs=1)
    calls: list[str] = []
    expert_state = model.expert_state
    model.expert_state = lambda task: calls.append(task) or expert_state(task)  # type: ignore[method-assign, func-returns-value]
    engine.fit(model, datamodule=TaskDataModule(suite, batch_size=4))
    assert not calls
    assert set(model.results["mean"]) == {"accuracy"}
    for task, row in model.results["tasks"].items():
        assert set(row) == {"n", "accuracy"}
        assert row["accuracy"] == pytest.approx(accuracy(suite, task, model.merged_state()))
    assert {"val/accuracy", "val/accuracy/task.a"} <= set(engine.callback_metrics)
    assert "val/expert_accuracy" not in engine.callback_metrics


def test_a_merge_can_be_trained_after_it_was_evaluated() -> None:
    # evaluation runs in inference mode, and tensors from there cannot take part in training
    suite = ToySuite("cnn")
    for buffers in ("average", "base", "recalibrate"):
        model, data = AdaMerging(suite=suite, buffers=buffers), TaskDataModule(suite, batch_size=4, seed=0)
        trainer().test(model, datamodule=data, verbose=False)
        trainer(max_epochs=1).fit(model, datamodule=data)
        fresh = AdaMerging(suite=suite, buffers=buffers)
        trainer(max_epochs=1).fit(fresh, datamodule=TaskDataModule(suite, batch_size=4, seed=0))
        assert torch.equal(model.coefficients, fresh.coefficients)


def test_predict_gives_every_image_once() -> None:
    suite = ToySuite("vit")
    model = TaskArithmetic(suite=suite, scale=0.2)
    outputs = trainer().predict(model, datamodule=TaskDataModule(suite, eval_batch_size=8))
    assert outputs is not None
    found: dict[str, dict[int, int]] = {task: {} for task in suite.tasks}
    for loader in outputs:
        for batch in loader:
            assert isinstance(batch, dict)
            for index, prediction in zip(batch["index"].tolist(), batch["prediction"].tolist(), strict=True):
                assert index not in found[batch["task"]]
                found[batch["task"]][index] = prediction
    for task, predictions in found.items():
        assert list(predictions) == list(range(len(suite.dataset(task, "test"))))
        assert list(predictions.values()) == by_hand(suite, task, arithmetic(suite, 0.2)).tolist()


def loader(suite: Suite, task: str, batch: int = 5) -> DataLoader[Any]:
    data = suite.dataset(task, "test")
    view = Indexed(data, range(len(data)), task, suite.num_classes(task))
    return DataLoader(view, batch_size=batch, collate_fn=_labelled)


def test_loaders_of_ones_own_are_told_apart_by_name() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite)
    loaders = {task: loader(suite, task) for task in ("task.c", "task.a")}  # another order, and not all
    trainer().test(model, dataloaders=loaders, verbose=False)
    assert list(model.results["tasks"]) == ["task.a", "task.c"]
    for task, row in model.results["tasks"].items():
        assert row["n"] == len(suite.dataset(task, "test"))
        assert row["expert_accuracy"] == pytest.approx(accuracy(suite, task, suite.expert(task)))
    by_order = TaskArithmetic(suite=suite)
    trainer().test(by_order, dataloaders=[loader(suite, task) for task in suite.tasks], verbose=False)
    assert by_order.results["tasks"]["task.c"] == model.results["tasks"]["task.c"]


def test_an_unknown_task_is_an_error_that_lists_the_known_ones() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite)
    with pytest.raises(MergeError, match=r"toys: unknown task 'cars'; it has task.a, task.b, task.c"):
        trainer().test(model, dataloaders={"cars": loader(suite, "task.a")}, verbose=False)
    with pytest.raises(MergeError, match="unknown task 'cars'"):
        model(torch.zeros(1, 3, 8, 8), "cars")


def test_forward_gives_the_logits_of_the_merge() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite, scale=0.4)
    model.configure_model()
    for task in suite.tasks:
        logits = model(images_of(suite, task)[0], task)
        assert logits.shape == (len(suite.dataset(task, "test")), suite.num_classes(task))
        assert torch.equal(logits.argmax(-1), by_hand(suite, task, arithmetic(suite, 0.4)))


# Recalibration -------------------------------------------------------------------------------------------------------


def test_recalibrated_statistics_equal_a_plain_pass_in_train_mode() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite, scale=0.3, buffers="recalibrate")
    data = TaskDataModule(suite, batch_size=4, seed=2)
    trainer().test(model, datamodule=data, verbose=False)
    state = model.merged_state()

    net = network("cnn")
    net.load_state_dict(arithmetic(suite, 0.3))
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    net.train()
    with torch.no_grad():
        for batch in data.adaptation_batches():
            net(torch.cat([part.images for part in batch.values()]))
    average = arithmetic(suite, 0.3)
    for name, value in net.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(state[name], value)
            assert not torch.allclose(state[name], average[name], atol=1e-3)
    for task, row in model.results["tasks"].items():
        assert row["accuracy"] == pytest.approx(accuracy(suite, task, net.state_dict()))
        assert row["expert_accuracy"] == pytest.approx(accuracy(suite, task, suite.expert(task)))


def test_base_statistics_are_those_of_the_base() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite, buffers="base")
    trainer().test(model, datamodule=TaskDataModule(suite), verbose=False)
    state = model.merged_state()
    assert all(torch.equal(state[name], value) for name, value in suite.base().items() if "running" in name)


def test_recalibration_without_images_is_an_error() -> None:
    suite = ToySuite("cnn")
    model = TaskArithmetic(suite=suite, buffers="recalibrate")
    with pytest.raises(MergeError, match="recalibrate needs a TaskDataModule to draw unlabelled images from"):
        trainer().test(model, dataloaders={"task.a": loader(suite, "task.a")}, verbose=False)


def test_recalibration_leaves_a_network_without_batch_norm_as_it_is(tmp_path: Path) -> None:
    suite = ToySuite("vit")
    model: MergeModule = TaskArithmetic(suite=suite, buffers="recalibrate")
    trainer().test(model, datamodule=TaskDataModule(suite), verbose=False)
    plain = TaskArithmetic(suite=suite)
    trainer().test(plain, datamodule=TaskDataModule(suite), verbose=False)
    assert model.results == plain.results


# Counting ------------------------------------------------------------------------------------------------------------


def test_an_expert_that_is_never_right_does_not_divide_by_zero() -> None:
    scores = TaskScores(["x", "empty"])
    scores.reset()
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for kind, logits in (("merged", right), ("expert", wrong), ("base", wrong)):
        for _ in range(4):
            scores.update(kind, "x", logits, torch.tensor([0]))  # type: ignore[arg-type]
    results = scores.compute(references=True)
    assert set(results["tasks"]) == {"x"}  # a task without images is left out
    assert results["tasks"]["x"]["accuracy"] == 1.0
    assert results["tasks"]["x"]["expert_accuracy"] == 0.0
    assert results["tasks"]["x"]["normalized_accuracy"] == 4.0  # as if the expert had one hit


def test_hits_can_be_added_after_they_were_read() -> None:
    hits = Hits()
    hits.add(torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert hits.compute().tolist() == [1, 2]
    hits.add(torch.tensor([1]), torch.tensor([1]))
    assert hits.compute().tolist() == [2, 3]
    hits.reset()
    assert (hits.correct.item(), hits.total.item()) == (0, 0)


def test_any_name_of_a_task_will_do() -> None:
    base = network("mlp")
    names = ("train", "type", "cars.v1", "a b/c", "values")
    suite = NetworkSuite(
        network=base,
        experts={name: base.state_dict() for name in names},
        test={name: ToyData(5 + number, 3, seed=number) for number, name in enumerate(names)},
        num_classes=dict.fromkeys(names, 4),
    )
    model = TaskArithmetic(suite=suite)
    trainer().test(model, datamodule=TaskDataModule(suite), verbose=False)
    assert [row["n"] for row in model.results["tasks"].values()] == [5, 6, 7, 8, 9]
    assert tuple(model.results["tasks"]) == names
