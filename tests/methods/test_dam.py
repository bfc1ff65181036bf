"""DAM: every phase is what it says, against plain autograd; presets; ranks and kills."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as tf
from callbacks_helpers import Batches
from laboratory import laboratory
from lightning.pytorch.plugins import MixedPrecision
from ranks import close
from testers import TINY, MergeTester
from torch import Tensor
from torch.func import functional_call
from toys import ToySuite

from lit_merge import MergeError, MergeTrainer, TaskDataModule
from lit_merge.callbacks import Report
from lit_merge.callbacks.backdoor_monitor import BackdoorMonitor
from lit_merge.methods import DAM
from lit_merge.methods.concrete import ConcreteMerging
from lit_merge.objectives import Entropy, ExpertAlignment, PerturbationConsistency, TaskOutput
from lit_merge.objectives.entropy import entropy

SGD = partial(torch.optim.SGD, lr=0.05)


class TestDAM(MergeTester):
    make = DAM
    unit: ClassVar[dict[str, Any] | None] = {"init": 1.0, "masks": "single"}
    zero: ClassVar[dict[str, Any] | None] = {"init": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        keep = torch.tensor(2.0, dtype=base.dtype).sigmoid()  # M1 is 1 everywhere, M2 σ(2)
        return base + 0.3 * keep * deltas.sum(0)

    def test_checkpoint_is_small_and_comes_back(self, tmp_path: Path) -> None:
        cases: list[tuple[dict[str, Any], int]] = [({}, 2), ({"preset": "released"}, 3), ({"mask_update": "adam"}, 6)]
        for options, networks in cases:
            module = fitted(ToySuite("vit"), 3, mask_steps=2, **options)
            module.trainer.save_checkpoint(tmp_path / "merge.ckpt")
            size = 4 * sum(module.bank.sizes)
            assert (tmp_path / "merge.ckpt").stat().st_size < networks * size + 48 * 1024
            again: Any = DAM.load_from_checkpoint(tmp_path / "merge.ckpt", suite=ToySuite("vit"))
            first, second = module.merged_state(), again.merged_state()
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert torch.equal(again.perturbations.delta("task.a"), module.perturbations.delta("task.a"))
            assert module.perturbations.delta("task.a").abs().max() > 0


def fitted(suite: Any, steps: int, size: int = 6, callbacks: list[L.Callback] | None = None, **kw: Any) -> Any:
    module = DAM(suite=suite, **kw)
    data = TaskDataModule(suite, batch_size=size, steps_per_epoch=steps, seed=0)
    MergeTrainer(**TINY, callbacks=callbacks).fit(module, datamodule=data)
    return module


def double(suite: ToySuite) -> ToySuite:
    for task in suite.tasks:
        data: Any = suite.dataset(task, "test")
        data.images = data.images.double()
    return suite


class Plain:
    """The algorithm in plain autograd: T masked task vectors, one forward pass a task."""

    def __init__(self, module: Any, suite: ToySuite) -> None:
        self.module, self.suite, self.network = module, suite, suite.network().eval()
        self.base, self.experts = suite.base(), [suite.expert(task) for task in suite.tasks]
        std = torch.tensor(suite.pixels(suite.tasks[0]).std, dtype=torch.float64)[:, None, None]
        self.low, self.high = (
            suite.pixels(suite.tasks[0]).values(torch.full((3, 1, 1), float(k)).double()) for k in (0, 1)
        )
        self.std = std

    def logits(self, weights: Tensor, masks: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        state, start = {}, 0
        for column, (name, size) in enumerate(zip(self.module.bank.names, self.module.bank.sizes, strict=True)):
            pieces = [x[start : start + size] for x in masks.logits]
            factor = masks.recipe(column, *pieces).reshape(self.base[name].shape)
            tasks = zip(weights[:, column], self.experts, strict=True)
            terms = [weight * (factor * (expert[name] - self.base[name])) for weight, expert in tasks]
            state[name], start = self.base[name] + torch.stack(terms).sum(0), start + size
        return {t: self.suite.head(t)(functional_call(self.network, state, (images[t],))) for t in images}

    def shaken(self, images: Tensor, delta: Tensor, box: str) -> Tensor:
        moved = images + delta / self.std
        if box == "none":
            return moved
        low, high = self.low.minimum(images), self.high.maximum(images)  # a few toys lie outside of the box
        return moved.clamp(0, 1) if box == "unit" else moved.maximum(low).minimum(high)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_step_is_what_it_says(preset: Any) -> None:
    """Three steps of the masks and two of the coefficients, phase by phase."""
    suite, record, masked = double(ToySuite("vit", dtype="float64")), Batches(), 3
    kept: list[tuple[Tensor, ...]] = []
    module: Any = DAM(
        suite=suite, preset=preset, mask_steps=masked, optimizer=SGD, mask_rate=0.3, granularity="tensor",
        mask_update="normalized", ascent_rate=0.02, inner_step="sgd", inner_rate=0.05, stale=False, final_mask="mean",
        coefficient_stage="safe", coefficient_alpha=0.4,
    )  # fmt: skip
    data = TaskDataModule(suite, batch_size=6, steps_per_epoch=masked + 2, seed=0)
    MergeTrainer(**TINY, callbacks=[record]).fit(module, datamodule=data)
    plain, dual = Plain(module, suite), preset == "paper"
    alpha, ascent_box, box = (1.0, "valid", "valid") if dual else (0.1, "none", "unit")
    logits = [torch.zeros_like(module.logits), *([torch.full_like(module.logits, 2.0)] if dual else [])]
    start = torch.full_like(module.coefficients, 0.3)
    deltas = {task: torch.zeros(3, 8, 8, dtype=torch.float64) for task in suite.tasks}
    adam = {task: (torch.zeros(3, 8, 8).double(), torch.zeros(3, 8, 8).double()) for task in suite.tasks}

    def masks(step: int, values: list[Tensor]) -> Any:
        return module.both_masks("sample" if step < masked else "mean", step if step < masked else -1)._replace(
            logits=tuple(values)
        )

    def performance(weights: Tensor, mask: Any, images: dict[str, Tensor]) -> Tensor:
        found = plain.logits(weights, mask, images)
        return torch.stack([Entropy()(TaskOutput(z, z)) for z in found.values()]).sum()

    def safety(weights: Tensor, mask: Any, images: dict[str, Tensor], classes: dict[str, Tensor]) -> Tensor:
        found = plain.logits(weights, mask, {t: plain.shaken(x, deltas[t], box) for t, x in images.items()})
        terms = [tf.cross_entropy(z, classes[t]) if dual else entropy(z).mean() for t, z in found.items()]
        return torch.stack(terms).sum()

    def climb(step: int, weights: Tensor, mask: Any, images: dict[str, Tensor], classes: dict[str, Tensor]) -> None:
        for task, x in images.items():
            delta = deltas[task].clone().requires_grad_()
            z = plain.logits(weights, mask, {task: plain.shaken(x, delta, ascent_box)})[task]
            (g,) = torch.autograd.grad(tf.cross_entropy(z, classes[task]), delta)
            if dual:
                deltas[task] = (deltas[task] + 0.02 * g.sign()).clamp(-0.05, 0.05)
            else:
                first, second = (a.lerp(b, c) for a, b, c in zip(adam[task], (g, g * g), (0.1, 0.001), strict=True))
                adam[task], n = (first, second), step + 1
                deltas[task] = deltas[task] + 0.02 * (first / (1 - 0.9**n)) / ((second / (1 - 0.999**n)).sqrt() + 1e-8)

    def predicted(weights: Tensor, mask: Any, images: dict[str, Tensor]) -> dict[str, Tensor]:
        return {t: z.argmax(-1) for t, z in plain.logits(weights, mask, images).items()}

    def moved(values: Tensor, g: Tensor) -> Tensor:
        parts = [part / part.square().mean().sqrt().clamp(min=1e-300) for part in g.split(module.bank.sizes)]
        return values - 0.3 * torch.cat(parts)

    coefficients = start.clone()
    for step, images in enumerate(record.seen):
        if step < masked:
            inner, fresh, rest = ({t: x[k : k + 2] for t, x in images.items()} for k in (0, 2, 4))
            at = start.clone().requires_grad_()
            (g,) = torch.autograd.grad(performance(at[:, module.column], masks(step, logits), inner), at)
            point = (start - 0.05 * g)[:, module.column]
            climb(step, point, masks(step, logits), fresh, predicted(point, masks(step, logits), fresh))
            classes = predicted(point, masks(step, logits), rest)
            if dual:
                x = logits[0].clone().requires_grad_()
                (g,) = torch.autograd.grad(performance(point, masks(step, [x, logits[1]]), rest), x)
                before, logits[0] = logits[0], moved(logits[0], g)
                x = logits[1].clone().requires_grad_()
                # L_perf by the weights is that of before M1's step; its way to M2 is that of after
                weights_gradient = performance(point, masks(step, [before, x]), rest)
                kept.append((before, logits[0]))
                (g_perf,) = torch.autograd.grad(weights_gradient, x)
                (g_safe,) = torch.autograd.grad(alpha * safety(point, masks(step, [logits[0], x]), rest, classes), x)
                ratio = _ratio(module, step, before, logits[0])
                logits[1] = moved(logits[1], g_perf * ratio + g_safe)
            else:
                x = logits[0].clone().requires_grad_()
                mask = masks(step, [x])
                loss = performance(point, mask, rest) + alpha * safety(point, mask, rest, classes)
                (g,) = torch.autograd.grad(loss, x)
                logits[0] = moved(logits[0], g)
        else:
            mask, at = masks(step, logits), coefficients.clone().requires_grad_()
            point = coefficients[:, module.column]
            classes = predicted(point, mask, images)
            climb(step, point, mask, images, classes)
            weights = at[:, module.column]
            loss = performance(weights, mask, images) + 0.4 * safety(weights, mask, images, classes)
            (g,) = torch.autograd.grad(loss, at)
            coefficients = coefficients - 0.05 * g
    for task in suite.tasks:
        close(module.perturbations.delta(task).double(), deltas[task], 1e-6)  # held in single precision
    close(module.logits.detach(), logits[0], 1e-5)
    if dual:
        close(module.detection.detach(), logits[1], 1e-5)
    close(module.coefficients.detach(), coefficients, 1e-6)
    assert (coefficients != 0.3).any()
    assert all(p.grad is None for p in module.parameters())  # nothing leaks into another phase or step


def _ratio(module: Any, step: int, before: Tensor, after: Tensor) -> Tensor:
    """M1 after its step over M1 before: M2's slope by L_perf is taken under the new M1."""
    mask = module.mask(before, "sample", step)
    parts = zip(before.split(module.bank.sizes), after.split(module.bank.sizes), strict=True)
    return torch.cat([mask.recipe(k, b) / mask.recipe(k, a) for k, (a, b) in enumerate(parts)])


# What follows from it ------------------------------------------------------------------------------------------------


def test_without_masks_it_is_task_arithmetic() -> None:
    module = DAM(suite=ToySuite("cnn"), masks="single")
    module.configure_model()
    merged, plain = module.merge(module.bank), module.bank.contract(0.3)
    for name, value in plain.items():
        close(merged[name], value, 1e-6)


def test_a_stage_of_entropy_is_that_of_concrete_merging() -> None:
    """With α = 0 and a single mask nothing but the extra part of each batch is left of DAM."""
    options: dict[str, Any] = {"mask_steps": 0, "optimizer": SGD}
    ours = fitted(ToySuite("cnn"), 3, masks="single", coefficient_stage="entropy", **options)
    other = ConcreteMerging(suite=ToySuite("cnn"), **options)
    data = TaskDataModule(other.suite, batch_size=6, steps_per_epoch=3, seed=0)
    MergeTrainer(**TINY).fit(other, datamodule=data)
    close(ours.coefficients.detach(), other.coefficients.detach())
    assert (ours.coefficients != 0.3).any()


def test_stages_differ() -> None:
    none, safe = (fitted(ToySuite("mlp"), 4, mask_steps=2, coefficient_stage=stage) for stage in ("none", "safe"))
    assert (none.coefficients == 0.3).all()
    assert (safe.coefficients != 0.3).any()
    assert not torch.equal(none.logits, safe.logits)  # two more steps
    assert len(none.configure_optimizers()) == 2  # of the masks


def test_the_objective_may_ask_for_experts() -> None:
    module = fitted(ToySuite("vit"), 3, mask_steps=2, objective=ExpertAlignment())
    assert module.report_extra().keys() == {"mask", "effective_scale", "perturbation"}
    scale = module.report_extra()["effective_scale"]["task.a"]
    mask = module.settled_mask()
    merged, start, products = module.coefficient_table()[0], 0, 0.0
    for column, size in enumerate(module.bank.sizes):
        pieces = [x[start : start + size] for x in mask.logits]
        products, start = products + float((merged[column] * mask.recipe(column, *pieces)).sum().detach()), start + size
    assert scale == pytest.approx(products / start, rel=1e-5)
    assert max(module.report_extra()["perturbation"]["largest"].values()) == pytest.approx(
        0.0375
    )  # three steps of a quarter of 0.05


def test_memory_is_left_out_of_the_optimizer() -> None:
    plans = fitted(ToySuite("mlp"), 2, mask_steps=1).configure_optimizers()
    assert [type(plan["optimizer"]).__name__ for plan in plans] == ["SGD", "SGD", "Adam"]
    assert all("momentum_buffer" not in state for plan in plans for state in plan["optimizer"].state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "published"}, "DAM.preset: expected paper or released, found 'published'"),
        ({"masks": "triple"}, "DAM.masks: expected single or dual"),
        ({"coefficient_stage": "unsafe"}, "DAM.coefficient_stage: expected none, entropy or safe"),
        ({"alpha": -1.0}, "DAM.alpha: expected at least 0, found -1"),
        ({"coefficient_alpha": float("nan")}, "DAM.coefficient_alpha: expected at least 0, found nan"),
        ({"epsilon": -0.1}, "Ascent.epsilon: expected at least 0"),
        ({"epsilon": float("inf")}, "Ascent.rate: expected a number, as there is no epsilon"),
        ({"mask_rate": -1.0}, "DAM.mask_rate: expected at least 0"),
        ({"objective": PerturbationConsistency()}, "DAM.objective: it has perturbations of its own"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        DAM(suite=ToySuite("mlp"), **options)


def test_a_box_of_its_own_is_that_of_the_ascent() -> None:
    boxes: list[tuple[Any, Any, str]] = [
        ("released", None, "none"),  # images are cut to [0, 1] only after
        ("released", "valid", "valid"),
        ("paper", None, "valid"),
        ("paper", "none", "none"),
    ]
    for preset, box, expected in boxes:
        assert DAM(suite=ToySuite("mlp"), preset=preset, box=box).ascent.box == expected


class Shapes(L.Callback):
    """Looks at what is told of each image."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, _: int) -> None:
        for task, index in outputs["index"].items():
            assert len(outputs["logits"][task]) == len(index) == 6
            found = pl_module.all_outputs(pl_module.bank.base, {task: batch[task].images})[task][1]
            assert torch.equal(found.argmax(-1), outputs["logits"][task].argmax(-1))  # init is 0


def test_no_inner_step_leaves_no_image_out() -> None:
    module = fitted(ToySuite("mlp"), 2, callbacks=[Shapes()], inner_rate=0.0, init=0.0, coefficient_stage="none")
    assert torch.equal(module.moved, module.coefficients)


def test_normalized_steps_have_one_size_however_small_the_gradient() -> None:
    module = DAM(suite=ToySuite("mlp"))
    module.configure_model()
    gradient = torch.full((sum(module.bank.sizes),), 1e-25)  # its square is 0 in single precision
    close(module._scaled(gradient), torch.ones_like(gradient))
    assert (module._scaled(torch.zeros_like(gradient)) == 0).all()


def test_an_overflow_of_half_precision_leaves_nothing_behind() -> None:
    suite = ToySuite("mlp")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)  # the first step overflows
    module = DAM(suite=suite, preset="released", mask_steps=9)
    data = TaskDataModule(suite, batch_size=6, steps_per_epoch=2, seed=0)
    MergeTrainer(**TINY, plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(module, datamodule=data)
    assert scaler.get_scale() == 2.0**10
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert module.logits.abs().max() > 0


def test_says_how_to_ask_for_masks_alone() -> None:
    with pytest.warns(UserWarning, match="or set coefficient_stage: none"):
        fitted(ToySuite("mlp"), 1)


def test_a_run_ends_with_accuracy_and_attack_success() -> None:
    suite, report = laboratory(), Report()
    module = DAM(suite=suite, mask_steps=1)
    tester = MergeTrainer(**TINY, callbacks=[report, BackdoorMonitor()])
    data = TaskDataModule(suite, batch_size=3, steps_per_epoch=2)
    tester.fit(module, datamodule=data)
    tester.test(module, datamodule=data)
    extra = report.content["extra"]
    assert 0 <= extra["backdoor"]["succession"]["asr"] <= 1
    assert extra["effective_scale"].keys() == set(suite.tasks)
