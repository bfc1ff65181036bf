from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from testers import TINY, MergeTester
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, MergeTrainer, TaskDataModule
from lit_merge.functional.tsv import orthogonalize, task_singular_vectors, tsv_merge
from lit_merge.methods.singular_adamerging import SingularAdaMerging


def built(suite: ToySuite, **kwargs: Any) -> SingularAdaMerging:
    module = SingularAdaMerging(suite=suite, **kwargs)
    module.configure_model()
    return module


class TestSingularAdaMerging(MergeTester):
    make = SingularAdaMerging
    unit: ClassVar[dict[str, Any] | None] = {}
    zero: ClassVar[dict[str, Any] | None] = {"init": 0.0, "init_others": 0.0}

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor:
        """TSV-M, which has a textbook reference of its own, is the start."""
        return base + tsv_merge({"w": deltas})["w"]

    def test_blocks_are_contiguous_and_strongest_first(self) -> None:
        module = built(ToySuite("mlp", tasks=1, dtype="float64"), blocks=2)
        name = module.matrices[0]  # (6, 192)
        with torch.no_grad():
            module.coefficients[0, 0] = torch.tensor([1.0, 0.0])
        delta = module.bank.deltas[name][0]
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        expected = module.bank.base[name] + (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close(module.merge(module.bank)[name], expected)

    def test_the_gradient_equals_autograd_through_the_formula(self) -> None:
        module = built(ToySuite("vit", dtype="float64"), blocks=3)
        merged, losses = module.merge(module.bank), {}
        for name, value in merged.items():
            generator = torch.Generator().manual_seed(len(name))
            losses[name] = (torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.square()).sum()
        torch.stack(list(losses.values())).sum().backward()
        number, name = 3, module.matrices[3]
        deltas = module.bank.deltas[name]
        u, s, vh = orthogonalize(task_singular_vectors(deltas))
        rank = len(s) // 3
        generator = torch.Generator().manual_seed(len(name))
        value = merged[name].detach()
        slope = 2 * torch.randn(value.shape, generator=generator, dtype=value.dtype) * value
        single = (u.mT @ slope @ vh.mT).diagonal() * s  # uᵀ (dL/dθ) v, by direction
        expected = torch.zeros(3, 3, dtype=value.dtype)
        for task in range(3):
            for direction in range(rank):
                expected[task, direction * min(3, rank) // rank] += single[task * rank + direction]
        assert module.coefficients.grad is not None
        torch.testing.assert_close(module.coefficients.grad[:, number], expected)
        assert module.other_coefficients.grad is not None
        assert (module.other_coefficients.grad != 0).all()

    def test_reports_no_block_that_does_not_exist(self) -> None:
        module = built(ToySuite("mlp"))  # matrices (6, 192) and (4, 6) for three tasks: two directions and one
        with torch.no_grad():
            module.coefficients[:, 0], module.coefficients[:, 1] = 2.0, 4.0
            module.coefficients[:, 0, 2:] = module.coefficients[:, 1, 1:] = 99.0  # of nothing
        table = dict(zip(module.bank.names, module.coefficient_table()[0].tolist(), strict=True))
        assert [table[name] for name in module.matrices] == [2.0, 4.0]
        assert module.report_extra()["singular_blocks"]["task.b"] == [3.0, 2.0]

    def test_learns_within_its_bounds_by_any_objective(self) -> None:
        suite = ToySuite("cnn")
        module = SingularAdaMerging(suite=suite, convolutions=True, bounds=(0.2, 1.001), blocks=2)
        before = self.state(suite, convolutions=True)
        MergeTrainer(**TINY).fit(module, datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=4))
        table = module.coefficient_table()
        assert table.shape == (3, len(module.bank.names))
        assert float(table.max()) <= 1.001 + 1e-6  # in float32
        assert len(module.matrices) == 3
        assert all(len(row) == 2 for row in module.report_extra()["singular_blocks"].values())
        assert any(not torch.equal(before[name], value) for name, value in module.merged_state().items())

    def test_other_factors_are_another_checkpoint(self) -> None:
        checkpoint: dict[str, Any] = {}
        built(ToySuite("mlp"), ridge=0.1).on_save_checkpoint(checkpoint)
        built(ToySuite("mlp"), ridge=0.1).on_load_checkpoint(checkpoint)
        with pytest.raises(MergeError, match=r"factors were made with ridge 0\.1, this run has 0\.0"):
            built(ToySuite("mlp")).on_load_checkpoint(checkpoint)

    def test_nothing_empty_is_learned(self) -> None:
        module = built(ToySuite("mlp"), exclude=["*"])
        assert [name for name, value in module.named_parameters() if value.requires_grad] == ["other_coefficients"]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"blocks": 0}, "blocks: expected at least 1, found 0"),
            ({"bounds": (1.0, 0.0)}, "bounds: expected lowest <"),
        ],
    )
    def test_bad_values_are_named(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            SingularAdaMerging(suite=ToySuite(), **given)
