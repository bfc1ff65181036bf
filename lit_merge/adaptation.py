"""Adaptation of a merge: the loss of one unlabelled batch of every task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_merge.autocast_weights import autocast_type
from lit_merge.block_steps import BlockSteps
from lit_merge.data.batches import UnlabelledBatch
from lit_merge.errors import MergeError
from lit_merge.functional.activation_memory import bytes_per_image, saved_bytes
from lit_merge.functional.leaf_gradient import leaf_loss, leaves
from lit_merge.lazy_weights import LazyWeights, detached
from lit_merge.objectives import Objective, TaskOutput
from lit_merge.perturbations import UniversalPerturbations
from lit_merge.skeleton import Skeleton
from lit_merge.teachers import TeacherCache

__all__ = ("AdaptationSteps", "Batches", "Perturbed")

Batches = dict[str, UnlabelledBatch]


class Perturbed(NamedTuple):
    """What becomes of a task's images under its perturbation.

    Attributes:
        logits: ``(B, C)``, for the objective.
        loss: What is to be added to the objective, a mean over images.
    """

    logits: Tensor | None
    loss: Tensor | None = None


_UNPERTURBED = Perturbed(None)


class AdaptationSteps(BlockSteps):
    """The adaptation half of :class:`~lit_merge.MergeModule`: merge once per step, then the losses of all tasks.

    Attributes:
        objective: Loss of each task.
        perturbations: Universal perturbations of the tasks' images, if the objective or the method has them.
        max_images: Images per encoder pass, or ``auto``.
        activation_budget: Bytes for what a pass keeps for its way back, if ``max_images`` is ``auto``.
    """

    skeleton: Skeleton
    objective: Objective
    perturbations: UniversalPerturbations | None
    max_images: int | Literal["auto"] | None
    activation_budget: int
    teachers: TeacherCache
    _hands_on = True  # whether the rule returns what the bank contracts as it is
    _image_bytes: dict[object, int]

    @abstractmethod
    def complete(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add to merged parameters what a network needs besides."""

    @abstractmethod
    def head(self, task: str) -> nn.Module:
        """Return the frozen head of a task."""

    def use_passes(self, max_images: int | Literal["auto"] | None, activation_budget: int) -> None:
        """Set :attr:`max_images` and :attr:`activation_budget`.

        Raises:
            MergeError: One of them is out of range.
        """
        if max_images not in (None, "auto") and (isinstance(max_images, str) or max_images < 1):
            raise MergeError(f"model.max_images: expected auto, null or at least 1, found {max_images}")
        if activation_budget < 1:
            raise MergeError(f"model.activation_budget: expected at least 1 byte, found {activation_budget}")
        self.max_images, self.activation_budget = max_images, activation_budget
        self._image_bytes = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # noqa: ANN401 - a method may have its own
        """Find out which weights autocast casts before the first step, so that a run that goes on makes them alike."""
        parts = batch.values() if isinstance(batch, Mapping) else ()
        images = next((part.images[:1] for part in parts if isinstance(part, UnlabelledBatch)), None)
        if images is not None and self.merge_by == "network" and self.skeleton.autocast_weights.names is None:
            with self.trainer.precision_plugin.train_step_context(), torch.enable_grad():
                if autocast_type(self.device) is not None:
                    self.skeleton(self._as_leaves(self.bank.base), images)
        return None

    def training_step(self, batch: Batches, batch_idx: int) -> dict[str, Any]:
        """Take the loss of one unlabelled batch of every task; the losses of the tasks are summed.

        Returns:
            The loss, and per task the logits ``(B, C)`` and the positions ``(B,)`` of the images, for callbacks.
        """
        merged = self.merged_to_adapt()
        weights = leaves(merged)
        outputs: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        state = self.complete(weights)
        count = len(self.passes(state, batch))
        found = self._chunk_losses(state, batch, outputs, losses)
        loss = leaf_loss(merged, weights, found, self._loss_scale(), count)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log_dict({f"train/loss/{task}": value for task, value in losses.items()}, batch_size=1)
        index = {task: batch[task].index[: len(logits)] for task, logits in outputs.items()}
        return {"loss": loss, "logits": outputs, "index": index}

    def merged_to_adapt(self) -> dict[str, Tensor]:
        """Merge; what autocast would cast in every layer is made in its type, if the rule hands it on as it is.

        A rule that goes on computing with what the bank contracts would do so in half precision; it is asked again.
        Nothing of a rule is under autocast, which would multiply matrices of coefficients in half precision. Block by
        block autocast casts by itself.
        """
        if self.merge_by == "block":
            return super().merged_to_adapt()
        types = self.skeleton.autocast_weights.types(self.device) if self._hands_on else {}
        with torch.autocast(self.device.type, enabled=False):
            with self.bank.contracting_to(types) as contracted:
                merged = self.merge(self.bank)
            made = (value.grad_fn for name, value in merged.items() if value.grad_fn is not None or name in types)
            ways = {getattr(function, "way_back", None) for function in made}
            if not types or (None not in ways and ways == contracted):
                return merged
            self._hands_on = False
            del merged
            return self.merge(self.bank)

    def _chunk_losses(
        self, state: dict[str, Tensor], batch: Batches, outputs: dict[str, Tensor], losses: dict[str, Tensor]
    ) -> Iterator[Tensor]:
        """Sum of the losses of each chunk; logits and single losses are noted on the way."""
        for chunk in self.passes(state, batch):
            found = self.all_outputs(state, {task: batch[task].images for task in chunk})
            shaken = self.perturbed(state, batch, {task: logits.detach() for task, (_, logits) in found.items()})
            total: list[Tensor] = []
            for task, (features, logits) in found.items():
                under = shaken.get(task, _UNPERTURBED)
                output = self._task_output(task, batch[task], logits, features)
                loss = self.objective(output._replace(perturbed_logits=under.logits))
                loss = loss if under.loss is None else loss + under.loss
                total.append(loss * batch[task].share)
                losses[task] = loss.detach()
                outputs[task] = logits.detach()[: None if batch[task].share else 0]  # borrowed images do not count
            yield torch.stack(total).sum()

    def passes(self, state: Mapping[str, Tensor], batch: Batches) -> list[list[str]]:
        """Say which tasks go through the encoder together: up to :attr:`max_images`, or as many as memory is meant for.

        What an image takes is measured once, with one of its shape; all ranks find the same.

        Args:
            state: Complete state dict.
            batch: Images of all tasks.
        """
        if self.max_images != "auto":
            return chunks(batch, self.max_images)
        most = {}
        for task, part in batch.items():
            shape = part.images.shape[1:]
            if shape not in most:
                most[shape] = max(1, self.activation_budget // self._bytes_per_image(state, task, part.images[:1]))
        return chunks(batch, most)

    def _bytes_per_image(self, state: Mapping[str, Tensor], task: str, image: Tensor) -> int:
        key = (image.shape, autocast_type(self.device))
        if key not in self._image_bytes:
            saved = saved_bytes
            if isinstance(state, LazyWeights):  # stay so
                saved = self.skeleton.by_block.saved_bytes
            else:
                state = self._as_leaves(state)
            found = bytes_per_image(lambda images: self.head(task)(self.skeleton(state, images)), image, saved)
            again = self.objective.ascent is not None or type(self).perturbed is not AdaptationSteps.perturbed
            self._image_bytes[key] = found * (2 if again else 1)  # the same images go once more, perturbed
        return self._image_bytes[key]

    def _as_leaves(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fixed = self.skeleton.buffers_of
        return {n: x.detach().requires_grad_(n not in fixed and x.is_floating_point()) for n, x in state.items()}

    def perturbed(
        self, state: Mapping[str, Tensor], batch: Batches, logits: Mapping[str, Tensor]
    ) -> dict[str, Perturbed]:
        """Move the perturbations of some tasks uphill, if there are any, and run the network on the images under them.

        Args:
            state: Complete state dict, from which the losses are computed.
            batch: Images of all tasks.
            logits: ``(B, C)`` without a perturbation, constants, of the tasks that are meant.
        """
        if self.perturbations is None or self.objective.ascent is None:
            return {}
        self.climb(state, batch, {task: found.argmax(-1) for task, found in logits.items()})
        shaken = {task: self.perturbations(task, batch[task].images) for task in logits}
        return {task: Perturbed(found) for task, (_, found) in self.all_outputs(state, shaken).items()}

    def climb(self, state: Mapping[str, Tensor], batch: Batches, classes: Mapping[str, Tensor]) -> None:
        """Move the universal perturbations of some tasks uphill, with a network's weights as constants.

        Args:
            state: Complete state dict.
            batch: Images of all tasks; the ranks have different ones.
            classes: What is predicted for them without a perturbation, ``(B,)``, for the tasks that are meant.
        """
        if self.perturbations is None:
            raise MergeError(f"{type(self).__name__}: its objective has no universal perturbations")
        still = detached(state)
        self.perturbations.climb(
            lambda images: {task: logits for task, (_, logits) in self.all_outputs(still, images).items()},
            {task: batch[task].images for task in classes},
            classes,
            {task: batch[task].share for task in classes},
            lambda gradient: torch.as_tensor(self.trainer.strategy.reduce(gradient, reduce_op="mean")),
            self._loss_scale(),
        )

    def _task_output(self, task: str, batch: UnlabelledBatch, logits: Tensor, features: Tensor) -> TaskOutput:
        if not self.objective.uses_expert:
            return TaskOutput(logits, features, share=batch.share)
        with torch.no_grad():
            storage, expert = self.bank.storage, None
            if storage.shared and storage.anyone(not self.teachers.knows(task, batch)):
                expert = self.expert_state(task)  # fetched together, for images that are new to any of the ranks
            expert_features, expert_logits = self.teachers.outputs(
                task,
                batch,
                lambda: len(self.suite.dataset(task, "test")),
                lambda images: self.outputs(expert or self.expert_state(task), task, images),
            )
        return TaskOutput(logits, features, expert_logits, expert_features, batch.share)

    def _loss_scale(self) -> float:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def all_outputs(
        self, state: Mapping[str, Tensor], images: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run images ``(B, C, H, W)`` of several tasks, all of one shape, in one pass: features and logits per task."""
        parts = self.skeleton(state, torch.cat(list(images.values()))).split([len(part) for part in images.values()])
        return {task: (part, self.head(task)(part)) for task, part in zip(images, parts, strict=True)}


def chunks(batch: Mapping[str, UnlabelledBatch], most: int | Mapping[torch.Size, int] | None) -> list[list[str]]:
    """Group tasks whose images have the same shape, up to ``most`` images a group, or up to those of their shape.

    All ranks group alike, as those that climb together must: a rank with an image less counts the others' number, which
    follows from its share.

    >>> b = {t: UnlabelledBatch(torch.zeros(4, 1, 2, 2), torch.arange(4)) for t in "abc"}
    >>> chunks(b, 8), chunks(b, None)
    ([['a', 'b'], ['c']], [['a', 'b', 'c']])
    """
    groups: list[list[str]] = []
    size = 0
    for task, part in batch.items():
        images = part.images
        same = groups and batch[groups[-1][0]].images.shape[1:] == images.shape[1:]
        count = ceil(len(images) / part.share - 1e-6) if part.share else len(images)  # the largest of any rank
        limit = most[images.shape[1:]] if isinstance(most, Mapping) else most
        if not same or (limit is not None and size + count > limit):
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += count
    return groups
