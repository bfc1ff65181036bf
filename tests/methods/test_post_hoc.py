from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import torch.nn.functional as tf
from callbacks_helpers import Batches
from kills import Case, Kill, check, fit, in_child, uninterrupted
from laboratory import laboratory
from ranks import close
from testers import TINY, MergeTester
from torch import Tensor
from torch.func import functional_call
from toys import ToySuite

from lit_merge import MergeError, MergeTrainer, TaskArithmetic, TaskDataModule
from lit_merge.callbacks import BackdoorMonitor, CoefficientMonitor, Report
from lit_merge.checkpoints.export import write_merged
from lit_merge.methods import AWM, SAU
from lit_merge.objectives import Entropy, ExpertAlignment, TaskOutput, WeightedSum
from lit_merge.objectives.shared_adversarial import shared_adversarial_gain, shared_adversarial_loss
from lit_merge.suites import Suite

SGD = partial(torch.optim.SGD, lr=2.0)


class TestPostHoc(MergeTester):
    make = AWM
    unit: ClassVar[dict[str, Any] | None] = {"init": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"init": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + 0.3 * deltas.sum(0)  # the mean mask of equal logits is 1 everywhere

    def test_checkpoint_is_small_and_comes_back(self, tmp_path: Path) -> None:
        for make, unit in ((AWM, "entry"), (SAU, "neuron")):
            module = fitted(make, ToySuite("vit"), 2, unit=unit)
            module.trainer.save_checkpoint(tmp_path / "merge.ckpt")
            held = 12 * len(module.logits) + 4 * 3 * 3 * 64  # logits, and Adam's two moments; perturbations
            assert (tmp_path / "merge.ckpt").stat().st_size < held + 32 * 1024
            again = make.load_from_checkpoint(tmp_path / "merge.ckpt", suite=ToySuite("vit"))
            first, second = module.merged_state(), again.merged_state()
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert again.report_extra() == module.report_extra()


def fitted(
    make: Callable[..., Any],
    suite: Suite,
    steps: int,
    size: int = 4,
    callbacks: list[L.Callback] | None = None,
    **kw: Any,
) -> Any:
    module = make(suite=suite, **kw)
    data = TaskDataModule(suite, batch_size=size, steps_per_epoch=steps, seed=0)
    MergeTrainer(**TINY, callbacks=callbacks).fit(module, datamodule=data)
    return module


# The algorithm, against plain autograd -------------------------------------------------------------------------------


def masked(module: Any, suite: ToySuite, factors: list[Tensor] | None) -> dict[str, Tensor]:
    """θ0 + m ⊙ 0.3 Σ τ, from the experts; without factors m = 1."""
    base, state = suite.base(), {}
    for column, name in enumerate(module.bank.names):
        delta = 0.3 * torch.stack([suite.expert(task)[name] - base[name] for task in suite.tasks]).sum(0)
        factor = torch.ones_like(delta) if factors is None else factors[column].reshape(delta.shape)
        state[name] = base[name] + factor * delta
    return state


def drawn(module: Any, logits: Tensor, unit: str, step: int) -> list[Tensor]:
    """Factors of all tensors: one draw an entry, rescaled; or one a row."""
    factors, start = [], 0
    for column, name in enumerate(module.bank.names):
        shape = module.bank.deltas[name].shape[1:]
        rows = shape[0] if unit == "neuron" else shape.numel()
        found = module.drawn(column, logits[start : start + rows], "sample", step)
        start += rows
        factors.append(found / found.mean() if unit == "entry" else found.repeat_interleave(shape.numel() // rows))
    assert start == len(logits)
    return factors


VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (AWM, {}),
    (AWM, {"safety": "entropy", "unit": "neuron", "start": 1.0}),
    (SAU, {"unit": "neuron", "start": 1.0}),
    (SAU, {"ascent_steps": 2}),
]


@pytest.mark.parametrize(("make", "options"), VARIANTS, ids=str)
def test_every_step_is_what_it_says(make: Any, options: dict[str, Any]) -> None:
    suite, record = ToySuite("vit", dtype="float64"), Batches()
    for task in suite.tasks:
        suite.dataset(task, "test").images = suite.dataset(task, "test").images.double()  # type: ignore[attr-defined]
    module = fitted(make, suite, 4, 6, [record], alpha=0.7, epsilon=0.2, ascent_rate=0.08, optimizer=SGD, **options)
    unit, network = options.get("unit", "entry"), suite.network().eval()
    logits = torch.full_like(module.logits, options.get("start", 0.0))
    deltas = {task: torch.zeros(3, 8, 8) for task in suite.tasks}
    reference = masked(module, suite, None)

    def see(state: dict[str, Tensor], task: str, images: Tensor, delta: Tensor | None = None) -> Tensor:
        low, high = images.clamp(max=-4.0), images.clamp(min=4.0)
        shaken = images if delta is None else (images + 8 * delta.double()).max(low).min(high)
        found: Tensor = suite.head(task)(functional_call(network, state, (shaken,)))
        return found

    for step, batch in enumerate(record.seen):
        still = masked(module, suite, drawn(module, logits, unit, step))
        own = reference if make is SAU else still
        classes = {task: see(own, task, images).argmax(-1) for task, images in batch.items()}
        for task, images in batch.items():
            for _ in range(options.get("ascent_steps", 1)):
                at = deltas[task].clone().requires_grad_()
                shown, other = see(still, task, images, at), see(reference, task, images, at)
                gain = tf.cross_entropy(shown, classes[task])
                if make is SAU:
                    gain = shared_adversarial_gain(shown, other, classes[task])
                deltas[task] = (at + 0.08 * torch.autograd.grad(gain, at)[0].sign()).detach().clamp(-0.2, 0.2)
        x = logits.clone().requires_grad_()
        state, losses = masked(module, suite, drawn(module, x, unit, step)), []
        for task, images in batch.items():
            shown = see(state, task, images, deltas[task])
            loss = tf.cross_entropy(shown, classes[task])
            if make is SAU:
                loss = shared_adversarial_loss(shown, see(reference, task, images, deltas[task]), classes[task])
            elif "safety" in options:
                loss = Entropy()(TaskOutput(shown, shown))
            clean = see(state, task, images)
            losses.append(Entropy()(TaskOutput(clean, clean)) + 0.7 * loss)
        logits = logits - 2.0 * torch.autograd.grad(torch.stack(losses).sum(), x)[0]
    close(module.logits.detach(), logits)
    for task, delta in deltas.items():
        close(module.perturbations.delta(task), delta, 1e-7)
        assert delta.abs().max() > 0.15
    assert (logits - options.get("start", 0.0)).abs().max() > 0.02
    assert all(p.grad is None for p in module.parameters())


def test_neurons_are_pruned_whole() -> None:
    module = AWM(suite=ToySuite("vit"), unit="neuron", final_mask="threshold")
    module.configure_model()
    full, names = module.merged_state(), module.bank.names
    name = [key for key in names if full[key].ndim == 2][3]
    row = sum(len(full[key]) for key in names[: names.index(name)]) + 2
    with torch.no_grad():
        module.logits[row] = -1.0
    pruned, base = module.merged_state(), module.bank.base
    assert torch.equal(pruned[name][2], base[name][2])
    assert not torch.equal(full[name][2], base[name][2])
    pruned[name][2] = full[name][2]
    assert all(torch.equal(pruned[key], value) for key, value in full.items())
    width, entries = full[name][0].numel(), sum(module.bank.sizes)
    assert module.effective_scale()["task.a"] == pytest.approx(0.3 * (1 - width / entries))
    assert module.mask_facts()["density"] == pytest.approx(1 - width / entries)


# What is defended ----------------------------------------------------------------------------------------------------


def test_takes_any_merged_network_and_refuses_another(tmp_path: Path) -> None:
    suite = ToySuite("cnn")
    other = TaskArithmetic(suite=suite, scale=0.5)
    other.configure_model()
    state = other.merged_state()
    write_merged(tmp_path / "export", state, {})
    modules = [fitted(SAU, suite, 2, merged=merged) for merged in (tmp_path / "export", state)]
    for name in ("logits", "fooling"):
        assert torch.equal(*(getattr(module, name) for module in modules))
    assert modules[0].effective_scale() == {"merged network": pytest.approx(1.0)}
    assert "merged" not in modules[1].state_dict()
    givens: tuple[dict[str, Any], ...] = ({}, {"merged": state})
    for module, given in zip(modules, givens, strict=True):
        assert not any(isinstance(value, dict) for value in module.hparams.values())  # no network among them
        module.trainer.save_checkpoint(tmp_path / "merge.ckpt")
        SAU.load_from_checkpoint(tmp_path / "merge.ckpt", suite=suite, **given)
        with pytest.raises(MergeError, match=r"its expert 'merged network' was sha256:.*, this run has sha256:"):
            SAU.load_from_checkpoint(tmp_path / "merge.ckpt", suite=suite, merged=dict(suite.expert("task.a")))
    with pytest.raises(MergeError, match=r"its tasks was \['task.a', 'task.b', 'task.c'\], this run has \['task.a'"):
        SAU.load_from_checkpoint(tmp_path / "merge.ckpt", suite=ToySuite("cnn", tasks=2), merged=state)
    start = SAU(suite=suite, merged=state)
    start.configure_model()
    assert all(torch.allclose(value, state[name], atol=1e-6) for name, value in start.merged_state().items())
    with pytest.raises(MergeError, match=r"merged network: its tensors are not those of the network: 1 missing"):
        SAU(suite=suite, merged={k: v for k, v in state.items() if k != "out.bias"}).configure_model()


def test_keeps_company_with_monitors_and_objectives_that_ask_for_experts(tmp_path: Path) -> None:
    suite = laboratory(tmp_path / "cache")
    objective = WeightedSum([Entropy(), ExpertAlignment("kl")])
    module = AWM(suite=suite, objective=objective, unit="neuron", start=0.5, max_images=8)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=3)
    callbacks = [Report(), CoefficientMonitor(), BackdoorMonitor()]
    engine = MergeTrainer(**TINY, callbacks=callbacks, default_root_dir=tmp_path)
    engine.fit(module, datamodule=data)
    engine.test(module, datamodule=data, verbose=False)
    extra = json.loads((tmp_path / "report.json").read_text())["extra"]
    assert extra["mask"]["unit"] == "neuron"
    assert extra["effective_scale"] == pytest.approx(module.effective_scale())
    assert set(extra["perturbations"]["fooling_rate"]) == set(extra["perturbations"]["largest"]) == set(suite.tasks)
    assert all(0.02 < largest <= 0.1 for largest in extra["perturbations"]["largest"].values())
    experts = {task: suite.clean.expert(task) for task in suite.tasks}
    clean = type(module.bank).from_state_dicts(suite.base(), experts)
    expected = clean.contract(0.3, module.settled_mask())
    assert all(torch.allclose(value, expected[name]) for name, value in module.merge(clean).items())
    assert "clean_merge_asr" in extra["backdoor"]["succession"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (AWM, {"unit": "layer"}, "AWM.unit: expected entry or neuron, found 'layer'"),
        (SAU, {"final_mask": "max"}, "SAU.final_mask: expected mean, threshold or sample, found 'max'"),
        (SAU, {"alpha": -1.0}, "SAU.alpha: expected at least 0, found -1.0"),
        (AWM, {"safety": "none"}, "AWM.safety: expected consistency or entropy, found 'none'"),
        (AWM, {"ascent_steps": -1}, "Ascent.steps: expected at least 0, found -1"),
    ],
)
def test_names_wrong_arguments(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make(suite=ToySuite(), **arguments)


# Resuming; tests/test_ranks.py has several ranks ---------------------------------------------------------------------


class Shown(SAU):
    """What the harness of kills compares."""

    @property
    def coefficients(self) -> Tensor:
        return torch.cat([self.logits.detach(), self.fooling, *(d.flatten() for d in self.perturbations.buffers())])  # type: ignore[union-attr]


@dataclass(frozen=True)
class Defended(Case):
    def model(self, suite: Suite | None = None, **kwargs: Any) -> Any:
        return Shown(
            suite=suite or ToySuite("cnn"), ascent_direction="adam", ascent_rate=0.02,
            optimizer=partial(torch.optim.Adam, lr=0.1),
            scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7), **kwargs,
        )  # fmt: skip


def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path) -> None:
    case = Defended()
    uninterrupted(case)
    assert in_child(lambda: fit(case, tmp_path, Kill("start", 9))) == -signal.SIGKILL
    check(case, tmp_path)
