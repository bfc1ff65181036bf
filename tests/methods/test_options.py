"""Options that no other test turns: each of them reaches the rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import ToySuite

from lit_merge import methods, transforms
from lit_merge.methods._per_task import PerTaskModule


@cache
def merged(name: str, **options: Any) -> dict[str, Tensor]:
    """The merge; of a method with a network per task, the network of one."""
    tasks = 2 if "lerp" in name else 3
    suite = ToySuite("vit", tasks=tasks, train=name in ("FisherMerging", "RegMeanPlusPlus"))
    # the matrix at the end is none
    given = {option: ["proj"] if option == "exclude" else value for option, value in options.items()}
    if hasattr(methods, name):
        module = getattr(methods, name)(suite=suite, **given)
    else:
        module = methods.SimpleAverage(suite=suite, transforms=[getattr(transforms, name)(**given)])
    module.configure_model()
    with torch.no_grad():
        return dict(module.task_state("task.a") if isinstance(module, PerTaskModule) else module.merged_state())


@pytest.mark.parametrize(
    ("name", "option", "value", "others"),
    [
        ("Dare", "rescale", False, {}), ("Della", "rescale", False, {}), ("MagPrune", "rescale", False, {}),
        ("Emr", "balance", "tensors", {}), ("Lines", "outside", 0.0, {}), ("Sce", "renormalize", True, {}),
        ("FisherMerging", "squares", "batch", {}), ("FisherMerging", "normalize", False, {}),
        ("IsoC", "tolerance", 0.5, {}), ("IsoC", "exclude", True, {}),
        ("IsoCts", "tolerance", 0.9, {}), ("IsoCts", "exclude", True, {}),
        ("KarcherMean", "tolerance", 9.0, {"of": "task_vectors", "weights": (1.0, 2.0, 5.0)}),
        ("KarcherMean", "max_steps", 1, {"of": "task_vectors", "weights": (1.0, 2.0, 5.0)}),
        ("Knots", "weighted", False, {}), ("Knots", "tolerance", 0.5, {}), ("Knots", "exclude", True, {}),
        ("ModelStock", "average", "angle", {}), ("ModelStock", "clamp", False, {}),
        ("NuSlerp", "lengths", "linear", {}), ("Slerp", "lengths", "linear", {}),
        ("RegMeanPlusPlus", "others", "base", {}), ("Svc", "exclude", True, {}),
        ("TsvCompress", "tolerance", 0.9, {"fraction": 0.5}), ("TsvCompress", "exclude", True, {}),
        ("TsvMerge", "tolerance", 0.9, {}), ("TsvMerge", "ridge", 0.5, {}), ("TsvMerge", "exclude", True, {}),
        ("SingularAdaMerging", "tolerance", 0.9, {}), ("SingularAdaMerging", "ridge", 0.5, {}),
        ("SingularAdaMerging", "fraction", 0.1, {}), ("SingularAdaMerging", "exclude", True, {}),
    ],
)  # fmt: skip
def test_an_option_reaches_the_rule(name: str, option: str, value: Any, others: dict[str, Any]) -> None:
    usual, changed = merged(name, **others), merged(name, **others, **{option: value})
    differing = {n for n, tensor in usual.items() if not torch.allclose(tensor, changed[n], rtol=1e-4, atol=1e-6)}
    assert differing
    if option == "exclude" and name != "Knots":  # where all matrices are trimmed together
        assert differing == {"proj"}
