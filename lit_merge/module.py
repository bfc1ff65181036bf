"""MergeModule: a merge as a LightningModule, and the one base class of all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_merge.agreement import check_agreement
from lit_merge.bank_reading import BankReading, StorageDtype
from lit_merge.block_steps import MergeBy
from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.lazy import Selected
from lit_merge.data.batches import UnlabelledBatch
from lit_merge.errors import MergeError
from lit_merge.functional.batch_norm import recalibrate_batch_norm
from lit_merge.lost_ranks import stop_watching, watch_parent
from lit_merge.metrics import TaskScores
from lit_merge.model_parallel import adopt_strategy, average_gradients
from lit_merge.objectives import Entropy, Objective
from lit_merge.perturbations import UniversalPerturbations
from lit_merge.skeleton import Skeleton, freeze_to_buffers
from lit_merge.stage_bank import StageBank
from lit_merge.storage import StorageKind
from lit_merge.stream_steps import StreamSteps
from lit_merge.suites.base import Suite
from lit_merge.task_vectors import TaskVectors
from lit_merge.teachers import TeacherCache
from lit_merge.transforms import Needs, Pieces, Transform

__all__ = ("MergeModule",)

Batches = dict[str, UnlabelledBatch]
_OBJECTS = ("suite", "transforms", "objective", "optimizer", "scheduler")


class MergeModule(BankReading, StreamSteps, ABC):
    """One network out of many: frozen task vectors, a rule that combines them, an objective that adapts the rule.

    A method says how it merges (:meth:`merge`) and, if it learns, how its parameters are made
    (:meth:`make_parameters`). Everything else is here: one pass over the task vectors per step however many tasks
    there are, evaluation beside base and experts, kilobyte checkpoints that know their experts.

    Args:
        suite: What is merged.
        transforms: Applied to the task vectors in order, before the rule sees them.
        objective: Loss of each task on unlabelled images; by default :class:`~lit_merge.objectives.Entropy`.
        optimizer: Makes the optimizer from the parameters; by default Adam with learning rate 1e-3.
        scheduler: Makes the scheduler from the optimizer, stepped every step.
        buffers: Running statistics of the merged network: ``average`` of the experts', those of the ``base``, or
            ``recalibrate``: average while adapting, then measured on unlabelled images before each evaluation.
        max_images: Images per encoder pass in adaptation; tasks are grouped up to it, to save memory. A task's batch
            is never split. By default all tasks go together. ``auto``: as many as ``activation_budget`` is enough for.
        activation_budget: Bytes for what the network keeps of one pass for its way back, under ``max_images: auto``.
        teacher_cache: Bytes for the experts' outputs, if the objective needs them.
        merge_by: What is merged at once in a step of adaptation. ``network``: all weights. ``block``: those of one
            numbered block, again in the backward pass, so that neither merged weights nor their gradient, nor the
            activations inside of blocks take more memory than one block's; a step costs one pass forward more.
        storage_dtype: How task vectors are kept; by default as the base, at least float32. ``bfloat16`` halves the
            memory at a relative error of 2⁻⁹ per task vector; coefficients and sums stay in float32.
        storage: Where they are kept: on the ``device``, the ``host``, in a file (``mmap``), on the device with matrices
            cut to ``low_rank``, or ``sharded`` over the ranks; ``auto``: the first of ``device``, ``host`` and ``mmap``
            that has room. Only ``low_rank`` changes results, see :class:`~lit_merge.storage.StorageChoice`.
        storage_rank: Directions that ``low_rank`` keeps of each matrix and task: a number, or a share in (0, 1].
        storage_budget: Bytes that base and task vectors may take on the device; by default what is free is measured.
        storage_folder: Where the file of ``mmap`` is, without a name; by default the folder for temporary files.

    Raises:
        MergeError: A value is out of range.
    """

    bank: TaskVectors
    skeleton: Skeleton
    heads: nn.ModuleList
    perturbations: UniversalPerturbations | None

    def __init__(
        self,
        suite: Suite,
        transforms: Sequence[Transform] | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        buffers: Literal["average", "base", "recalibrate"] = "average",
        max_images: int | Literal["auto"] | None = None,
        activation_budget: int = 4 * 2**30,
        teacher_cache: int = 2**30,
        storage_dtype: StorageDtype | None = None,
        storage: StorageKind = "auto",
        storage_rank: int | float = 0.25,
        storage_budget: int | None = None,
        storage_folder: str | None = None,
        merge_by: MergeBy = "network",
    ) -> None:
        super().__init__()
        if buffers not in ("average", "base", "recalibrate"):
            raise MergeError(f"model.buffers: expected average, base or recalibrate, found {buffers!r}")
        self.keep_in(storage_dtype, storage, storage_rank, storage_budget, storage_folder)
        self.use_passes(max_images, activation_budget)
        self.use_merge_by(merge_by)
        self.save_hyperparameters(ignore=(*_OBJECTS, "storage_budget", "storage_folder"))  # these say where it ran
        self.suite = suite
        self.transforms = tuple(transforms or ())
        self.objective = objective or Entropy()
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler
        self.buffer_policy = buffers
        self.perturbations = None
        self.teachers = TeacherCache(teacher_cache)
        self._measured: dict[str, Tensor] = {}

    # What a method says ------------------------------------------------------------------------------------------

    def make_parameters(self, bank: TaskVectors) -> None:
        """Make what is learned, as ``nn.Parameter`` attributes; a method that learns nothing leaves this out."""

    @abstractmethod
    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the merged parameters by name, differentiable with respect to what is learned."""

    def project(self) -> None:
        """Bring the parameters back to where they may be; called after each step, without gradients."""

    def coefficient_table(self) -> Tensor | None:
        """Return coefficients per task and tensor ``(T, L)`` for tables and pictures, if the method has them."""
        return None

    def report_extra(self) -> dict[str, Any]:
        """Return plain data that the method adds to ``extra`` of the report."""
        return {}

    @property
    def stored_bytes(self) -> int:
        """Bytes to be kept to serve all tasks, heads aside: one network, unless the method says otherwise."""
        state = {id(value): value for value in self.bank.base.values()}  # tied names once
        return sum(value.nbytes for value in state.values())

    @property
    def needs(self) -> Needs:
        """What the rule has to see at once, see :mod:`lit_merge.streaming`; a method that says nothing: everything."""
        return "data" if self.learnable else "network"

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges the pieces of a network one after the other, in sorted order of names.

        Args:
            pieces: Task vectors of the whole network, read piece by piece, for statistics.
        """
        return self.merge

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Whether each entry of a tensor is merged for itself, given the statistics; it may then be read in parts.

        Args:
            name: Name of the tensor.
            shape: Its shape; a part is flat.
        """
        return False

    @property
    def learnable(self) -> bool:
        """Whether the method has parameters to train."""
        return type(self).make_parameters is not MergeModule.make_parameters

    # Building ----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build or download the suite, once per node."""
        self.suite.prepare()

    def configure_model(self) -> None:
        """Read base, experts and heads; idempotent, as Lightning calls it for every stage."""
        if hasattr(self, "bank"):
            return
        self.suite.prepare()
        self.skeleton = Skeleton(self.suite.network())
        self.skeleton.by_block.check(self.merge_by)
        base = self.suite.base()
        check_keys("base", base, self.skeleton.keys, of="network", advice="give the state dict of this very network")
        base = Selected(base, self.skeleton.keys)  # columns go with depth, whatever a file's order is
        if self.progress is None:
            bank = self.transformed_bank(base)
        else:  # in a stream the experts are read one by one
            bank = self.accumulated = StageBank.of_base(base, buffers=self.skeleton.buffers_of, tied=self.skeleton.tied)
        self.head_digests = {task: state_digest(self.suite.head(task).state_dict()) for task in self.suite.tasks}
        self.heads = nn.ModuleList(freeze_to_buffers(deepcopy(self.suite.head(task))) for task in self.suite.scored)
        self.scores = TaskScores(self.suite.tasks, self.suite.unseen)
        self.bank = bank
        if (ascent := self.objective.ascent) is not None:
            self.perturbations = UniversalPerturbations.of_suite(self.suite, ascent)
        self.make_parameters(bank)
        check_agreement(self, learned=False)  # before the wrapper of several ranks stumbles over a shape
        # the bank is the same on all ranks; broadcasting it at every step would cost gigabytes
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [n for n, _ in self.named_buffers(remove_duplicate=False)]
        )

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's union
        """Make the optimizer and, if asked for, the scheduler."""
        if not self.learnable:
            return None  # in a stream, where such a method is fitted without a step
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        options = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            options["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": options}

    def setup(self, stage: str) -> None:
        """Get the strategy ready, refuse precisions that would round the coefficients; watch for the end of rank zero.

        Raises:
            MergeError: A learnable merge with a half ``*-true`` precision.
        """
        watch_parent(self.trainer)
        adopt_strategy(self.trainer.strategy)
        precision = str(self.trainer.precision)
        if self.learnable and precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
            raise MergeError(
                f"trainer.precision: {precision} would round the coefficients (steps of 0.002 at 0.3); "
                "use bf16-mixed or 32-true"
            )

    def on_fit_start(self) -> None:
        """Check that all ranks hold the same, and forget statistics of an evaluation before this fit.

        Raises:
            MergeError: Something differs between ranks, see :mod:`lit_merge.agreement`.
        """
        self._measured = {}  # made in inference mode, and for other coefficients
        check_agreement(self, learned=True)

    def teardown(self, stage: str) -> None:
        """Watch no longer for the end of rank zero."""
        stop_watching()

    # Adapting: see AdaptationSteps -------------------------------------------------------------------------------

    def on_after_backward(self) -> None:
        """Let all ranks have the same gradients, where the strategy does not."""
        average_gradients(self.trainer.strategy, self.parameters())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's hook
        """Step, then project."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.project()

    # The merged network ------------------------------------------------------------------------------------------

    def head(self, task: str) -> nn.Module:
        """Return the frozen head of a task."""
        return self.heads[self.suite.scored.index(self.suite.check_task(task))]

    def outputs(self, state: Mapping[str, Tensor], task: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run a complete state dict on images ``(B, C, H, W)``: features ``(B, D)`` and logits ``(B, C)``."""
        features = self.skeleton(state, images)
        return features, self.head(task)(features)

    def complete(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add buffers by the policy, integer tensors and tied names to merged parameters."""
        policy: Literal["average", "base"] = "base" if self.buffer_policy == "base" else "average"
        return self.bank.complete(parameters, policy) | self._measured

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """State dict of the merged network, with the keys of the base: what :meth:`export` writes."""
        self.configure_model()  # a merge that went piece by piece has read no network
        settled = self.settled_state()
        return self.complete(self.merge(self.bank)) if settled is None else settled

    def expert_state(self, task: str) -> dict[str, Tensor]:
        """State dict of one expert as it was before the transforms, on this module's device."""
        if self.progress is not None:
            return super().expert_state(task)
        if not self.transforms and task in self.bank.tasks:
            return self.bank.expert(task)
        if self._expert[0] != task:  # transforms changed the bank, or it has no unseen task, so the suite is asked
            self._expert = (task, {name: value.to(self.device) for name, value in self.suite.expert(task).items()})
        return self._expert[1]

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Batches]) -> None:
        """Measure running statistics of batch normalisation under the merged weights.

        Args:
            batches: Unlabelled batches of all tasks, the same on all ranks.
        """
        self._measured = {}
        state = self.merged_state()
        mixed = (torch.cat([part.images.to(self.device) for part in batch.values()]) for batch in batches)
        self._measured = recalibrate_batch_norm(self.skeleton.network, state, mixed)

    @property
    def needs_images(self) -> bool:
        """Whether :meth:`calibrate` needs a data module."""
        return self.buffer_policy == "recalibrate"

    def calibrate(self, datamodule: Any) -> None:  # noqa: ANN401 - any data module, or none
        """Take from images what the merge needs of them, before it is scored or exported; on all ranks.

        Args:
            datamodule: A :class:`~lit_merge.TaskDataModule` that was set up, or ``None``.

        Raises:
            MergeError: There is none, and the policy for buffers needs one.
        """
        if self.buffer_policy != "recalibrate":
            return
        if datamodule is None:
            raise MergeError(
                "model.buffers: recalibrate needs a TaskDataModule to draw unlabelled images from; give --data"
            )
        self.recalibrate(datamodule.adaptation_batches())

    def prepare_evaluation(self) -> None:
        """Check that all ranks hold the same, and calibrate with the images of the trainer's data module."""
        check_agreement(self, learned=True)
        self.calibrate(getattr(self.trainer, "datamodule", None))

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Return the merged network's logits of one task: images ``(B, C, H, W)`` to ``(B, classes)``."""
        return self.outputs(self._merged or self.merged_state(), task, images)[1]

    # Checkpoints -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load what was learned into parameters that are made first.

        A strategy that forks or spawns brings its result back into a module that was never configured.
        """
        self.configure_model()
        if self.perturbations is None:  # of an objective that only the fit had
            kept: Any = copy(state_dict)  # with its metadata, which a new dictionary would lack
            for name in [name for name in state_dict if name.startswith("perturbations.")]:
                del kept[name]
            state_dict = kept
        return super().load_state_dict(state_dict, strict, assign)
