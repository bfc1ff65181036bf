"""Universal perturbations: ball, box and ascent; and the consistency objective in an ordinary merge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as tf
from callbacks_helpers import Batches
from ranks import close
from testers import TINY
from torch import Tensor
from torch.func import functional_call
from toys import ToySuite

from lit_merge import AdaMerging, Entropy, MergeError, MergeTrainer, TaskDataModule, WeightedSum
from lit_merge.data.pixels import PixelScale
from lit_merge.objectives import PerturbationConsistency, TaskOutput
from lit_merge.perturbations import Ascent, UniversalPerturbations, fooled

CLIP = PixelScale((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
SGD = partial(torch.optim.SGD, lr=0.05)


def perturbations(ascent: Ascent | None = None) -> UniversalPerturbations:
    return UniversalPerturbations({"a": (3, 4, 4)}, {"a": CLIP}, ascent or Ascent(0.1, steps=5))


def images(count: int = 6) -> Tensor:
    return CLIP.values(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def linear(x: Tensor) -> Tensor:
    weight = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))
    return x.flatten(1) @ weight.to(x)


def test_stays_in_the_ball_and_in_the_box_of_pixels() -> None:
    deltas, x = perturbations(), images()
    classes = linear(x).argmax(-1)
    for _ in range(3):
        deltas.climb(lambda batch: {"a": linear(batch["a"])}, {"a": x}, {"a": classes})
    assert deltas.largest()["a"] == pytest.approx(0.1)
    pixels = CLIP.pixels(deltas("a", x))
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert (pixels - CLIP.pixels(x)).abs().max() <= 0.1 + 1e-6
    assert ((pixels < 1e-6) | (pixels > 1 - 1e-6)).any()  # the box was of use


@pytest.mark.parametrize("direction", ["sign", "adam"])
def test_a_step_of_ascent_makes_predictions_worse(direction: Any) -> None:
    deltas, x = perturbations(Ascent(0.1, 1, 0.01, direction)), images()
    classes = linear(x).argmax(-1)
    losses = []
    for _ in range(4):
        losses.append(float(tf.cross_entropy(linear(deltas("a", x)), classes)))
        deltas.climb(lambda batch: {"a": linear(batch["a"])}, {"a": x}, {"a": classes})
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 0.01


def test_a_value_outside_of_the_box_stays_where_it_is() -> None:
    deltas = perturbations()
    deltas.delta("a").fill_(0.1)
    strange = torch.full((1, 3, 4, 4), 9.0)
    assert torch.equal(deltas("a", strange), strange)
    assert deltas("a", -strange).min() > -9.0  # back towards the box it may go


def test_the_released_box_flattens_the_dark_half() -> None:
    deltas, x = perturbations(), images()
    assert torch.equal(deltas("a", x, box="unit"), x.clamp(0, 1))
    assert torch.equal(deltas("a", x, box="none"), x)


def test_half_precision_scales_the_loss_on_its_way_back() -> None:
    """Confident predictions have a gradient by the logits that half precision would round to 0."""
    x = images()
    classes = linear(x).argmax(-1)

    def half(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = linear(batch["a"])
        return {"a": (found + 20 * tf.one_hot(classes, 3)).half()}

    for scale, moved in ((1.0, False), (2.0**16, True)):
        deltas = perturbations(Ascent(0.1))
        deltas.climb(half, {"a": x}, {"a": classes}, scale=scale)
        assert bool(deltas.delta("a").any()) == moved


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    for direction in ("sign", "adam"):
        deltas = perturbations(Ascent(0.1, 1, 0.05, direction))
        for value in (torch.nan, torch.inf, 1.0):
            deltas.ascend("a", torch.full((3, 4, 4), value))
        assert deltas.delta("a").isfinite().all()
        assert (deltas.delta("a") > 0).all()


def test_counts_flips() -> None:
    assert fooled(torch.eye(4), torch.tensor([0, 1, 0, 0])) == 0.5


def test_begins_again() -> None:
    deltas = perturbations(Ascent(0.1, 1, 0.05, "adam"))
    deltas.ascend("a", torch.ones(3, 4, 4))
    deltas.reset()
    assert all((value == 0).all() for value in deltas.buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": -1.0}, "epsilon: expected at least 0"),
        ({"epsilon": float("inf")}, "epsilon: expected at least 0, or null for no bound, found inf"),
        ({"rate": float("inf")}, "rate: expected a number above 0, found inf"),
        ({"epsilon": None}, "rate: expected a number, as there is no epsilon"),
        ({"steps": -1}, "steps: expected at least 0, found -1"),
        ({"rate": 0.0}, "rate: expected a number above 0"),
        ({"direction": "up"}, "direction: expected sign or adam, found 'up'"),
        ({"box": "open"}, "box: expected valid, unit or none, found 'open'"),
    ],
)
def test_names_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=f"Ascent.{message}"):
        Ascent(**arguments)


# In an ordinary merge ------------------------------------------------------------------------------------------------


def safe(weight: float = 0.5, **options: Any) -> WeightedSum:
    return WeightedSum([Entropy(), PerturbationConsistency(**options)], [1.0, weight])


def fitted(objective: Any, callbacks: list[L.Callback] | None = None, **options: Any) -> Any:
    suite = ToySuite("mlp")
    module = AdaMerging(suite=suite, objective=objective, optimizer=SGD, **options)
    data = TaskDataModule(suite, batch_size=4, steps_per_epoch=3, seed=0)
    MergeTrainer(**TINY, callbacks=callbacks).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("most", [None, 4])
def test_adamerging_climbs_then_descends_under_the_perturbation(most: int | None) -> None:
    record = Batches()
    module = fitted(safe(epsilon=0.06, steps=2), [record], max_images=most)
    suite, bank = module.suite, module.bank
    network, scale = suite.network().eval(), suite.pixels("task.a")
    coefficients = torch.full_like(module.coefficients, 0.3)
    deltas = {task: torch.zeros(3, 8, 8) for task in suite.tasks}

    def logits(values: Tensor, task: str, x: Tensor) -> Tensor:
        found: Tensor = suite.head(task)(functional_call(network, bank.complete(bank.contract(values)), (x,)))
        return found

    def shaken(x: Tensor, delta: Tensor) -> Tensor:
        low, high = (scale.values(torch.full((3, 1, 1), float(level))) for level in (0, 1))
        found: Tensor = (x + delta / scale.std[0]).maximum(low.minimum(x)).minimum(high.maximum(x))
        return found

    for batch in record.seen:
        at = coefficients.clone().requires_grad_()
        losses = []
        for task, x in batch.items():
            classes = logits(coefficients, task, x).argmax(-1)
            for _ in range(2):
                delta = deltas[task].clone().requires_grad_()
                loss = tf.cross_entropy(logits(coefficients, task, shaken(x, delta)), classes)
                (g,) = torch.autograd.grad(loss, delta)
                deltas[task] = (deltas[task] + 0.015 * g.sign()).clamp(-0.06, 0.06)
            z = logits(at, task, x)
            losses.append(Entropy()(TaskOutput(z, z)))
            losses.append(0.5 * tf.cross_entropy(logits(at, task, shaken(x, deltas[task])), classes))
        (g,) = torch.autograd.grad(torch.stack(losses).sum(), at)
        coefficients = coefficients - 0.05 * g
    close(module.coefficients.detach(), coefficients, 1e-5)
    assert any((delta.abs() > 0.04).any() for delta in deltas.values())
    for task, delta in deltas.items():
        close(module.perturbations.delta(task), delta, 1e-6)


def test_a_checkpoint_has_the_perturbations_and_fits_a_merge_without(tmp_path: Path) -> None:
    module = fitted(safe())
    module.trainer.save_checkpoint(tmp_path / "merge.ckpt")
    load = partial(AdaMerging.load_from_checkpoint, tmp_path / "merge.ckpt", suite=ToySuite("mlp"))
    again: Any = load(objective=safe())
    assert torch.equal(again.perturbations.delta("task.b"), module.perturbations.delta("task.b"))
    assert again.perturbations.delta("task.b").abs().max() > 0
    plain: Any = load()
    assert plain.perturbations is None
    assert torch.equal(plain.coefficients, module.coefficients)


def test_terms_share_one_perturbation() -> None:
    with pytest.raises(MergeError, match="WeightedSum: its terms share one universal perturbation"):
        WeightedSum([PerturbationConsistency(0.1), PerturbationConsistency(0.2)])
    with pytest.raises(MergeError, match="kind: expected consistency or entropy"):
        PerturbationConsistency(kind="hope")  # type: ignore[arg-type]
    with pytest.raises(MergeError, match="needs perturbed_logits"):
        PerturbationConsistency()(TaskOutput(torch.zeros(1, 2), torch.zeros(1, 2)))
