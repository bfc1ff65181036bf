"""No step of an adaptation waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
from toys import ToySuite
from waits import Waits, waits_of

from lit_merge import AdaMerging, MergeModule, TaskDataModule, methods
from lit_merge.callbacks import CoefficientMonitor, CollapseMonitor, ExportMerge, Report, ResumePoint
from lit_merge.data_free_module import DataFreeModule
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, PerturbationConsistency, WeightedSum

EVERYTHING = WeightedSum(
    [Entropy(), Diversity(), ExpertAlignment("kl"), ExpertAlignment("l1"), PerturbationConsistency()]
)
LEARNABLE = [
    name
    for name in methods.__all__
    if isinstance(found := getattr(methods, name), type)
    and issubclass(found, MergeModule)
    and found.make_parameters is not MergeModule.make_parameters
]


def watched(
    monkeypatch: pytest.MonkeyPatch, method: Any = AdaMerging, protocol: Any = "transductive", **kwargs: Any
) -> Waits:
    suite = ToySuite("vit" if issubclass(method, DataFreeModule) else "mlp", tasks=2)  # these learn blocks
    data = TaskDataModule(suite, batch_size=36, steps_per_epoch=5, protocol=protocol)  # all images in each step
    callbacks = [Report(), CoefficientMonitor(), CollapseMonitor(), ResumePoint(), ExportMerge()]
    return waits_of(
        method(suite=suite, **kwargs), data, monkeypatch, *callbacks, steps=1 if protocol == "online" else 2
    )


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_step_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = watched(monkeypatch, getattr(methods, name))
    assert waits.ours == []


@pytest.mark.parametrize(
    "options",
    [
        {"objective": EVERYTHING},
        {"protocol": "online"},
        {"granularity": "block", "bounds": (0.0, 1.0), "max_images": 40},
        {"method": methods.DAM, "preset": "released", "mask_steps": 1},
        {"method": methods.ConcreteMerging, "preset": "released", "mask_steps": 1},
        {"method": methods.AWM, "unit": "neuron", "ascent_direction": "adam"},
    ],
    ids=["every objective", "online", "chunks", "dam released", "concrete released", "awm neurons"],
)
def test_a_step_with(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, **options).ours == []
