"""The bank of a stream: a file of its weights brings back every bit, and its size is that of two experts."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from lit_merge.errors import MergeError
from lit_merge.stage_bank import Differences, StageBank
from lit_merge.stage_files import find_stage, write_stage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def values() -> torch.Tensor:  # of all sizes, so that sums cancel
        return torch.randn(4000, generator=generator) * 10 ** torch.randint(-9, 4, (4000,), generator=generator)

    base = {"w": values().to(dtype), "scalar": torch.tensor(1.0, dtype=dtype), "mean": values()[:5].to(dtype)}
    merged = {"w": (-base["w"].float() + values() * 1e-6).to(torch.promote_types(dtype, torch.float32))}
    merged["scalar"] = torch.tensor(-1 + 1e-9, dtype=merged["w"].dtype)
    bank, other = (StageBank.of_base(base, buffers=["mean"]) for _ in range(2))
    bank.receive("a", {name: value + 1 for name, value in base.items()}, 1)
    bank.settle(merged)
    file = write_stage(tmp_path, 7, bank.settled_state(wide=True))
    other.restore("file", load_file(find_stage(file, [tmp_path])))
    for name, value in bank.merged.items():
        assert torch.equal(other.merged[name], value)
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-5)
    first, second = bank.settled_state(), other.settled_state()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == dtype for name in base)


def test_statistics_are_the_mean_of_all_so_far() -> None:
    base = {"w": torch.zeros(1), "mean": torch.zeros(1)}
    bank = StageBank.of_base(base, buffers=["mean"])
    for number, value in enumerate((3.0, 6.0, 9.0), start=1):
        bank.receive(str(number), {"w": torch.zeros(1), "mean": torch.tensor([value])}, number)
        within = bank.complete(dict(bank.merged))["mean"]
        bank.settle(bank.merged)
        assert bank.settled_state()["mean"] == within
    assert bank.settled_state()["mean"].item() == pytest.approx(6.0)
    assert bank.settled_state("base")["mean"].item() == 0
    assert len(bank.deltas["w"]) == 2


def test_weights_of_another_network_are_refused() -> None:
    bank = StageBank.of_base({"w": torch.zeros(2)})
    with pytest.raises(MergeError, match=r"file: w: expected .*\(2,\).*found .*\(3,\).*another network"):
        bank.restore("file", {"w": torch.zeros(3)})
    with pytest.raises(MergeError, match="1 missing"):
        bank.restore("file", {"v": torch.zeros(2)})


def test_differences_put_the_base_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = StageBank.of_base({"w": torch.ones(2), "v": torch.zeros(1), "steps": torch.tensor(3)})
    assemble = Mock(wraps=bank._assemble)
    monkeypatch.setattr(bank, "_assemble", assemble)
    found = Differences({"w": torch.tensor([1.0, 3.0]), "v": torch.ones(1)}, bank, torch.device("cpu"))
    assert {name: value.tolist() for name, value in found.items()} == {"w": [0.0, 2.0], "v": [1.0]}
    assert assemble.call_count == 1
