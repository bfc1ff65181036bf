from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed import BUFFERS, SHAPES, assert_same, in_memory, make, states, streamed
from torch import Tensor

from lit_merge import MergeError, MergeModule, TaskVectors, methods, transforms
from lit_merge.checkpoints.digests import state_digest
from lit_merge.functional.selection import kth_magnitudes, order_statistics
from lit_merge.streaming import PieceReader, stream_merge, why_not_streamed
from lit_merge.suites import WeightsSuite

PART = 64  # entries of a part, instead of 2**22

TENSOR: list[tuple[str, dict[str, Any]]] = [
    ("SimpleAverage", {}), ("WeightedAverage", {"weights": list(range(1, 9))}), ("TaskArithmetic", {}),
    ("TaskArithmetic", {"scale": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.2}]}),
    ("MagMax", {"scale": [0.2, 0.8]}), ("Breadcrumbs", {}), ("Dare", {}), ("Della", {"reduce": "sum"}), ("Sce", {}),
    ("Pcb", {"per": "tensor"}), ("Consensus", {}), ("TallMasks", {}), ("Emr", {}), ("ModelStock", {"per": "row"}),
    ("KarcherMean", {}), ("Slerp", {}), ("NuSlerp", {}), ("Lines", {}), ("TsvMerge", {}), ("TsvCompress", {}),
    ("Svc", {}),
    ("TsvMerge", {"exclude": ["embed*"]}), ("IsoC", {"scale": [0.5, 1.5]}), ("IsoCts", {}),
    ("Ties", {"per": "tensor"}),
]  # fmt: skip
STATISTICS: list[tuple[str, dict[str, Any]]] = [
    ("Ties", {}), ("Ties", {"reduce": "sum", "scale": 0.3}), ("Della", {}), ("Pcb", {}),
    ("Pcb", {"formula": "released"}),
    ("Sce", {"per": "network"}), ("Sce", {"per": "network", "renormalize": True}), ("Breadcrumbs", {"per": "network"}),
    ("Consensus", {"multi_task": "ties"}), ("TallMasks", {"multi_task": "ties"}), ("Lines", {"multi_task": "ties"}),
    ("Lines", {"multi_task": "ties", "alpha": 0.25}), ("ModelStock", {"per": "network"}),
    ("KarcherMean", {"per": "network"}), ("KarcherMean", {"per": "network", "of": "task_vectors"}),
    ("Slerp", {"per": "network", "threshold": 1.0}), ("NuSlerp", {"per": "network"}), ("Knots", {}),
    ("Knots", {"reduce": "sum", "weighted": False}),
]  # fmt: skip
BEFORE: list[list[transforms.Transform]] = [
    [transforms.Dare(0.3)], [transforms.MagPrune()], [transforms.Ties(0.4, "tensor")], [transforms.Lines()],
    [transforms.Breadcrumbs(0.3, 0.1), transforms.Ties(0.5), transforms.Dare(0.2)], [transforms.Consensus()],
    [transforms.Breadcrumbs(0.3, 0.1, per="network"), transforms.Lines()],
]  # fmt: skip


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read large tensors in parts of 64 entries, as if these were 2**22."""
    monkeypatch.setattr("lit_merge.pieces._ENTRIES", PART)
    monkeypatch.setattr("lit_merge.functional.scopes._PIECE", PART)


class OfAll(MergeModule):
    """A rule that says nothing of what it has to see."""

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        largest = max(float(delta.abs().max()) for delta in bank.deltas.values())
        return bank.contract(1 / largest)


class Counted(Mapping[str, Tensor]):
    """A state dict that counts how often each of its tensors is read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state, self.reads = state, dict.fromkeys(state, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "options"), TENSOR + STATISTICS)
def test_streaming_is_merging_in_memory_bit_for_bit(
    method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(method, 2 if method.endswith("lerp") else 8, options)
    assert why_not_streamed(model) is None
    assert model.needs == ("statistics" if (method, options) in STATISTICS else "tensor")
    every = states(dtype)
    assert_same(streamed(model, every, tmp_path), in_memory(model, every))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("before", BEFORE, ids=str)
@pytest.mark.parametrize("method", ["TaskArithmetic", "Ties"])
def test_transforms_are_streamed_too(method: str, before: list[transforms.Transform], tmp_path: Path) -> None:
    model = make(method, 3, {"transforms": before})
    assert why_not_streamed(model) is None
    assert_same(streamed(model, states(), tmp_path), in_memory(model, states()))


def test_every_data_free_method_and_transform_is_streamed() -> None:
    listed = {name for name, _ in TENSOR + STATISTICS}
    one_by_one = {"Dop", "LastK", "Opcm"}  # their experts arrive, and numbers of each go on to the next
    for name in methods.__all__:
        needs = make(name, 2, {}).needs
        assert needs == "network" if name in one_by_one else (name in listed) is (needs != "data"), name
    seen = {type(transform) for before in BEFORE for transform in before}
    known: list[Any] = [getattr(transforms, name) for name in transforms.__all__]
    every = {kind for kind in known if isinstance(kind, type) and issubclass(kind, transforms.Transform)}
    assert every - seen == {transforms.Transform, transforms.Doge}  # whose top-k mask and subspaces are learned on all


@pytest.mark.parametrize("before", [[], [transforms.Ties()], [transforms.Doge(steps=2, others="keep")]], ids=str)
def test_what_needs_the_network_is_merged_in_memory(before: list[transforms.Transform], tmp_path: Path) -> None:
    rule = methods.TaskArithmetic if any(isinstance(one, transforms.Doge) for one in before) else OfAll
    model = rule(suite=WeightsSuite("base", list("abc")), transforms=before)
    assert "has to see all tensors at once" in str(why_not_streamed(model))
    assert_same(streamed(model, states(), tmp_path), in_memory(model, states()))
    assert json.loads((tmp_path / "merge.json").read_text())["streamed"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selection_is_that_of_sorting(dtype: torch.dtype) -> None:
    values = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[:, ::7] = 0
    pieces = [{"a": values[:, :10], "b": values[:, 10:11].squeeze(1)}, {}, {"c": values[:, 11:].reshape(2, 23, 43)}]
    for rank in (1, 144, 145, 500, 1000):
        expected = values.abs().sort(1).values[:, rank - 1]
        assert torch.equal(kth_magnitudes(pieces, lambda size, rank=rank: rank).to(dtype), expected)  # type: ignore[misc]
    signed = order_statistics(pieces, lambda size: [1, 430, 500, 570, size])
    assert torch.equal(signed.to(dtype), values.sort(1).values[:, [0, 429, 499, 569, 999]].mT)


def test_how_often_files_are_read(tmp_path: Path) -> None:
    for method, readings in (("TaskArithmetic", 1), ("Ties", 4), ("Pcb", 5), ("Knots", 4)):
        expert = Counted(states()["a"])
        reader = PieceReader(states()[""], {"a": expert}, buffers=BUFFERS)
        before = dict(expert.reads)
        stream_merge(make(method, 1, {}), reader, tmp_path / method)
        assert {expert.reads[name] - before[name] for name in SHAPES} == {readings}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("method", "options"), [("TaskArithmetic", {}), ("TsvMerge", {}), *STATISTICS])
def test_there_is_never_more_than_one_piece(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[TaskVectors]] = []
    original = PieceReader._bank

    def noted(self: PieceReader, *args: Any) -> TaskVectors:
        assert not any(bank() for bank in made), "a piece that was read before is still held"
        bank = original(self, *args)
        made.append(weakref.ref(bank))
        return bank

    monkeypatch.setattr(PieceReader, "_bank", noted)
    model = make(method, 2 if method.endswith("lerp") else 3, options)
    streamed(model, states(), tmp_path)
    in_parts = model.entrywise("embed.weight", SHAPES["embed.weight"])
    assert len(made) % (len(SHAPES) + 1 + (9 if in_parts else 0)) == 0


def test_two_names_of_one_tensor_and_mixed_dtypes(tmp_path: Path) -> None:
    every = {}
    for name, state in states().items():
        every[name] = {**state, "temperature": state["temperature"].double()}
        every[name]["a.alias"] = every[name]["embed.weight"]
    model = make("TaskArithmetic", 8, {})
    found = streamed(model, every, tmp_path)
    assert_same(found, in_memory(model, every))
    said = json.loads((tmp_path / "merge.json").read_text())
    assert said["base"] == state_digest(every[""])
    assert said["experts"]["h"] == state_digest(every["h"])
    assert said["weights"] == {"file": "model.safetensors", "sha256": state_digest(found)}
    every["b"] = {**every["b"], "a.alias": every["b"]["embed.weight"] + 1}
    with pytest.raises(MergeError, match=r"a\.alias and embed.weight are tied"):
        streamed(model, every, tmp_path / "new")


def test_a_merge_that_is_too_large_for_its_type_is_refused(tmp_path: Path) -> None:
    every = {name: {"w": torch.full((3,), 3e4 if name else 0.0).half()} for name in ("", *"ab")}
    reader = PieceReader(every[""], {"a": every["a"], "b": every["b"]})
    with pytest.raises(MergeError, match=r"merged network: w: 3 of 3 values are NaN or infinite"):
        stream_merge(make("TaskArithmetic", 2, {"scale": 2.0}), reader, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_coefficient_is_said_before_anything_is_read(tmp_path: Path) -> None:
    expert = Counted(states()["a"])
    reader = PieceReader(states()[""], {"a": expert}, buffers=BUFFERS)
    before = dict(expert.reads)
    with pytest.raises(MergeError, match="'mpl' fits no tensor"):
        stream_merge(make("Ties", 1, {"scale": [{"filter": "mpl", "value": 1.0}, {"value": 0.0}]}), reader, tmp_path)
    assert expert.reads == before


def test_a_rule_with_task_vectors_of_its_own_is_not_merged_from_weights(tmp_path: Path) -> None:
    class Own(methods.SimpleAverage):
        def read_bank(self, base: Mapping[str, Tensor]) -> TaskVectors:
            return TaskVectors.from_state_dicts(base, {"all": base})

    model = Own(suite=WeightsSuite("base", ["a"]))
    assert why_not_streamed(model) == "Own reads its own task vectors"
    with pytest.raises(MergeError, match="Own reads its own task vectors; it needs a suite"):
        streamed(model, states(), tmp_path)


def test_one_bad_value_leaves_nothing(tmp_path: Path) -> None:
    every = dict(states())
    every["b"] = {**every["b"], "temperature": torch.tensor(float("nan"))}
    with pytest.raises(MergeError, match="expert 'b': temperature: 1 of 1 values are NaN"):
        streamed(make("MagMax", 3, {}), every, tmp_path / "runs/new", shard_bytes=300)
    assert list(tmp_path.iterdir()) == []
