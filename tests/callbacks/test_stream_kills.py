"""A stream that is killed goes on to the same bits; tests/benchmarks/kill_streams.py has the full campaign."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from kills import side_by_side
from streams import Case, Moment, StreamKill, check, final, killed, uninterrupted

from lit_merge.callbacks import sequential_merging

KILLS: list[tuple[Case, tuple[tuple[Moment, int], ...]]] = [
    (Case(), (("open", 2),)),  # between stages
    (Case(), (("in_file", 2), ("after_file", 1))),
    (Case(), (("in_save", 2),)),
    (Case(), (("after_save", 3),)),  # only pictures, export and test are left
    (Case("ada++", epochs=1), (("start", 5),)),
    (Case("doge", epochs=1), (("end", 2), ("epoch_end", 1))),
]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential_merging, "draw", lambda *_: None)
    monkeypatch.setattr("lit_merge.callbacks.coefficient_monitor.draw_heat_map", lambda *_: None)


def test_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def job(number: int, case: Case, kills: tuple[tuple[Moment, int], ...]) -> None:
        (root := tmp_path / str(number)).mkdir()
        for when, left in kills:
            assert killed(case, root, partial(StreamKill, when, left)), (case, when, left)  # type: ignore[arg-type]
        check(case, root)
        assert not list(root.glob(".stage*"))

    for case, _ in KILLS:
        uninterrupted(case)
    side_by_side([partial(job, number, case, kills) for number, (case, kills) in enumerate(KILLS)])


def test_two_ranks_come_to_the_same_bits_as_one(tmp_path: Path) -> None:
    Case(ranks=2).run(tmp_path)
    assert final(tmp_path) == uninterrupted(Case())
