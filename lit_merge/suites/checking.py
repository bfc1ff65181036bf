"""Does a suite hold together? Everything is opened once, and one batch goes through every expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_keys
from lit_merge.data.datasets import Indexed
from lit_merge.errors import MergeError, MissingExtraError
from lit_merge.skeleton import Skeleton
from lit_merge.suites.base import Suite
from lit_merge.task_vectors import TaskVectors

__all__ = ("Finding", "check_suite")


@dataclass(frozen=True)
class Finding:
    """What the check of one task found.

    Attributes:
        task: Its name, or ``base``.
        error: What is wrong, empty if nothing is.
        images: Number of test images.
        classes: Number of classes of the head.
        expert_hits: Share of the batch that the expert gets right, if there is an expert.
        base_hits: Share of the batch that the base gets right.
        distance: Norm of the task vector over the norm of the base.
    """

    task: str
    error: str = ""
    images: int = 0
    classes: int = 0
    expert_hits: float | None = None
    base_hits: float | None = None
    distance: float | None = None


def check_suite(suite: Suite, batch_size: int = 32) -> Iterator[Finding]:
    """Open base, experts, heads and images of a suite, and send one batch through base and experts.

    A batch is spread evenly over a test set, since many are sorted by class. Nothing is merged, and only one expert
    stands in memory at a time.

    Args:
        suite: The suite.
        batch_size: Images of the batch.

    Yields:
        One finding for the base if it is wrong, which ends the check; else one per task.
    """
    with suppress(MergeError, MissingExtraError):  # whatever is missing is named below, with all that is wrong
        suite.prepare()
    try:
        skeleton = Skeleton(suite.network())
        base = suite.base()
        check_keys("base", base, skeleton.keys, of="network", advice="give the state dict of this very network")
    except (MergeError, MissingExtraError) as error:
        yield Finding("base", str(error))
        return
    for task in suite.scored:
        try:
            yield _check_task(suite, skeleton, task, batch_size)
        except (MergeError, MissingExtraError) as error:
            yield Finding(task, str(error))


def _labels(data: object) -> list[int]:
    """All labels, where they can be had without the images; a dataset may name more classes than it uses."""
    found = getattr(data, "labels", None)
    return list(found()) if callable(found) else []


def _check_task(suite: Suite, skeleton: Skeleton, task: str, batch_size: int) -> Finding:
    head, classes, data = suite.head(task).eval(), suite.num_classes(task), suite.dataset(task, "test")
    named, used = getattr(data, "classes", None), _labels(data)
    if named is not None and len(named) != classes and not (len(named) > classes > max(used, default=classes)):
        raise MergeError(
            f"{suite.name}: task {task!r}: the test set has {len(named)} classes "
            f"({', '.join(map(str, named[:3]))}, …), the head has {classes}; they must agree"
        )
    if max(used, default=0) >= classes:
        raise MergeError(
            f"{suite.name}: task {task!r}: the test set has the label {max(used)}, and the head has {classes} classes; "
            f"labels must be 0 to {classes - 1}"
        )
    if len(data) == 0:
        raise MergeError(f"{suite.name}: task {task!r}: its test set is empty; expected images")
    positions = torch.linspace(0, len(data) - 1, min(batch_size, len(data))).long().tolist()
    items = Indexed(data, positions, f"{task} (test)", classes)
    images = torch.stack([items[i][0] for i in range(len(items))])
    labels = torch.tensor([items[i][1] for i in range(len(items))])

    def hits(state: dict[str, Tensor], who: str) -> float:
        with torch.inference_mode():
            logits = head(skeleton(state, images))
        if logits.shape != (len(labels), classes):
            raise MergeError(f"{who}: expected logits {(len(labels), classes)}, found {tuple(logits.shape)}")
        if not bool(logits.isfinite().all()):
            raise MergeError(f"{who}: its logits are not finite; its weights or the images are broken")
        return float((logits.argmax(-1) == labels).float().mean())

    found = Finding(task, images=len(data), classes=classes)
    if not suite.has_expert(task):
        return replace(found, base_hits=hits(dict(suite.base()), "base"))
    bank = TaskVectors.from_state_dicts(
        suite.base(), {task: suite.expert(task)}, buffers=skeleton.buffers_of, tied=skeleton.tied
    )
    change = sum(float(delta.double().square().sum()) for delta in bank.deltas.values()) ** 0.5
    size = sum(float(value.double().square().sum()) for value in bank.base.values()) ** 0.5
    if change == 0:
        raise MergeError(f"{suite.name}: expert {task!r} is equal to the base; expected a fine-tuned network")
    return replace(
        found,
        expert_hits=hits(bank.expert(task), f"expert {task!r}"),
        base_hits=hits(dict(bank.base), "base"),
        distance=change / max(size, 1e-12),
    )
