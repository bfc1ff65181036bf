from __future__ import annotations

import math

import pytest
import torch

from lit_merge import MergeError
from lit_merge.functional.continual_metrics import continual_metrics

NAN = math.nan
MATRIX = [[0.8, 0.4, 0.1, NAN], [0.6, 0.9, 0.3, NAN], [0.7, 0.5, 0.6, NAN]]  # a fourth task has not come yet


def test_every_stage_by_hand() -> None:
    found = continual_metrics(MATRIX, base=[0.2, 0.3, 0.1, 0.5], experts=[1.0, 0.9, 0.0, 1.0])
    expected = {
        "average_accuracy": [0.8, 0.75, 0.6],
        "normalized_accuracy": [0.8, 0.8, NAN],  # an expert that is never right has no shares
        "backward_transfer": [NAN, -0.2, (-0.1 - 0.4) / 2],
        "forgetting": [NAN, 0.2, (0.1 + 0.4) / 2],
        "forward_transfer": [NAN, 0.1, (0.1 + 0.2) / 2],
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(found, name), torch.tensor(values, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-12
        )
    assert found.final()["normalized_accuracy"] is None


def test_forgetting_is_against_the_best_stage_before_scored_or_not() -> None:
    blind = [[0.5, NAN, NAN], [0.9, 0.6, NAN], [0.7, 0.6, 0.5]]  # no task was scored before it came
    found = continual_metrics(blind, base=[0.1, 0.1, 0.1]).final()
    assert found["forgetting"] == pytest.approx(0.1)
    assert found["backward_transfer"] == pytest.approx(0.1)
    assert found["forward_transfer"] is None


def test_bad_input() -> None:
    for arguments, message in (
        (([[0.1], [0.2]],), r"matrix: expected \(S, T\) with 1 ≤ S ≤ T, found shape \(2, 1\)"),
        (([[0.1, 0.2], [NAN, 0.2]],), "task 1 has no accuracy after stage 2"),
        (([[80.0]],), r"matrix: expected accuracies in \[0, 1\]"),
        (([[0.8]], [0.1, 0.2]), r"base: expected 1 accuracies, one for each task, found shape \(2,\)"),
    ):
        with pytest.raises(MergeError, match=message):
            continual_metrics(*arguments)
