from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, Objective, TaskOutput, WeightedSum


def output(seed: int = 0, size: int = 6) -> TaskOutput:
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (4, 5, 4, 5))
    return TaskOutput(3 * a, b, 3 * c, d)


def test_entropy_equals_the_definition() -> None:
    p = output().logits.softmax(-1)
    assert float(Entropy()(output())) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-6)


def test_entropy_is_exact_for_confident_predictions() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = Entropy()(TaskOutput(logits, logits))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.isfinite(logits.grad).all() if logits.grad is not None else False


def test_diversity_equals_the_definition() -> None:
    mean = output().logits.softmax(-1).mean(0)
    assert float(Diversity()(output())) == pytest.approx(float((mean * mean.log()).sum()), rel=1e-6)


def test_diversity_bounds() -> None:
    even, one = 100 * torch.eye(4), 100 * torch.eye(4)[:1].expand(4, 4)
    assert float(Diversity()(TaskOutput(even, even))) == pytest.approx(-math.log(4))
    assert float(Diversity()(TaskOutput(one, one))) == pytest.approx(0, abs=1e-6)


def kl(o: TaskOutput, temperature: float) -> Tensor:
    assert o.expert_logits is not None
    p, q = (o.expert_logits / temperature).softmax(-1), (o.logits / temperature).softmax(-1)
    return (p * (p / q).log()).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_equals_the_definition(temperature: float) -> None:
    loss = ExpertAlignment("kl", temperature)(output())
    assert float(loss) == pytest.approx(float(kl(output(), temperature)), rel=1e-5)


def test_feature_distances_equal_the_definition() -> None:
    o = output()
    assert o.expert_features is not None
    difference = o.features - o.expert_features
    cosine = (o.features * o.expert_features).sum(-1) / (o.features.norm(dim=-1) * o.expert_features.norm(dim=-1))
    expected = {"l1": difference.abs().mean(), "l2": difference.square().mean(), "cosine": 1 - cosine.mean()}
    for distance, value in expected.items():
        assert float(ExpertAlignment(distance)(o)) == pytest.approx(float(value), rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("distance", ["kl", "l1", "l2", "cosine"])
def test_alignment_is_zero_with_the_expert_itself(distance: Any) -> None:
    o = output()
    assert float(ExpertAlignment(distance)(TaskOutput(o.logits, o.features, o.logits, o.features))) == pytest.approx(
        0, abs=1e-6
    )


def test_weighted_sum() -> None:
    total = WeightedSum([Entropy(), Diversity(), ExpertAlignment()], [1.0, 0.5, 2.0])
    expected = Entropy()(output()) + 0.5 * Diversity()(output()) + 2 * ExpertAlignment()(output())
    torch.testing.assert_close(total(output()), expected)
    assert total.uses_expert
    assert not WeightedSum([Entropy()]).uses_expert


@pytest.mark.parametrize("objective", [Entropy(), ExpertAlignment("kl"), ExpertAlignment("l1"), ExpertAlignment("l2")])
def test_ranks_average_to_one(objective: Objective) -> None:
    whole = output()
    assert whole.expert_logits is not None
    assert whole.expert_features is not None
    halves = [
        TaskOutput(whole.logits[p], whole.features[p], whole.expert_logits[p], whole.expert_features[p])
        for p in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close((objective(halves[0]) + objective(halves[1])) / 2, objective(whole))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertAlignment("js"), "distance: expected kl, l1, l2 or cosine, found 'js'"),  # type: ignore[arg-type]
        (lambda: ExpertAlignment(temperature=0), "temperature: expected a number above 0, found 0"),
        (lambda: WeightedSum([]), "at least one term and as many weights, found 0 terms and 0 weights"),
        (lambda: WeightedSum([Entropy()], [1.0, 2.0]), "found 1 terms and 2 weights"),
        (lambda: ExpertAlignment()(TaskOutput(torch.zeros(1, 2), torch.zeros(1, 2))), "expert's outputs are missing"),
    ],
)
def test_names_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()
