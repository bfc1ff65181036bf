"""Concrete subspace learning: one mask over the merged task vector, learned at test time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lit_merge.adaptation import Batches
from lit_merge.coefficients import Coefficient, Tied, start_values
from lit_merge.data.parts import split_batches
from lit_merge.errors import MergeError
from lit_merge.functional.concrete import FinalMask
from lit_merge.functional.finite import check_finite
from lit_merge.functional.masked import Mask
from lit_merge.masked_module import MaskedMergeModule, Seen
from lit_merge.task_vectors import Granularity, TaskVectors

__all__ = ("ConcreteMerging",)

InnerStep = Literal["sgd", "sign", "adam"]


class _Preset(NamedTuple):
    """What the paper and the released code do differently."""

    inner_step: InnerStep
    inner_rate: float
    stale: bool
    final_mask: FinalMask


_PRESETS = {"paper": _Preset("sgd", 0.05, False, "mean"), "released": _Preset("adam", 1.0, True, "sample")}


class ConcreteMerging(MaskedMergeModule):
    """Learn a mask that all tasks share, and then the coefficients under it: θ = θ0 + m ⊙ Σ_t λ_{t,l} τ_{t,l}.

    The mask m is a relaxed Bernoulli variable with one logit per parameter, 0 at the start, divided by its mean in
    each parameter tensor. It redistributes a merged task vector within its tensors, where tasks get in each other's
    way, and cannot scale a tensor.

    ``coefficients="learned"`` is Concrete AdaMerging, in two stages. Each of the first ``mask_steps`` steps draws a
    mask m, cuts its batch in two halves, and

    1. moves the coefficients by one step on the first half, from λ0 to λ′ (the mask is a constant);
    2. takes an optimizer step of the logits on the second half, with the coefficients λ′ as constants.

    The coefficients then go back to λ0. All further steps learn them as :class:`~lit_merge.AdaMerging` does, under the
    final mask. A ``batch_size`` of 32 gives both halves the published 16 images per task; in the second stage all 32
    are one batch.

    ``coefficients="fixed"`` is Concrete task arithmetic: every step is one of the mask, on the whole batch, at λ0.

    Where paper and released code differ (DAM's code, which builds on it, does as released), ``preset`` chooses, and an
    argument of that name overrides it:

    ==============  ==========================  =======================================================================
    argument        ``paper``                   ``released``
    ==============  ==========================  =======================================================================
    ``inner_step``  ``sgd``: λ′ = λ0 − η g      ``adam``, whose moments last over the steps: each coefficient moves by
                                                about η = 1, at first by exactly ±1
    ``inner_rate``  0.05 (η; ours)              1
    ``stale``       no: g is the gradient at λ0 yes: g is taken at λ′ of the step before, and applied to λ0
    ``final_mask``  ``mean``: σ(x), ours and    ``sample``: one random draw, continuous
                    deterministic
    ==============  ==========================  =======================================================================

    What is learned is as large as a network, and so is a checkpoint: logits and the state of their optimizer, with
    Adam three network sizes. Beside these and the bank, a step takes the memory of two networks: merged weights and
    their gradient, then that and the gradient of the logits; with ``merge_by: block`` that of one, the gradient of the
    logits, and one block. ``fused: true`` keeps Adam from taking more.

    Randomness is a function of (``mask_seed``, step), so a resumed run and all ranks draw the same masks. Half a batch
    is cut by the order of the images over all ranks, so that several ranks together cut it as one would. Under the
    protocol ``online``, images of the first stage are scored with the drawn masks.

    Args:
        coefficients: ``learned`` or ``fixed``.
        granularity: Of the coefficients, as in :class:`~lit_merge.AdaMerging`: ``task``, ``block``, ``tensor``
            (``layer``), or filters with these as values, see :mod:`lit_merge.coefficients`.
        init: Coefficients at the start, λ0, a number, a list over depth or by name; null for 1/T.
        preset: ``paper`` or ``released``.
        mask_steps: Steps of the first stage, if coefficients are learned; published: 1000 of 2000.
        mask_rate: Learning rate of the logits; by default that of ``optimizer``, which makes one optimizer for the
            logits and one for the coefficients. The published rate is 1e-3 for both.
        inner_step: ``sgd``; ``sign``: λ′ = λ0 − η sign(g); or ``adam``.
        inner_rate: η, at least 0.
        stale: Take the inner gradient at the λ′ of the step before.
        final_mask: ``mean``, ``threshold`` (σ(x) ≥ ½: binary, and of use only for logits far from 0) or ``sample``;
            all are rescaled.
        **kwargs: ``temperature`` and ``mask_seed`` of :class:`~lit_merge.masked_module.MaskedMergeModule`, and those of
            :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: Tang et al., Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion,
    sections 3 and 4, arXiv 2312.06173; the released code is that of FusionBench.
    """

    column: Tensor
    _unlearned = "coefficients: fixed"  # what asks for masks alone

    def __init__(
        self,
        coefficients: Literal["learned", "fixed"] = "learned",
        granularity: Granularity | list[Tied] = "tensor",
        init: Coefficient | None = 0.3,
        preset: Literal["paper", "released"] = "paper",
        mask_steps: int = 1000,
        mask_rate: float | None = None,
        inner_step: InnerStep | None = None,
        inner_rate: float | None = None,
        stale: bool | None = None,
        final_mask: FinalMask | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base classes
    ) -> None:
        super().__init__(**kwargs)
        self._one_of("coefficients", coefficients, ("learned", "fixed"))
        self._one_of("preset", preset, tuple(_PRESETS))
        chosen = _PRESETS[preset]
        self.inner_step: InnerStep = chosen.inner_step if inner_step is None else inner_step
        self.inner_rate = chosen.inner_rate if inner_rate is None else inner_rate
        self.stale = chosen.stale if stale is None else stale
        self.final_mask: FinalMask = chosen.final_mask if final_mask is None else final_mask
        self._one_of("inner_step", self.inner_step, get_args(InnerStep))
        self._one_of("final_mask", self.final_mask, get_args(FinalMask))
        for name, value in (("mask_steps", mask_steps), ("inner_rate", self.inner_rate), ("mask_rate", mask_rate)):
            check_finite(f"{type(self).__name__}.{name}", value, least=0)
        self.learned = coefficients == "learned"
        self.granularity: Granularity | list[Tied] = granularity
        check_finite(f"{type(self).__name__}.init", init)
        self.init = init
        self.mask_steps = mask_steps
        self.mask_rate = mask_rate

    def _one_of(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if value not in known:
            choices = f"{', '.join(known[:-1])} or {known[-1]}"
            raise MergeError(f"{type(self).__name__}.{name}: expected {choices}, found {value!r}")

    # What is learned ---------------------------------------------------------------------------------------------

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make the logits ``(P,)`` and the coefficients ``(T, G)``."""
        groups, column = bank.groups(self.granularity)
        self.register_buffer("column", column, persistent=False)
        start = 1 / len(bank.tasks) if self.init is None else self.init
        shares = nn.functional.one_hot(column, len(groups)).mT.double()
        self.logits = self.make_logits(bank)
        row = start_values(start, shares, bank.names).to(bank.compute_dtype)
        self.coefficients = nn.Parameter(row.repeat(len(bank.tasks), 1))
        # λ′ of the last step, which the next may need: the coefficients themselves stay at λ0 in the first stage
        self.moved = nn.Parameter(self.coefficients.detach().clone(), requires_grad=False)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union
        """Make the optimizers of logits, coefficients and, if it is Adam's, the inner step; as many as are needed."""
        masks = self.optimizer_factory([self.logits])
        for group in () if self.mask_rate is None else masks.param_groups:
            group["lr"] = self.mask_rate
        if not self.learned:
            return self.plans(masks)
        plans = self.plans(masks, self.optimizer_factory([self.coefficients]))
        if self.inner_step == "adam":
            plans.append({"optimizer": torch.optim.Adam([self.moved], lr=self.inner_rate)})
        return plans

    def settled_mask(self) -> Mask:
        """Return the mask that is used in the end."""
        return self.mask(self.logits, self.final_mask)

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + m ⊙ Σ λ_{t,l} τ_{t,l} with the final mask; every tensor is masked."""
        return bank.contract(self.coefficients[:, self.column], self.settled_mask())

    def coefficient_table(self) -> Tensor:
        """Coefficients ``(T, L)``; under a rescaled mask alone they are also the effective scale of each tensor."""
        return self.coefficients.detach()[:, self.column]

    # Adapting ----------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check the masks, and say if the second stage will not be reached."""
        super().on_train_start()
        total = round(self.stage_steps)
        if self.learned and total <= self.mask_steps:
            rank_zero_warn(
                f"{type(self).__name__}: all {total} steps belong to the mask (mask_steps: {self.mask_steps}), so the "
                f"coefficients stay as they are; fit longer, lower mask_steps, or set {self._unlearned}"
            )

    def training_step(self, batch: Batches, batch_idx: int) -> dict[str, Any]:
        """Take one step of the mask, or of the coefficients.

        Returns:
            The loss, and per task the logits ``(B, C)`` and the positions ``(B,)`` of the images, for callbacks.
        """
        done, seen = self.stage_step, Seen()
        learning = int(self.learned and done >= self.mask_steps)  # the mask, then the coefficients
        if learning:
            mask = self.settled_mask().detach()
            loss, gradient = self._gradient(self.coefficients, mask, self.coefficients, batch, seen)
        else:
            mask, point, rest = self.mask(self.logits, "sample", done), self.coefficients.detach(), batch
            if self.learned:
                half, rest = self.parts(batch, 2)
                start = (self.moved if self.stale else point).detach().requires_grad_()
                inner, gradient = self._gradient(start, mask.detach(), start, half, seen)
                point = self._move(gradient)
                self.log("train/inner_loss", inner, batch_size=1)
            loss, gradient = self._gradient(point, mask, self.logits, rest, seen)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict({f"train/loss/{task}": value for task, value in seen.losses.items()}, batch_size=1)
        self.step(learning, (self.logits, self.coefficients)[learning], gradient)
        return seen.outputs(loss, batch)

    def parts(self, batch: Batches, count: int) -> list[Batches]:
        """Cut a batch into parts that do not depend on the number of ranks."""
        return split_batches(batch, count, self.trainer.global_rank, self.trainer.world_size)

    def _gradient(
        self, coefficients: Tensor, mask: Mask, of: Tensor, batch: Batches, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        loss, (gradient,) = self.gradients(coefficients[:, self.column], mask, [of], self.losses_of(batch, seen))
        return loss, gradient

    def _move(self, gradient: Tensor) -> Tensor:
        """λ′: one step from λ0."""
        start = self.coefficients.detach()
        if self.overflowed(gradient):  # spoils this step, which the scaler then skips, and nothing that lasts
            return torch.full_like(start, torch.nan)
        if self.inner_step == "adam":
            self.moved.data.copy_(start)
            self.moved.grad = gradient
            self.optimizers(use_pl_optimizer=False)[-1].step()  # type: ignore[index] # does not count as one of the run
            self.moved.grad = None
        else:
            direction = gradient.sign() if self.inner_step == "sign" else gradient
            self.moved.data.copy_(start - self.inner_rate * direction)
        return self.moved.detach()

    # Telling -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log the mean and the density of the mask."""
        facts = self.mask_facts()
        self.log_dict({f"mask/{key}": facts[key] for key in ("mean", "density")})

    @torch.no_grad()
    def mask_facts(self) -> dict[str, float]:
        """Say what the mask looks like before it is rescaled.

        Returns:
            ``mean``: mean of σ(x); ``density``: share of entries with σ(x) ≥ ½; the lowest and the highest logit.
        """
        return {
            "mean": float(self.logits.sigmoid().mean()),
            "density": float((self.logits >= 0).double().mean()),
            "lowest_logit": float(self.logits.min()),
            "highest_logit": float(self.logits.max()),
        }

    @torch.no_grad()
    def effective_scale(self) -> dict[str, float]:
        """Mean of λ · m over all entries, per task: what a merge without a mask has to be compared at."""
        mask = self.settled_mask()
        parts = zip(*(logits.split(self.bank.sizes) for logits in mask.logits), strict=True)
        weights = torch.stack([mask.recipe(column, *pieces).sum() for column, pieces in enumerate(parts)])
        means = (self.coefficient_table() * weights).sum(1) / len(self.logits)
        return dict(zip(self.bank.tasks, means.tolist(), strict=True))

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        return {"mask": {"final": self.final_mask, **self.mask_facts()}, "effective_scale": self.effective_scale()}
