from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from callbacks_helpers import Batches
from kills import Case, Kill, When, check, fit, in_child, uninterrupted
from lightning.pytorch.cli import ReduceLROnPlateau
from ranks import close
from testers import TINY, MergeTester
from torch import Tensor
from torch.func import functional_call
from toys import ToySuite

from lit_merge import AdaMerging, Entropy, MergeError, MergeTrainer, TaskArithmetic, TaskDataModule
from lit_merge.methods.concrete import ConcreteMerging
from lit_merge.objectives import TaskOutput
from lit_merge.suites import Suite

SGD = partial(torch.optim.SGD, lr=0.05)


class TestConcreteMerging(MergeTester):
    make = ConcreteMerging
    unit: ClassVar[dict[str, Any] | None] = {"init": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"init": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.3 * deltas.sum(0)  # the mean mask of equal logits is 1 everywhere

    def test_checkpoint_is_small_and_comes_back(self, tmp_path: Path) -> None:
        cases: list[dict[str, Any]] = [{}, {"preset": "released"}, {"coefficients": "fixed"}]
        for options in cases:
            module = fitted(ToySuite("vit"), 3, mask_steps=2, **options)
            module.trainer.save_checkpoint(tmp_path / "merge.ckpt")
            size = 4 * sum(module.bank.sizes)
            assert (tmp_path / "merge.ckpt").stat().st_size < 3 * size + 32 * 1024  # logits, and Adam's two moments
            again = ConcreteMerging.load_from_checkpoint(tmp_path / "merge.ckpt", suite=ToySuite("vit"))
            first, second = module.merged_state(), again.merged_state()
            assert all(torch.equal(first[name], second[name]) for name in first)


def fitted(suite: Suite, steps: int, size: int = 4, callbacks: list[L.Callback] | None = None, **kw: Any) -> Any:
    module = ConcreteMerging(suite=suite, **kw)
    data = TaskDataModule(suite, batch_size=size, steps_per_epoch=steps, seed=0)
    MergeTrainer(**TINY, callbacks=callbacks).fit(module, datamodule=data)
    return module


# The algorithm, against plain autograd -------------------------------------------------------------------------------


def objective(
    module: Any, suite: ToySuite, images: dict[str, Tensor], coefficients: Tensor, logits: Tensor, step: int | None
) -> Tensor:
    """Sum of the tasks' entropies for T masked task vectors, one forward pass a task."""
    mask = module.settled_mask() if step is None else module.mask(logits, "sample", step)
    network, state, start = suite.network().eval(), {}, 0
    base, experts = suite.base(), [suite.expert(task) for task in suite.tasks]
    for column, (name, size) in enumerate(zip(module.bank.names, module.bank.sizes, strict=True)):
        factor = mask.recipe(column, logits[start : start + size]).reshape(base[name].shape)
        weights = coefficients[:, module.column[column]]
        terms = [w * (factor * (e[name] - base[name])) for w, e in zip(weights, experts, strict=True)]
        state[name], start = base[name] + torch.stack(terms).sum(0), start + size
    losses = []
    for task in suite.tasks:
        features = functional_call(network, state, (images[task],))
        losses.append(Entropy()(TaskOutput(suite.head(task)(features), features)))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("granularity", ["task", "tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner_step": "sign", "final_mask": "threshold"},
        {"preset": "released"},
        {"preset": "released", "stale": False},
        {"coefficients": "fixed"},
    ],
    ids=["paper", "sign", "released", "not stale", "fixed"],
)
def test_every_step_is_what_it_says(options: dict[str, Any], granularity: Any) -> None:
    suite, steps, record = ToySuite("vit", dtype="float64"), (3, 3), Batches()
    for task in suite.tasks:
        suite.dataset(task, "test").images = suite.dataset(task, "test").images.double()  # type: ignore[attr-defined]
    module = fitted(
        suite,
        sum(steps),
        6,
        [record],
        optimizer=SGD,
        mask_rate=2.0,
        granularity=granularity,
        mask_steps=steps[0],
        **options,
    )
    inner = {"paper": "sgd"}.get(options.get("preset", "paper"), "adam")
    inner = options.get("inner_step", inner)
    learned, stale = "coefficients" not in options, options.get("stale", "preset" in options)
    logits = torch.zeros_like(module.logits)
    start = torch.full_like(module.coefficients, 0.3)
    last = start.clone()
    moving = last.clone().requires_grad_()
    adam = torch.optim.Adam([moving], lr=1.0)
    for step, images in enumerate(record.seen):
        if learned and step >= steps[0]:
            break
        rest, point = images, start
        if learned:
            half, rest = ({task: x[cut] for task, x in images.items()} for cut in (slice(0, 3), slice(3, 6)))
            at = (last if stale else start).clone().requires_grad_()
            (g,) = torch.autograd.grad(objective(module, suite, half, at, logits, step), at)
            if inner == "adam":
                moving.data.copy_(start)
                moving.grad = g
                adam.step()
                point = moving.detach().clone()
            else:
                point = start - 0.05 * (g.sign() if inner == "sign" else g)
            last = point
        x = logits.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(module, suite, rest, point, x, step), x)
        logits = logits - 2.0 * g
    close(module.logits.detach(), logits)
    assert logits.abs().max() > 0.02
    coefficients = start.clone()
    for images in record.seen[steps[0] :] if learned else []:
        at = coefficients.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(module, suite, images, at, module.logits.detach(), None), at)
        coefficients = coefficients - 0.05 * g
    close(module.coefficients.detach(), coefficients)
    assert (coefficients == 0.3).all() == (not learned)
    assert all(p.grad is None for p in module.parameters())  # nothing leaks into another phase or step


def test_without_a_first_stage_it_is_adamerging() -> None:
    suite = ToySuite("cnn")
    module = fitted(suite, 4, optimizer=SGD, mask_steps=0)
    other = AdaMerging(suite=suite, optimizer=SGD)
    MergeTrainer(**TINY).fit(other, datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=4, seed=0))
    torch.testing.assert_close(module.coefficients, other.coefficients, rtol=0, atol=1e-6)
    assert other.coefficients.std() > 1e-3


def test_the_mask_lowers_the_objective_where_task_arithmetic_stands() -> None:
    suite = ToySuite("vit")
    images = {task: suite.dataset(task, "test").images[:20] for task in suite.tasks}  # type: ignore[attr-defined]
    module = fitted(suite, 60, 20, coefficients="fixed", mask_rate=0.05)
    plain = TaskArithmetic(suite=suite)
    plain.configure_model()
    losses = [sum(float(Entropy()(TaskOutput(m(x, task), x))) for task, x in images.items()) for m in (plain, module)]
    assert losses[1] < 0.9 * losses[0]


def test_masks_are_functions_of_seed_step_and_tensor() -> None:
    module = ConcreteMerging(suite=ToySuite("vit"))
    module.configure_model()
    pieces = module.logits.detach()[:50]

    def draw(seed: int, step: int, column: int) -> Tensor:
        module.mask_seed = seed
        return module.mask(module.logits, "sample", step).recipe(column, pieces)

    masks = [draw(*keys) for keys in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all((masks[0] - other).abs().max() > 0.1 for other in masks[1:])
    torch.rand(3)
    assert torch.equal(masks[0], draw(0, 0, 0))


def test_schedulers_follow_their_stage() -> None:
    rates: list[tuple[float, ...]] = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(tuple(o.param_groups[0]["lr"] for o in trainer.optimizers[:2]))

    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    fitted(ToySuite(), 4, 4, [Rates()], optimizer=SGD, mask_rate=0.2, scheduler=halve, mask_steps=2)
    assert rates == [(0.1, 0.05), (0.05, 0.05), (0.05, 0.025), (0.05, 0.0125)]


def test_a_scheduler_may_watch_the_loss() -> None:
    watch = partial(
        ReduceLROnPlateau, monitor="train/loss", patience=0, threshold=10.0, factor=0.5, threshold_mode="abs"
    )
    module = fitted(ToySuite(), 4, 4, optimizer=SGD, scheduler=watch, mask_steps=2)
    assert [o.param_groups[0]["lr"] for o in module.trainer.optimizers] == [0.025, 0.025]


def test_tells_mask_and_effective_scale() -> None:
    module = fitted(ToySuite("cnn"), 5, mask_rate=0.5, coefficients="fixed", final_mask="threshold")
    extra = json.loads(json.dumps(module.report_extra()))
    kept = (module.logits >= 0).float()
    assert extra["mask"]["final"] == "threshold"
    assert extra["mask"]["density"] == pytest.approx(float(kept.mean()))
    assert 0.2 < extra["mask"]["density"] < 0.8
    assert extra["mask"]["lowest_logit"] < -0.5 < 0.5 < extra["mask"]["highest_logit"]
    live = sum(len(x) for x in kept.split(module.bank.sizes) if x.any())  # a tensor without an entry stays the base
    expected = dict.fromkeys(module.bank.tasks, pytest.approx(0.3 * live / len(kept), rel=1e-5))
    assert extra["effective_scale"] == expected


def test_says_that_the_second_stage_is_out_of_reach() -> None:
    with pytest.warns(UserWarning, match=r"all 2 steps belong to the mask \(mask_steps: 2\).*lower mask_steps"):
        fitted(ToySuite(), 2, mask_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficients": "both"}, "coefficients: expected learned or fixed, found 'both'"),
        ({"preset": "fusionbench"}, "preset: expected paper or released, found 'fusionbench'"),
        ({"inner_step": "lion"}, "inner_step: expected sgd, sign or adam, found 'lion'"),
        ({"final_mask": "binary"}, "final_mask: expected mean, threshold or sample, found 'binary'"),
        ({"mask_steps": -1}, "mask_steps: expected at least 0, found -1"),
        ({"inner_rate": -0.1}, "inner_rate: expected at least 0, found -0.1"),
        ({"temperature": 0.0}, "temperature: expected a number above 0, found 0.0"),
    ],
)
def test_names_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=f"ConcreteMerging.{message}"):
        ConcreteMerging(suite=ToySuite(), **arguments)


def test_half_precision_scales_the_loss_and_nothing_else() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    suite, modules = ToySuite("vit"), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for plugins in (None, MixedPrecision("16-mixed", "cpu", scaler)):
        module = ConcreteMerging(suite=suite, optimizer=SGD, mask_rate=2.0, mask_steps=3)
        data = TaskDataModule(suite, batch_size=6, steps_per_epoch=5, seed=0)
        MergeTrainer(**TINY, plugins=plugins).fit(module, datamodule=data)
        modules.append(module)
    for name in ("logits", "coefficients", "moved"):
        change, expected = (getattr(m, name).detach() - (0.3 if name != "logits" else 0) for m in reversed(modules))
        assert 0 < (change - expected).norm() / expected.norm() < 0.1


# Several ranks, and resuming -----------------------------------------------------------------------------------------


def test_refuses_masks_that_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConcreteMerging, "on_fit_start", lambda self: None)
    monkeypatch.setattr(ConcreteMerging, "all_gather", lambda self, x: torch.stack([x, x + 1]))
    with pytest.raises(MergeError, match="ConcreteMerging: the ranks draw different masks from one seed"):
        fitted(ToySuite(), 1)


@dataclass(frozen=True)
class Masked(Case):
    """A run of both stages, with everything that has a state."""

    preset: str = "released"

    def model(self, suite: Suite | None = None, **kwargs: Any) -> Any:
        return ConcreteMerging(
            suite=suite or ToySuite("cnn"), preset=self.preset, mask_steps=8, mask_rate=0.3,  # type: ignore[arg-type]
            optimizer=partial(torch.optim.Adam, lr=0.01),
            scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7), **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "when", "number"), [("released", "end", 3), ("released", "start", 9), ("paper", "in_save", 5)]
)
def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, preset: str, when: When, number: int) -> None:
    case = Masked(preset=preset)  # coefficients learned under the mask: what differs in it differs in them
    uninterrupted(case)
    assert in_child(lambda: fit(case, tmp_path, Kill(when, number))) == -signal.SIGKILL
    check(case, tmp_path)
