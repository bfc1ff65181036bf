"""Consensus, TallMasks, Emr, Lines: one network, or one per task."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import testers
import torch
from testers import TINY, MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, MergeModule, MergeTrainer, TaskArithmetic, TaskDataModule, Ties
from lit_merge.functional.consensus import consensus_merge, tall_masks
from lit_merge.functional.emr import emr, emr_unified
from lit_merge.functional.lines import depths
from lit_merge.methods.consensus import Consensus
from lit_merge.methods.emr import Emr
from lit_merge.methods.lines import Lines
from lit_merge.methods.tall_masks import TallMasks
from lit_merge.transforms.consensus import Consensus as ConsensusTransform
from lit_merge.transforms.lines import Lines as LinesTransform


def task_vectors(suite: ToySuite) -> dict[str, Tensor]:
    base = suite.base()
    return {name: torch.stack([suite.expert(task)[name] - base[name] for task in suite.tasks]) for name in base}


class TestConsensus(MergeTester):
    make = Consensus
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        least = min(2, len(deltas))
        return base + consensus_merge({"w": deltas}, 0.3, 0.4, least)["w"]

    def test_is_task_arithmetic_after_the_transform(self) -> None:
        suite = ToySuite("vit")
        composed = TaskArithmetic(0.3, suite=suite, transforms=[ConsensusTransform()])
        composed.configure_model()
        ours, theirs = self.state(suite), composed.merged_state()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])

    def test_of_ties_is_ties_where_two_tasks_need_it(self) -> None:
        suite = ToySuite("vit")
        ties = Ties(density=0.5, suite=suite)
        ties.configure_model()
        ours, theirs, base = (
            self.state(suite, scale=1.0, multi_task="ties", density=0.5),
            ties.merged_state(),
            suite.base(),
        )
        masked = [torch.isclose(ours[n], base[n], atol=1e-7) | torch.isclose(ours[n], theirs[n]) for n in base]
        assert all(mask.all() for mask in masked)
        assert any(not torch.equal(ours[name], theirs[name]) for name in base)


class PerTask(MergeTester):
    """What the two methods with a network per task have in common."""

    def reconstructed(self, suite: ToySuite) -> dict[str, Tensor]:
        raise NotImplementedError

    def test_every_task_is_scored_on_its_own_network(self) -> None:
        suite = ToySuite("vit")
        module = self.build(suite)
        rebuilt, base = self.reconstructed(suite), suite.base()
        trainer = MergeTrainer(**TINY)
        data = TaskDataModule(suite, batch_size=4)
        trainer.test(module, datamodule=data, verbose=False)
        found = module.results["tasks"]
        predictions = trainer.predict(module, datamodule=data)
        for number, task in enumerate(suite.tasks):
            state = {name: value + rebuilt[name][number] for name, value in base.items()}
            own = module.task_state(task)  # type: ignore[operator]
            for name in base:
                torch.testing.assert_close(own[name], state[name])
            pairs = [suite.dataset(task, "test")[i] for i in range(found[task]["n"])]
            images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
            logits = module.outputs(own, task, images)[1]
            torch.testing.assert_close(module(images, task), logits)
            assert found[task]["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
            said = [part["prediction"] for loader in predictions for part in loader if part["task"] == task]  # type: ignore[union-attr]
            assert torch.equal(torch.cat(said), logits.argmax(-1))
        stored = module.merged_state()
        assert any(not torch.allclose(stored[n], own[n], atol=1e-4) for n in stored)
        assert module.task_state("unheard of").keys() == stored.keys()  # type: ignore[operator]
        entries = sum(value.numel() for value in base.values())
        extra = module.report_extra()
        assert (extra["networks"], extra["task_identity"]) == (3, "known")
        assert 3 * entries / 8 <= extra["modulator_bytes"] <= 3 * entries / 8 + 16

    @pytest.mark.parametrize("buffers", ["average", "recalibrate"])
    def test_running_statistics_are_the_experts_own(self, buffers: Any) -> None:
        suite = ToySuite("cnn")
        module = self.build(suite, buffers=buffers)
        MergeTrainer(**TINY).test(module, datamodule=TaskDataModule(suite, batch_size=4), verbose=False)
        for task in suite.tasks:
            own, expert = module.task_state(task), suite.expert(task)  # type: ignore[operator]
            assert all(torch.equal(own[name], expert[name]) for name in ("bn1.running_mean", "blocks.1.running_var"))
        base = suite.base()  # base and vector, a bit per entry and task, and the tasks' statistics
        statistics = sum(value.nbytes for name, value in base.items() if "running" in name or "tracked" in name)
        assert module.bank.base.keys() == base.keys()
        whole = sum(value.nbytes for value in base.values())
        assert module.stored_bytes == 2 * whole - statistics + 3 * statistics + module.report_extra()["modulator_bytes"]


class TestTallMasks(PerTask):
    make = TallMasks
    unit: ClassVar[dict[str, Any] | None] = {}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + deltas.sum(0)

    def reconstructed(self, suite: ToySuite) -> dict[str, Tensor]:
        deltas = task_vectors(suite)
        masks = tall_masks(deltas, 0.4)
        return {name: masks[name] * value.sum(0) for name, value in deltas.items()}

    def test_thresholds_are_per_task(self) -> None:
        module = self.build(threshold=[0.0, 0.4, 1e9])
        assert isinstance(module, TallMasks)
        stored, first, last = module.merged_state(), module.task_state("task.a"), module.task_state("task.c")
        assert all(torch.equal(stored[name], first[name]) for name in stored)
        assert all(torch.allclose(last[name], value) for name, value in module.bank.base.items())
        with pytest.raises(MergeError, match=r"TallMasks\.threshold: expected 3, one per task, found 1"):
            self.build(threshold=[0.1]).task_state("task.a")  # type: ignore[operator]


class TestEmr(PerTask):
    make = Emr
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        return base + emr_unified({"w": deltas})["w"]

    def reconstructed(self, suite: ToySuite) -> dict[str, Tensor]:
        return emr(task_vectors(suite))


class TestLines(MergeTester):
    make = Lines
    zero: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}
    unit: ClassVar[dict[str, Any] | None] = {"beta": 0.0}

    @pytest.fixture(autouse=True)
    def networks_with_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            testers, "ToySuite", lambda kind, **options: ToySuite("mlp" if kind == "tied" else kind, **options)
        )

    def test_refuses_a_network_without_blocks(self) -> None:
        with pytest.raises(MergeError, match="no name has a block number"):
            self.state(ToySuite("tied"))

    @pytest.mark.parametrize("multi_task", ["sum", "ties"])
    def test_scales_the_merged_vector_by_depth(self, multi_task: Any) -> None:
        suite = ToySuite("vit", dtype="float64")
        plain: MergeModule = TaskArithmetic(1.0, suite=suite)
        if multi_task == "ties":
            plain = Ties(density=0.5, suite=suite)
        plain.configure_model()
        merged, base, found = plain.merged_state(), suite.base(), depths(suite.base())
        whole = {name: value.sum(0) for name, value in task_vectors(suite).items()}
        lengths = [float(torch.cat([v.flatten() for v in x.values()]).norm())
                   for x in (whole, {n: merged[n] - base[n] for n in base})]  # fmt: skip
        alpha = lengths[0] / lengths[1] / 3
        for name, value in self.state(suite, beta=0.4, multi_task=multi_task, density=0.5).items():
            factor = alpha + 0.4 * (found[name] or 0.0)
            torch.testing.assert_close(value - base[name], factor * (merged[name] - base[name]))
        assert {found[name] for name in base} == {None, 0.0, 1.0}

    def test_the_transform_before_a_sum_is_the_method(self) -> None:
        suite = ToySuite("vit")
        composed = TaskArithmetic(1.0, suite=suite, transforms=[LinesTransform(1 / 3, 0.5)])
        composed.configure_model()
        ours, theirs = self.state(suite), composed.merged_state()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


del PerTask, MergeTester  # pytest would collect them
