from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from testers import TINY, MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, MergeTrainer, TaskDataModule
from lit_merge.functional.isotropic import iso_c, iso_cts
from lit_merge.functional.tsv import kept_rank
from lit_merge.methods.iso_c import IsoC
from lit_merge.methods.iso_cts import IsoCts
from lit_merge.methods.knots import Knots
from lit_merge.methods.tsv_compress import TsvCompress
from lit_merge.methods.tsv_merge import TsvMerge
from lit_merge.suites import NetworkSuite


def textbook_tsv(deltas: Tensor, rank: int) -> Tensor:
    """TSV-M as it is written down."""
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left, _, right = torch.linalg.svd(torch.cat([u[:, :rank] for u, _, _ in parts], 1), full_matrices=False)
    first, _, last = torch.linalg.svd(torch.cat([v[:rank] for _, _, v in parts]), full_matrices=False)
    middle = torch.cat([s[:rank] for _, s, _ in parts]).diag()
    merged: Tensor = left @ right @ middle @ first @ last
    return merged


class TestTsvMerge(MergeTester):
    make = TsvMerge
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        if deltas.ndim != 3:
            return base + deltas.mean(0)
        return base + textbook_tsv(deltas, kept_rank(deltas.shape[1], deltas.shape[2], len(deltas)))

    def test_reports_interference_and_merges_once(self, tmp_path: Path) -> None:
        suite = ToySuite("cnn")
        module = self.build(suite, convolutions=True, cache_dir=str(tmp_path))
        module.merged_state()
        files = sorted(tmp_path.iterdir())
        extra = json.loads(json.dumps(module.report_extra()))["tsv"]
        assert extra["tensors"].keys() == {"conv1.weight", "blocks.0.weight", "out.weight"}
        assert extra["interference"] > 0
        assert len(files) == 3 * 3
        stamps = [path.stat().st_mtime_ns for path in files]
        again = self.build(suite, convolutions=True, cache_dir=str(tmp_path)).merged_state()
        assert stamps == [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
        assert all(torch.equal(again[name], value) for name, value in module.merged_state().items())


class TestIsoC(MergeTester):
    make = IsoC
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        if deltas.ndim != 3:
            return base + deltas.mean(0)
        u, s, vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
        flat: Tensor = s.mean() * u @ vh
        return base + flat


class TestIsoCts(MergeTester):
    make = IsoCts
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def test_is_the_function(self) -> None:
        module = self.build(common=0.5, scale=1.5, others="sum")
        expected = iso_cts(module.bank.deltas, 1.5, common=0.5, policy=module.policy)  # type: ignore[arg-type]
        common = iso_c(module.bank.deltas, 1.5, policy=module.policy)  # type: ignore[arg-type]
        for name, value in module.merge(module.bank).items():
            torch.testing.assert_close(value - module.bank.base[name], expected[name])
        assert any(not torch.allclose(expected[name], common[name], atol=1e-3) for name in common)


class TestKnots(MergeTester):
    make = Knots
    unit: ClassVar[dict[str, Any] | None] = {"scale": 1.0, "density": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def test_without_trimming_and_conflicts_the_sum_is_the_mean_times_t(self) -> None:
        suite = ToySuite("mlp", tasks=1)
        mean, total = (self.state(suite, density=1.0, reduce=reduce) for reduce in ("mean", "sum"))
        assert all(torch.allclose(mean[name], total[name]) for name in mean)
        with pytest.raises(MergeError, match=r"Knots\.reduce: expected mean or sum, found 'max'"):
            Knots(suite=suite, reduce="max")  # type: ignore[arg-type]


def rank_one(base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The expert with the strongest direction alone of every matrix and kernel of its task vector."""
    found = {}
    for name, value in expert.items():
        found[name] = value.clone()
        if value.ndim > 1:
            u, s, vh = torch.linalg.svd((value - base[name]).flatten(1), full_matrices=False)
            found[name] = base[name] + (s[0] * u[:, :1] @ vh[:1]).reshape(value.shape)
    return found


class TestTsvCompress(MergeTester):
    make = TsvCompress
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        rows, columns = deltas.shape[1:] if deltas.ndim == 3 else (0, 0)
        rank = kept_rank(rows, columns, len(deltas))
        if rank * (rows + columns + 1) >= rows * columns:  # factors would take more
            return base + deltas.mean(0)
        u, s, vh = torch.linalg.svd(deltas, full_matrices=False)
        kept: Tensor = (u * s[:, None])[..., :rank] @ vh[:, :rank]
        return base + kept.mean(0)

    @pytest.mark.parametrize("kind", ["mlp", "cnn"])
    def test_lossless_compression_scores_as_the_experts(self, kind: Any) -> None:
        toys = ToySuite(kind)
        suite = NetworkSuite(
            network=toys.network(),
            experts={task: rank_one(toys.base(), toys.expert(task)) for task in toys.tasks},
            heads={task: toys.head(task) for task in toys.tasks},
            test={task: toys.dataset(task, "test") for task in toys.tasks},  # type: ignore[misc]
        )
        module = TsvCompress(suite=suite, fraction=0.1, convolutions=True)  # one triplet, and no more is there
        trainer = MergeTrainer(**TINY)
        trainer.test(module, datamodule=TaskDataModule(suite, batch_size=8), verbose=False)
        rows = module.results["tasks"].values()
        assert all(row["accuracy"] == row["expert_accuracy"] for row in rows)
        assert kind == "cnn" or all(row["accuracy"] != row["base_accuracy"] for row in rows)
        stored = module.merged_state()
        assert module.report_extra()["bytes"]["ratio"] < 0.6
        for task in suite.tasks:
            state = module.task_state(task)
            assert all(torch.allclose(state[n], v.to(state[n]), atol=1e-5) for n, v in suite.expert(task).items())
            images = suite.dataset(task, "test")[0][0][None]
            own, shared = (module.outputs(each, task, images)[1] for each in (state, stored))
            torch.testing.assert_close(module(images, task), own)
            assert not torch.allclose(own, shared, atol=1e-2)

    def test_a_mixed_precision_evaluation_does_not_round_the_experts(self) -> None:
        module = self.build(ToySuite("mlp"), fraction=0.2)
        plain = module.task_state("task.a")  # type: ignore[operator]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module.task_state("task.a")  # type: ignore[operator]
        assert all(torch.equal(plain[name], value) for name, value in mixed.items())

    def test_keeps_no_network_after_predictions_and_refuses_what_it_ignores(self) -> None:
        suite = ToySuite("mlp")
        module = TsvCompress(suite=suite)
        MergeTrainer(**TINY).predict(module, datamodule=TaskDataModule(suite, batch_size=8))
        assert module._chosen == ("", {})
        with pytest.raises(MergeError, match=r"TsvCompress\.others: every expert keeps .* found 'sum'; leave it out"):
            TsvCompress(suite=suite, others="sum")

    def test_reports_real_bytes(self) -> None:
        module = self.build(ToySuite("mlp"), fraction=0.2, dtype="bfloat16")
        found = module.report_extra()["bytes"]
        # (6, 192) at rank 1, (4, 6) at rank 1, and biases of 6 and 4: for three tasks, two bytes each
        assert found["compressed"] == 3 * 2 * (199 + 11 + 10)
        assert found["task_vectors"] == 3 * found["base"] == 3 * 4 * (6 * 192 + 4 * 6 + 10)
        assert found["ratio"] == found["compressed"] / found["task_vectors"]
        assert module.stored_bytes == found["compressed"] + found["base"]
