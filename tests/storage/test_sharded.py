"""A bank that ranks hold together is the dense one, in every value and gradient, at 1/W of its memory."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import gathered
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.masked import Mask
from lit_merge.storage import DenseStorage, RankGroup, StorageFactory, sharded, sharded_over
from lit_merge.task_vectors import TaskVectors

TASKS = 3
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (5, 7),
    "scalar": (),
    "b": (3,),
    "k": (2, 3, 2, 2),
    "even": (8, 4),
    "e": (0,),
}


def values(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def bank_of(
    storage: StorageFactory, dtype: torch.dtype = torch.float64, kept: torch.dtype | None = None
) -> TaskVectors:
    experts = {f"t{t}": values(t + 1, dtype) for t in range(TASKS)}
    return TaskVectors.from_state_dicts(values(0, dtype), experts, dtype=kept, storage=storage)


def rescaled(column: int, first: Tensor, second: Tensor) -> Tensor:
    """A mask that wants to see whole tensors."""
    return first.sigmoid() / first.sigmoid().mean().clamp(min=0.1) * (second + column)


def gradients(rank: int) -> dict[str, Tensor]:
    """Each rank has images of its own, and so another gradient by the same merged weights."""
    return values(100 + rank, torch.float64)


def used(bank: TaskVectors, rank: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Everything that a bank can be asked for; gradients are of the loss of one rank."""
    point = torch.linspace(-1, 1, TASKS * len(bank.names), dtype=bank.compute_dtype).view(TASKS, -1)
    given = {name: value.to(dtype) for name, value in gradients(rank).items()}
    given.pop("b")  # a tensor that the loss does not depend on
    logits = tuple(torch.linspace(-2, 2 + k, sum(bank.sizes), dtype=bank.compute_dtype) for k in range(2))
    found: dict[str, Any] = {}
    for kind, mask in (("plain", None), ("masked", Mask(rescaled, tuple(x.clone().requires_grad_() for x in logits)))):
        coefficients = point.clone().requires_grad_()
        merged = bank.contract(coefficients, mask)
        sum((merged[name] * value).sum() for name, value in given.items()).backward()  # type: ignore[union-attr]
        found[f"{kind} weights"] = {name: value.detach() for name, value in merged.items()}
        found[f"{kind} coefficients"] = coefficients.grad
        found[f"{kind} logits"] = [] if mask is None else [x.grad for x in mask.logits]
    first, *rest = bank.pull_back(given, point, Mask(rescaled, logits))
    found["pulled coefficients"], found["pulled logits"] = first, rest
    found["base"], found["expert"], found["deltas"] = dict(bank.base), bank.expert("t1"), dict(bank.deltas)
    found["twice"] = dict(bank.map(lambda deltas: {name: 2 * value for name, value in deltas.items()}).deltas)
    return found


def held(bank: TaskVectors) -> int:
    return sum(value.nbytes for value in bank.storage.buffers())


def alike(found: object, wanted: object, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def averaged(each: list[dict[str, Any]], key: str) -> Tensor:
    return torch.stack([one[key] for one in each]).mean(0)


def work(whole: int, kept: torch.dtype | None) -> dict[str, Any]:
    """One rank: join the group, and use a bank that is shared."""
    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    sharded.WHOLE = whole
    bank = bank_of(sharded_over(RankGroup()), kept=kept)
    single = bank_of(sharded_over(RankGroup()), torch.float32, kept)
    copied = deepcopy(bank).contract(0.3)
    with pytest.raises(MergeError, match="cannot be pickled; keep a checkpoint"):
        pickle.dumps(bank)
    rank = dist.get_rank()
    answers = [bank.storage.anyone(rank == asked) for asked in (0, dist.get_world_size() - 1, -1)]
    return {"held": held(bank), "copied": copied, "answers": answers, "single": used(single, rank, torch.float32),
            **used(bank, rank)}  # fmt: skip


@pytest.mark.parametrize(
    ("world", "whole", "kept"), [(2, 0, None), (4, 0, torch.bfloat16), (4, 8, None)], ids=["2", "4-bf16", "4-small"]
)
def test_ranks_together_have_the_dense_bank(tmp_path: Path, world: int, whole: int, kept: torch.dtype | None) -> None:
    each = gathered(world, tmp_path / "ranks", lambda: work(whole, kept))
    dense, single = bank_of(DenseStorage, kept=kept), bank_of(DenseStorage, torch.float32, kept)
    wanted = [used(dense, rank) for rank in range(world)]
    for rank, found in enumerate(each):
        alike(found["copied"], dense.contract(0.3), 1e-14)
        assert found["answers"] == [True, True, False]
        for key, value in wanted[rank].items():
            alike(found[key], averaged(wanted, key) if key.endswith("coefficients") else value, 1e-12)
        for key, value in used(single, rank, torch.float32).items():
            if not key.endswith("coefficients"):
                alike(found["single"][key], value, 1e-6)
        alike(found["single"]["plain coefficients"], each[0]["single"]["plain coefficients"], 0)
    alike(
        each[0]["single"]["plain coefficients"].double(),
        averaged(wanted, "plain coefficients"),
        2e-6 if kept is None else 0.1,
    )
    small = sum(size for size in dense.sizes if size <= whole)
    entries = sum(size if size <= whole else -(-size // world) for size in dense.sizes)
    row = 2 if kept else 8
    assert [found["held"] for found in each] == [entries * (8 + TASKS * row)] * world  # (T + 1)/W, up to padding
    assert entries <= (len(dense._weights) - small) / world + small + len(SHAPES)


def test_a_rank_keeps_no_more_than_its_share_while_it_reads() -> None:
    class Alone(RankGroup):  # the second of three; only reading is tried
        def __init__(self) -> None:
            self.size, self.rank = 3, 1

    sizes = {"a": 3 * 2**15, "b": 3 * 2**14 + 1}
    state: Mapping[str, Tensor] = {name: torch.arange(float(size)) for name, size in sizes.items()}
    experts = {t: {n: 2 * v for n, v in state.items()} for t in "xy"}
    bank = TaskVectors.from_state_dicts(state, experts, storage=sharded_over(Alone()))
    assert held(bank) == 3 * 4 * (2**15 + 2**14 + 1)
    assert torch.equal(bank.storage.get_buffer("_deltas")[0, : 2**15], torch.arange(2.0**15, 2.0**16))
    assert bank.storage.get_buffer("_deltas")[1, -1] == 2 * 2**14 + 1  # entries 16385 to 32769 of 49153
    assert bank.digests == TaskVectors.from_state_dicts(state, experts).digests


def test_nccl_is_given_tensors_on_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a run, when Lightning has moved the module to the CPU."""

    class Elsewhere(RankGroup):
        def __init__(self) -> None:
            self.size, self.rank, self._handle = 2, 0, None

        def _there(self, value: Tensor) -> Tensor:
            return value.to("meta")

    class Value:
        device = torch.device("cpu")

        def to(self, device: torch.device) -> torch.device:
            return device

    sent: list[str] = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *tensors, group: sent.extend(x.device.type for x in tensors))
    group, value = Elsewhere(), torch.ones(4)
    uses: list[Callable[[], Tensor]] = [
        lambda: group.gather(value, 8), lambda: group.scatter_mean(value), lambda: group.total(value),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(NotImplementedError, match="out of meta"):  # the way back
            use()
    assert sent == ["meta"] * 5
    there: Any = RankGroup._there
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda handle: "gloo")
    assert there(group, value) is value
    monkeypatch.setattr(dist, "get_backend", lambda handle: "nccl")
    assert there(group, Value()) == torch.device("cuda", 3)
