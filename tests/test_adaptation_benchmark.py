"""The rows of the adaptation benchmark compute the same; the benchmark itself is run by hand."""

from __future__ import annotations

import pytest
from benchmarks import _adaptation_rows
from benchmarks._adaptation_rows import Plan, run
from torch import Tensor

from lit_merge.objectives import Entropy, TaskOutput


class Turns:
    def __init__(self) -> None:
        self.times: list[float] = []

    def wait(self) -> None:
        pass

    def answer(self, seconds: float, cpu: float) -> None:
        self.times.append(seconds)


def test_ours_and_the_naive_way_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    class Noted(Entropy):
        def __call__(self, output: TaskOutput) -> Tensor:
            loss = super().__call__(output)
            seen.append(float(loss.detach()))
            return loss

    monkeypatch.setitem(_adaptation_rows.OBJECTIVES, "entropy", Noted)
    losses, found = {}, {}
    for row in _adaptation_rows.ROWS:
        turns = Turns()
        found[row] = run(Plan(row, "tiny", tasks=2, images=2, steps=3), turns)
        assert len(turns.times) == 3
        losses[row] = seen.copy()
        seen.clear()
    assert len(losses["ours"]) == 6  # two tasks, three steps
    assert losses["ours"] == pytest.approx(losses["naive"], rel=1e-5)
    assert len(set(losses["floor"])) == 2  # its weights stay as they are
    assert losses["floor"][:2] != pytest.approx(losses["ours"][:2], rel=1e-5)
    assert found["ours"]["bandwidth"]["copy"] > 0
