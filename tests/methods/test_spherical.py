"""Averages on and off the sphere: WeightedAverage, Slerp, NuSlerp, KarcherMean, ModelStock."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import testers
import torch
from testers import MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, SimpleAverage
from lit_merge.functional.spherical import slerp
from lit_merge.methods.karcher_mean import KarcherMean
from lit_merge.methods.model_stock import ModelStock
from lit_merge.methods.nuslerp import NuSlerp
from lit_merge.methods.slerp import Slerp
from lit_merge.methods.weighted_average import WeightedAverage


class TestWeightedAverage(MergeTester):
    make = partial(WeightedAverage, weights={"task.a": 1.0, "task.b": 2.0, "task.c": 5.0})
    zero: ClassVar[dict[str, Any] | None] = {"weights": [0.0, 0.0, 0.0], "normalize": False}
    unit: ClassVar[dict[str, Any] | None] = {"weights": None}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0, 5.0], dtype=deltas.dtype)[: len(deltas)] / 8
        return base + (weights.reshape(-1, *[1] * base.ndim) * deltas).sum(0)

    def test_equal_weights_are_the_simple_average(self) -> None:
        plain = SimpleAverage(suite=ToySuite("cnn"))
        plain.configure_model()
        ours, theirs = self.state(ToySuite("cnn"), weights=None), plain.merged_state()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])

    def test_weights_are_as_exact_as_the_network(self) -> None:
        module = self.build(ToySuite("mlp", dtype="float64"), weights=[1.0, 1.0, 1.0])
        for name, value in module.merge(module.bank).items():
            expected = module.bank.base[name] + module.bank.deltas[name].mean(0)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("weights", [{"task.a": 1.0, "d": 1.0}, [1.0], [1.0, -1.0, 0.0]])
    def test_names_wrong_weights(self, weights: Any) -> None:
        with pytest.raises(MergeError, match=r"weights: expected (one for each of|3, one for|numbers whose sum)"):
            self.state(weights=weights)


class TwoExperts(MergeTester):
    """The harness on suites of two tasks."""

    @pytest.fixture(autouse=True)
    def two_tasks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(testers, "ToySuite", partial(ToySuite, tasks=2))

    def test_refuses_three(self) -> None:
        with pytest.raises(MergeError, match=r"lerp: expected two experts, found 3; KarcherMean takes any number"):
            self.state(ToySuite("mlp"))


class TestSlerp(TwoExperts):
    make = Slerp

    def test_ends_are_the_experts(self) -> None:
        suite = ToySuite("cnn", tasks=2)
        for t, task in ((0.0, "task.a"), (1.0, "task.b")):
            merged = self.state(suite, t=t, threshold=1.0, buffers="base")
            for name in ("conv1.weight", "out.bias"):
                torch.testing.assert_close(merged[name], suite.expert(task)[name])

    def test_turns_the_weights_themselves(self) -> None:
        suite = ToySuite("vit", tasks=2, dtype="float64")
        both = [suite.expert(task) for task in suite.tasks]
        expected = slerp({name: torch.stack([state[name] for state in both]) for name in both[0]}, 0.3)
        for name, value in self.state(suite, t=0.3).items():
            torch.testing.assert_close(value, expected[name])


class TestNuSlerp(TwoExperts):
    make = NuSlerp

    def test_turns_the_task_vectors_by_weights(self) -> None:
        suite = ToySuite("vit", tasks=2, dtype="float64")
        base = suite.base()
        deltas = {n: torch.stack([suite.expert(task)[n] - base[n] for task in suite.tasks]) for n in base}
        for per in ("row", "tensor", "network"):
            expected = slerp(deltas, 0.75, per=per, threshold=1.0)
            for name, value in self.state(suite, weights={"task.b": 3.0, "task.a": 1.0}, per=per).items():
                torch.testing.assert_close(value - base[name], expected[name])


class TestKarcherMean(MergeTester):
    make = KarcherMean
    unit: ClassVar[dict[str, Any] | None] = {}

    def test_of_task_vectors_differs_from_of_weights(self) -> None:
        first, second = self.state(), self.state(of="task_vectors")
        assert any(not torch.allclose(first[name], second[name], atol=1e-3) for name in first)
        with pytest.raises(MergeError, match=r"KarcherMean\.of: expected weights or task_vectors, found 'base'"):
            KarcherMean(suite=ToySuite(), of="base")  # type: ignore[arg-type]


class TestModelStock(MergeTester):
    make = ModelStock

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor | None:
        flat = deltas.reshape(len(deltas), -1)
        tasks = len(flat)
        if tasks < 2:
            return base
        pairs = [
            float(torch.cosine_similarity(flat[s], flat[t], dim=0, eps=1e-30)) for t in range(tasks) for s in range(t)
        ]
        cosine = max(0.0, sum(pairs) / len(pairs))
        return base + tasks * cosine / (1 + (tasks - 1) * cosine) * deltas.mean(0)

    def test_refuses_one_expert(self) -> None:
        with pytest.raises(MergeError, match="expected at least two experts, found 1"):
            self.state(ToySuite("mlp", tasks=1))


del TwoExperts, MergeTester  # pytest would collect them
