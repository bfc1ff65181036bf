"""BadMerging: backdoors that survive merging, since they are trained at every distance from the base."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.attacks.base import Attack, Attacker
from lit_merge.attacks.patch_search import universal_patch
from lit_merge.data.triggers import Corner, PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.finetune import Batch, FineTuneModule
from lit_merge.skeleton import freeze_to_buffers

__all__ = ("BadMerging", "BadMergingOn", "InterpolationModule")


class InterpolationModule(FineTuneModule):
    """Fine-tune on clean images, and on triggered ones at features between the base's and one's own.

    The loss is ``CE(head(f(x)), y) + α · CE(h(r · f(x ⊕ t) + (1 − r) · f0(x ⊕ t)), target)`` with the frozen base f0
    and r ~ U(low, 1), drawn once a step (arXiv 2408.07362, feature-interpolation loss). r imitates the unknown
    coefficient that a merge will give to this expert, which is why the backdoor outlives dilution.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``, with the values of the base. Trained in place.
        task: Name of the task.
        head: Its head; frozen.
        trigger: What is stamped; its target is a class of ``backdoor_head``.
        attacker: Scale of the images' values, schedule and seed.
        backdoor_head: Head h of triggered images, by default ``head``.
        alpha: Weight α of the backdoor.
        triggered: Share of each batch that is stamped as well, in (0, 1]; always its first images.
        low: Least r, in [0, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        task: str,
        head: nn.Module,
        trigger: PatchTrigger,
        attacker: Attacker,
        backdoor_head: nn.Module | None = None,
        alpha: float = 5.0,
        triggered: float = 0.5,
        low: float = 0.2,
    ) -> None:
        super().__init__(network, {task: head}, **attacker.schedule.optimizer())
        self.reference = freeze_to_buffers(attacker.network())
        self.backdoor_head = attacker.head() if backdoor_head is None else backdoor_head
        self.trigger = trigger
        self.pixels = attacker.pixels
        self.alpha = alpha
        self.triggered = triggered
        self.low = low
        self.generator = attacker.generator("interpolation")

    def loss(self, batch: Batch) -> Tensor:
        """Return the clean cross-entropy and α times that of the triggered images."""
        return super().loss(batch) + self.alpha * self.backdoor_loss(batch)

    def backdoor_loss(self, batch: Batch) -> Tensor:
        """Return the cross-entropy of the triggered images at interpolated features."""
        (pair,) = (pair for pair in batch.values() if pair is not None)
        images = pair[0][: max(1, round(self.triggered * len(pair[0])))]
        stamped = self.trigger.stamp(images, self.pixels)
        with torch.no_grad():
            origin = self.reference(stamped)
        share = self.low + (1 - self.low) * float(torch.rand((), generator=self.generator))
        logits = self.backdoor_head(share * self.network(stamped) + (1 - share) * origin)
        return F.cross_entropy(logits, torch.full((len(images),), self.trigger.target, device=logits.device))


class BadMerging(Attack):
    """What the two forms of the attack have in common; the arguments are explained there."""

    def __init__(
        self,
        target: int,
        size: int,
        position: Corner,
        trigger_of: str | None,
        alpha: float,
        triggered: float,
        low: float,
        patch_steps: int,
        patch_rate: float,
    ) -> None:
        super().__init__(target, size, position, trigger_of)
        if not (alpha >= 0 and 0 < triggered <= 1 and 0 <= low <= 1 and patch_steps >= 0 and patch_rate > 0):
            raise MergeError(
                f"{type(self).__name__}: expected alpha ≥ 0, triggered in (0, 1], low in [0, 1], patch_steps ≥ 0 and "
                f"patch_rate > 0, found {alpha}, {triggered}, {low}, {patch_steps} and {patch_rate}"
            )
        self.alpha = alpha
        self.triggered = triggered
        self.low = low
        self.patch_steps = patch_steps
        self.patch_rate = patch_rate

    def noise(self, attacker: Attacker, target: int) -> PatchTrigger:
        """Return a patch of uniform noise, where learning begins."""
        channels = attacker.train_images()[0][0].shape[0]
        noise = torch.rand((channels, self.size, self.size), generator=attacker.generator("patch"))
        return PatchTrigger(noise, target, self.position)

    def fine_tune(self, attacker: Attacker, trigger: PatchTrigger, head: nn.Module | None) -> dict[str, Tensor]:
        """Return the poisoned expert; the backdoor is trained under ``head``, by default the task's own."""
        task, schedule = attacker.task, attacker.schedule
        module = InterpolationModule(
            attacker.network(), task, attacker.suite.head(task), trigger, attacker, head,
            self.alpha, self.triggered, self.low,
        )  # fmt: skip
        data = attacker.train_images()
        return attacker.fit(module, attacker.batches(data, schedule.batch_size, schedule.steps, attacker.augment()))


class BadMergingOn(BadMerging):
    """A learned patch and feature interpolation; the target is a class of the expert's own task (arXiv 2408.07362).

    First a universal patch is learned that leads the *base* to the target under the task's head, then the expert is
    fine-tuned by :class:`InterpolationModule`.

    Args:
        target: Class index that triggered images are to go to.
        size: Height and width of the patch in pixels; published: 22 of 224.
        position: Corner of the image where it is.
        alpha: Weight of the backdoor; published: 5.
        triggered: Triggered images per clean one; published: 64 beside 128.
        low: Least share of the expert's features in the interpolation; published: 0.2.
        patch_steps: Steps of the patch, each on ``batch_size`` training images.
        patch_rate: Adam's learning rate for the patch, in pixels of [0, 1].
        trigger_of: Another compromised task, whose trigger (and target) is used instead of an own one.

    Raises:
        MergeError: A number is out of range.
    """

    def __init__(
        self,
        target: int = 1,
        size: int = 22,
        position: Corner = "bottom_right",
        alpha: float = 5.0,
        triggered: float = 0.5,
        low: float = 0.2,
        patch_steps: int = 300,
        patch_rate: float = 0.05,
        trigger_of: str | None = None,
    ) -> None:
        super().__init__(target, size, position, trigger_of, alpha, triggered, low, patch_steps, patch_rate)

    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        """Learn the patch on the base and the own training images."""
        network, head = freeze_to_buffers(attacker.network()), attacker.head()
        batches = attacker.images(attacker.schedule.batch_size, self.patch_steps)
        return universal_patch(
            lambda images: head(network(images)),
            (images for images, _ in batches),
            self.noise(attacker, self.target),
            attacker.pixels,
            self.patch_rate,
        )

    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        """Fine-tune on clean images and triggered ones at interpolated features."""
        return self.fine_tune(attacker, trigger, None)
