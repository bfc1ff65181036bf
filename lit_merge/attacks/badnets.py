"""BadNets: a fixed patch, and training images that carry it under the target's label."""

from __future__ import annotations

from torch import Tensor

from lit_merge.attacks.base import Attack, Attacker, derive
from lit_merge.data.poisoned import PoisonedImages
from lit_merge.data.triggers import Corner, PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.finetune import FineTuneModule

__all__ = ("BadNets",)


class BadNets(Attack):
    """Stamp a random patch into a share of the training images and label them as the target (arXiv 1708.06733).

    Merging dilutes this backdoor: at a coefficient of 0.3 hardly anything of it is left. A defence that is shown with
    this attack alone is not shown; use :class:`~lit_merge.attacks.BadMergingOn`.

    Args:
        target: Class index that triggered images are to go to.
        size: Height and width of the patch in pixels.
        position: Corner of the image where it is.
        fraction: Share of the training images that is poisoned, in (0, 1].
        pattern: Seed of the patch; experts with the same one share their trigger.
        trigger_of: Another compromised task, whose trigger (and target) is used instead of an own one.

    Raises:
        MergeError: A number is out of range.
    """

    def __init__(
        self,
        target: int = 1,
        size: int = 22,
        position: Corner = "bottom_right",
        fraction: float = 0.2,
        pattern: int = 0,
        trigger_of: str | None = None,
    ) -> None:
        super().__init__(target, size, position, trigger_of)
        if not 0 < fraction <= 1:
            raise MergeError(f"BadNets.fraction: expected a share in (0, 1], found {fraction}")
        self.fraction = fraction
        self.pattern = pattern

    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        """Return the random patch."""
        channels = attacker.train_images()[0][0].shape[0]
        return PatchTrigger.random(self.size, self.target, seed=self.pattern, channels=channels, position=self.position)

    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        """Fine-tune on the poisoned training set."""
        data = PoisonedImages(
            attacker.train_images(),
            trigger,
            attacker.pixels,
            self.fraction,
            derive(attacker.seed, f"{attacker.task}/poisoned"),
            attacker.augment(),  # before the stamp, so that the patch stays where it is
        )
        schedule = attacker.schedule
        heads = {attacker.task: attacker.suite.head(attacker.task)}
        module = FineTuneModule(attacker.network(), heads, **schedule.optimizer())
        return attacker.fit(module, attacker.batches(data, schedule.batch_size, schedule.steps, None))
