"""Every learnable method does on several ranks what it does on one: its steps, what it learns, and its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import CASES, LEARNABLE
from rank_group import gathered

from lit_merge.storage import sharded

FEW = ("adamerging-plus-plus", "dam")  # of 8 images in a step the last of a stream are 5 and 6
ALIKE = {  # to a bank that ranks share: it is asked for the same as in another case
    *("adamerging-tensor", "adamerging-block", "adamerging-depth", "adamerging-by-name"),
    *("concrete-released", "concrete-perturbed", "dam-released"),
}


def test_the_table_has_every_learnable_method() -> None:
    assert {case.method for case in CASES.values()} == LEARNABLE
    assert {CASES[name].method for name in shared(tuple(CASES))} == LEARNABLE


def check(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    def close(one: Any, other: Any, what: str) -> None:
        size = max(1e-30, *(float(value.abs().max()) for value in (one, other) if value.numel()), 0.0)
        off = float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
        assert off <= CASES[name].tolerance * size, f"{name}: {what}: {off} of {size}"

    for rank in ranks:
        assert len(rank["steps"]) == len(alone["steps"]) > 0
        for number, (got, wanted) in enumerate(zip(rank["steps"], alone["steps"], strict=True)):
            for which, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
                close(mine[0], theirs[0], f"gradient {which} of step {number}")
                close(mine[1], theirs[1], f"parameter {which} after step {number}")
        assert rank["learned"].keys() == alone["learned"].keys()
        for key, value in alone["learned"].items():
            close(rank["learned"][key], value, key)
            assert torch.equal(rank["learned"][key], ranks[0]["learned"][key]), key  # bit for bit among themselves
        got, wanted = rank["report"], alone["report"]
        assert got["tasks"] == wanted["tasks"]
        assert got["mean"] == pytest.approx(wanted["mean"], abs=1e-12)
        got, wanted = plain(got["extra"]), plain(wanted["extra"])
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            same = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)
            assert got[key] == same, f"{name}: {key}"
    for whole, *parts in zip(alone["images"], *(rank["images"] for rank in ranks), strict=True):
        for task, images in whole.items():
            assert sorted(place for part in parts for place in part.get(task, [])) == sorted(images)
    moved = [float(gradient.abs().max()) for step in alone["steps"] for gradient, _ in step if gradient.numel()]
    assert max(moved) > 1e-6  # there was something to compare


def plain(extra: Any, prefix: str = "") -> dict[str, Any]:
    """All leaves of nested plain data but times and files, whose bits may differ."""
    if not isinstance(extra, dict | list):
        return {prefix: extra}
    items = extra.items() if isinstance(extra, dict) else enumerate(extra)
    kept = [(key, value) for key, value in items if "seconds" not in str(key) and key != "file"]
    return {name: value for key, part in kept for name, value in plain(part, f"{prefix}/{key}").items()}


def run(ranks: int, names: tuple[str, ...], folder: Path, **more: Any) -> list[dict[str, dict[str, Any]]]:
    """Run several cases on one group of ranks, which is made only once."""

    def work() -> dict[str, dict[str, Any]]:
        return {name: CASES[name].run(folder / name, ranks, **more) for name in names}

    return [work()] if ranks == 1 else gathered(ranks, folder, work)


def shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those whose experts are there at once: a stream has a bank of two rows, which is on the device."""
    return tuple(name for name in names if not CASES[name].stream and name not in ALIKE)


@pytest.fixture(autouse=True)
def small_tensors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "WHOLE", 0)  # all tensors of toys are small


@pytest.mark.parametrize("part", range(4))
def test_two_ranks_are_one(tmp_path: Path, part: int) -> None:
    names = tuple(CASES)[part::4]
    (alone,), ranks = run(1, names, tmp_path / "1"), run(2, names, tmp_path / "2")
    for name in names:
        check(name, alone[name], [rank[name] for rank in ranks])
    ranks = run(2, shared(names), tmp_path / "shared", storage="sharded")
    for name in shared(names):
        check(name, alone[name], [rank[name] for rank in ranks])


def test_four_ranks_are_one(tmp_path: Path) -> None:
    (alone,), ranks = run(1, FEW, tmp_path / "1"), run(4, FEW, tmp_path / "4")
    for name in FEW:
        check(name, alone[name], [rank[name] for rank in ranks])
    by_block = {"storage": "sharded", "merge_by": "block"}  # the most that goes on between ranks
    ranks = run(4, FEW[:1], tmp_path / "shared", **by_block)
    for name in FEW[:1]:
        check(name, alone[name], [rank[name] for rank in ranks])


@pytest.mark.skipif("LIT_MERGE_ALL_RANKS" not in os.environ, reason="two minutes; set LIT_MERGE_ALL_RANKS to run it")
@pytest.mark.timeout(900)
def test_four_ranks_are_one_for_every_method(tmp_path: Path) -> None:
    names = tuple(CASES)
    (alone,) = run(1, names, tmp_path / "1")
    at_once = tuple(name for name, case in CASES.items() if not case.stream)
    for folder, chosen, more in (("4", names, {}), ("shared", at_once, {"storage": "sharded"})):
        ranks = run(4, chosen, tmp_path / folder, **more)
        for name in chosen:
            check(name, alone[name], [rank[name] for rank in ranks])
