"""lit-merge: merging fine-tuned networks at test time, as a LightningModule.

Names are imported when they are first used, so that ``import lit_merge`` costs nothing.

>>> import lit_merge
>>> "AdaMerging" in dir(lit_merge)
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AWM": "lit_merge.methods",
    "AdaMerging": "lit_merge.methods",
    "BackdoorSuite": "lit_merge.suites",
    "Breadcrumbs": "lit_merge.methods",
    "CalibratedModule": "lit_merge.calibrated_module",
    "ClipSuite": "lit_merge.suites",
    "ConcreteMerging": "lit_merge.methods",
    "Consensus": "lit_merge.methods",
    "DAM": "lit_merge.methods",
    "Dare": "lit_merge.methods",
    "DataFreeModule": "lit_merge.data_free_module",
    "DecompositionCache": "lit_merge.decomposition_cache",
    "Della": "lit_merge.methods",
    "Diversity": "lit_merge.objectives",
    "Doge": "lit_merge.methods",
    "Dop": "lit_merge.methods",
    "Emr": "lit_merge.methods",
    "Entropy": "lit_merge.objectives",
    "ExpertAlignment": "lit_merge.objectives",
    "ExpertModule": "lit_merge.expert",
    "FineTuneDataModule": "lit_merge.data",
    "FisherMerging": "lit_merge.methods",
    "IsoC": "lit_merge.methods",
    "IsoCts": "lit_merge.methods",
    "KarcherMean": "lit_merge.methods",
    "Knots": "lit_merge.methods",
    "LastK": "lit_merge.methods",
    "LinearizedSuite": "lit_merge.suites",
    "Lines": "lit_merge.methods",
    "MagMax": "lit_merge.methods",
    "MergeError": "lit_merge.errors",
    "MergeModule": "lit_merge.module",
    "MergeTrainer": "lit_merge.trainer",
    "MiniSuite": "lit_merge.suites",
    "ModelStock": "lit_merge.methods",
    "NetworkSuite": "lit_merge.suites",
    "NuSlerp": "lit_merge.methods",
    "Objective": "lit_merge.objectives",
    "Opcm": "lit_merge.methods",
    "Pcb": "lit_merge.methods",
    "PerturbationConsistency": "lit_merge.objectives",
    "RegMean": "lit_merge.methods",
    "RegMeanPlusPlus": "lit_merge.methods",
    "RunLogger": "lit_merge.loggers",
    "SAU": "lit_merge.methods",
    "Sce": "lit_merge.methods",
    "SequentialModule": "lit_merge.sequential_module",
    "SimpleAverage": "lit_merge.methods",
    "SingularAdaMerging": "lit_merge.methods",
    "Slerp": "lit_merge.methods",
    "Stage": "lit_merge.stages",
    "Suite": "lit_merge.suites",
    "Svc": "lit_merge.methods",
    "TallMasks": "lit_merge.methods",
    "TaskArithmetic": "lit_merge.methods",
    "TaskDataModule": "lit_merge.data",
    "TaskVectors": "lit_merge.task_vectors",
    "Ties": "lit_merge.methods",
    "Transform": "lit_merge.transforms",
    "TsvCompress": "lit_merge.methods",
    "TsvMerge": "lit_merge.methods",
    "WeightedAverage": "lit_merge.methods",
    "WeightedSum": "lit_merge.objectives",
    "WeightsSuite": "lit_merge.suites",
    "Wudi": "lit_merge.methods",
    "main": "lit_merge.cli",
}
_MODULES = ("attacks", "callbacks", "configs", "functional", "transforms")

__all__ = (
    "AWM",
    "DAM",
    "SAU",
    "AdaMerging",
    "BackdoorSuite",
    "Breadcrumbs",
    "CalibratedModule",
    "ClipSuite",
    "ConcreteMerging",
    "Consensus",
    "Dare",
    "DataFreeModule",
    "DecompositionCache",
    "Della",
    "Diversity",
    "Doge",
    "Dop",
    "Emr",
    "Entropy",
    "ExpertAlignment",
    "ExpertModule",
    "FineTuneDataModule",
    "FisherMerging",
    "IsoC",
    "IsoCts",
    "KarcherMean",
    "Knots",
    "LastK",
    "LinearizedSuite",
    "Lines",
    "MagMax",
    "MergeError",
    "MergeModule",
    "MergeTrainer",
    "MiniSuite",
    "ModelStock",
    "NetworkSuite",
    "NuSlerp",
    "Objective",
    "Opcm",
    "Pcb",
    "PerturbationConsistency",
    "RegMean",
    "RegMeanPlusPlus",
    "RunLogger",
    "Sce",
    "SequentialModule",
    "SimpleAverage",
    "SingularAdaMerging",
    "Slerp",
    "Stage",
    "Suite",
    "Svc",
    "TallMasks",
    "TaskArithmetic",
    "TaskDataModule",
    "TaskVectors",
    "Ties",
    "Transform",
    "TsvCompress",
    "TsvMerge",
    "WeightedAverage",
    "WeightedSum",
    "WeightsSuite",
    "Wudi",
    "__version__",
    "attacks",
    "callbacks",
    "configs",
    "functional",
    "main",
    "transforms",
)

if TYPE_CHECKING:
    from lit_merge import attacks, callbacks, configs, functional, transforms
    from lit_merge.calibrated_module import CalibratedModule
    from lit_merge.cli import main
    from lit_merge.data import FineTuneDataModule, TaskDataModule
    from lit_merge.data_free_module import DataFreeModule
    from lit_merge.decomposition_cache import DecompositionCache
    from lit_merge.errors import MergeError
    from lit_merge.expert import ExpertModule
    from lit_merge.loggers import RunLogger
    from lit_merge.methods import (
        AWM,
        DAM,
        SAU,
        AdaMerging,
        Breadcrumbs,
        ConcreteMerging,
        Consensus,
        Dare,
        Della,
        Doge,
        Dop,
        Emr,
        FisherMerging,
        IsoC,
        IsoCts,
        KarcherMean,
        Knots,
        LastK,
        Lines,
        MagMax,
        ModelStock,
        NuSlerp,
        Opcm,
        Pcb,
        RegMean,
        RegMeanPlusPlus,
        Sce,
        SimpleAverage,
        SingularAdaMerging,
        Slerp,
        Svc,
        TallMasks,
        TaskArithmetic,
        Ties,
        TsvCompress,
        TsvMerge,
        WeightedAverage,
        Wudi,
    )
    from lit_merge.module import MergeModule
    from lit_merge.objectives import (
        Diversity,
        Entropy,
        ExpertAlignment,
        Objective,
        PerturbationConsistency,
        WeightedSum,
    )
    from lit_merge.sequential_module import SequentialModule
    from lit_merge.stages import Stage
    from lit_merge.suites import BackdoorSuite, ClipSuite, LinearizedSuite, MiniSuite, NetworkSuite, Suite, WeightsSuite
    from lit_merge.task_vectors import TaskVectors
    from lit_merge.trainer import MergeTrainer
    from lit_merge.transforms import Transform


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name in _MODULES:
        return import_module(f"lit_merge.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lit_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
