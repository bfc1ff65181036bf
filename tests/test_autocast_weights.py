"""Under mixed precision, merged weights are made in the type that autocast casts them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from toys import Kind, ToySuite

from lit_merge import AdaMerging, MergeTrainer
from lit_merge.autocast_weights import AutocastWeights
from lit_merge.data import UnlabelledBatch
from lit_merge.functional.leaf_gradient import leaf_loss, leaves
from lit_merge.functional.masked import Mask
from lit_merge.methods import ConcreteMerging
from lit_merge.skeleton import Skeleton
from lit_merge.task_vectors import TaskVectors

STEPS = 3


class Loader:
    def __init__(self, suite: ToySuite, images: int = 4) -> None:
        data = {task: suite.dataset(task, "test") for task in suite.tasks}
        index = torch.arange(images)
        self.batch = {t: UnlabelledBatch(torch.stack([d[i][0] for i in range(images)]), index) for t, d in data.items()}

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        return iter([self.batch] * STEPS)


def fit(module: Any, suite: ToySuite, epochs: int = 1, path: Path | None = None) -> MergeTrainer:
    trainer = MergeTrainer(
        max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=Loader(suite), ckpt_path=path)
    return trainer


def adapted(module: Any, suite: ToySuite, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[set[Any]]]:
    """Logits of every pass, and the types of the weights in it, but for the first: that is of the base, to look on."""
    logits, types = [], []
    original = Skeleton.forward

    def forward(self: Skeleton, state: Any, images: Tensor) -> Tensor:
        types.append({value.dtype for value in state.values() if value.is_floating_point()})
        logits.append(original(self, state, images))
        return logits[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Skeleton, "forward", forward)
        fit(module, suite)
    return [x.detach() for x in logits[1:]], types[1:]


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied"])
@pytest.mark.parametrize("limit", [None, 4])
def test_same_logits_as_with_autocasts_own_casts(
    kind: Kind, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = ToySuite(kind)
    module = AdaMerging(suite=suite, max_images=limit)
    found, types = adapted(module, suite, monkeypatch)
    plain = AdaMerging(suite=suite, max_images=limit)
    monkeypatch.setattr(AutocastWeights, "types", lambda *_: {})
    expected, before = adapted(plain, suite, monkeypatch)
    passes = len(found) // STEPS
    assert all(torch.bfloat16 in one for one in types)
    assert not any(torch.bfloat16 in one for one in before)
    for a, b in zip(found[: 2 * passes], expected[: 2 * passes], strict=True):
        assert torch.equal(a, b)
    # a tied weight's two gradients of one pass are added up in half precision, as autocast does where it keeps a cast
    torch.testing.assert_close(module.coefficients, plain.coefficients, rtol=0, atol=1e-6 if kind == "tied" else 1e-7)


def test_masks_are_learned_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = ToySuite("vit")
    module = ConcreteMerging(suite=suite, mask_steps=2)
    found, types = adapted(module, suite, monkeypatch)
    monkeypatch.setattr(AutocastWeights, "types", lambda *_: {})
    plain = ConcreteMerging(suite=suite, mask_steps=2)
    expected, _ = adapted(plain, suite, monkeypatch)
    assert all(torch.bfloat16 in one for one in types)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(module.logits, plain.logits, rtol=1e-5, atol=1e-7)


class Odd(nn.Module):
    """Reads one layer's weight without calling it, calls one outside of autocast, and ties one to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read, self.apart, self.head = (nn.Linear(4, 4) for _ in range(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.places = nn.Embedding(4, 4)
        self.head.weight = self.places.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain(x) + self.places(torch.arange(4))) @ self.read.weight
        with torch.autocast("cpu", enabled=False):
            x = self.apart(x.float())
        features: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0]).mean(1)
        return features


def test_only_what_autocast_casts_whole_and_always() -> None:
    network = Odd()
    skeleton = Skeleton(network)
    state = network.state_dict()
    skeleton(state, torch.ones(2, 4, 4))
    assert skeleton.autocast_weights.names is None
    with torch.autocast("cpu"):
        skeleton(state, torch.ones(2, 4, 4))
        found = skeleton.autocast_weights.types(torch.device("cpu"))
    attention = {f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    expected = {"plain.weight", "plain.bias", "head.bias"} | attention
    assert found.keys() & state.keys() == expected
    assert set(found.values()) == {torch.bfloat16}
    assert skeleton.autocast_weights.types(torch.device("cpu")) == {}


class Halved(AdaMerging):
    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        return {name: 0.5 * value for name, value in super().merge(bank).items()}


class Shifted(AdaMerging):
    """Only what stays in single precision is computed with the others."""

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        merged = super().merge(bank)
        size = sum(value.sum() for name, value in merged.items() if "ln" not in name)
        return {name: value + 0 * size if "ln" in name else value for name, value in merged.items()}


class Twice(AdaMerging):
    """Merges to find out how strongly to merge."""

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        assert not torch.is_autocast_enabled("cpu")
        size = torch.stack([value.norm() for value in super().merge(bank).values()])
        return bank.contract(self.weights() * size / size.mean())


@pytest.mark.parametrize("rule", [Halved, Shifted, Twice])
def test_a_rule_that_computes_with_what_is_contracted_keeps_its_precision(
    rule: type[AdaMerging], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = ToySuite("vit")
    types = adapted(rule(suite=suite), suite, monkeypatch)[1]
    assert types == [{torch.float32}] * STEPS


def test_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    suite = ToySuite("tied")  # two gradients of a weight are added up in its own type
    found = [AdaMerging(suite=suite) for _ in range(3)]
    fit(found[0], suite, epochs=2)
    fit(found[1], suite).save_checkpoint(tmp_path / "half.ckpt")
    fit(found[2], suite, epochs=2, path=tmp_path / "half.ckpt")
    assert torch.equal(found[2].coefficients, found[0].coefficients)
    assert not torch.equal(found[1].coefficients, found[0].coefficients)


@pytest.mark.parametrize("merge_by", ["network", "block"])
def test_a_rule_multiplies_its_matrices_in_single_precision(merge_by: Literal["network", "block"]) -> None:
    class Mixed(AdaMerging):
        def weights(self) -> Tensor:
            return self.coefficients @ torch.eye(self.coefficients.shape[1])

    suite, found = ToySuite("vit"), []
    for rule in (Mixed, AdaMerging):
        module = rule(suite=suite, merge_by=merge_by)
        fit(module, suite)
        found.append(module.coefficients.detach())
    assert torch.equal(*found)


def test_sums_over_chunks_are_in_single_precision() -> None:
    ones = torch.ones(1, 2)
    bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, 2.0])}})
    coefficients = ones[:, :1].clone().requires_grad_()
    with bank.contracting_to({"w": torch.bfloat16}):
        merged = bank.contract(coefficients)
    w = leaves(merged)
    loss = leaf_loss(merged, w, (w["w"].sum() * factor for factor in (256.0, 1.0, 1.0)), count=3)
    loss.backward()
    assert coefficients.grad is not None
    assert coefficients.grad.item() == 258 * 3  # in bfloat16, 256 + 1 is 256


@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_scale_is_taken_off_in_single_precision(masked: bool) -> None:
    bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, 2.0])}})
    coefficients = torch.ones(1, 1, requires_grad=True)
    mask = Mask(lambda number, x: x, (torch.ones(2),)) if masked else None
    with bank.contracting_to({"w": torch.float16}):
        merged = bank.contract(coefficients, mask)
    w = leaves(merged)
    assert w["w"].dtype == torch.float16
    leaf_loss(merged, w, [1e-7 * w["w"].float().sum()], scale=2.0**16).backward()
    assert coefficients.grad is not None
    assert coefficients.grad.item() == pytest.approx(3e-7, rel=1e-3)  # 1e-7 is one of float16's last numbers
