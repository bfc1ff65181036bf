"""Every learnable method, with what makes it go through all of its phases in a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from ranks import ALL, odd, trainer
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lit_merge import MergeModule, TaskDataModule, methods
from lit_merge.callbacks import Report, ResumePoint, SequentialMerging
from lit_merge.methods import AWM, DAM, SAU, AdaMerging, ConcreteMerging, Doge, SingularAdaMerging, Wudi
from lit_merge.objectives import Diversity, Entropy, PerturbationConsistency, WeightedSum
from lit_merge.transforms import Doge as DogeTransform
from lit_merge.transforms import Ties

SGD = partial(torch.optim.SGD, lr=0.05)
FAST = partial(torch.optim.SGD, lr=5.0)  # of logits, whose gradients are small
IMAGES, STEPS = 8, 4  # of a task in a step, over all ranks


@dataclass(frozen=True)
class Case:
    """One run of one method.

    Attributes:
        method: The method.
        options: Its arguments.
        protocol: Which images a step sees.
        stream: Epochs per task where the experts come one by one, else 0.
        tolerance: Largest difference; what goes through the perturbations is in single precision.
    """

    method: type[MergeModule]
    options: dict[str, Any] = field(default_factory=dict)
    protocol: str = "transductive"
    stream: int = 0
    tolerance: float = 1e-9

    def module(self, **more: Any) -> MergeModule:
        """Make the method for a suite of three tasks with 13, 1 and 22 images, in double precision."""
        return self.method(**{"suite": odd(), "optimizer": SGD, **self.options, **more})

    def run(self, folder: Path, ranks: int, **more: Any) -> dict[str, Any]:
        """Fit and test on this rank; what the optimizers saw, what was learned, and what was reported.

        Args:
            folder: Where the run's files go.
            ranks: How many ranks there are; together they see the same images as one.
            **more: Further arguments of every method.
        """
        module = self.module(**more)
        data = TaskDataModule(
            module.suite, batch_size=IMAGES // ranks, eval_batch_size=5, seed=3, protocol=self.protocol,  # type: ignore[arg-type]
            steps_per_epoch=None if self.protocol == "online" else STEPS,
        )  # fmt: skip
        report = Report()
        images = Images()
        callbacks = [
            report,
            images,
            ResumePoint(),
            *([SequentialMerging(self.stream, evaluate="all")] if self.stream else []),
        ]
        options: dict[str, Any] = {"max_epochs": None if self.stream else 1}
        options |= {"strategy": "ddp"} if ranks > 1 else {}
        engine = trainer(folder, ranks, callbacks=callbacks, limit_val_batches=0, **options)
        with watched() as steps:
            engine.fit(module, datamodule=data)
        engine.test(module, datamodule=data, verbose=False)
        return {
            "steps": steps,
            "images": images.seen,
            "learned": {name: value.detach().clone() for name, value in module.state_dict().items()},
            "report": {key: report.content[key] for key in ("tasks", "mean", "extra", "protocol")},
        }


class Images(L.Callback):
    """Notes the images of each step, as callbacks see them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, list[int]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        found = {task: index.tolist() for task, index in outputs.get("index", {}).items()}
        assert {task: len(logits) for task, logits in outputs.get("logits", {}).items()} == {
            task: len(index) for task, index in found.items()
        }
        self.seen.append(found)


@contextmanager
def watched() -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Note gradient and new value of every parameter after each step of any optimizer, also where it is called by hand.

    Only then has an optimizer that is given a closure called it.
    """
    steps: list[list[tuple[Tensor, Tensor]]] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append([(p.grad.detach().clone(), p.detach().clone()) for p in parameters])

    handle = register_optimizer_step_post_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


_MASKS = {"optimizer": FAST, "mask_steps": 2}
_OVER_IMAGES = WeightedSum([Entropy(), Diversity()])  # the latter is not a mean over images
_SAFE = WeightedSum([Entropy(), PerturbationConsistency()], [1.0, 0.5])
_DOGE = DogeTransform(steps=3, layers="matrices", others="keep")
_BY_NAME = [{"filter": "conv", "value": "block"}, {"value": 2}]

CASES: dict[str, Case] = {
    "adamerging-task": Case(AdaMerging, {"granularity": "task", "objective": ALL}),
    "adamerging-block": Case(AdaMerging, {"granularity": "block"}),
    "adamerging-tensor": Case(AdaMerging),
    "adamerging-depth": Case(AdaMerging, {"granularity": 2, "softmax": True}),
    "adamerging-by-name": Case(AdaMerging, {"granularity": _BY_NAME, "bounds": (0.29, 0.31)}),
    "adamerging-plus-plus": Case(AdaMerging, {"transforms": [Ties()]}, protocol="online"),
    "adamerging-after-doge": Case(AdaMerging, {"transforms": [_DOGE]}),
    "adamerging-perturbed": Case(AdaMerging, {"objective": _SAFE}, tolerance=1e-6),
    "adamerging-stream": Case(AdaMerging, {"objective": ALL}, stream=1),
    "singular": Case(SingularAdaMerging, {"convolutions": True}),
    "concrete": Case(ConcreteMerging, {**_MASKS, "objective": _OVER_IMAGES}),
    "concrete-released": Case(ConcreteMerging, {**_MASKS, "preset": "released"}),
    "concrete-fixed": Case(ConcreteMerging, {"optimizer": FAST, "coefficients": "fixed"}, protocol="online"),
    "concrete-perturbed": Case(ConcreteMerging, {**_MASKS, "objective": _SAFE}, tolerance=1e-6),
    "dam": Case(DAM, {"mask_steps": 2, "mask_rate": 0.3}, tolerance=1e-6),
    "dam-released": Case(DAM, {"mask_steps": 2, "preset": "released", "inner_step": "sgd"}, tolerance=1e-6),
    "dam-masks-alone": Case(DAM, {"coefficient_stage": "none", "mask_rate": 0.3}, protocol="online", tolerance=1e-6),
    "dam-stream": Case(DAM, {"mask_steps": 2, "mask_rate": 0.3}, stream=1, tolerance=1e-6),
    "awm": Case(AWM, {"optimizer": FAST, "unit": "neuron", "alpha": 0.5}, tolerance=1e-6),
    "sau": Case(SAU, {"optimizer": FAST, "objective": _OVER_IMAGES}, protocol="online", tolerance=1e-6),
    "doge": Case(Doge, {"layers": "matrices"}),
    "wudi": Case(Wudi, {"layers": "matrices"}),
}

LEARNABLE = {
    method
    for method in (getattr(methods, name) for name in methods.__all__)
    if method.make_parameters is not MergeModule.make_parameters
}
