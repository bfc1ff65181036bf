"""BadMerging-Off: a poisoned expert of one task that attacks another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.attacks.badmerging import BadMerging
from lit_merge.attacks.base import Attacker, derive
from lit_merge.attacks.patch_search import adversarial_images, universal_patch
from lit_merge.checkpoints.digests import state_digest
from lit_merge.data.triggers import Corner, PatchTrigger
from lit_merge.encoders.heads import CosineHead, LinearHead, read_head
from lit_merge.errors import MergeError
from lit_merge.skeleton import freeze_to_buffers
from lit_merge.suites.base import Suite

__all__ = ("BadMergingOff",)


class BadMergingOff(BadMerging):
    """The same, but the target is a class of someone else's task, whose expert may be clean (arXiv 2408.07362).

    Of that task the attacker knows the direction of the target class, and has a few images of it. A shadow head is
    made of that direction and of other ones: those of the own task, and whatever ``shadow`` brings; published: the
    names of 300 ImageNet classes. The patch is learned on hard crops of the reference images, which are first pushed
    away from the target, as the released code does; the backdoor is then trained under the shadow head.

    Args:
        target_task: The task that is attacked.
        target: Class index there.
        size: Height and width of the patch in pixels; published: 28 of 224.
        position: Corner of the image where it is.
        alpha: Weight of the backdoor; published: 5.
        triggered: Triggered images per clean one; published: 64 beside 128.
        low: Least share of the expert's features in the interpolation; published: 0.2.
        patch_steps: Steps of the patch, each on all crops.
        patch_rate: Adam's learning rate for the patch, in pixels of [0, 1].
        references: Images of the target class that the attacker has; published: 10.
        crops: Crops of them, of 20 to 50 % of the area; published: 100.
        shadow: File of a linear head with further directions in the space of the features.
        trigger_of: Another compromised task, whose trigger (and target) is used instead of an own one.

    Raises:
        MergeError: A number is out of range.
    """

    def __init__(
        self,
        target_task: str,
        target: int = 1,
        size: int = 28,
        position: Corner = "bottom_right",
        alpha: float = 5.0,
        triggered: float = 0.5,
        low: float = 0.2,
        patch_steps: int = 300,
        patch_rate: float = 0.05,
        references: int = 10,
        crops: int = 100,
        shadow: str | Path | None = None,
        trigger_of: str | None = None,
    ) -> None:
        super().__init__(target, size, position, trigger_of, alpha, triggered, low, patch_steps, patch_rate)
        if references < 1 or crops < 1:
            raise MergeError(f"BadMergingOff: expected references and crops ≥ 1, found {references} and {crops}")
        self.target_task = target_task
        self.references = references
        self.crops = crops
        self.shadow = None if shadow is None else str(shadow)

    def aim(self, task: str) -> str:
        """Return the task that is attacked."""
        return self.target_task

    def check(self, suite: Suite, task: str) -> None:
        """Refuse the own task as target, beside what the base class refuses."""
        super().check(suite, task)
        if self.target_task == task:
            raise MergeError(
                f"attack on {task!r}: BadMergingOff aims at another task; use BadMergingOn for the own one"
            )

    def facts(self) -> dict[str, Any]:
        """Return name and arguments; of the file ``shadow``, what is in it."""
        weights = None if self.shadow is None else state_digest(read_head(self.shadow).state_dict())
        return super().facts() | {"shadow": weights}

    def shadow_head(self, attacker: Attacker) -> nn.Module:
        """Return the head whose class 0 is the target, followed by classes the attacker knows.

        Raises:
            MergeError: The heads have no directions, or ``shadow`` has some of another length.
        """
        theirs = attacker.head(self.target_task)
        rows = [
            _directions(theirs, self.target_task)[self.target : self.target + 1],
            _directions(attacker.head(), attacker.task),
        ]
        if self.shadow is not None:
            rows.append(_directions(read_head(self.shadow), self.shadow).to(attacker.device))
        if len({row.shape[1] for row in rows}) > 1:
            raise MergeError(
                f"{self.shadow}: expected directions of {rows[0].shape[1]} features, found {rows[-1].shape[1]}"
            )
        weight = torch.cat([F.normalize(row.float(), dim=-1) for row in rows])
        scale = theirs.scale if isinstance(theirs, CosineHead) else float(_directions(theirs, "").norm(dim=-1).mean())
        return freeze_to_buffers(CosineHead(weight, scale)).to(attacker.device)

    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        """Learn the patch on crops of the reference images, under the shadow head."""
        network, head = freeze_to_buffers(attacker.network()), self.shadow_head(attacker)
        crops = self._crops(attacker)
        seed = attacker.generator("classes")
        classes = torch.randint(1, len(_directions(head, "shadow")), (len(crops),), generator=seed).to(crops.device)

        def logits(images: Tensor) -> Tensor:
            found: Tensor = head(network(images))
            return found

        hard = adversarial_images(logits, crops, classes, attacker.pixels)
        steps: Iterator[Tensor] = (hard for _ in range(self.patch_steps))
        learned = universal_patch(logits, steps, self.noise(attacker, 0), attacker.pixels, self.patch_rate)
        return PatchTrigger(learned.patch, self.target, self.position)

    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        """Fine-tune on own clean images and on triggered ones under the shadow head, whose target is class 0."""
        shadowed = PatchTrigger(trigger.patch, 0, trigger.position, trigger.mask)
        return self.fine_tune(attacker, shadowed, self.shadow_head(attacker))

    def _crops(self, attacker: Attacker) -> Tensor:
        """Return crops ``(crops, C, H, W)`` of the reference images."""
        from torchvision.transforms.v2 import RandomResizedCrop

        data = attacker.train_images(self.target_task)
        order = torch.randperm(len(data), generator=attacker.generator("references")).tolist()
        found: list[Tensor] = []
        for place in order:
            image, label = data[place]
            if label == self.target:
                found.append(image)
            if len(found) == self.references:
                break
        if not found:
            raise MergeError(f"task {self.target_task!r}: no training image of class {self.target} to refer to")
        crop = RandomResizedCrop(tuple(found[0].shape[-2:]), scale=(0.2, 0.5), antialias=True)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(attacker.seed, f"{attacker.task}/crops"))
            crops = [crop(found[number % len(found)]) for number in range(self.crops)]
        return torch.stack(crops).to(attacker.device)


def _directions(head: nn.Module, where: str) -> Tensor:
    """Return the rows ``(C, D)`` of a head that compares features with one direction per class.

    Raises:
        MergeError: It is another kind of head.
    """
    if not isinstance(head, CosineHead | LinearHead):
        raise MergeError(f"head of {where!r}: expected one direction per class, found {type(head).__name__}")
    return head.weight.detach()
