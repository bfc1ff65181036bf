"""Shared adversarial examples: perturbed images that two networks get wrong in the same way.

A network that is being cleaned and the network that it came from share the backdoor as long as both answer it with the
same wrong class. Source: Wei et al., Shared Adversarial Unlearning, arXiv 2307.10562; written
without labels, as DAM's released code has it (arXiv 2410.13910): ``classes`` is what is predicted without the
perturbation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as tf
from torch import Tensor

from lit_merge.objectives.base import at_least_float32

__all__ = ("js_divergence", "shared_adversarial_gain", "shared_adversarial_loss")

_FLOOR, _EPSILON = 1e-3, 1e-6


def js_divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two predictions, ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q).

    Args:
        one: Logits ``(B, C)`` of p.
        other: Logits ``(B, C)`` of q.

    Returns:
        ``(B,)`` in nats, between 0 and log 2.

    >>> certain, torn = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> js_divergence(certain, -certain), js_divergence(certain, torn)
    (tensor([0.6931]), tensor([0.2158]))
    """
    log_p, log_q = (at_least_float32(logits).log_softmax(-1) for logits in (one, other))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return sum((x.exp() * (x - log_m)).sum(-1) for x in (log_p, log_q)) / 2  # type: ignore[return-value]


def shared_adversarial_gain(perturbed: Tensor, reference: Tensor, classes: Tensor) -> Tensor:
    """What a perturbation climbs that looks for shared adversarial examples: ½ CE − ½ JS.

    The cross-entropy asks for wrong predictions, and the divergence for the same ones from both networks. Images that
    are shared adversarial examples already have no part in the divergence.

    Args:
        perturbed: Logits ``(B, C)`` of the network that is cleaned, with the perturbation.
        reference: Logits ``(B, C)`` of the network that it came from, with the perturbation.
        classes: ``(B,)``, what is predicted without it.

    Returns:
        A scalar in nats, in the mean over all images.

    >>> here, there = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> shared_adversarial_gain(here, there, torch.tensor([0]))  # ½ (0.1269 − 0.3278)
    tensor(-0.1004)
    >>> shared_adversarial_gain(there, there, torch.tensor([0]))  # ½ 2.1269
    tensor(1.0635)
    """
    both = perturbed.argmax(-1) == reference.argmax(-1)
    shared = both & (perturbed.argmax(-1) != classes)
    apart = js_divergence(perturbed, reference).masked_fill(shared, 0).mean()
    return (tf.cross_entropy(at_least_float32(perturbed), classes) - apart) / 2


def shared_adversarial_loss(perturbed: Tensor, reference: Tensor, classes: Tensor) -> Tensor:
    """Mean of −log(1 − p), p being what a network gives to the class that fools the network it came from.

    Images on which that network is not fooled count as 0. Below p = 0.001 there is no gradient. Published as a mean of
    two logarithms, log(10⁻⁶ + min(1 − p, 0.999)) and log(1 + 10⁻⁶ − max(p, 0.001)), which are equal.

    Args:
        perturbed: Logits ``(B, C)`` of the network that is cleaned, with the perturbation.
        reference: Logits ``(B, C)`` of the network that it came from, with the perturbation.
        classes: ``(B,)``, what is predicted without it.

    Returns:
        A scalar in nats, in the mean over all images.

    >>> fooled = torch.tensor([[0.0, 9.0]])
    >>> shared_adversarial_loss(torch.zeros(1, 2), fooled, torch.tensor([0]))  # p = ½
    tensor(0.6931)
    >>> shared_adversarial_loss(torch.zeros(1, 2), fooled, torch.tensor([1]))  # it is no mistake
    tensor(0.)
    """
    answer = reference.argmax(-1)
    p = at_least_float32(perturbed).softmax(-1).gather(-1, answer[:, None]).squeeze(-1)
    return (-(1 + _EPSILON - p.clamp(min=_FLOOR)).log()).masked_fill(answer == classes, 0).mean()
