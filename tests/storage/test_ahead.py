"""Rooms that are filled ahead: the streams are simulated, and do their work in every order that the events allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from lit_merge.storage.ahead import Signals, rotate
from lit_merge.storage.page_lock import PageLock

ITEMS = list(range(9))
CUDA = torch.device("cuda", 1)


class Streams(Signals):
    """Two queues with the semantics of CUDA events: a wait is for what was recorded last when it was queued."""

    def __init__(self, seed: int) -> None:
        self.queues: dict[str, list[tuple[str, object]]] = {"side": [], "main": []}
        self.stream = "main"
        self._recorded: dict[object, int] = {}
        self._happened: set[int] = set()
        self._numbers = count(1)
        self._random = random.Random(seed)
        self._favourite = (None, "side", "main")[seed % 3]

    def queue(self, work: Callable[[], None]) -> None:
        self.queues[self.stream].append(("work", work))

    def _record(self, stream: str, event: object) -> None:
        number = self._recorded[event] = next(self._numbers)
        self.queues[stream].append(("record", number))

    def _wait(self, stream: str, event: object) -> None:
        if event in self._recorded:
            self.queues[stream].append(("wait", self._recorded[event]))

    @contextmanager
    def filling(self, room: int) -> Iterator[None]:
        self._wait("side", ("used", room))
        self.stream = "side"
        yield
        self.stream = "main"
        self._record("side", ("filled", room))

    def await_filled(self, room: int) -> None:
        self._wait("main", ("filled", room))

    def used(self, room: int) -> None:
        self._record("main", ("used", room))

    def settle(self, room: int) -> None:
        while self._recorded.get(("filled", room), 0) not in {0, *self._happened}:
            self.advance()

    def advance(self) -> bool:
        """Do one thing that can be done; one stream is faster, or neither."""
        able = [
            name
            for name, queue in self.queues.items()
            if queue and not (queue[0][0] == "wait" and queue[0][1] not in self._happened)
        ]
        if not able:
            assert not any(self.queues.values()), "the streams wait for each other"
            return False
        kind, what = self.queues[self._favourite if self._favourite in able else self._random.choice(able)].pop(0)
        if kind == "work":
            what()  # type: ignore[operator]
        elif kind == "record":
            self._happened.add(what)  # type: ignore[arg-type]
        return True


class Heedless(Streams):
    """Uses a room without waiting for it."""

    def await_filled(self, room: int) -> None:
        pass


class Hasty(Streams):
    """Fills a room that is in use."""

    def used(self, room: int) -> None:
        pass


def wrong(streams: Streams, staged: bool, eager: bool) -> int:
    """How often a room had something else in it than it should have."""
    rooms: list[int | None] = [None, None]
    staging: list[int | None] = [None, None]
    seen: list[tuple[int, int | None]] = []

    def fill(room: int, item: int) -> int:
        if staged:
            streams.settle(room)
            staging[room] = item  # by the processor, at once
        streams.queue(lambda: rooms.__setitem__(room, staging[room] if staged else item))
        return room

    for item, room in rotate(ITEMS, fill, streams):
        for _ in range(3):
            streams.queue(lambda item=item, room=room: seen.append((item, rooms[room])))  # type: ignore[misc]
        while eager and streams.advance():
            pass
    while streams.advance():
        pass
    assert len(seen) == 3 * len(ITEMS)
    return sum(found != item for item, found in seen)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_every_use_sees_what_the_room_was_filled_with(staged: bool, eager: bool) -> None:
    assert not any(wrong(Streams(seed), staged, eager) for seed in range(30))


@pytest.mark.parametrize("asked", [0, 1, 2, 5, len(ITEMS)])
def test_rooms_are_free_for_others_when_it_ends(asked: int) -> None:
    """Also where not all was asked for: the next owner of the memory has it from the stream that used the rooms."""
    for seed in range(30):
        streams, rooms = Streams(seed), [0, 0]
        walk = rotate(ITEMS, lambda room, item: streams.queue(lambda: rooms.__setitem__(room, item)), streams)  # noqa: B023
        for _ in range(asked):
            next(walk)
        walk.close()  # type: ignore[attr-defined]
        streams.queue(lambda: rooms.__setitem__(slice(None), [-1, -1]))  # noqa: B023
        while streams.advance():
            pass
        assert rooms == [-1, -1]


@pytest.mark.parametrize("careless", [Heedless, Hasty])
def test_the_simulation_notices_a_wait_that_is_missing(careless: type[Streams]) -> None:
    assert any(wrong(careless(seed), staged=False, eager=False) for seed in range(30))


def test_one_room_is_filled_ahead() -> None:
    filled: list[int] = []
    for item, _ in rotate(ITEMS, lambda room, item: filled.append(item), Streams(0)):
        assert filled == ITEMS[: item + 2]
    assert list(rotate([], lambda room, item: None, Streams(0))) == []


class Driver:
    """What of CUDA's runtime locks pages."""

    def __init__(self, status: int) -> None:
        self.status, self.locked, self.waited = status, dict[int, int](), list[torch.device]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        if not self.status:
            self.locked[pointer] = size
        return self.status

    def cudaHostUnregister(self, pointer: int) -> None:
        assert self.waited == [CUDA], "copies that are queued may still read it"
        del self.locked[pointer]


def test_pages_are_locked_as_long_as_the_lock_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(3, 8)[:, :5]  # with all that lies between its rows
    driver = Driver(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", driver.waited.append)
    lock = PageLock(rows, CUDA)
    assert lock.held
    assert driver.locked == {rows.data_ptr(): 96}
    del lock
    assert not driver.locked
    assert not PageLock(torch.zeros(0), CUDA).held


def test_a_lock_that_the_system_refuses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(1))
    assert not PageLock(torch.zeros(4), CUDA).held
