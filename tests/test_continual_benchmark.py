"""What the tables of the continual benchmark are made of; the benchmark itself is run by hand."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks._continual import ROWS, against, best_scales, content_of, scored, table

from lit_merge import configs


def result(name: str, seed: int, order: str, matrix: list[list[float | None]], **more: Any) -> dict[str, Any]:
    facts = {"tasks": ["a", "b"], "base": [0.2, 0.2], "experts": [1.0, 0.8], "seconds": [9.0, 2.0 + seed]}
    return {"name": name, "seed": seed, "order": order, "matrix": matrix, **facts, **more}


ONE = result("opcm", 0, "given", [[0.9, 0.3], [0.7, 0.8]], scales={"0.5": 0.6, "1.5": 0.9})
TWO = result("opcm", 1, "given", [[0.9, None], [0.8, 0.8]])  # the next task was not scored
OTHER = result("other", 0, "given", [[0.9, 0.2], [0.9, 0.5]])
TOGETHER = result("together", 0, "all at once", [[0.5, 0.8]], seconds=[], chosen=0.3)
ALL = [ONE, TWO, OTHER, TOGETHER]


def test_means_over_runs_and_what_is_undefined() -> None:
    assert scored(ONE)["backward_transfer"] == pytest.approx(-0.2)
    assert scored(TWO)["forward_transfer"] is None
    assert scored(TOGETHER)["normalized_accuracy"] == pytest.approx(0.75)
    lines = table(ALL).splitlines()
    assert lines[2].startswith("| opcm | 77.5 ± 3.5 | 87.5 ± 3.5 | -15.0 ± 7.1 | 15.0 ± 7.1 | 10.0 ± 0.0 | 2 | 2 |")
    assert lines[4] == "| together: 0.3 | 65.0 ± 0.0 | 75.0 ± 0.0 |  |  |  |  | 1 |"


def test_only_runs_of_the_same_experts_are_compared() -> None:
    lines = against(ALL).splitlines()
    assert lines[2:] == [
        "| other | 5.0 ± 0.0 | 1 of 1 | -20.0 ± 0.0 | 0 of 1 |",
        "| together | 10.0 ± 0.0 | 1 of 1 |  |  |",
    ]
    assert best_scales(ALL).splitlines()[2:] == ["| opcm | 75.0 | 90.0 | 1.5 |"]


def test_every_config_of_a_stream_has_a_row() -> None:
    streams = {name.removesuffix(".yaml") for name in configs.names() if "SequentialMerging" in _text(name)}
    assert streams == {row.config for row in ROWS if not row.at_once}
    content = content_of(ROWS[0], 2, "shuffle 1")
    assert content["suite"]["init_args"] == {"seed": 2}
    assert content["trainer"]["callbacks"][0]["init_args"]["seed"] == 1


def _text(name: str) -> str:
    path = configs.find(name)
    assert path is not None
    return path.read_text(encoding="utf-8")
