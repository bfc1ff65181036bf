"""Batches made and copied ahead are the same batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lit_merge.data import UnlabelledBatch
from lit_merge.data.prefetch import copied_ahead, made_ahead
from lit_merge.errors import MergeError


def alive() -> bool:
    return any(thread.name == "batches" for thread in threading.enumerate())


def test_no_more_are_made_than_were_asked_for() -> None:
    made: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = made_ahead(batches(), 3)
    assert [next(ahead) for _ in range(2)] == [0, 1]
    deadline = time.monotonic() + 5
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 6  # two used, three that wait, one in the making
    assert alive()
    del ahead  # given up
    assert not alive()


def test_an_error_comes_in_its_place() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise MergeError("image 7 cannot be decoded")

    ahead = made_ahead(batches(), 4)
    assert next(ahead) == 1
    with pytest.raises(MergeError, match="image 7"):
        next(ahead)
    assert not alive()


class Stream:
    """Stands for a CUDA stream; writes down what is asked of it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_event(self) -> str:
        self.log.append(f"copied {self.log.count('asked') - 1}")
        return self.log[-1]

    def wait_event(self, event: str) -> None:
        self.log.append(f"wait for {event}")


def test_a_batch_is_copied_ahead_and_waited_for_before_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name, value in (("Stream", lambda _: Stream(log)), ("current_stream", lambda _: Stream(log))):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: log.append("recorded"))

    def batches() -> Iterator[dict[str, UnlabelledBatch]]:
        for number in range(3):
            log.append("asked")
            index = torch.tensor([number, 7])
            yield {"x": UnlabelledBatch(index.float(), index, 0.5, (number, 7))}

    for number, batch in enumerate(copied_ahead(batches(), torch.device("meta"))):
        part: Any = batch["x"]
        assert type(part) is UnlabelledBatch
        assert (part.images.device.type, part.index.device.type) == ("meta", "meta")
        assert (part.share, list(part.positions)) == (0.5, [number, 7])
        assert log[-3:] == [f"wait for copied {number}", "recorded", "recorded"]
        assert f"copied {min(number + 1, 2)}" in log
    assert number == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_whole() -> None:
    host = [{"x": UnlabelledBatch(torch.randn(64, 3, 32, 32).pin_memory(), torch.arange(64))} for _ in range(8)]
    for wanted, batch in zip(host, copied_ahead(iter(host), torch.device("cuda", 0)), strict=True):
        total = sum(batch["x"].images.double().sum() for _ in range(20)) / 20
        assert float(total) == pytest.approx(float(wanted["x"].images.double().sum()))
