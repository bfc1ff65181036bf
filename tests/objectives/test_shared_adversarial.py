from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_merge.objectives.shared_adversarial import js_divergence, shared_adversarial_gain, shared_adversarial_loss


def logits(seed: int, size: int = 40, classes: int = 4) -> Tensor:
    return 3 * torch.randn(size, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_equals_the_definition_and_stays_finite() -> None:
    p, q = logits(0).softmax(-1), logits(1).softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(js_divergence(logits(0), logits(1)), expected)
    torch.testing.assert_close(js_divergence(logits(1), logits(0)), expected)
    sure = torch.tensor([[1e4, 0.0]], requires_grad=True)
    far = js_divergence(sure, torch.tensor([[0.0, 1e4]]))
    (slope,) = torch.autograd.grad(far.sum(), sure)
    assert float(far.detach()) == pytest.approx(math.log(2))
    assert torch.isfinite(slope).all()


def test_loss_is_the_published_mean_of_two_logarithms() -> None:
    perturbed, reference, classes = logits(0), logits(1), logits(2).argmax(-1)
    expected = 0.0
    for own, other, y in zip(perturbed.softmax(-1), reference.argmax(-1).tolist(), classes.tolist(), strict=True):
        p = float(own[other])
        if other != y:
            expected -= 0.5 * (math.log(1e-6 + min(1 - p, 0.999)) + math.log(1 + 1e-6 - max(p, 0.001))) / len(classes)
    assert float(shared_adversarial_loss(perturbed, reference, classes)) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_divergence_counts_only_where_the_networks_are_not_fooled_alike() -> None:
    perturbed = torch.tensor([[0.0, 2.0], [0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    classes = torch.tensor([0, 0, 0])  # fooled alike; fooled alone; right both
    apart = js_divergence(perturbed, reference)
    expected = (2 * math.log(1 + math.e**2) + math.log(1 + math.e**-2) - float(apart[1] + apart[2])) / 6
    assert float(shared_adversarial_gain(perturbed, reference, classes)) == pytest.approx(expected)
