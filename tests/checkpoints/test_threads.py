"""Networks that are read at the same time: the same bits and errors as one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError, TaskVectors
from lit_merge.checkpoints import torch_files
from lit_merge.checkpoints.lazy import Selected
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.threads import in_threads

NAMES = [f"{number}.w" for number in range(12)]
BASE = {name: torch.full((50,), float(number)) for number, name in enumerate(NAMES)}


class Meeting(Mapping[str, Tensor]):
    """A network that is read only while another one is; notes by which threads."""

    def __init__(self, state: Mapping[str, Tensor], meet: Callable[[], object]) -> None:
        self.state, self.meet, self.by, self.met = state, meet, set[int](), False

    def __getitem__(self, name: str) -> Tensor:
        if threading.current_thread() is not threading.main_thread():  # which compares the layouts before
            self.by.add(threading.get_ident())
            if not self.met:
                self.met = True
                self.meet()
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def experts(tasks: str = "abc") -> dict[str, dict[str, Tensor]]:
    return {task: {n: v + number + 1 for n, v in BASE.items()} for number, task in enumerate(tasks)}


@pytest.mark.parametrize("inference", [False, True])
def test_experts_are_read_at_the_same_time_each_by_one_thread(inference: bool) -> None:
    barrier = threading.Barrier(2, timeout=20)  # broken if the second expert waits for the first
    meeting = {task: Meeting(state, barrier.wait) for task, state in experts("ab").items()}
    with torch.inference_mode(inference):
        found = TaskVectors.from_state_dicts(BASE, meeting, threads=2)
        expected = TaskVectors.from_state_dicts(BASE, experts("ab"), threads=1)
    (first,), (second,) = meeting["a"].by, meeting["b"].by
    assert first != second
    assert list(found.digests.items()) == list(expected.digests.items())
    assert all(torch.equal(found.deltas[name], value) for name, value in expected.deltas.items())


def test_the_error_is_that_of_the_first_expert_in_order() -> None:
    failed = threading.Event()
    given: dict[str, Mapping[str, Tensor]] = dict(experts("abcd"))
    given["b"] = Meeting({**given["b"], NAMES[-1]: torch.full((50,), torch.nan)}, lambda: failed.wait(20))

    def fail() -> None:
        failed.set()
        raise MergeError("expert 'c' is broken, too")

    given["c"] = Meeting(given["c"], fail)
    with pytest.raises(MergeError, match=r"expert 'b': 11\.w: 50 of 50 values are NaN"):
        TaskVectors.from_state_dicts(BASE, given, threads=3)


def test_grad_mode_goes_along() -> None:
    with torch.no_grad():
        assert in_threads([torch.is_grad_enabled] * 3, 3) == [False] * 3
    assert in_threads([torch.is_grad_enabled] * 3, 3) == [True] * 3


def test_a_torch_file_is_shared_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is mapped anew after every other tensor, and what may be unpickled is a setting of the whole process."""
    monkeypatch.setattr(torch_files, "_WINDOW", 400)
    torch.save(BASE, tmp_path / "base.pt")
    state = read_state(tmp_path / "base.pt")

    def check() -> bool:
        return all(torch.equal(Selected(state, [n])[n], BASE[n]) for _ in range(4) for n in reversed(NAMES))

    with torch.serialization.safe_globals([complex]):
        allowed = set(torch.serialization.get_safe_globals())
        assert in_threads([check] * 6, 6) == [True] * 6
        assert set(torch.serialization.get_safe_globals()) == allowed
