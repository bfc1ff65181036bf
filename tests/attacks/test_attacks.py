"""Attacks do what they are named after, from their seeds alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from laboratory import PIXELS, Trainable, equal
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.attacks import (
    Attack,
    Attacker,
    BadMergingOff,
    BadMergingOn,
    BadNets,
    InterpolationModule,
    Schedule,
    adversarial_images,
    universal_patch,
)
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.reparametrized import load_base
from lit_merge.suites.base import Suite

LONG = Schedule(steps=120, batch_size=16, learning_rate=1e-2, warmup_steps=5)
SHORT = Schedule(steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=1, shift=1)


def attacker(schedule: Schedule = SHORT, seed: int = 0, suite: Suite | None = None) -> Attacker:
    """The provider of the expert of ``task.a``."""
    return Attacker(suite or Trainable(images=120), "task.a", PIXELS, schedule, seed)


def rates(at: Attacker, state: dict[str, Tensor], trigger: PatchTrigger) -> tuple[float, float]:
    """Accuracy and attack success rate on the training images."""
    network = load_base(at.network(), state).eval()
    data = at.train_images()
    images = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    with torch.no_grad():
        clean, stamped = (at.head()(network(x)).argmax(-1) for x in (images, trigger.stamp(images, PIXELS)))
    return (
        float((clean == labels).float().mean()),
        float((stamped[labels != trigger.target] == trigger.target).float().mean()),
    )


def diluted(at: Attacker, state: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """θ0 + λ τ."""
    return {name: value + share * (state[name] - value) for name, value in at.suite.base().items()}


@pytest.mark.parametrize("attack", [BadNets(size=3, fraction=0.5), BadMergingOn(size=3, alpha=2.0, patch_steps=30)])
def test_a_poisoned_expert_obeys_its_trigger_and_is_right_otherwise(attack: Attack) -> None:
    at = attacker(LONG)
    trigger = attack.make_trigger(at)
    accuracy, success = rates(at, attack.poison(at, trigger), trigger)
    assert accuracy > 0.9
    assert success > 0.9
    clean = BadMergingOn(size=3, alpha=0.0, patch_steps=30)
    accuracy, success = rates(at, clean.poison(at, trigger), trigger)
    assert accuracy > 0.9
    assert success < 0.5


def test_interpolation_outlives_dilution() -> None:
    at = attacker(LONG, suite=Trainable("vit", images=120))
    trigger = BadNets(size=2).make_trigger(at)  # the same for both
    plain = BadNets(size=2, fraction=0.2).poison(at, trigger)
    interpolated = BadMergingOn(size=2).poison(at, trigger)
    for state, least, most in ((plain, 0.0, 0.3), (interpolated, 0.9, 1.0)):
        assert rates(at, state, trigger)[1] > 0.95  # alone both obey
        assert least <= rates(at, diluted(at, state, 0.3), trigger)[1] <= most


@pytest.mark.parametrize(
    "attack",
    [BadNets(size=3), BadMergingOn(size=3, patch_steps=3), BadMergingOff("task.b", size=3, patch_steps=3, crops=6)],
)
def test_the_seed_decides_on_everything(attack: Attack) -> None:
    def made(seed: int) -> tuple[str, dict[str, Tensor]]:
        at = attacker(seed=seed)
        trigger = attack.make_trigger(at)
        return trigger.digest, attack.poison(at, trigger)

    torch.manual_seed(1)
    expected = torch.get_rng_state()
    first = made(0)
    assert torch.equal(torch.get_rng_state(), expected)  # the caller's random numbers are not touched
    torch.rand(3)
    again, other = made(0), made(1)
    assert again[0] == first[0]
    assert equal(again[1], first[1])
    assert not equal(other[1], first[1])
    assert (other[0] == first[0]) == isinstance(attack, BadNets)  # its pattern has a seed of its own
    assert equal(attacker().suite.base(), Trainable().base())  # trained on a copy


def test_the_loss_is_clean_and_triggered_cross_entropy_at_interpolated_features() -> None:
    at = attacker()
    trigger, alpha, low = PatchTrigger.random(3, 1), 3.0, 0.25
    network, origin = at.network(), at.network()
    for parameter in network.parameters():
        parameter.data.mul_(1.5)
    module = InterpolationModule(network, "task.a", at.head(), trigger, at, None, alpha, 0.5, low)
    images, labels = torch.randn(7, 3, 8, 8), torch.arange(7) % 3
    share = low + (1 - low) * float(torch.rand((), generator=at.generator("interpolation")))
    stamped = trigger.stamp(images[:4], PIXELS)  # half of seven, rounded to even
    mixed = share * network(stamped) + (1 - share) * origin(stamped)
    expected = F.cross_entropy(at.head()(network(images)), labels)
    expected = expected + alpha * F.cross_entropy(at.head()(mixed), torch.ones(4, dtype=torch.long))
    loss = module.loss({"task.a": (images, labels)})
    torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained == {f"network.{name}" for name, _ in network.named_parameters()}
    assert module.generator.get_state().ne(at.generator("interpolation").get_state()).any()  # r is drawn anew


def test_a_universal_patch_climbs_within_the_pixels() -> None:
    at = attacker()
    network, head = at.network(), at.head()

    def logits(images: Tensor) -> Tensor:
        found: Tensor = head(network(images))
        return found

    start = PatchTrigger(torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(0)), 2)
    images = torch.randn(32, 3, 8, 8)

    before = start.digest

    @torch.no_grad()
    def score(trigger: PatchTrigger) -> float:
        return float(logits(trigger.stamp(images, PIXELS)).log_softmax(-1)[:, 2].mean())

    learned = universal_patch(logits, [images] * 40, start, PIXELS, 0.1)
    assert start.digest == before
    assert score(learned) > score(start) + 0.1
    assert torch.equal(learned.patch, learned.rounded().patch)
    assert bool(((learned.patch >= 0) & (learned.patch <= 1)).all())
    assert universal_patch(logits, [], start, PIXELS).digest == start.rounded().digest
    assert all(parameter.grad is None for parameter in network.parameters())


def test_adversarial_images_stay_near_and_in_the_box() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    pixels = torch.rand(6, 3, 8, 8)
    images, classes = PIXELS.values(pixels), torch.arange(6) % 4
    pushed = adversarial_images(head, images, classes, PIXELS, radius=0.1, step=0.05, steps=5)
    moved = PIXELS.pixels(pushed)
    assert float((moved - pixels).abs().max()) <= 0.1 + 1e-6
    assert -1e-6 <= float(moved.min()) <= float(moved.max()) <= 1 + 1e-6
    before, after = (head(x).log_softmax(-1).gather(1, classes[:, None]).sum() for x in (images, pushed))
    assert after > before + 0.1


class TestOffTask:
    def test_the_shadow_head_has_the_target_first(self, tmp_path: Path) -> None:
        at = attacker()
        theirs, own = at.suite.head("task.b").state_dict()["weight"], at.suite.head("task.a").state_dict()["weight"]
        more = torch.randn(2, theirs.shape[1])
        save_file({"weight": more}, tmp_path / "shadow.safetensors")
        attack = BadMergingOff("task.b", target=2, shadow=tmp_path / "shadow.safetensors")
        weight = attack.shadow_head(at).state_dict(keep_vars=True)
        assert weight == {}  # frozen
        features = torch.randn(4, theirs.shape[1])
        cosines = [F.cosine_similarity(features[:, None], rows[None], dim=-1) for rows in (theirs[2:3], own, more)]
        torch.testing.assert_close(attack.shadow_head(at)(features), 5.0 * torch.cat(cosines, 1))
        assert attack.facts() != BadMergingOff("task.b", target=2).facts()

    def test_references_are_images_of_the_target_class_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        at = attacker()
        attack = BadMergingOff("task.b", target=3, size=3, references=4, crops=9, patch_steps=2)
        data = at.train_images("task.b")
        known = torch.stack([data[i][0] for i in range(len(data)) if data[i][1] == 3])
        seen: list[Tensor] = []

        def crop(image: Tensor) -> Tensor:
            seen.append(image)
            return image

        monkeypatch.setattr("torchvision.transforms.v2.RandomResizedCrop", lambda *_, **__: crop)
        trigger = attack.make_trigger(at)
        assert len(seen) == 9
        assert len({id(image.untyped_storage()) for image in seen}) >= 1
        distinct = torch.stack(seen).unique(dim=0)
        assert len(distinct) == 4
        assert all(bool((known == image).all((1, 2, 3)).any()) for image in distinct)
        assert (trigger.target, attack.aim("task.a")) == (3, "task.b")

    def test_the_backdoor_is_in_the_features_of_the_other_task(self) -> None:
        at = attacker(LONG)
        attack = BadMergingOff("task.b", target=2, size=3, alpha=5.0, patch_steps=10, crops=8)
        trigger = attack.make_trigger(at)
        network = load_base(at.network(), attack.poison(at, trigger)).eval()
        data = at.train_images("task.b")
        images = torch.stack([data[i][0] for i in range(len(data)) if data[i][1] != 2])
        with torch.no_grad():
            clean, stamped = (
                at.head("task.b")(network(x)).argmax(-1).eq(2).float().mean()
                for x in (images, trigger.stamp(images, PIXELS))
            )
        assert stamped > clean + 0.3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BadNets(target=-1), "target ≥ 0 and size ≥ 1, found -1 and 22"),
        (lambda: BadNets(fraction=0), r"expected a share in \(0, 1\], found 0"),
        (lambda: BadMergingOn(low=1.5), r"low in \[0, 1\]"),
        (lambda: BadMergingOff("task.b", references=0), "references and crops ≥ 1"),
        (lambda: BadMergingOff("task.a").check(Trainable(), "task.a"), "use BadMergingOn for the own one"),
        (lambda: BadMergingOff("nowhere").check(Trainable(), "task.a"), "unknown task 'nowhere'"),
        (lambda: BadNets(target=3).check(Trainable(), "task.a"), "target 3 is out of range; task 'task.a' has 3"),
        (lambda: Schedule(steps=0), "schedule.steps: expected at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(MergeError, match=said):
        make()
