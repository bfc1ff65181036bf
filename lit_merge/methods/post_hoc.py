"""Post-hoc defences: any merged network, and one mask on what it has learned, tuned against universal perturbations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_merge.adaptation import Batches, Perturbed
from lit_merge.checkpoints.arithmetic import ArithmeticState
from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.sources import weights_file
from lit_merge.errors import MergeError
from lit_merge.functional.concrete import FinalMask
from lit_merge.functional.finite import check_finite
from lit_merge.functional.masked import Mask
from lit_merge.masked_module import MaskedMergeModule, Seen
from lit_merge.perturbations import Ascent, UniversalPerturbations, fooled
from lit_merge.task_vectors import TaskVectors

__all__ = ("AdversarialMasking", "MaskUnit")

MaskUnit = Literal["entry", "neuron"]
_MERGED = "merged network"
_START = {"entry": 0.0, "neuron": 4.0}
_MEMORY = 20  # steps that the running fooling rate goes back


class AdversarialMasking(MaskedMergeModule):
    """Tune one mask on a merged network, θ = θ0 + m ⊙ (θm − θ0), until universal perturbations do it less harm.

    The premise, that of ANP and all that followed: what carries a backdoor is more sensitive to perturbations than the
    rest. Neither labels, nor the trigger, nor which expert is poisoned are known, and the experts themselves are not
    needed: the bank is the one task vector θm − θ0. Each step, on one unlabelled batch of every task,

    1. draws a mask, and moves each task's universal perturbation δ uphill under the masked network, whose weights are
       constants;
    2. takes an optimizer step of the mask's logits on the ``objective`` of the clean images + α · an adversarial loss
       of the images under δ.

    :class:`~lit_merge.methods.AWM` and :class:`~lit_merge.methods.SAU` differ in what is climbed and in the adversarial
    loss. As in the two post-hoc baselines in the code of DAM, the unit of the mask is an entry, and the mask is divided
    by its mean in each parameter tensor: it moves weight inside a tensor and cannot scale it. With ``unit: neuron``, as
    in ANP, all entries of a tensor with the same first index (an output row of a matrix, a filter, an entry of
    a vector) share a logit, and the mask is not rescaled, so that it can prune. It can then also just make the task
    vector shorter, which alone lowers attack success: compare with the ``effective_scale`` of the report.

    Where the published code is vague or defective this class is not: δ is kept in a ball and applied within the valid
    box of pixels, both phases use the same batch, and the final mask is deterministic.

    ==================  ======================================  ======================================================
    ``merged``          what is defended                        clean floor of the backdoor monitor
    ==================  ======================================  ======================================================
    null                task arithmetic of the suite's experts  the same of the clean experts, under the same mask
    a file or folder    what ``export`` or a run of lit-merge   task arithmetic (``init``) of the clean experts under
                        wrote, under the network's own names    the mask, as nothing tells how it was merged
    a state dict        the same, from Python                   likewise
    ==================  ======================================  ======================================================

    A checkpoint goes with one merged network and refuses any other; one made from a state dict wants it again as
    ``merged``. Transforms act on the merged task vector. Memory: logits with Adam's moments (three networks, if the
    unit is an entry), base and task vector, and two networks during a step.

    Args:
        merged: What is defended.
        init: Scale of the task arithmetic.
        unit: ``entry`` or ``neuron``.
        start: Logits at the start; by default 0 for entries, as released, and 4 for neurons. At 0 the masks of the
            steps drop half of the entries, and the rescaled final mask is 1 everywhere, so the run starts at the merged
            network itself; without rescaling it would start at half of its task vector. At 4 98.2 % of it are there,
            and a logit has a way to go before anything is pruned.
        alpha: Weight α of the adversarial loss, at least 0; published: 0.01.
        epsilon: Largest change of a pixel in [0, 1]; null for none, as released.
        ascent_steps: Steps of ascent for each step of the mask.
        ascent_rate: Change of a pixel by one step; by default a quarter of ``epsilon``.
        ascent_direction: ``sign`` or ``adam``, see :class:`~lit_merge.perturbations.Ascent`.
        final_mask: ``mean``, ``threshold`` (σ(x) ≥ ½: with neurons, it prunes) or ``sample``.
        **kwargs: ``temperature`` and ``mask_seed`` of :class:`~lit_merge.masked_module.MaskedMergeModule`, and those of
            :class:`~lit_merge.MergeModule`. An objective that looks at perturbed images is shown those under this δ.

    Raises:
        MergeError: A value is out of range; or, later, the merged network is not one of the suite's base, or nothing
            tells how the suite's images come from pixels.

    Source: Wu and Wang, Adversarial Neuron Pruning Purifies Backdoored Deep Models, arXiv 2110.14430; on merged
    networks: Yang et al., arXiv 2410.13910.
    """

    fooling: Tensor

    no_stream = "it defends one merged network; export the stream, and give it as merged"

    def __init__(
        self,
        merged: dict[str, Tensor] | str | Path | None = None,
        init: float = 0.3,
        unit: MaskUnit = "entry",
        start: float | None = None,
        alpha: float = 0.01,
        epsilon: float | None = 0.1,
        ascent_steps: int = 1,
        ascent_rate: float | None = None,
        ascent_direction: Literal["sign", "adam"] = "sign",
        final_mask: FinalMask = "mean",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base classes
    ) -> None:
        # hyper-parameters are taken from the arguments as they stand now: a path is one, as text, a network is not
        network, merged = merged, None if merged is None or isinstance(merged, Mapping) else str(merged)
        super().__init__(**kwargs)
        self._one_of("unit", unit, get_args(MaskUnit))
        self._one_of("final_mask", final_mask, get_args(FinalMask))
        check_finite(f"{type(self).__name__}.alpha", alpha, least=0)
        check_finite(f"{type(self).__name__}.start", start)
        self.merged: Mapping[str, Tensor] | str | None = network if isinstance(network, Mapping) else merged
        check_finite(f"{type(self).__name__}.init", init)
        self.init = init
        self.unit: MaskUnit = unit
        self.start = _START[unit] if start is None else start
        self.alpha = alpha
        self.ascent = Ascent(epsilon, ascent_steps, ascent_rate, ascent_direction)
        self.final_mask: FinalMask = final_mask
        self._fooled: dict[str, Tensor] = {}

    def _one_of(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if value not in known:
            kinds = f"{', '.join(known[:-1])} or {known[-1]}"
            raise MergeError(f"{type(self).__name__}.{name}: expected {kinds}, found {value!r}")

    # What is defended --------------------------------------------------------------------------------------------

    def read_bank(self, base: Mapping[str, Tensor]) -> TaskVectors:
        """Read the merged network as one task vector.

        Raises:
            MergeError: There is no such file, or it is not a merge of this base.
        """
        if self.merged is None:
            experts = {task: self.suite.expert(task) for task in self.suite.tasks}
            averaged = () if self.buffer_policy == "base" else self.skeleton.buffers_of
            state: Mapping[str, Tensor] = ArithmeticState(base, experts, self.init, averaged)
        else:
            state = self.merged if isinstance(self.merged, Mapping) else read_state(weights_file(Path(self.merged)))
            where = _MERGED if isinstance(self.merged, Mapping) else f"{_MERGED} {self.merged}"
            advice = "give a merge of this very base under the network's own names, such as merged.safetensors"
            check_keys(where, state, base, of="network", advice=advice)
        return TaskVectors.from_state_dicts(
            base,
            {_MERGED: state},
            buffers=self.skeleton.buffers_of,
            tied=self.skeleton.tied,
            dtype=self.bank_dtype,
            storage=self.storage_factory(),
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of base, merged network and heads; the perturbations belong to the tasks."""
        return super().fingerprint() | {"tasks": list(self.suite.tasks)}

    def coefficients_of(self, bank: TaskVectors) -> Tensor:
        """Coefficients ``(T, L)``: 1 for the merged network, ``init`` for each of several experts."""
        value = 1.0 if bank.tasks == (_MERGED,) else self.init
        return torch.full((len(bank.tasks), len(bank.names)), value, dtype=bank.compute_dtype, device=self.device)

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + m ⊙ (θm − θ0) with the final mask; every tensor is masked."""
        return bank.contract(self.coefficients_of(bank), self.settled_mask())

    # The mask ----------------------------------------------------------------------------------------------------

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make the logits, one per unit, and the perturbations."""
        self._widths = [1 if self.unit == "entry" else shape[1:].numel() for shape in bank.shapes.values()]
        self._rows = [size // max(width, 1) for size, width in zip(bank.sizes, self._widths, strict=True)]
        self.logits = nn.Parameter(torch.full((sum(self._rows),), self.start, dtype=bank.compute_dtype))
        # never moved: the distributed wrapper, which leaves the logits out, wants a parameter
        self.scale = nn.Parameter(torch.ones((), dtype=bank.compute_dtype))
        self.perturbations = UniversalPerturbations.of_suite(self.suite, self.ascent)
        self.register_buffer("fooling", torch.zeros(len(self.suite.tasks)))

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union
        """Make the optimizer of the logits."""
        return self.plans(self.optimizer_factory([self.logits]))

    def spread(self, logits: Tensor) -> Tensor:
        """Return the logit of each entry, ``(P,)``, from the logits of the units."""
        if self.unit == "entry":
            return logits
        parts = zip(logits.split(self._rows), self._widths, strict=True)
        return torch.cat([part[:, None].expand(-1, width).flatten() for part, width in parts])

    def mask(self, logits: Tensor, kind: FinalMask, step: int = -1) -> Mask:
        """Return a mask, rescaled if its unit is the entry; a sample is one draw per unit.

        Args:
            logits: ``(P,)``, see :meth:`spread`.
            kind: ``mean``, ``threshold`` or ``sample``, see :func:`lit_merge.functional.final_mask`.
            step: Of the sample; -1 for the one that is used in the end.
        """
        if self.unit == "entry":
            return super().mask(logits, kind, step)

        def recipe(column: int, piece: Tensor) -> Tensor:
            width = max(self._widths[column], 1)
            rows = self.drawn(column, piece[::width], kind, step)
            return rows[:, None].expand(-1, width).flatten()[: len(piece)]

        return Mask(recipe, (logits,))

    def settled_mask(self) -> Mask:
        """Return the mask that is used in the end."""
        return self.mask(self.spread(self.logits), self.final_mask)

    # Adapting ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batches, batch_idx: int) -> dict[str, Any]:
        """Take one step of perturbations and mask.

        Returns:
            The loss, and per task the logits ``(B, C)`` and the positions ``(B,)`` of the images, for callbacks.
        """
        seen, done = Seen(), self.trainer.global_step
        mask = self.mask(self.spread(self.logits), "sample", done)
        one = self.coefficients_of(self.bank)
        loss, (gradient,) = self.gradients(one, mask, [self.logits], self.losses_of(batch, seen))
        rates = torch.stack([self._fooled[task] for task in batch])
        rates = torch.as_tensor(self.trainer.strategy.reduce(rates, reduce_op="mean"))
        for task, rate in zip(batch, rates, strict=True):  # one by one: a list of places would be copied to the device
            self.fooling[self.suite.tasks.index(task)].lerp_(rate, max(1 / (done + 1), 1 / _MEMORY))
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/fooling_rate", rates.mean(), batch_size=1)
        self.log_dict({f"train/loss/{task}": value for task, value in seen.losses.items()}, batch_size=1)
        self.step(0, self.logits, gradient)
        return seen.outputs(loss, batch)

    def perturbed(
        self, state: Mapping[str, Tensor], batch: Batches, logits: Mapping[str, Tensor]
    ) -> dict[str, Perturbed]:
        """Move the perturbations, and take the adversarial loss of the images under them."""
        assert self.perturbations is not None
        images = {task: batch[task].images for task in logits}
        reference = self.reference_state()
        classes = self.classes(logits, images, reference)
        self.ascend(state, batch, classes, reference)
        shaken = {task: self.perturbations(task, part) for task, part in images.items()}
        changed = {task: found for task, (_, found) in self.all_outputs(state, shaken).items()}
        with torch.no_grad():
            answers = {} if reference is None else self.all_outputs(reference, shaken)
        result = {}
        for task, found in changed.items():
            adversarial = self.adversarial_loss(found, classes[task], answers.get(task, (None, None))[1])
            result[task] = Perturbed(found, self.alpha * adversarial)
            self._fooled[task] = fooled(found.detach(), classes[task]) * batch[task].share
        return result

    def reference_state(self) -> dict[str, Tensor] | None:
        """Return the network that the masked one is compared with, if the method has one."""
        return None

    @abstractmethod
    def classes(
        self, logits: Mapping[str, Tensor], images: Mapping[str, Tensor], reference: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Return what stands for the labels of clean images, ``(B,)`` per task.

        Args:
            logits: ``(B, C)`` per task, of the masked network.
            images: ``(B, C, H, W)`` per task.
            reference: See :meth:`reference_state`.
        """

    @abstractmethod
    def ascend(
        self,
        state: Mapping[str, Tensor],
        batch: Batches,
        classes: Mapping[str, Tensor],
        reference: dict[str, Tensor] | None,
    ) -> None:
        """Move the perturbations of some tasks uphill.

        Args:
            state: Complete state dict of the masked network, to be used as constants.
            batch: Images of all tasks.
            classes: See :meth:`classes`; for the tasks that are meant.
            reference: See :meth:`reference_state`.
        """

    @abstractmethod
    def adversarial_loss(self, perturbed: Tensor, classes: Tensor, reference: Tensor | None) -> Tensor:
        """Return what the mask minimises besides the objective, in the mean over images.

        Args:
            perturbed: Logits ``(B, C)`` of the masked network under the perturbation.
            classes: ``(B,)``, see :meth:`classes`.
            reference: Logits ``(B, C)`` of the reference under the perturbation, if there is one.
        """

    # Telling -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self) -> None:
        """Log the mean and the density of the mask."""
        facts = self.mask_facts()
        self.log_dict({f"mask/{key}": facts[key] for key in ("mean", "density")})

    @torch.no_grad()
    def mask_facts(self) -> dict[str, float]:
        """Say what the mask looks like before it is rescaled.

        Returns:
            ``mean``: mean of σ(x) over all entries; ``density``: share of entries with σ(x) ≥ ½; the lowest and the
            highest logit.
        """
        logits = self.spread(self.logits)
        return {
            "mean": float(logits.sigmoid().mean()),
            "density": float((logits >= 0).double().mean()),
            "lowest_logit": float(self.logits.min()),
            "highest_logit": float(self.logits.max()),
        }

    @torch.no_grad()
    def effective_scale(self) -> dict[str, float]:
        """Mean of coefficient · m over all entries: what a merge without a mask has to be compared at.

        Returns:
            Per task, for task arithmetic; else of the merged task vector as a whole, 1 meaning its own length.
        """
        mask, logits = self.settled_mask(), self.spread(self.logits)
        parts = logits.split(self.bank.sizes)
        mean = float(torch.stack([mask.recipe(column, part).sum() for column, part in enumerate(parts)]).sum())
        mean /= len(logits)
        return dict.fromkeys(self.suite.tasks, self.init * mean) if self.merged is None else {_MERGED: mean}

    def report_extra(self) -> dict[str, Any]:
        """Return plain data for ``extra`` of the report."""
        assert self.perturbations is not None
        fooling = dict(zip(self.suite.tasks, self.fooling.tolist(), strict=True))
        return {
            "mask": {"final": self.final_mask, "unit": self.unit, **self.mask_facts()},
            "effective_scale": self.effective_scale(),
            "perturbations": {"fooling_rate": fooling, "largest": self.perturbations.largest()},
        }
