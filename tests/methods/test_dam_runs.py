"""DAM after a kill; tests/test_ranks.py has it on several ranks."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Case, Kill, When, check, fit, in_child, uninterrupted
from toys import ToySuite

from lit_merge.methods import DAM
from lit_merge.suites import Suite

SGD = partial(torch.optim.SGD, lr=0.05)


@dataclass(frozen=True)
class Defended(Case):
    """A run of both stages, with everything that has a state."""

    preset: str = "paper"

    def model(self, suite: Suite | None = None, **kwargs: Any) -> Any:
        return DAM(
            suite=suite or ToySuite("mlp"), preset=self.preset, mask_steps=8, mask_rate=0.3,  # type: ignore[arg-type]
            optimizer=partial(torch.optim.Adam, lr=0.01), coefficient_stage="safe", **kwargs,
        )  # fmt: skip


@pytest.mark.parametrize(("preset", "when", "number"), [("released", "start", 9), ("paper", "in_save", 5)])
def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, preset: str, when: When, number: int) -> None:
    case = Defended(preset=preset)  # coefficients learned under masks and perturbations: what differs there, differs
    uninterrupted(case)
    assert in_child(lambda: fit(case, tmp_path, Kill(when, number))) == -signal.SIGKILL
    check(case, tmp_path)
