"""Every storage does what the dense one does."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from kills import in_child
from testers import Negate
from torch import Tensor

from lit_merge import MergeError, TaskVectors
from lit_merge.functional.leaf_gradient import leaf_loss, leaves
from lit_merge.functional.masked import Mask
from lit_merge.storage import DenseStorage, HostStorage, LowRankStorage, MappedStorage, Storage
from lit_merge.storage.host import Room
from lit_merge.transforms import Dare, Ties

T = 3
SHAPES = {"h.1.w": (40, 24), "conv": (12, 2, 4, 4), "b": (24,), "scalar": (), "h.0.w": (24, 36), "one": (1, 1)}
EXACT = ["host", "mmap", "host ahead", "mmap ahead"]


class Eager:
    """Streams that do everything at once; says what was asked."""

    def __init__(self) -> None:
        self.settled: list[int] = []

    def filling(self, room: int) -> Any:
        return nullcontext()

    def await_filled(self, room: int) -> None:
        pass

    used = await_filled

    def settle(self, room: int) -> None:
        self.settled.append(room)


class Ahead:
    """A storage that copies ahead, on the CPU."""

    _copies = True
    _fill: Callable[..., Any]

    def _signals(self, rooms: list[Room]) -> Any:
        self.signals = Eager()
        return self.signals


class HostAhead(Ahead, HostStorage):
    """Without a side stream."""


class MappedAhead(Ahead, MappedStorage):
    """Without a side stream."""


STORAGES: dict[str, Any] = {
    "host": HostStorage,
    "mmap": MappedStorage,
    "host ahead": HostAhead,
    "mmap ahead": MappedAhead,
    "low_rank": partial(LowRankStorage, rank=3),
    "device": DenseStorage,
}


def networks(seed: int = 0, rank: int = 3) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Base and experts whose matrices are of low rank apart."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    base = {name: draw(shape) for name, shape in SHAPES.items()}
    experts = {}
    for t in range(T):
        experts[f"t{t}"] = {
            name: value + (0.3 * draw(len(value), rank) @ draw(rank, value[0].numel())).view_as(value)
            if value.ndim > 1
            else value + draw(value.shape)
            for name, value in base.items()
        }
    return base, experts


def bank(kind: str, dtype: torch.dtype | None = None, **kwargs: Any) -> TaskVectors:
    base, experts = networks()
    return TaskVectors.from_state_dicts(base, experts, dtype=dtype, storage=partial(STORAGES[kind], **kwargs))


def results(tv: TaskVectors) -> dict[str, Tensor]:
    """All that a bank is asked for."""
    generator = torch.Generator().manual_seed(5)

    def draw(*size: Any) -> Tensor:
        return torch.randn(*size, generator=generator).to(tv.storage.device)

    coefficients = draw(T, len(tv.names)).requires_grad_()
    logits = draw(sum(tv.sizes)).requires_grad_()
    mask = Mask(lambda column, x: x.sigmoid(), (logits,))
    gradients = {name: draw(shape) for name, shape in SHAPES.items() if name != "b"}
    found = {f"base {name}": value for name, value in tv.base.items()}
    found |= {f"delta {name}": value for name, value in tv.deltas.items()}
    found |= {f"expert {name}": value for name, value in tv.expert("t1").items()}
    for label, merged in (("plain", tv.contract(coefficients)), ("masked", tv.contract(coefficients, mask))):
        found |= {f"{label} {name}": value.detach() for name, value in merged.items()}
        asked = [coefficients, logits] if label == "masked" else [coefficients]
        loss = torch.stack([(merged[name] * given).sum() for name, given in gradients.items()]).sum()
        for name, value in zip("cx", torch.autograd.grad(loss, asked), strict=False):
            found[f"{label} d{name}"] = value
    for name, back in zip("cx", tv.pull_back(gradients, coefficients, mask), strict=True):
        assert back is not None
        found[f"back {name}"] = back
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    torch.testing.assert_close(dict(other), dict(one), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXACT)
def test_has_the_bits_of_a_dense_bank(kind: str, dtype: torch.dtype) -> None:
    found, expected = results(bank(kind, dtype)), results(bank("device", dtype))
    same(found, expected)


def test_low_rank_is_exact_where_the_rank_is_enough() -> None:
    tv = bank("low_rank")
    assert tv.storage._ranks == (3, 3, 0, 0, 3, 0)
    same(results(tv), results(bank("device")), 1e-5)
    assert tv.storage_report()["relative_error"] < 1e-5
    whole = bank("low_rank", rank=1.0)  # factors of full rank are larger than the matrix
    assert whole.storage_report()["relative_error"] == 0
    same(results(whole), results(bank("device")), 1e-6)


def test_truncated_factors_are_the_task_vectors_that_they_stand_for() -> None:
    """Contraction and gradients are those of the truncated task vectors, and the report says how far these are."""
    tv, dense = bank("low_rank", rank=1), bank("device")
    truncated = dense.map(lambda deltas: {name: value.clone() for name, value in tv.deltas.items()})
    same(results(tv), results(truncated), 1e-5)
    length = {name: value.reshape(T, -1) for name, value in dense.deltas.items()}
    error = {name: tv.deltas[name].reshape(T, -1) - value for name, value in length.items()}
    lost, whole = (torch.cat(list(each.values()), 1) for each in (error, length))
    report = tv.storage_report()
    assert report["relative_error"] == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-5)
    assert list(report["tasks"].values()) == pytest.approx((lost.norm(dim=1) / whole.norm(dim=1)).tolist(), rel=1e-5)
    each = {name: float(error[name].norm() / length[name].norm()) for name in error}
    worst = max(each, key=each.__getitem__)
    assert report["worst"] == {"tensor": worst, "relative_error": pytest.approx(each[worst], rel=1e-5)}
    singular = torch.linalg.svdvals(dense.deltas["h.1.w"][0])  # nothing of this rank is nearer (Eckart and Young)
    assert float(error["h.1.w"][0].norm()) == pytest.approx(float(singular[1:].norm()), rel=1e-4)
    assert report["bytes"] == 4 * T * (40 + 24 + 12 + 32 + 24 + 36 + 24 + 1 + 1)
    assert report["dense_bytes"] == 4 * T * sum(tv.sizes)
    again = tv.map(Negate()).storage_report()  # which loses no more
    assert again["relative_error"] < 1e-5
    assert again["before_transforms"] == [report["relative_error"]]


@pytest.mark.parametrize("kind", [*EXACT, "low_rank"])
def test_survives_copy_and_pickle(kind: str) -> None:
    tv = bank(kind)
    expected = results(tv)
    for other in (deepcopy(tv), pickle.loads(pickle.dumps(tv))):
        same(results(other), expected)
        assert type(other.storage) is type(tv.storage)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("transform", [Negate(), Dare(0.5), Ties(0.3)], ids=["network", "tensor", "statistics"])
def test_a_transform_has_the_bits_of_one_in_memory(kind: str, transform: Any) -> None:
    tv = bank(kind)
    mapped = tv.map(transform)
    same(results(mapped), results(bank("device").map(transform)))
    same(results(tv), results(bank("device")))
    assert type(mapped.storage) is type(tv.storage)


@pytest.mark.parametrize("kind", ["device", "host", "low_rank"])
def test_a_module_of_another_type_keeps_every_bit_of_its_bank(kind: str) -> None:
    tv = bank(kind)
    same(results(deepcopy(tv).to(torch.bfloat16)), results(tv))  # what Trainer(precision="bf16-true") does


def test_host_memory_does_not_move_with_the_module() -> None:
    tv = bank("host")
    storage: Any = tv.storage
    before = storage._base.data_ptr()
    tv.to(torch.float64)
    assert storage._base.data_ptr() == before
    assert sum(value.numel() for value in tv.storage.buffers()) == 0
    assert tv.storage.lazy
    assert isinstance(tv.deltas["b"], Tensor)


def test_a_storage_that_copies_waits_for_its_staging_rooms() -> None:
    storage: Any = bank("mmap ahead").storage
    assert [column for column, _ in storage.walk([0, 4, 2])] == [0, 4, 2]
    assert storage.signals.settled == [0, 1, 0]


@pytest.mark.parametrize("kind", STORAGES)
def test_a_loss_without_a_gradient(kind: str) -> None:
    tv = bank(kind)
    coefficients = torch.zeros(T, len(tv.names), requires_grad=True)
    merged = tv.contract(coefficients)
    leaf_loss(merged, leaves(merged), [torch.tensor(2.0)]).backward()
    assert coefficients.grad is not None
    assert not coefficients.grad.any()


def test_forks_share_a_file_that_has_no_name(tmp_path: Path) -> None:
    tv = bank("mmap", folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert sum(value.nbytes for value in tv.storage.buffers()) == 0
    copied, storage = deepcopy(tv), cast("Any", tv.storage)

    def write() -> None:
        storage._rows[0, 0] = 7.0
        assert float(copied.deltas["h.1.w"][0, 0, 0]) == 7.0

    assert in_child(write) == 0
    assert float(tv.deltas["h.1.w"][0, 0, 0]) == 7.0
    assert not list(tmp_path.iterdir())


def test_the_system_is_told_what_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": torch.randn(2**16), "b": torch.randn(3)}
    tv = TaskVectors.from_state_dicts(base, {"a": {"w": torch.ones(2**16), "b": torch.ones(3)}}, storage=MappedStorage)
    said: list[tuple[str, int]] = []
    kind: Any = type(cast("Any", tv.storage)._files[0])
    advise = kind.advise

    def noted(self: Any, part: Tensor, what: str) -> None:
        said.append((what, part.nbytes))
        advise(self, part, what)

    monkeypatch.setattr(kind, "advise", noted)
    merged = tv.contract(0.5)
    torch.testing.assert_close(merged["w"], 0.5 * (base["w"] + 1))
    assert said == [("MADV_DONTNEED", 2**18)] * 4  # base and row, asked of both files


@contextmanager
def _free(monkeypatch: pytest.MonkeyPatch, size: int) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": size}))
        yield


def test_no_room_on_the_disk_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs = 4 * (T + 1) * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    with _free(monkeypatch, needs - 1), pytest.raises(MergeError, match=f"need {needs:,} bytes, and {needs - 1:,} are"):
        bank("mmap", folder=tmp_path)
    with _free(monkeypatch, needs):
        tv = bank("mmap", folder=tmp_path)
    with _free(monkeypatch, 10), pytest.raises(MergeError, match="10 are free; give another folder"):
        tv.map(Negate())
    with pytest.raises(MergeError, match="none-such: expected a folder, found none"):
        bank("mmap", folder=tmp_path / "none-such")


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, float("nan")])
def test_a_rank_is_a_number_or_a_share(rank: Any) -> None:
    with pytest.raises(MergeError, match="storage_rank: expected a number of directions, 1 or more, or a share"):
        bank("low_rank", rank=rank)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["host", "mmap", "low_rank"])
def test_on_a_cuda_device(kind: str) -> None:
    found, expected = (results(bank(each).to("cuda")) for each in (kind, "device"))
    same(found, expected, 0.0 if kind != "low_rank" else 1e-4)


def test_the_dense_storage_can_be_made_elsewhere() -> None:
    storage: Storage = bank("device", device=torch.device("meta")).storage
    assert storage.device.type == "meta"
