"""Shared adversarial unlearning of a merged network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.adaptation import Batches
from lit_merge.lazy_weights import detached
from lit_merge.methods.post_hoc import AdversarialMasking
from lit_merge.objectives.shared_adversarial import shared_adversarial_gain, shared_adversarial_loss

__all__ = ("SAU",)


class SAU(AdversarialMasking):
    """Shared adversarial unlearning: the masked network shall not make the mistakes that the merged network makes.

    The merged network itself, without a mask, stays beside as the reference. δ climbs
    :func:`~lit_merge.objectives.shared_adversarial.shared_adversarial_gain` towards images that both get wrong in the
    same way; the mask goes down
    :func:`~lit_merge.objectives.shared_adversarial.shared_adversarial_loss`, the probability that the masked network
    gives to what the reference mistakes an image under δ for. A mistake is another class than the reference predicts
    without δ: this stands for the labels, and unlike the prediction of a network under a random mask it stays put.

    A step takes two passes of the reference and one pass forward and back for each step of ascent more than
    :class:`~lit_merge.methods.AWM`, and memory for one network more.

    Args:
        **kwargs: See :class:`~lit_merge.methods.post_hoc.AdversarialMasking`.

    Source: Wei et al., Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples,
    arXiv 2307.10562; on merged networks: the code of arXiv 2410.13910, 2000 steps of Adam with learning
    rate 1e-3.
    """

    @torch.no_grad()
    def reference_state(self) -> dict[str, Tensor]:
        """Return the merged network without a mask."""
        with self.recipes():
            return self.complete(self.bank.contract(self.coefficients_of(self.bank)))

    @torch.no_grad()
    def classes(
        self, logits: Mapping[str, Tensor], images: Mapping[str, Tensor], reference: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return the predictions of the reference."""
        assert reference is not None
        return {task: found.argmax(-1) for task, (_, found) in self.all_outputs(reference, images).items()}

    def ascend(
        self,
        state: Mapping[str, Tensor],
        batch: Batches,
        classes: Mapping[str, Tensor],
        reference: dict[str, Tensor] | None,
    ) -> None:
        """Climb towards shared adversarial examples."""
        assert reference is not None
        assert self.perturbations is not None
        still = detached(state)
        for _ in range(self.ascent.steps):
            deltas = {task: self.perturbations.delta(task).detach().clone().requires_grad_() for task in classes}
            shaken = {task: self.perturbations(task, batch[task].images, delta) for task, delta in deltas.items()}
            own, other = self.all_outputs(still, shaken), self.all_outputs(reference, shaken)
            gains = [
                shared_adversarial_gain(own[task][1], other[task][1], found) * batch[task].share
                for task, found in classes.items()
            ]
            scale = self._loss_scale()
            gradients = torch.autograd.grad(torch.stack(gains).sum() * scale, list(deltas.values()))
            for task, gradient in zip(deltas, gradients, strict=True):
                mean = self.trainer.strategy.reduce(gradient, reduce_op="mean")
                self.perturbations.ascend(task, torch.as_tensor(mean) / scale)

    def adversarial_loss(self, perturbed: Tensor, classes: Tensor, reference: Tensor | None) -> Tensor:
        """Return the shared adversarial loss."""
        assert reference is not None
        return shared_adversarial_loss(perturbed, reference, classes)
