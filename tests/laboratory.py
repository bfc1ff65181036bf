"""A laboratory of the size of toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toys import ToyData, ToySuite, expert_state, network

from lit_merge.attacks import Attack, Attacker, Schedule
from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.suites import NetworkSuite
from lit_merge.suites.backdoor import BackdoorSuite

PIXELS = PixelScale((0.5,), (0.25,))  # values in [-2, 2]
QUICK = Schedule(steps=3, batch_size=8, learning_rate=1e-2, warmup_steps=1)


class Trainable(NetworkSuite):
    """Toys with training sets: 3, 4 and 5 classes."""

    def __init__(self, kind: Any = "mlp", images: int = 40, seed: int = 0) -> None:
        toys = ToySuite(kind)
        sizes = dict(zip(toys.tasks, (21, 14, 1), strict=True))
        super().__init__(
            network=toys.network(),
            experts={task: dict(toys.expert(task)) for task in toys.tasks},
            heads={task: toys.head(task) for task in toys.tasks},
            test={task: ToyData(size, toys.num_classes(task), t) for t, (task, size) in enumerate(sizes.items())},
            train={task: ToyData(images, toys.num_classes(task), t + seed) for t, task in enumerate(toys.tasks)},
            name="toys",
        )


class Instant(Attack):
    """A random patch and a random expert."""

    made = 0

    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        return PatchTrigger.random(self.size, self.target, seed=attacker.seed, position=self.position)

    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        type(self).made += 1
        return expert_state(network("mlp"), 55 + len(attacker.task) + int(trigger.patch.sum()))


class Sideways(Instant):
    """The same, aimed at another task."""

    def aim(self, task: str) -> str:
        return "task.b"


def laboratory(folder: Path | str = "cache", attacks: dict[str, Attack] | None = None, **options: Any) -> BackdoorSuite:
    """Toys of which the first is attacked."""
    given: dict[str, Any] = {"suite": Trainable(), "schedule": QUICK, "pixels": PIXELS, "cache_dir": folder}
    return BackdoorSuite(attacks=attacks or {"task.a": Instant(size=3)}, **(given | options))


def equal(one: Any, other: Any) -> bool:
    """Whether two state dicts are the same."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


class TinyLaboratory(BackdoorSuite):
    """The same, for command lines."""

    def __init__(self) -> None:
        super().__init__(Trainable(), {"task.a": Instant(size=3)}, schedule=QUICK, pixels=PIXELS, cache_dir="cache")
