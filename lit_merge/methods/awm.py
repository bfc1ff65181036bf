"""Adversarial weight masking of a merged network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from lit_merge.adaptation import Batches
from lit_merge.methods.post_hoc import AdversarialMasking
from lit_merge.objectives.consistency import Safety, safety_loss

__all__ = ("AWM",)


class AWM(AdversarialMasking):
    """Adversarial weight masking: the masked network shall predict under δ what it predicts without.

    δ climbs CE(f(x + δ), argmax f(x)), and the adversarial loss is the same cross-entropy, downhill, as in AWM itself.
    ``safety: entropy`` is what the released code for merged networks has in its place, the entropy of f(x + δ). The L1
    norm of the mask, which AWM adds, is left out as there: that of a rescaled mask is constant.

    With ``unit: neuron`` it is a variant of ANP, whose perturbations are of weights instead of images.

    Args:
        safety: ``consistency`` or ``entropy``, see :func:`lit_merge.objectives.consistency.safety_loss`.
        **kwargs: See :class:`~lit_merge.methods.post_hoc.AdversarialMasking`.

    Raises:
        MergeError: A value is out of range.

    Source: Chai and Chen, One-shot Neural Backdoor Erasing via Adversarial Weight Masking, arXiv
    2207.04497; on merged networks: the code of arXiv 2410.13910, 2000 steps of Adam with learning rate 1e-3.
    """

    def __init__(self, safety: Safety = "consistency", **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(**kwargs)
        self._one_of("safety", safety, get_args(Safety))
        self.safety: Safety = safety

    def classes(
        self, logits: Mapping[str, Tensor], images: Mapping[str, Tensor], reference: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return the predictions of the masked network itself."""
        return {task: found.argmax(-1) for task, found in logits.items()}

    def ascend(
        self,
        state: Mapping[str, Tensor],
        batch: Batches,
        classes: Mapping[str, Tensor],
        reference: dict[str, Tensor] | None,
    ) -> None:
        """Climb the cross-entropy."""
        self.climb(state, batch, classes)

    def adversarial_loss(self, perturbed: Tensor, classes: Tensor, reference: Tensor | None) -> Tensor:
        """Return cross-entropy or entropy."""
        return safety_loss(perturbed, classes, self.safety)
