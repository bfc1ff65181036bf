from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from testers import TINY, MergeTester
from torch import Tensor
from torch.func import functional_call
from toys import Kind, ToySuite

from lit_merge import AdaMerging, Diversity, Entropy, ExpertAlignment, MergeError, MergeTrainer, TaskDataModule
from lit_merge.data import UnlabelledBatch
from lit_merge.objectives import TaskOutput, WeightedSum


class TestAdaMerging(MergeTester):
    make = AdaMerging
    unit: ClassVar[dict[str, Any] | None] = {"init": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"init": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.3 * deltas.sum(0)


def batch_of(suite: ToySuite, size: int, dtype: torch.dtype) -> dict[str, UnlabelledBatch]:
    data = {task: suite.dataset(task, "test") for task in suite.tasks}
    return {
        task: UnlabelledBatch(torch.stack([d[i][0] for i in range(size)]).to(dtype), torch.arange(size))
        for task, d in data.items()
    }


def step_gradient(module: AdaMerging, batch: dict[str, UnlabelledBatch]) -> tuple[float, Tensor]:
    """Loss and coefficient gradient of the module's own training step."""
    trainer = MergeTrainer(**TINY)
    trainer.strategy.connect(module)
    module.trainer = trainer
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    assert module.coefficients.grad is not None
    return float(loss.detach()), module.coefficients.grad.clone()


def naive_gradient(module: AdaMerging, suite: ToySuite, batch: dict[str, UnlabelledBatch]) -> tuple[float, Tensor]:
    """The same through plain autograd: merged weights in the graph, one forward per task, losses summed."""
    base, experts = suite.base(), [suite.expert(task) for task in suite.tasks]
    coefficients = module.coefficients.detach().clone().requires_grad_()
    weights = (coefficients.softmax(0) if module.softmax else coefficients)[:, module.column]
    network = suite.network().eval()
    trained = [name for name, _ in network.named_parameters()]  # tied tensors once
    state: dict[str, Tensor] = {}
    for name, value in base.items():
        if name in trained:
            column = trained.index(name)
            state[name] = value + torch.stack(
                [weights[t, column] * (e[name] - value) for t, e in enumerate(experts)]
            ).sum(0)
        elif value.is_floating_point() and name in dict(network.named_buffers()):
            state[name] = value + torch.stack([e[name] - value for e in experts]).mean(0)
    loss = torch.zeros((), dtype=weights.dtype)
    for task in suite.tasks:
        features = functional_call(network, state, (batch[task].images,))
        logits = suite.head(task)(features)
        loss = loss + Entropy()(TaskOutput(logits, features))
    loss.backward()
    assert coefficients.grad is not None
    return float(loss.detach()), coefficients.grad


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied"])
@pytest.mark.parametrize("granularity", ["task", "block", "tensor", "layer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_gradient_equals_autograd(kind: Kind, granularity: Any, dtype: str, tolerance: float) -> None:
    suite = ToySuite(kind, dtype=dtype)
    module = AdaMerging(suite=suite, granularity=granularity, init=0.2)
    module.configure_model()
    with torch.no_grad():
        noise = torch.randn(module.coefficients.shape, generator=torch.Generator().manual_seed(1))
        module.coefficients.add_(noise, alpha=0.05)
    batch = batch_of(suite, 5, getattr(torch, dtype))
    loss, gradient = step_gradient(module, batch)
    naive_loss, naive = naive_gradient(module, suite, batch)
    assert loss == pytest.approx(naive_loss, rel=tolerance)
    assert (gradient - naive).norm() / naive.norm() < tolerance


@pytest.mark.parametrize("most", [1, 5, 7, 10, 100])
def test_chunks_change_nothing(most: int) -> None:
    suite = ToySuite("vit", dtype="float64")
    batch = batch_of(suite, 5, torch.float64)
    gradients = []
    for limit in (None, most):
        module = AdaMerging(suite=suite, objective=WeightedSum([Entropy(), Diversity()]), max_images=limit)
        module.configure_model()
        gradients.append(step_gradient(module, batch)[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-14)


def test_softmax_gradient_equals_autograd() -> None:
    suite = ToySuite("cnn", dtype="float64")
    module = AdaMerging(suite=suite, softmax=True)
    module.configure_model()
    batch = batch_of(suite, 4, torch.float64)
    assert (step_gradient(module, batch)[1] - naive_gradient(module, suite, batch)[1]).norm() < 1e-12


@pytest.mark.parametrize("limit", [None, 4])
def test_bank_is_read_once_each_way_whatever_the_tasks(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_merge.storage import DenseBlock

    passes: list[str] = []

    def counted(name: str) -> Any:
        original = getattr(DenseBlock, name)

        def call(*args: Any) -> Any:
            passes.append(name)
            return original(*args)

        return call

    for name in ("merge_as", "products"):
        monkeypatch.setattr(DenseBlock, name, counted(name))
    suite = ToySuite("vit", tasks=5)
    module = AdaMerging(suite=suite, max_images=limit)
    module.configure_model()
    step_gradient(module, batch_of(suite, 4, torch.float32))
    tensors = len(module.bank.names)
    assert passes == ["merge_as"] * tensors + ["products"] * tensors


def test_encoder_sees_all_tasks_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_merge.skeleton import Skeleton

    sizes: list[int] = []
    original = Skeleton.forward

    def forward(self: Skeleton, state: dict[str, Tensor], images: Tensor) -> Tensor:
        sizes.append(len(images))
        return original(self, state, images)

    monkeypatch.setattr(Skeleton, "forward", forward)
    suite = ToySuite("vit")
    for limit, expected in ((None, [12]), (8, [8, 4]), (4, [4, 4, 4])):
        sizes.clear()
        module = AdaMerging(suite=suite, max_images=limit)
        module.configure_model()
        step_gradient(module, batch_of(suite, 4, torch.float32))
        assert sizes == expected


def fitted(suite: ToySuite, steps: int = 6, lr: float = 0.1, **kwargs: Any) -> AdaMerging:
    module = AdaMerging(suite=suite, optimizer=lambda p: torch.optim.SGD(p, lr=lr), **kwargs)
    data = TaskDataModule(suite, batch_size=8, steps_per_epoch=steps)
    MergeTrainer(**TINY).fit(module, datamodule=data)
    return module


def test_bounds_are_projected_and_no_coefficient_dies() -> None:
    suite = ToySuite("vit")
    module = fitted(suite, lr=50.0, bounds=(0.0, 1.0))
    values = module.coefficients.detach()
    assert values.min() >= 0
    assert values.max() <= 1
    at_bound = (values == 0) | (values == 1)
    assert at_bound.any(), "the step was too small to test the bounds"
    gradient = step_gradient(module, batch_of(suite, 5, torch.float32))[1]
    assert (gradient[at_bound] != 0).all()


def test_softmax_coefficients_sum_to_one() -> None:
    module = fitted(ToySuite("vit"), softmax=True)
    torch.testing.assert_close(module.weights().sum(0), torch.ones(len(module.bank.names)))


def test_adaptation_lowers_its_objective() -> None:
    suite = ToySuite("vit")
    batch = batch_of(suite, 21, torch.float32)
    for objective in (Entropy(), ExpertAlignment("kl"), ExpertAlignment("l1"), ExpertAlignment("cosine")):
        losses = [step_gradient(fitted(suite, steps, lr=0.02, objective=objective), batch)[0] for steps in (1, 40)]
        assert losses[1] < losses[0]


def test_one_over_tasks_is_the_average() -> None:
    suite = ToySuite("cnn")
    module = AdaMerging(suite=suite, init=None)
    module.configure_model()
    torch.testing.assert_close(module.coefficients.detach(), torch.full_like(module.coefficients, 1 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bounds": (1.0, 0.0)}, "bounds: expected lowest < highest"),
        ({"bounds": (0.0, 1.0), "softmax": True}, "exclude each other"),
        ({"buffers": "mean"}, "model.buffers: expected average, base or recalibrate, found 'mean'"),
        ({"max_images": 0}, "model.max_images: expected auto, null or at least 1, found 0"),
    ],
)
def test_names_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        AdaMerging(suite=ToySuite(), **arguments)


def test_names_an_unknown_granularity() -> None:
    module = AdaMerging(suite=ToySuite(), granularity="head")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="expected task, block, tensor or layer, found 'head'"):
        module.configure_model()


def test_half_true_precision_is_refused() -> None:
    suite = ToySuite()
    trainer = MergeTrainer(**TINY, precision="bf16-true")
    with pytest.raises(MergeError, match="bf16-true would round the coefficients"):
        trainer.fit(AdaMerging(suite=suite), datamodule=TaskDataModule(suite))


def test_mixed_precision_keeps_coefficient_arithmetic_in_float32() -> None:
    suite = ToySuite("vit")
    module = AdaMerging(suite=suite)
    module.configure_model()
    batch = batch_of(suite, 5, torch.float32)
    exact = step_gradient(module, batch)[1]
    module.coefficients.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        merged = module.merge(module.bank)
        rounded = step_gradient(module, batch)[1]
    plain = module.merge(module.bank)
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert (rounded - exact).norm() / exact.norm() < 0.1
