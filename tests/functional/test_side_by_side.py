from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lit_merge.functional.side_by_side import side_by_side
from lit_merge.functional.ties import ties_merge
from lit_merge.functional.tsv import tsv_merge


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_threads() -> None:
    draw = torch.Generator().manual_seed(0)
    deltas = {"w": torch.randn(4, 30, 20, generator=draw), "b": torch.randn(4, 30, generator=draw)}
    rules: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = [tsv_merge, ties_merge]
    many = [rule(deltas) for rule in rules]
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    for found, rule in zip(many, rules, strict=True):
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in rule(deltas).items())


@pytest.mark.usefixtures("threads")
def test_a_thread_computes_as_its_caller_would() -> None:
    def look(item: int) -> tuple[int, bool, bool, bool, bool]:
        return (item, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
                torch.get_num_threads() == 1)  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert side_by_side(look, range(4)) == [(item, False, False, False, True) for item in range(4)]
    with torch.inference_mode():
        assert all(entry[2] for entry in side_by_side(look, range(4)))
    assert all(entry[1] for entry in side_by_side(look, range(4)))
    alone = side_by_side(lambda _: threading.get_ident(), range(2), torch.device("meta"))
    assert set(alone) == {threading.get_ident()}


@pytest.mark.usefixtures("threads")
def test_what_goes_wrong_is_said_and_the_threads_come_back() -> None:
    def fail(item: int) -> Tensor:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(fail, [1, 2])
    assert torch.get_num_threads() == 3
