from __future__ import annotations

import pytest
import torch
from toys import Kind, ToySuite

from lit_merge import MergeError, TaskArithmetic
from lit_merge.checkpoints.arithmetic import ArithmeticState


@pytest.mark.parametrize("kind", ["cnn", "tied"])
def test_is_the_merge_of_the_method(kind: Kind) -> None:
    suite = ToySuite(kind)
    method = TaskArithmetic(suite=suite, scale=0.4)
    method.configure_model()
    experts = {task: suite.expert(task) for task in suite.tasks}
    statistics = [name for name in suite.base() if "running" in name]
    state = ArithmeticState(suite.base(), experts, 0.4, statistics)
    expected = method.merged_state()
    assert list(state) == list(suite.base())
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
        assert state[name].dtype == value.dtype


def test_names_the_expert_that_does_not_fit() -> None:
    base = {"w": torch.zeros(2, 1)}
    with pytest.raises(MergeError, match=r"expert 'b': w: expected shape \(2, 1\), found \(1, 2\)"):
        ArithmeticState(base, {"a": base, "b": {"w": torch.zeros(1, 2)}}, 0.3)
    state = ArithmeticState(base, {"a": base, "b": {"w": torch.full((2, 1), torch.nan)}}, 0.3)
    with pytest.raises(MergeError, match="expert 'b': w: 2 of 2 values are NaN"):
        state["w"]
