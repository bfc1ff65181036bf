from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from testers import MergeTester
from toys import ToySuite

from lit_merge import MergeError, Ties
from lit_merge.functional import disjoint_mean_merge, ties, ties_merge


def numpy_ties(flat: np.ndarray, density: float, reduce: str) -> np.ndarray:
    """The paper's algorithm on flat task vectors (T, d), entry by entry."""
    tasks, size = flat.shape
    trimmed = np.zeros_like(flat)
    for t in range(tasks):
        for i in np.argsort(-np.abs(flat[t]))[: round(density * size)]:
            trimmed[t, i] = flat[t, i]
    merged = np.zeros(size)
    for i in range(size):
        sign = np.sign(trimmed[:, i].sum())
        agreeing = [v for v in trimmed[:, i] if v != 0 and np.sign(v) == sign]
        if agreeing:
            merged[i] = sum(agreeing) / (len(agreeing) if reduce == "mean" else 1)
    return merged


class TestTies(MergeTester):
    make = Ties
    unit: ClassVar[dict[str, Any] | None] = {"density": 1.0}
    zero: ClassVar[dict[str, Any] | None] = {"scale": 0.0}

    @pytest.mark.parametrize(("reduce", "scale"), [("mean", 1.0), ("sum", 0.3)])
    def test_equals_the_algorithm_of_the_paper(self, reduce: str, scale: float) -> None:
        suite = ToySuite("mlp", dtype="float64")
        base = suite.base()
        flat = np.stack(
            [torch.cat([(suite.expert(t)[n] - base[n]).flatten() for n in base]).numpy() for t in suite.tasks]
        )
        expected = torch.cat([v.flatten() for v in base.values()]) + scale * torch.from_numpy(
            numpy_ties(flat, 0.2, reduce)
        )
        merged = self.state(suite, reduce=reduce, scale=scale)
        torch.testing.assert_close(torch.cat([merged[n].flatten() for n in base]), expected)

    def test_names_an_unknown_reduction(self) -> None:
        with pytest.raises(MergeError, match=r"Ties\.reduce: expected mean or sum, found 'max'"):
            Ties(suite=ToySuite(), reduce="max")  # type: ignore[arg-type]


def test_tensors_are_trimmed_for_themselves_if_asked() -> None:
    deltas = {"large": torch.tensor([[8.0, -4.0], [-8.0, 6.0]]), "small": torch.tensor([[0.1, 0.4], [0.2, -0.5]])}
    assert not ties(deltas, 0.5)["small"].any()
    found = ties_merge(deltas, 0.5, per="tensor")
    # large: 8 and -8 cancel, and no other entry votes: the positive one stays
    torch.testing.assert_close(found, {"large": torch.tensor([8.0, 0.0]), "small": torch.tensor([0.0, -0.5])})
    split = ties(deltas, 0.5, per="tensor")
    torch.testing.assert_close(found, disjoint_mean_merge(split))
    with pytest.raises(MergeError, match="per: expected network or tensor, found 'row'"):
        ties_merge(deltas, per="row")  # type: ignore[arg-type]
