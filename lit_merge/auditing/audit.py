"""The audit of a suite: every expert looked at before it is merged, without labels and without its trigger."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_merge.auditing.inversion import Inversion, invert, reach, reach_of_classes
from lit_merge.auditing.outliers import task_vector_outliers
from lit_merge.auditing.robust import robust_z
from lit_merge.auditing.sensitivity import Logits, fooling_rates, leave_one_out, universal_sensitivity
from lit_merge.auditing.suspicion import THRESHOLDS, precision_recall, suspicion
from lit_merge.data.datasets import EvenlySpread
from lit_merge.errors import MergeError
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.perturbations import Ascent
from lit_merge.suites.backdoor import BackdoorSuite
from lit_merge.suites.base import Suite

__all__ = ("AuditOptions", "Memory", "audit", "inversion_row")

_LEAST_RATE = 0.02  # a difference of two per cent of the images means nothing


@dataclass(frozen=True)
class AuditOptions:
    """How an audit looks at experts.

    Args:
        images: Unlabelled test images per task, evenly spread, at least 1; one half is for learning perturbations and
            the other for counting what they do.
        scale: Coefficient of every expert in the merge of the leave-one-out test (task arithmetic).
        ascent: How untargeted universal perturbations are found.
        inversion: How candidate triggers are looked for.
        seed: Decides on the batches.
        device: Where to compute, such as ``cpu`` or ``cuda``.

    Raises:
        MergeError: A value is out of range.
    """

    images: int = 256
    scale: float = 0.3
    ascent: Ascent = field(default_factory=lambda: Ascent(epsilon=0.05, steps=10))
    inversion: Inversion = field(default_factory=Inversion)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MergeError(f"audit: images: expected at least 1, found {self.images}")


class _Seen(NamedTuple):
    """What was found for one network on the images of one task."""

    universal: dict[str, Any]
    reach: Tensor


Memory = MutableMapping[tuple[str, str, AuditOptions], _Seen]
"""What was found for single networks: audits of suites that share some of them need not look at these again."""


def audit(
    suite: Suite,
    options: AuditOptions | None = None,
    memory: Memory | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Look at every expert of a suite, and point at the suspicious ones.

    Four signals per expert, each beside its control: norm and spectrum of the task vector beside the other experts';
    predictions flipped by one untargeted universal perturbation, and how many of them go to one class, beside the
    base; candidate triggers of limited size towards every class, beside the other classes and the base; and how much
    less the merge is fooled, by its own perturbations and by the candidate, when the expert is left out. The score is
    that of the signals with a threshold in :data:`~lit_merge.auditing.suspicion.THRESHOLDS`; the others did not tell
    poisoned experts from clean ones in the laboratory and are reported as facts.

    Only images are read; labels are dropped. Not looked for: triggers that are larger than the budget, and those aimed
    at another task's images than the expert's own. A poisoned base would hide what its experts inherit.

    Args:
        suite: Base, experts, heads and test images; one expert is enough.
        options: How to look.
        memory: Filled with what is found for single networks, and read; give the same one to several audits of suites
            with the same images and heads.
        say: Told what is looked at next.

    Returns:
        Plain data: ``suite``, ``options``, ``thresholds``, ``experts`` with all evidence per task, ``pointed``, the
        suspicious tasks in the order of the suite, and ``laboratory``, the truth about a
        :class:`~lit_merge.suites.backdoor.BackdoorSuite`, else ``None``.

    Raises:
        MergeError: The suite does not hold together, or nothing tells how its images come from pixels.
    """
    given = options or AuditOptions()
    tell = say or (lambda text: None)
    rows, signals = _Auditor(suite, given, {} if memory is None else memory, tell).rows()
    verdicts = suspicion(signals)
    pointed = [task for task in suite.tasks if verdicts[task]["suspicious"]]
    laboratory = None
    if isinstance(suite, BackdoorSuite):
        laboratory = {"compromised": list(suite.compromised)} | precision_recall(pointed, suite.compromised)
    return {
        "suite": suite.name,
        "options": asdict(given),
        "thresholds": dict(THRESHOLDS),
        "experts": {task: verdicts[task] | {"signals": signals[task]} | rows[task] for task in suite.tasks},
        "pointed": pointed,
        "laboratory": laboratory,
    }


def inversion_row(expert: Tensor, base: Tensor) -> dict[str, Any]:
    """Say which class of an expert is easier to reach than it should be.

    The margin of a class is its :func:`~lit_merge.auditing.inversion.reach` less the larger of two controls: the
    median over the expert's other classes, since all are easy in a task whose images are easily led astray; and the
    reach of the same class in the base, since some classes are easy by what they look like.

    Args:
        expert: Reach per class ``(classes,)``.
        base: That of the base.

    Returns:
        ``target``, the class of the largest margin; ``margin``; and ``reach``, ``others`` and ``base`` there. With one
        class there are no others, and the margin is that above the base.

    >>> row = inversion_row(torch.tensor([0.25, 1.0, 0.5]), torch.tensor([0.5, 0.25, 0.5]))
    >>> row["target"], row["margin"], row["others"]
    (1, 0.625, 0.375)
    """
    classes = len(expert)
    others = torch.stack([
        torch.cat([expert[:c], expert[c + 1 :]]).quantile(0.5) if classes > 1 else base[c] for c in range(classes)
    ])  # fmt: skip
    margins = expert - torch.maximum(others, base)
    target = int(margins.argmax())
    found = {"reach": expert, "others": others, "base": base}
    return {"target": target, "margin": float(margins[target])} | {k: float(v[target]) for k, v in found.items()}


class _Auditor:
    """Networks and images of one audit."""

    def __init__(self, suite: Suite, options: AuditOptions, memory: Memory, say: Callable[[str], None]) -> None:
        self.suite, self.options, self.memory, self.say = suite, options, memory, say
        self.module = TaskArithmetic(suite=suite, scale=options.scale)
        self.module.configure_model()
        self.module.to(options.device)
        self.scales = {task: suite.pixels(task) for task in suite.tasks}
        self.learn, self.count = {}, {}
        for task in suite.tasks:
            data = EvenlySpread(suite.dataset(task, "test"), options.images)
            if not len(data):
                raise MergeError(f"{suite.name}: task {task!r}: its test set is empty; an audit needs images")
            images = torch.stack([data[number][0] for number in range(len(data))]).to(options.device)
            # interleaved, as a dataset may be sorted by class
            self.learn[task], self.count[task] = images[::2], images[1::2] if len(images) > 1 else images

    def logits(self, state: dict[str, Tensor], task: str) -> Logits:
        return lambda images: self.module.outputs(state, task, images)[1]

    def seen(self, digest: str, state: dict[str, Tensor], task: str) -> _Seen:
        """Look at one network alone, with the images of one task."""
        key = (digest, task, self.options)
        if key not in self.memory:
            logits, scale, ascent = self.logits(state, task), self.scales[task], self.options.ascent
            learn, count = self.learn[task], self.count[task]
            universal, _ = universal_sensitivity(logits, learn, count, scale, ascent)
            classes, how, seed = self.suite.num_classes(task), self.options.inversion, self.options.seed
            self.memory[key] = _Seen(universal, reach_of_classes(logits, learn, count, scale, classes, how, seed))
        return self.memory[key]

    def merged(self, without: str | None = None) -> dict[str, Tensor]:
        """Return the merge, or the merge in which one expert's coefficient is 0."""
        bank = self.module.bank
        kept = torch.tensor([float(task != without) for task in bank.tasks])
        return self.module.complete(bank.contract(self.options.scale * kept))

    def leave_one_out(self) -> dict[str, dict[str, Any]]:
        """Find the merge's own perturbations, and show them to the merges without one expert, one at a time."""
        state, deltas = self.merged(), {}
        for task in self.suite.tasks:
            logits, scale, ascent = self.logits(state, task), self.scales[task], self.options.ascent
            _, deltas[task] = universal_sensitivity(logits, self.learn[task], self.count[task], scale, ascent)
        full = fooling_rates(partial(self.logits, state), self.count, self.scales, deltas)
        rows = {}
        for task in self.suite.tasks:
            left = self.merged(task)
            rates = fooling_rates(partial(self.logits, left), self.count, self.scales, deltas)
            rows[task] = leave_one_out(full, rates, task)
        return rows

    def candidate_in_merges(self, task: str, target: int) -> dict[str, float]:
        """Say how far an expert's candidate reaches in the merge, and in the merge without the expert."""
        own = self.logits(self.module.bank.expert(task), task)
        scale, options = self.scales[task], self.options
        candidates = invert(own, self.learn[task], scale, [target], options.inversion, options.seed)
        states = {"merge": self.merged(), "without": self.merged(task)}
        return {
            name: float(reach(self.logits(state, task), self.count[task], scale, candidates))
            for name, state in states.items()
        }

    def rows(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
        """Collect the evidence and the signals of every expert."""
        bank, tasks = self.module.bank, self.suite.tasks
        self.say("task vectors")
        vectors = task_vector_outliers(bank)
        self.say("the merge and the merges without one expert")
        left_out = self.leave_one_out()
        drop_z = robust_z(torch.tensor([left_out[task]["drop"] for task in tasks]), _LEAST_RATE).tolist()
        rows: dict[str, dict[str, Any]] = {}
        signals: dict[str, dict[str, float]] = {}
        for task, z in zip(tasks, drop_z, strict=True):
            self.say(f"expert {task}")
            base = self.seen(bank.digests[""], dict(bank.base), task)
            own = self.seen(bank.digests[task], bank.expert(task), task)
            inversion = inversion_row(own.reach, base.reach)
            inversion |= self.candidate_in_merges(task, inversion["target"])
            rows[task] = {
                "task_vector": vectors[task],
                "universal": own.universal | {f"base_{key}": value for key, value in base.universal.items()},
                "inversion": inversion,
                "leave_one_out": left_out[task] | {"drop_z": z},
            }
            signals[task] = {
                "norm": vectors[task]["norm_z"],
                "tensor": vectors[task]["tensor_z"],
                **({} if vectors[task]["rank_z"] is None else {"spectrum": vectors[task]["rank_z"]}),
                "fooling": own.universal["fooling"] - base.universal["fooling"],
                "concentration": own.universal["concentration"],
                "inversion": inversion["margin"],
                "leave_one_out": z,
                "candidate_drop": inversion["merge"] - inversion["without"],
            }
        return rows, signals
