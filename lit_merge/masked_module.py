"""What methods with a learned mask have in common: seeded masks, and manual optimisation that several ranks share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_merge.adaptation import Batches
from lit_merge.errors import MergeError
from lit_merge.functional.concrete import FinalMask, final_mask, rescale_mask
from lit_merge.functional.finite import check_finite
from lit_merge.functional.leaf_gradient import Gradients, accumulate, leaf_loss, leaves
from lit_merge.functional.masked import Mask
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("MaskedMergeModule", "Seen")


class Seen:
    """What callbacks want to know of the phases of one step.

    Attributes:
        losses: Loss per task, of the last phase.
        logits: Logits per task, ``(B, C)`` of each phase.
    """

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.logits: dict[str, list[Tensor]] = {}

    def outputs(self, loss: Tensor, batch: Batches) -> dict[str, Any]:
        """Return what a training step returns: the loss, and logits and positions of the images of the whole batch.

        Args:
            loss: The loss.
            batch: The images whose consecutive parts were seen; borrowed images do not count.
        """
        counts = {task: len(part.index) if part.share else 0 for task, part in batch.items()}
        return {
            "loss": loss,
            "logits": {task: torch.cat(found)[: counts[task]] for task, found in self.logits.items()},
            "index": {task: part.index[: counts[task]] for task, part in batch.items()},
        }


class MaskedMergeModule(MergeModule):
    """A merge under masks with one logit per parameter, optimised by hand.

    A method makes its logits with :meth:`make_logits`, its masks with :meth:`mask`, and writes a ``training_step`` out
    of :meth:`gradients` and :meth:`step`. Gradients are computed as values and never left lying in ``.grad``, so
    nothing leaks from one phase into another. They are averaged over ranks here: DistributedDataParallel wants
    a gradient of every parameter in every backward pass, which phases do not have.

    Args:
        temperature: Of the relaxed masks, above 0.
        mask_seed: Seed of the masks.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Attributes:
        wide: Names of the parameters of the size of a network. They are left out of the distributed wrapper, whose
            copy of the gradient would cost a network more; they start out the same on all ranks.

    Raises:
        MergeError: ``temperature`` is not above 0.
    """

    wide: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, temperature: float = 0.5, mask_seed: int = 0, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.automatic_optimization = False
        check_finite(f"{type(self).__name__}.temperature", temperature, above=0)
        self.temperature = temperature
        self.mask_seed = mask_seed

    def configure_model(self) -> None:
        """Build as usual, and leave the wide parameters out of the distributed wrapper."""
        super().configure_model()
        left_out = [*(name for name, _ in self.named_buffers(remove_duplicate=False)), *self.wide]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, left_out)

    # Masks -------------------------------------------------------------------------------------------------------

    def make_logits(self, bank: TaskVectors, start: float = 0.0) -> nn.Parameter:
        """Return logits ``(P,)``: the entries of all parameter tensors, flat in the order of ``bank.names``."""
        return nn.Parameter(torch.full((sum(bank.sizes),), start, dtype=bank.compute_dtype))

    def mask(self, logits: Tensor, kind: FinalMask, step: int = -1) -> Mask:
        """Return a rescaled mask; a sample is a function of the seed, the step and the kind of device.

        Args:
            logits: ``(P,)``.
            kind: ``mean``, ``threshold`` or ``sample``, see :func:`lit_merge.functional.final_mask`.
            step: Of the sample; -1 for the one that is used in the end.
        """
        return Mask(lambda column, piece: rescale_mask(self.drawn(column, piece, kind, step)), (logits,))

    def drawn(self, column: int, piece: Tensor, kind: FinalMask, step: int, which: int = 0) -> Tensor:
        """Return the mask of one tensor, not rescaled.

        Args:
            column: Number of the tensor.
            piece: Its logits.
            kind: ``mean``, ``threshold`` or ``sample``.
            step: Of the sample.
            which: Of several masks, so that their samples are independent.
        """
        generator = None
        if kind == "sample":
            keys = (self.mask_seed, step, column, *([which] if which else []))
            generator = torch.Generator(piece.device).manual_seed(_derived(*keys))
        return final_mask(piece, kind, self.temperature, generator)

    def on_train_start(self) -> None:
        """Compare the masks of all ranks.

        Raises:
            MergeError: One seed gives different masks.
        """
        blank = torch.zeros(max(self.bank.sizes), device=self.device)
        drawn = self.mask(blank, "sample").recipe(0, blank)
        own = (drawn * torch.arange(1, len(drawn) + 1, device=self.device)).sum().reshape(1)
        if not bool((torch.as_tensor(self.all_gather(own)).flatten() == own).all()):
            raise MergeError(
                f"{type(self).__name__}: the ranks draw different masks from one seed; use devices of one kind"
            )

    # Manual optimisation -----------------------------------------------------------------------------------------

    def gradients(
        self,
        coefficients: Tensor,
        mask: Mask,
        of: Sequence[Tensor],
        losses: Callable[[dict[str, Tensor]], Iterable[Tensor]],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return a loss of the merged network and what it changes with, at a point of one's choice.

        Args:
            coefficients: ``(T, L)``.
            mask: The mask; :meth:`~lit_merge.functional.masked.Mask.detach` makes it a constant.
            of: Tensors that coefficients or mask are made of.
            losses: Maps the complete state dict of the merged network to losses, which are summed.

        Returns:
            The loss on this rank, and the gradient of each tensor in the mean over ranks.
        """
        with self.recipes(), self.bank.contracting_to(self.skeleton.autocast_weights.types(self.device)):
            merged = self.bank.contract(coefficients, mask)
        weights = leaves(merged)
        loss = leaf_loss(merged, weights, losses(self.complete(weights)), self._loss_scale())
        del merged, weights  # a network's memory, just before the gradient of the mask takes as much
        found = torch.autograd.grad(loss, list(of))
        return loss.detach(), [torch.as_tensor(self.trainer.strategy.reduce(g, reduce_op="mean")) for g in found]

    def weight_gradient(
        self,
        coefficients: Tensor,
        mask: Mask,
        losses: Callable[[dict[str, Tensor]], Iterable[Tensor]],
        into: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss of the merged network and its gradient by the merged weights.

        With :meth:`pull_back` it is :meth:`gradients` in two halves, for steps that use one gradient twice.

        Args:
            coefficients: ``(T, L)``.
            mask: The mask.
            losses: Maps the complete state dict of the merged network to losses, which are summed.
            into: Gradient of an earlier loss that this one is added to, in place.

        Returns:
            The loss on this rank, and this rank's gradient by name.
        """
        with torch.no_grad(), self.bank.contracting_to(self.skeleton.autocast_weights.types(self.device)):
            weights = self.bank.contract(coefficients, mask)
        scale = self._loss_scale()
        for weight in weights.values():
            weight.requires_grad_()
        total = torch.zeros((), device=self.device)
        with Gradients(weights, {} if into is None else {n: _times(into[n], scale) for n in into}) as gradients:
            for loss in losses(self.complete(weights)):
                accumulate(loss * scale, weights)
                total += loss.detach()
        return total, {name: _times(gradient, 1 / scale) for name, gradient in gradients.sums.items()}

    def pull_back(
        self, gradient: dict[str, Tensor], coefficients: Tensor, mask: Mask, wanted: Sequence[bool]
    ) -> list[Tensor]:
        """Return gradients by coefficients ``(T, L)`` and logits ``(P,)``, in the mean over ranks.

        Args:
            gradient: By the merged weights, see :meth:`weight_gradient`.
            coefficients: ``(T, L)``, the same as there.
            mask: The mask, the same as there.
            wanted: For the coefficients and for each of the logits, whether it is wanted.
        """
        found = self.bank.pull_back(gradient, coefficients, mask, wanted)
        reduce = self.trainer.strategy.reduce
        return [torch.as_tensor(reduce(g, reduce_op="mean")) for g in found if g is not None]

    def losses_of(self, batch: Batches, seen: Seen) -> Callable[[dict[str, Tensor]], Iterable[Tensor]]:
        """Return the objective on a batch as a function of the merged network, for :meth:`gradients`.

        Args:
            batch: Unlabelled images per task.
            seen: Where losses and logits are noted.
        """

        def losses(state: dict[str, Tensor]) -> Iterable[Tensor]:
            outputs: dict[str, Tensor] = {}
            yield from self._chunk_losses(state, batch, outputs, seen.losses)
            for task, logits in outputs.items():
                seen.logits.setdefault(task, []).append(logits)

        return losses

    def plans(self, *optimizers: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """Return what Lightning wants of ``configure_optimizers``, with a scheduler for each if there is one."""
        if self.scheduler_factory is None:
            return [{"optimizer": optimizer} for optimizer in optimizers]
        return [{"optimizer": each, "lr_scheduler": self.scheduler_factory(each)} for each in optimizers]

    def overflowed(self, gradient: Tensor) -> bool:
        """Whether half precision made a gradient that a scaler skips."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None and not bool(gradient.isfinite().all())

    def step(self, number: int, parameter: nn.Parameter, gradient: Tensor, counts: bool = True) -> None:
        """Take one step of the optimizer and one of its scheduler; then project.

        Args:
            number: Of the optimizer.
            parameter: Its parameter.
            gradient: The gradient, which does not outlive the step.
            counts: Whether this is the one step of the run that the Trainer counts for a batch.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if counts:
            # the precision plugin unscales it
            parameter.grad = gradient if scaler is None else scaler.scale(gradient)
            _listed(self.optimizers())[number].step()
        else:
            parameter.grad = None if self.overflowed(gradient) else gradient
            _listed(self.optimizers(use_pl_optimizer=False))[number].step()
        parameter.grad = None
        with torch.no_grad():
            self.project()
        if self.scheduler_factory is not None:
            scheduler = _listed(self.lr_schedulers())[number]
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(*[self.trainer.callback_metrics[scheduler.monitor]] if plateau else [])


def _derived(*keys: int) -> int:
    """Seed from several numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, keys)).encode()).digest()[:7], "big")


def _times(gradient: Tensor, factor: float) -> Tensor:
    """Multiply in place, but in a type that half precision's loss scales fit into."""
    if factor == 1:
        return gradient
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(factor)


def _listed(value: Any) -> list[Any]:  # noqa: ANN401 - Lightning returns one or a list
    return value if isinstance(value, list) else [value]
