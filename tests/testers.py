"""One harness that every merging method must pass."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from toys import Kind, ToySuite, expert_state, network

from lit_merge import MergeModule, MergeTrainer, TaskDataModule, TaskVectors
from lit_merge.suites import NetworkSuite
from lit_merge.transforms import Transform

Make = Callable[..., MergeModule]


class Permuted(NetworkSuite):
    """A suite whose tasks come in the reverse order."""

    def __init__(self, suite: ToySuite) -> None:
        tasks = suite.tasks[::-1]
        super().__init__(
            network=suite.network(),
            experts={task: dict(suite.expert(task)) for task in tasks},
            heads={task: suite.head(task) for task in tasks},
            test={task: suite.dataset(task, "test") for task in tasks},  # type: ignore[misc]
            train=dict(suite._data["train"]),
            name=suite.name,
        )


class MergeTester:
    """Checks of a method; a subclass says how it is made and what its result should be.

    Attributes:
        make: Makes the method from ``suite`` and further arguments.
        permutable: The result does not depend on the order of the tasks.
        train: The suites have training sets.
        unit: Arguments under which a merge of one expert is that expert, if there are any.
        zero: Arguments under which a merge is the base, if there are any.
    """

    make: ClassVar[Make]
    permutable: ClassVar[bool] = True
    train: ClassVar[bool] = False
    unit: ClassVar[dict[str, Any] | None] = None
    zero: ClassVar[dict[str, Any] | None] = None

    def toys(self, kind: Kind, **kwargs: Any) -> ToySuite:
        return ToySuite(kind, train=self.train, **kwargs)

    def build(self, suite: NetworkSuite | None = None, **kwargs: Any) -> MergeModule:
        module = type(self).make(suite=suite or self.toys("vit"), **kwargs)
        module.configure_model()
        return module

    def state(self, suite: NetworkSuite | None = None, **kwargs: Any) -> dict[str, Tensor]:
        return self.build(suite, **kwargs).merged_state()

    def test_has_the_keys_shapes_and_dtypes_of_the_base(self) -> None:
        for kind in ("vit", "cnn", "tied"):
            suite = self.toys(kind)
            merged = self.state(suite)
            base = suite.base()
            assert merged.keys() == base.keys()
            for name, value in merged.items():
                assert (value.shape, value.dtype, value.device) == (
                    base[name].shape,
                    base[name].dtype,
                    base[name].device,
                )
                assert torch.isfinite(value).all()
            suite.network().load_state_dict(merged)  # strict

    def reference(self, base: Tensor, deltas: Tensor) -> Tensor | None:
        """Merged tensor from base ``(*shape)`` and task vectors ``(T, *shape)``; ``None``: not local to a tensor."""
        return None

    def test_equals_the_reference(self) -> None:
        suite = self.toys("vit", dtype="float64")
        merged, base = self.state(suite), suite.base()
        experts = [suite.expert(task) for task in suite.tasks]
        for name, value in base.items():
            deltas = torch.stack([expert[name] - value for expert in experts])
            if (expected := self.reference(value, deltas)) is None:
                pytest.skip("the rule is not local to a tensor; its own test has a reference")
            torch.testing.assert_close(merged[name], expected, rtol=1e-10, atol=1e-12)

    def test_does_not_change_what_it_is_given(self) -> None:
        suite = self.toys("cnn")
        before = {task: deepcopy(dict(suite.expert(task))) for task in suite.tasks}
        base = deepcopy(dict(suite.base()))
        heads = {task: deepcopy(suite.head(task).state_dict()) for task in suite.tasks}
        module = self.build(suite)
        MergeTrainer(**TINY).fit(module, datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=2))
        module.merged_state()
        assert all(torch.equal(base[name], value) for name, value in suite.base().items())
        for task, state in before.items():
            assert all(torch.equal(state[name], value) for name, value in suite.expert(task).items())
            assert all(torch.equal(heads[task][name], v) for name, v in suite.head(task).state_dict().items())
        assert any(p.requires_grad for p in suite.network().parameters())

    def test_is_deterministic(self) -> None:
        first = self.state()
        torch.rand(7)  # the global generator does not matter
        second = self.state()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_does_not_depend_on_the_order_of_tasks(self) -> None:
        suite = self.toys("cnn")
        first, second = self.state(suite), self.state(Permuted(suite))
        equal = all(torch.allclose(first[name].double(), second[name].double(), atol=1e-6) for name in first)
        assert equal is self.permutable

    def test_zero_gives_the_base(self) -> None:
        if self.zero is None:
            pytest.skip("there are no such arguments")
        suite = self.toys("tied")
        merged = self.state(suite, **self.zero)
        assert all(torch.equal(merged[name], value) for name, value in suite.base().items())

    def test_one_expert_gives_that_expert(self) -> None:
        if self.unit is None:
            pytest.skip("there are no such arguments")
        suite = self.toys("cnn", tasks=1)
        merged = self.state(suite, **self.unit)
        for name, value in suite.expert(suite.tasks[0]).items():
            torch.testing.assert_close(merged[name], value)

    def test_survives_copy_and_pickle(self) -> None:
        module = self.build(self.toys("tied"))
        state = module.merged_state()
        for other in (deepcopy(module), pickle.loads(pickle.dumps(module))):
            again = other.merged_state()
            assert all(torch.equal(state[name], again[name]) for name in state)

    def test_works_in_half_precision_weights(self) -> None:
        suite = self.toys("mlp", dtype="bfloat16")
        assert all(value.dtype == torch.bfloat16 for value in self.state(suite).values())

    def test_a_transform_can_stand_before_it(self) -> None:
        plain, negated = self.state(), self.state(transforms=[Negate()])
        base = self.toys("vit").base()
        changed = [name for name, value in plain.items() if not torch.allclose(negated[name], value)]
        assert changed, "the transform did not reach the rule"
        if self.reference(base[changed[0]], plain[changed[0]][None]) is not None:  # odd rules answer with the opposite
            assert all(torch.allclose(negated[n] - base[n], base[n] - plain[n], atol=1e-5) for n in base)

    def test_checkpoint_is_small_and_comes_back(self, tmp_path: Path) -> None:
        suite = self.toys("vit")
        module = type(self).make(suite=suite)
        if not module.learnable:
            module.configure_model()
            assert module.state_dict() == {}
            return
        trainer = MergeTrainer(**TINY)
        trainer.fit(module, datamodule=TaskDataModule(suite, batch_size=4, steps_per_epoch=2))
        trainer.save_checkpoint(tmp_path / "merge.ckpt")
        assert (tmp_path / "merge.ckpt").stat().st_size < 64 * 1024
        again = type(module).load_from_checkpoint(tmp_path / "merge.ckpt", suite=suite)
        first, second = module.merged_state(), again.merged_state()
        assert all(torch.equal(first[name], second[name]) for name in first)


class Negate(Transform):
    """τ → −τ."""

    def __call__(self, deltas: Any) -> Any:
        return {name: -delta for name, delta in deltas.items()}


TINY: dict[str, Any] = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def bank(kind: Kind = "vit", tasks: int = 3, dtype: torch.dtype = torch.float64) -> TaskVectors:
    """A bank of random experts."""
    base = network(kind).to(dtype)
    return TaskVectors.from_state_dicts(
        base.state_dict(),
        {f"t{t}": expert_state(base, t + 1) for t in range(tasks)},
        buffers=dict(base.named_buffers()),
    )
