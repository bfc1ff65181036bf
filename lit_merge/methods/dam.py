"""Defense-aware merging: two masks, one for what tasks share and one for what perturbations reveal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_merge.adaptation import Batches
from lit_merge.coefficients import Coefficient, Tied
from lit_merge.errors import MergeError
from lit_merge.functional.concrete import FinalMask, rescale_mask
from lit_merge.functional.finite import check_finite
from lit_merge.functional.masked import Mask
from lit_merge.masked_module import Seen
from lit_merge.methods._dam_presets import PRESETS, Masks, MaskUpdate, Stage
from lit_merge.methods.concrete import ConcreteMerging, InnerStep
from lit_merge.objectives.consistency import Safety, safety_loss
from lit_merge.perturbations import Box, UniversalPerturbations, fooled
from lit_merge.task_vectors import Granularity, TaskVectors

__all__ = ("DAM",)

_DETECTION = 1  # number of the second mask's stream of samples


class DAM(ConcreteMerging):
    """Defense-aware merging: θ = θ0 + (M1 ⊙ M2) ⊙ Σ_t λ_{t,l} τ_{t,l} with two learned masks.

    M1, the task-shared mask, is that of :class:`~lit_merge.methods.ConcreteMerging`: it keeps tasks out of each
    other's way. M2, the backdoor-detection mask, is not rescaled, so it can take parameters away; it starts near 1.
    What it is to take away answers to a universal perturbation δ_t of each task's images: the defender knows neither
    trigger nor target nor which expert is poisoned, and learns in δ what flips most predictions.

    Each of the first ``mask_steps`` steps draws both masks, cuts its batch into three parts, and

    1. moves the coefficients from λ0 to λ′ by a step on the objective (first part; masks are constants);
    2. moves each δ_t uphill on CE(f(x + δ_t), argmax f(x)) (second part; the merged network is a constant);
    3. moves M1 down the objective L_perf, then M2 down L_perf + α L_safe, where L_safe is the cross-entropy of
       f(x + δ_t) with argmax f(x) (third part; λ′ and δ are constants). M2 moves under the new M1, but L_perf's
       gradient by the weights and argmax f(x) are those under the old one: this saves one of six encoder passes.

    The remaining steps learn the coefficients from λ0 under the final masks, on the whole batch: L_perf
    (``coefficient_stage: entropy``, which inflates a backdoor again), or L_perf + α_λ L_safe (``safe``). With ``none``
    all steps are those of the masks. A ``batch_size`` of 48 gives each part the published 16 images.

    =====================  ===========================  ==============================================================
    argument               ``paper``                    ``released``
    =====================  ===========================  ==============================================================
    ``masks``              ``dual``                     ``single``: M1 alone, down L_perf + α L_safe
    ``safety``             ``consistency``              ``entropy``: of f(x + δ), however wrong
    ``alpha`` (α)          1                            0.1
    ``epsilon``            0.05 (ours)                  .inf: δ is not bounded
    ``box``                ``valid``: of pixels         ``unit``: perturbed images are cut to values in [0, 1] although
                                                        they are normalised, and not at all while δ is learned
    ``ascent_rate``        ε / 4, by the sign           2.7e-5 of a pixel (1e-4 in CLIP's values), by Adam's rule
    ``coefficient_stage``  ``safe``                     ``entropy``
    ``mask_update``        ``normalized`` (ours)        ``adam``
    ``mask_rate``          0.005 (ours)                 0.001
    inner step, final mask: as the presets of :class:`~lit_merge.methods.ConcreteMerging`
    =====================  ===========================  ==============================================================

    Memory beside the bank: two logits and, within a step, two networks; with ``mask_update: adam`` four more for its
    moments (two with a single mask). A checkpoint has logits and moments.

    In README's laboratory the masks alone lower attack success by a few points below that of a merge of the same
    effective scale, and the safe stage does most of it. A form of ours, this class with ``objective: ExpertAlignment``
    (``dam-aligned.yaml``), goes much lower, and most of that is alignment's doing.

    Args:
        preset: ``paper`` or ``released``; the arguments that follow override it one by one.
        masks: ``dual`` or ``single``.
        safety: ``consistency`` or ``entropy``, see :func:`~lit_merge.objectives.consistency.safety_loss`.
        alpha: Weight of L_safe for the masks, at least 0.
        epsilon: Largest change of a pixel in [0, 1]; ``.inf`` for no bound.
        ascent_steps: Steps of δ in each step; each is an encoder pass.
        ascent_rate: Change of a pixel by one step.
        box: What perturbed images are cut to: ``valid``, also while δ is learned; ``unit`` or ``none``, not then.
        coefficient_stage: ``none``, ``entropy`` or ``safe``.
        coefficient_alpha: α_λ, weight of L_safe for the coefficients, at least 0.
        detection_start: Logits of M2 at the start; 2 keeps 88 % of each entry.
        mask_update: ``normalized``: x − rate · g / rms(g), taken per tensor, without any state; or ``adam``.
        mask_rate: Learning rate of the logits.
        mask_steps: Steps of the first stage; published: 1000 of 2000.
        granularity, init, inner_step, inner_rate, stale, final_mask: See
            :class:`~lit_merge.methods.ConcreteMerging`; with an ``inner_rate`` of 0, λ′ is λ0 and costs neither
            a pass nor a part of the batch.
        **kwargs: ``temperature`` and ``mask_seed`` of :class:`~lit_merge.masked_module.MaskedMergeModule`, and those of
            :class:`~lit_merge.MergeModule`; ``optimizer`` is that of the coefficients.

    Raises:
        MergeError: A value is out of range, or the objective has universal perturbations of its own.

    Source: Yang et al., Mitigating the Backdoor Effect for Multi-Task Model Merging via Safety-Aware Subspace, arXiv
    2410.13910. Its code has one mask; the two of the paper's figure are rebuilt from its description.
    """

    wide = ("logits", "detection")
    no_blocks = "it uses one gradient by the merged weights twice, so all of it has to exist; use merge_by: network"
    _unlearned = "coefficient_stage: none"

    def __init__(
        self,
        preset: Literal["paper", "released"] = "paper",
        masks: Masks | None = None,
        safety: Safety | None = None,
        alpha: float | None = None,
        epsilon: float | None = None,
        ascent_steps: int | None = None,
        ascent_rate: float | None = None,
        box: Box | None = None,
        coefficient_stage: Stage | None = None,
        coefficient_alpha: float = 0.3,
        detection_start: float = 2.0,
        mask_update: MaskUpdate | None = None,
        mask_rate: float | None = None,
        mask_steps: int = 1000,
        granularity: Granularity | list[Tied] = "tensor",
        init: Coefficient | None = 0.3,
        inner_step: InnerStep | None = None,
        inner_rate: float | None = None,
        stale: bool | None = None,
        final_mask: FinalMask | None = None,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base classes
    ) -> None:
        self._one_of("preset", preset, tuple(PRESETS))
        usual = PRESETS[preset]
        super().__init__(
            coefficients="learned",
            granularity=granularity,
            init=init,
            preset=preset,
            mask_steps=mask_steps,
            mask_rate=usual.mask_rate if mask_rate is None else mask_rate,
            inner_step=inner_step,
            inner_rate=inner_rate,
            stale=stale,
            final_mask=final_mask,
            **kwargs,
        )
        self.hparams.pop("coefficients", None)  # Concrete merging's; `load_from_checkpoint` would give it back to us
        self.masks: Masks = masks or usual.masks
        self.safety: Safety = safety or usual.safety
        self.alpha = usual.alpha if alpha is None else alpha
        self.box: Box = box or usual.box
        self.coefficient_stage: Stage = coefficient_stage or usual.coefficient_stage
        self.coefficient_alpha, self.detection_start = coefficient_alpha, detection_start
        self.mask_update: MaskUpdate = mask_update or usual.mask_update
        self.ascent = usual.ascent_with(epsilon, ascent_steps, ascent_rate, self.box)
        kinds = {"masks": Masks, "safety": Safety, "box": Box, "coefficient_stage": Stage, "mask_update": MaskUpdate}
        for name, kind in kinds.items():
            self._one_of(name, getattr(self, name), get_args(kind))
        check_finite("DAM.alpha", self.alpha, least=0)
        check_finite("DAM.coefficient_alpha", coefficient_alpha, least=0)
        check_finite("DAM.detection_start", detection_start)
        if self.objective.ascent is not None:
            raise MergeError("DAM.objective: it has perturbations of its own; DAM adds its safety loss itself")
        self.learned = self.coefficient_stage != "none"

    # What is learned ---------------------------------------------------------------------------------------------

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make logits ``(P,)`` of each mask, the coefficients ``(T, G)`` and the perturbations."""
        super().make_parameters(bank)
        if self.masks == "dual":
            self.detection = self.make_logits(bank, self.detection_start)
        self.perturbations = UniversalPerturbations.of_suite(self.suite, self.ascent)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union
        """Make the optimizers: of each mask, of the coefficients, and of the inner step if it is Adam's."""
        plans = self.plans(*(self._mask_optimizer(logits) for logits in self._logits()))
        plans += self.plans(self.optimizer_factory([self.coefficients])) if self.learned else []
        if self.inner_step == "adam":
            plans.append({"optimizer": torch.optim.Adam([self.moved], lr=self.inner_rate)})
        return plans

    def _mask_optimizer(self, logits: nn.Parameter) -> torch.optim.Optimizer:
        rate = self.mask_rate or 0.0
        if self.mask_update == "adam":
            return torch.optim.Adam([logits], lr=rate, fused=True)  # the others take another network's memory
        return torch.optim.SGD([logits], lr=rate)

    def _logits(self) -> list[nn.Parameter]:
        return [self.logits, self.detection] if self.masks == "dual" else [self.logits]

    def both_masks(self, kind: FinalMask, step: int = -1) -> Mask:
        """Return M1 ⊙ M2; M1 alone if there is a single mask.

        Args:
            kind: ``mean``, ``threshold`` or ``sample``.
            step: Of the samples; -1 for the ones that are used in the end.
        """
        if self.masks == "single":
            return self.mask(self.logits, kind, step)

        def recipe(column: int, shared: Tensor, detection: Tensor) -> Tensor:
            keep = self.drawn(column, detection, kind, step, which=_DETECTION)
            return rescale_mask(self.drawn(column, shared, kind, step)) * keep

        return Mask(recipe, (self.logits, self.detection))

    def settled_mask(self) -> Mask:
        """Return the mask that is used in the end."""
        return self.both_masks(self.final_mask)

    # Adapting ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batches, batch_idx: int) -> dict[str, Any]:
        """Take one step of the masks, or of the coefficients.

        Returns:
            The loss, and per task the logits ``(B, C)`` and the positions ``(B,)`` of the images, for callbacks.
        """
        done, seen = self.stage_step, Seen()
        if self.learned and done >= self.mask_steps:
            loss = self.coefficient_step(batch, seen)
        else:
            *inner, fresh, rest = self.parts(batch, 3 if self.inner_rate else 2)
            mask = self.both_masks("sample", done)
            point = (self.inner_point(mask, inner[0], seen) if inner else self.coefficients.detach())[:, self.column]
            self.perturbation_step(point, mask, fresh, seen)
            loss = self.mask_step(point, mask, rest, seen)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict({f"train/loss/{task}": value for task, value in seen.losses.items()}, batch_size=1)
        return seen.outputs(loss, batch)

    def inner_point(self, mask: Mask, batch: Batches, seen: Seen) -> Tensor:
        """Return λ′ ``(T, G)``: one step from λ0 down the objective, with masks as constants."""
        start = (self.moved if self.stale else self.coefficients).detach().requires_grad_()
        loss, gradient = self._gradient(start, mask.detach(), start, batch, seen)
        self.log("train/inner_loss", loss, batch_size=1)
        return self._move(gradient)

    @torch.no_grad()
    def perturbation_step(self, point: Tensor, mask: Mask, batch: Batches, seen: Seen) -> None:
        """Move δ uphill, with the merged network as a constant.

        Args:
            point: Coefficients ``(T, L)``.
            mask: The mask.
            batch: Images per task.
            seen: Where logits are noted.
        """
        state = self.complete(self.bank.contract(point, mask))
        for chunk in self.passes(state, batch):
            found = self.all_outputs(state, {task: batch[task].images for task in chunk})
            for task, (_, logits) in found.items():
                seen.logits.setdefault(task, []).append(logits[: None if batch[task].share else 0])
            self.climb(state, batch, {task: logits.argmax(-1) for task, (_, logits) in found.items()})

    def mask_step(self, point: Tensor, mask: Mask, batch: Batches, seen: Seen) -> Tensor:
        """Move M1 down the objective, and M2 down objective and safety loss; a single mask down both.

        Args:
            point: Coefficients ``(T, L)``, constants.
            mask: What was drawn of the logits; it follows them, so M2 moves under the new M1.
            batch: Images per task.
            seen: Where losses and logits are noted.

        Returns:
            L_perf + α L_safe on this rank.
        """
        loss, slope = self.weight_gradient(point, mask, self.losses_of(batch, seen))
        if self.masks == "dual":
            (gradient,) = self.pull_back(slope, point, mask, (False, True, False))
            self.step(0, self.logits, self._scaled(gradient), counts=False)
            del gradient  # a network's memory, before the next pass takes two
        safe, slope = self.weight_gradient(point, mask, self.safety_losses(batch, seen, self.alpha), into=slope)
        last = len(mask.logits) - 1
        (gradient,) = self.pull_back(slope, point, mask, (False, *(k == last for k in range(last + 1))))
        del slope
        self.step(last, self._logits()[last], self._scaled(gradient))
        return loss + safe

    def coefficient_step(self, batch: Batches, seen: Seen) -> Tensor:
        """Move the coefficients down the objective, and if the stage is ``safe`` down α_λ L_safe too."""
        mask, point = self.settled_mask().detach(), self.coefficients.detach()[:, self.column]
        loss, slope = self.weight_gradient(point, mask, self.losses_of(batch, seen))
        if self.coefficient_stage == "safe":
            state = self.complete(self.bank.contract(point, mask))
            for chunk in self.passes(state, batch):
                self.climb(state, batch, {task: _classes(seen, task, batch) for task in chunk})
            del state
            losses = self.safety_losses(batch, seen, self.coefficient_alpha)
            safe, slope = self.weight_gradient(point, mask, losses, into=slope)
            loss = loss + safe
        (columns,) = self.pull_back(slope, point, mask, (True, *(False for _ in mask.logits)))
        gradient = torch.zeros_like(self.coefficients).index_add_(1, self.column, columns)
        self.step(len(mask.logits), self.coefficients, gradient)
        return loss

    def safety_losses(
        self, batch: Batches, seen: Seen, weight: float
    ) -> Callable[[dict[str, Tensor]], Iterator[Tensor]]:
        """Return the weighted safety loss as a function of the merged network, for :meth:`weight_gradient`.

        Args:
            batch: The images whose logits without a perturbation ``seen`` has last.
            seen: Where to find these.
            weight: α.
        """
        perturbations = self.perturbations
        assert perturbations is not None

        def losses(state: dict[str, Tensor]) -> Iterator[Tensor]:
            rates: dict[str, Tensor] = {}
            for chunk in self.passes(state, batch):
                shaken = {task: perturbations(task, batch[task].images, box=self.box) for task in chunk}
                total: list[Tensor] = []
                for task, (_, logits) in self.all_outputs(state, shaken).items():
                    classes = _classes(seen, task, batch)
                    total.append(weight * batch[task].share * safety_loss(logits, classes, self.safety))
                    rates[task] = fooled(logits.detach(), classes) * batch[task].share
                yield torch.stack(total).sum()
            self.log("train/fooling_rate", torch.stack(list(rates.values())).mean(), batch_size=1)

        return losses

    def _scaled(self, gradient: Tensor) -> Tensor:
        """Divide by the root mean square of each tensor, in place, if that is the update."""
        if self.mask_update == "normalized":
            tiny = torch.finfo(gradient.dtype).tiny
            for part in filter(len, gradient.split(self.bank.sizes)):
                part /= torch.linalg.vector_norm(part, torch.inf).clamp(min=tiny)  # small numbers' squares would be 0
                part /= part.square().mean().sqrt().clamp(min=tiny)
        return gradient

    # Telling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def mask_facts(self) -> dict[str, float]:
        """Say what the masks look like; M1 before it is rescaled, M2 with the prefix ``detection_``."""
        facts = super().mask_facts()
        if self.masks == "dual":
            keep = self.detection.sigmoid()
            facts |= {"detection_mean": float(keep.mean()), "detection_lowest": float(keep.min())}
        return facts

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        largest = {} if self.perturbations is None else self.perturbations.largest()
        return super().report_extra() | {"perturbation": {"largest": largest}}


def _classes(seen: Seen, task: str, batch: Mapping[str, Any]) -> Tensor:
    """Return what was last predicted for a task's images; for borrowed ones, which have no weight, any class."""
    logits = seen.logits[task][-1]
    return logits.argmax(-1) if len(logits) else logits.new_zeros(len(batch[task].images), dtype=torch.long)
