"""What the table of the catalogue is made of; the benchmark itself is run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from benchmarks._catalogue import EXCLUDED, entries, label_places, mean_rows, pareto_front, table
from toys import ToySuite

from lit_merge import SimpleAverage, configs, methods


def result(name: str, seed: int, *accuracies: float, **more: Any) -> dict[str, Any]:
    tasks = dict(zip("abc", accuracies, strict=False))
    facts = {"sees": "weights", "networks": 1, "seconds": 2.0 + seed, "peak_bytes": seed * 2**20, "stored_bytes": 10**6}
    return {"name": name, "seed": seed, "tasks": tasks, **facts, **more}


def test_every_method_has_a_row_or_a_reason() -> None:
    found = set()
    for entry in entries():
        path = configs.find(entry.config)
        assert path is not None, entry
        found.add(yaml.safe_load(path.read_text())["model"]["class_path"].rpartition(".")[2])
    assert set(methods.__all__) - found == {"AWM", "DAM", "SAU"}
    assert {"awm", "dam*", "sau"} <= set(EXCLUDED)
    files = [entry.file for entry in entries()]
    assert len(set(files)) == len(files)


def test_means_over_seeds_normalised_by_the_experts_of_the_seed() -> None:
    found = [result("experts", 0, 0.8, 1.0), result("experts", 1, 0.5, 1.0)]
    found += [result("merge", 0, 0.4, 0.9, chosen=0.2), result("merge", 1, 0.4, 0.8, chosen=0.3)]
    top, row = mean_rows(found)
    assert top["name"] == "experts"
    assert top["normalized"] == (100.0, 0.0)
    assert row["name"] == "merge: 0.2 or 0.3"
    assert row["accuracy"] == pytest.approx((62.5, 3.5355), abs=1e-3)  # 65 and 60
    assert row["normalized"] == pytest.approx((75.0, 7.0711), abs=1e-3)  # (50 + 90) / 2 and (80 + 80) / 2
    assert (row["seconds"], row["peak_bytes"]) == (2.0, 0)


def test_the_table_shows_what_failed_and_keeps_other_tasks_apart() -> None:
    text = table([
        result("experts", 0, 0.9, 0.9), result("merge", 0, 0.45, 0.9, networks=2),
        {"name": "bad", "seed": 0, "failed": "no rank"},
        result("pair", 0, 0.9), result("experts", 0, 0.9), result("experts", 1, 0.9),
    ])  # fmt: skip
    first, second, last = text.split("\n\n")
    assert "| merge (2 networks) | weights | 67.5 ± 0.0 | 75.0 ± 0.0 | 2 | 0 | 1.00 |" in first
    assert "| pair (seed 0 only) |" in second
    assert "merge" not in second
    assert last == "**bad, seed 0, failed:** no rank"


def test_the_front_is_what_no_other_row_beats() -> None:
    drawn = torch.randint(0, 12, (60, 2), generator=torch.Generator().manual_seed(0)).tolist()
    points = {str(number): (float(cost), float(gain)) for number, (cost, gain) in enumerate(drawn)}
    beaten = {
        a for a, (x, y) in points.items() if any((u, v) != (x, y) and u <= x and v >= y for u, v in points.values())
    }
    front = pareto_front(points)
    assert set(front) == set(points) - beaten
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


def test_labels_cover_no_point_of_the_front_and_no_other_label() -> None:
    drawn = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).sort(1).values
    points = [(float(x), float(y)) for x, y in drawn.T]
    places = label_places(points, [0.15] * 12, 0.04)
    for number, (left, height) in enumerate(places):
        assert left >= 0
        assert all(height >= y + 0.04 - 1e-9 for x, y in points if left <= x <= left + 0.15)
        near = [other for other in places[:number] if abs(other[0] - left) < 0.15]
        assert all(abs(other[1] - height) >= 0.04 - 1e-9 for other in near)


def test_one_network_is_stored_once_with_tied_names_once() -> None:
    module = SimpleAverage(suite=ToySuite("tied"))
    module.configure_model()
    network = module.suite.network()
    own = sum(value.nbytes for value in [*network.parameters(), *network.buffers()])
    assert module.stored_bytes == own
