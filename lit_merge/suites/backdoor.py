"""Any suite with some of its experts replaced by poisoned ones: the laboratory that defences are measured in."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.attacks.base import Attack, Attacker, Schedule
from lit_merge.checkpoints.atomic import atomic_path, cache_root
from lit_merge.checkpoints.digests import StateDigest, state_digest
from lit_merge.data.datasets import EvenlySpread
from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.suites._mini_build import LINEARIZED_RATE, RECIPE
from lit_merge.suites.base import LabelledDataset, Split, Suite
from lit_merge.suites.inventory import Piece
from lit_merge.suites.mini import MiniSuite, _load

__all__ = ("BackdoorSuite",)

_VERSION = 1  # raised when the meaning of a cached file changes
_SAMPLE = 256  # training images that are looked at to tell one training set from another


class BackdoorSuite(Suite):
    """A suite in which the experts of some tasks have a backdoor.

    Base, heads, images and the other experts are those of the wrapped suite. Poisoned experts and their triggers are
    made from its base and its training images, once, and kept in the cache folder; what is made is a function of the
    arguments and of the suite alone. With :class:`~lit_merge.callbacks.BackdoorMonitor` a run reports how far each
    backdoor comes through.

    Args:
        suite: What is attacked.
        attacks: Attack per compromised task; any number of them.
        seed: Seed of triggers and batches.
        schedule: How poisoned experts are trained; by default as the clean ones are, which for
            :class:`~lit_merge.MiniSuite` is its recipe, and otherwise that of the published CLIP experts.
        pixels: How the values of images come from pixels; by default as the datasets' transforms say.
        device: Where to train, ``cpu`` or ``cuda``.
        cache_dir: Where to keep what is made; ``None`` means ``$LIT_MERGE_CACHE``, else ``~/.cache/lit-merge``.

    Raises:
        MergeError: There is no attack, or one is on a task or aims at a class that the suite does not have.
    """

    def __init__(
        self,
        suite: Suite,
        attacks: dict[str, Attack],
        seed: int = 0,
        schedule: Schedule | None = None,
        pixels: PixelScale | None = None,
        device: str = "cpu",
        cache_dir: str | Path | None = None,
    ) -> None:
        self.clean = suite
        self.attacks = dict(attacks)
        self.seed = seed
        self.schedule = _schedule_of(suite) if schedule is None else schedule
        self.device = device
        self._pixels = pixels
        self._root = cache_root(cache_dir) / "backdoor"
        self._folders: dict[str, Path] = {}
        self._triggers: dict[str, PatchTrigger] = {}
        if not self.attacks:
            raise MergeError("BackdoorSuite.attacks: expected at least one, found none")
        for task in self.attacks:
            self._check(task)

    @property
    def name(self) -> str:
        """Name of the suite in reports."""
        attacks = ", ".join(f"{type(attack).__name__} in {task}" for task, attack in self.attacks.items())
        return f"{self.clean.name} ({attacks})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are merged."""
        return self.clean.tasks

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of further tasks that are scored."""
        return self.clean.unseen

    @property
    def compromised(self) -> tuple[str, ...]:
        """Names of the tasks whose experts are poisoned, in the order of :attr:`tasks`."""
        return tuple(task for task in self.tasks if task in self.attacks)

    def has_expert(self, task: str) -> bool:
        """Whether there is a network for ``task``."""
        return self.clean.has_expert(task)

    def sources(self) -> dict[str, Any]:
        """Where the networks come from, and which of them are poisoned."""
        return self.clean.sources() | {"backdoors": {task: self.attacks[task].facts() for task in self.compromised}}

    def inventory(self) -> Sequence[Piece]:
        """List the networks and datasets of the wrapped suite."""
        return self.clean.inventory()

    def prepare(self) -> None:
        """Build or download what is missing, poisoned experts included."""
        self.clean.prepare()
        for task in self.compromised:
            self.expert(task)

    def network(self) -> nn.Module:
        """Return the architecture."""
        return self.clean.network()

    def base(self) -> Mapping[str, Tensor]:
        """Return the state dict of the pretrained network."""
        return self.clean.base()

    def head(self, task: str) -> nn.Module:
        """Return the frozen head of a task."""
        return self.clean.head(task)

    def num_classes(self, task: str) -> int:
        """Return the number of classes of a task."""
        return self.clean.num_classes(task)

    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Return the labelled images of one split of a task; none of them has a trigger."""
        return self.clean.dataset(task, split)

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return the state dict of an expert, trained first if it is a poisoned one that is not in the cache.

        Raises:
            MergeError: The suite has no such task, or an attack does not fit it.
        """
        if task not in self.attacks:
            return self.clean.expert(task)
        path = self._folder(task) / "expert.safetensors"
        if (found := _load(path)) is not None:
            return found
        state = self.attacks[task].poison(self._attacker(task), self.trigger(task))
        facts = {"backdoor": "this network is poisoned, for research", "attack": json.dumps(self.attacks[task].facts())}
        with atomic_path(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt", "producer": "lit-merge", **facts})
        return state

    def aim(self, task: str) -> str:
        """Return the task that the backdoor in the expert of ``task`` is aimed at.

        Raises:
            MergeError: That expert is not poisoned.
        """
        self._owner(task)
        return self.attacks[task].aim(task)

    def trigger(self, task: str) -> PatchTrigger:
        """Return the trigger of the backdoor in the expert of ``task``, made first if need be.

        Raises:
            MergeError: That expert is not poisoned.
        """
        owner = self._owner(task)
        if owner not in self._triggers:
            path = self._folder(owner) / "trigger.safetensors"
            self._triggers[owner] = _load_trigger(path) or self._make_trigger(owner, path)
        return self._triggers[owner]

    def _make_trigger(self, task: str, path: Path) -> PatchTrigger:
        trigger = self.attacks[task].make_trigger(self._attacker(task))
        trigger.save(path)
        return trigger

    def pixels(self, task: str) -> PixelScale:
        """Return how the values of a task's images come from pixels.

        Raises:
            MergeError: It cannot be told, and was not given.
        """
        return self._pixels or self.clean.pixels(task)

    def _check(self, task: str) -> None:
        attack = self.attacks[task]
        if task not in self.tasks:
            raise MergeError(f"BackdoorSuite.attacks: unknown task {task!r}; merged are {', '.join(self.tasks)}")
        attack.check(self.clean, task)
        if attack.trigger_of is None:
            return
        lender = self.attacks.get(attack.trigger_of)
        if lender is None or lender.trigger_of is not None:
            own = [name for name, other in self.attacks.items() if other.trigger_of is None]
            raise MergeError(
                f"attack on {task!r}: trigger_of: expected a compromised task with a trigger of its own "
                f"({', '.join(own) or 'there is none'}), found {attack.trigger_of!r}"
            )
        if lender.target != attack.target:
            raise MergeError(
                f"attack on {task!r}: it shares the trigger of {attack.trigger_of!r}, so it must share its target "
                f"{lender.target}, found {attack.target}"
            )

    def _owner(self, task: str) -> str:
        """Return the compromised task whose trigger is used in the expert of ``task``."""
        if task not in self.attacks:
            raise MergeError(
                f"{self.name}: the expert of {task!r} is clean; poisoned are {', '.join(self.compromised)}"
            )
        return self.attacks[task].trigger_of or task

    def _attacker(self, task: str) -> Attacker:
        return Attacker(self.clean, task, self.pixels(task), self.schedule, self.seed, self.device)

    def _folder(self, task: str) -> Path:
        """Return the folder of what is made for one task; its name is a hash of everything that decides on it."""
        if task not in self._folders:
            owner = self._owner(task)
            facts = {
                "version": _VERSION,
                "seed": self.seed,
                "schedule": asdict(self.schedule),
                "task": task,
                "attack": self.attacks[task].facts(),
                "trigger": None if owner == task else [owner, self._folder(owner).name],
                "pixels": asdict(self.pixels(task)),
                "base": state_digest(self.base()),
                "tasks": {name: self._digest(name) for name in (task, self.aim(task))},
            }
            name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
            self._folders[task] = self._root / f"{task}-{name}"
        return self._folders[task]

    def _digest(self, task: str) -> str:
        """Return a hash of head and training images of a task; of many images, of some that are evenly spread."""
        digest = StateDigest()
        for name, value in sorted(self.head(task).state_dict().items()):
            digest.update(name, value)
        data = self.dataset(task, "train")
        some = EvenlySpread(data, _SAMPLE)
        with isolate_rng(include_cuda=False):  # a transform may be random
            torch.default_generator.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 - it is the global generator that datasets use
            random.seed(0)
            for number in range(len(some)):
                image, label = some[number]
                digest.update(f"{number} of {len(data)}, {int(label)}", image)
        return digest.hexdigest()


def _load_trigger(path: Path) -> PatchTrigger | None:
    """Read a cached trigger; ``None`` if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        return PatchTrigger.load(path)
    except MergeError as error:
        warnings.warn(f"{path} is damaged ({error}) and is made again", stacklevel=2)
        return None


def _schedule_of(suite: Suite) -> Schedule:
    """Return how the clean experts of a suite were trained."""
    if not isinstance(suite, MiniSuite):
        return Schedule()
    return Schedule(
        steps=suite.finetune_steps,
        batch_size=RECIPE.finetune_batch,
        learning_rate=LINEARIZED_RATE if suite.finetuning == "linearized" else RECIPE.finetune_rate,
        weight_decay=RECIPE.weight_decay,
        warmup_steps=int(RECIPE.warmup * suite.finetune_steps),
        clip=RECIPE.clip,
        shift=RECIPE.shift,
    )
