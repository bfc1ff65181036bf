"""DataFreeModule: merges that are learned from the task vectors alone, layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn

from lit_merge.data.steps import Steps
from lit_merge.errors import MergeError
from lit_merge.functional.layer_problem import (
    LayerChoice,
    LayerProblem,
    Others,
    choose_layers,
    layer_batches,
    layer_shapes,
    merge_other,
)
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("DataFreeModule",)


class DataFreeModule(MergeModule):
    """A merge that minimises an objective of each layer's task vectors; one training step is one step of all layers.

    A method says what the objective is, as a :class:`~lit_merge.functional.layer_problem.LayerProblem`::

        class Nearest(LayerProblem):
            def losses(self, value):  # (L, m, n) -> (L,); self.deltas is (L, T, m, n)
                return (value[:, None] - self.deltas).abs().sum((1, 2, 3))


        class NearestMerge(DataFreeModule):
            problem = Nearest

    What is learned is then the merged task vector. Progress bar, checkpoints, resuming, schedulers, loggers and
    evaluation are those of any other merge: ``train/loss`` is the objective, summed over layers, and
    ``train/gradient_norm`` the length of the gradient that is followed.

    No image is looked at in a fit: whatever data the Trainer is given is for evaluation. An epoch has as many steps as
    ``steps_per_epoch`` of the data module says, or :attr:`steps` if there is none or it does not say.

    Layers of one shape share one parameter. Beside the bank, a fit takes what is learned, the state of its optimizer
    and one gradient of one shape; a checkpoint holds the first two, which is two or three networks with Adam. Every
    rank computes the same.

    Args:
        layers: Which matrices are learned: ``blocks`` or ``matrices``, see
            :func:`~lit_merge.functional.layer_problem.choose_layers`.
        exclude: Names, with wildcards, that are left out of them.
        others: What is done with all other tensors: they stay at the ``base``, or take the ``mean`` or the ``sum`` of
            their task vectors.
        optimizer: Makes the optimizer from the parameters; by default fused Adam with learning rate :attr:`rate`. It
            must not need a closure.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Attributes:
        steps: Steps of an epoch that nothing else decides on.
        rate: Learning rate of the default optimizer.

    Raises:
        MergeError: A value is unknown.
    """

    steps: ClassVar[int] = 400
    rate: ClassVar[float] = 1e-4

    def __init__(
        self,
        layers: LayerChoice = "matrices",
        exclude: Sequence[str] = (),
        others: Others = "mean",
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(optimizer=optimizer or partial(torch.optim.Adam, lr=self.rate, fused=True), **kwargs)
        for name, value, known in (("layers", layers, LayerChoice), ("others", others, Others)):
            if value not in get_args(known):
                choices = " or ".join(", ".join(get_args(known)).rsplit(", ", 1))
                raise MergeError(f"{type(self).__name__}.{name}: expected {choices}, found {value!r}")
        self.automatic_optimization = False
        self.layers: LayerChoice = layers
        self.exclude = exclude if isinstance(exclude, str) else tuple(exclude)  # a word is refused later
        self.others: Others = others
        self._problems: list[list[tuple[slice, LayerProblem]]] = []

    # What a method says ------------------------------------------------------------------------------------------

    @abstractmethod
    def problem(self, deltas: Tensor) -> LayerProblem:
        """Return the objective of some layers of one shape; a class can stand here in place of a method.

        Args:
            deltas: Their task vectors, ``(L, T, m, n)``.
        """

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + what was learned, and for all other tensors what ``others`` says."""
        learned = self.learned()
        return bank.offset(
            {n: learned[n] if n in learned else merge_other(d, self.others) for n, d in bank.deltas.items()}
        )

    # What is learned ---------------------------------------------------------------------------------------------

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make one parameter per shape, ``(L, m, n)`` or what the problem starts with; keys are ``mxn``."""
        self.groups = layer_shapes(bank.deltas, choose_layers(bank.deltas, self.layers, self.exclude))
        self.values = nn.ParameterDict()
        for (height, width), names in self.groups.items():
            starts = [self.problem(deltas).start() for _, deltas in layer_batches(bank.deltas, names)]
            self.values[f"{height}x{width}"] = nn.Parameter(torch.cat(starts).contiguous())

    def learned(self) -> dict[str, Tensor]:
        """What was learned by the name of the tensor, ``(m, n)`` each unless the problem starts with another shape."""
        return {
            name: value
            for (height, width), names in self.groups.items()
            for name, value in zip(names, self.values[f"{height}x{width}"].detach(), strict=True)
        }

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union
        """Make the optimizer and, if asked for, the scheduler, which is stepped every step."""
        optimizer = self.optimizer_factory(list(self.values.values()))
        if self.scheduler_factory is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler_factory(optimizer)}

    # Fitting without data ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the place of the data in a fit.

        Raises:
            MergeError: The protocol is ``online``, or as in the base class.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if getattr(self._data(), "protocol", None) == "online":
            raise MergeError(
                f"data.protocol: online scores each image before the step that learns from it, and "
                f"{type(self).__name__} learns from none; use transductive"
            )
        self.trainer.fit_loop._data_source.instance = self  # the data module keeps validation and test

    def _data(self) -> Any:  # noqa: ANN401 - any data module, or none
        return getattr(self.trainer, "datamodule", None)

    def train_dataloader(self) -> Steps:
        """Return the numbers of the steps: the Trainer wants something to go through."""
        return Steps(getattr(self._data(), "steps_per_epoch", None) or self.steps)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """State the problems on the device of the fit; what they precompute, they do at the first step."""
        self.on_stage_start()

    @torch.no_grad()
    def on_stage_start(self) -> None:
        """State the problems anew for the experts in the bank."""
        deltas = self.bank.deltas
        self._problems = [
            [(part, self.problem(batch)) for part, batch in layer_batches(deltas, names)]
            for names in self.groups.values()
        ]

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # noqa: ANN401 - nothing, really
        """Take one step in every layer.

        Args:
            batch: Number of the step in its epoch; nothing depends on it.
            batch_idx: The same.

        Returns:
            The objective at the beginning of the step, summed over layers.
        """
        loss = torch.zeros((), device=self.device, dtype=self.bank.compute_dtype)
        square = torch.zeros_like(loss)
        with torch.autocast(self.device.type, enabled=False):  # sums over rows are never in half precision
            for number, (parameter, problems) in enumerate(zip(self.values.values(), self._problems, strict=True)):
                gradient = torch.empty_like(parameter)  # with its strides, which fused optimizers rely on
                for part, problem in problems:
                    losses, gradient[part] = problem.gradient(parameter.detach()[part])
                    loss += losses.sum()
                square += torch.linalg.vector_norm(gradient).square()
                self._step(parameter, gradient, counts=number == len(self._problems) - 1)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/gradient_norm", square.sqrt(), batch_size=1)
        self._schedule()
        return {"loss": loss}

    def _step(self, parameter: nn.Parameter, gradient: Tensor, counts: bool) -> None:
        """Move one parameter; the others have no gradient, and are passed over."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        # the Trainer counts a step of the optimizer that it wraps, and its precision plugin unscales the gradient
        optimizer: Any = self.optimizers(use_pl_optimizer=counts)
        parameter.grad = scaler.scale(gradient) if counts and scaler is not None else gradient
        optimizer.step()
        parameter.grad = None

    def _schedule(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(*[self.trainer.callback_metrics[scheduler.monitor]] if plateau else [])

    def on_train_epoch_end(self) -> None:
        """Leave all ranks with the same weights, whatever their devices are, before any callback exports them.

        Raises:
            MergeError: What was learned is not finite.
        """
        for parameter in self.values.values() if self.trainer.world_size > 1 else ():
            torch.distributed.broadcast(parameter.detach(), src=0)
        for key, parameter in self.values.items():  # after, so that no rank waits for one that stops here
            if not bool(torch.isfinite(parameter).all()):
                raise MergeError(
                    f"{type(self).__name__}: layers of shape {key} are not finite; lower the learning rate"
                )

    def on_train_end(self) -> None:
        """Forget what was precomputed."""
        self._problems = []

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        return {"learned_layers": {key: len(value) for key, value in self.values.items()}}
