"""A merge in a stream of experts: two task vectors in memory, parameters that begin anew in every stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_merge.adaptation import AdaptationSteps
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.reading import read_state
from lit_merge.errors import ChangedExpertError, MergeError
from lit_merge.fingerprint import check_fingerprint, fingerprint
from lit_merge.metrics import Results, mean_over_tasks
from lit_merge.progress import Progress
from lit_merge.stage_bank import Differences, StageBank
from lit_merge.stage_files import find_stage
from lit_merge.stages import Stage, StageSteps
from lit_merge.storage import StorageKind

__all__ = ("StreamSteps",)

ExpertReader = Callable[[str], Mapping[str, Tensor]]


class StreamSteps(AdaptationSteps, StageSteps):
    """The part of :class:`~lit_merge.MergeModule` that :class:`~lit_merge.callbacks.SequentialMerging` drives.

    Attributes:
        progress: How far the stream has come; ``None`` outside of a stream.
        accumulated: Base, merged task vector and the newest expert; :attr:`bank` is the same, or what the transforms
            make of it within a stage.
        stage_folder: Where the stage's file of a checkpoint may be, if no Trainer knows.
        no_stream: Why a method cannot be used in a stream; empty if it can.
    """

    no_stream: ClassVar[str] = ""
    bank: Any
    accumulated: StageBank
    transforms: Any
    buffer_policy: Literal["average", "base", "recalibrate"]
    storage: StorageKind
    storage_dtype: Literal["float32", "bfloat16", "float16"] | None
    head_digests: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self.progress: Progress | None = None
        self.expert_reader: ExpertReader | None = None
        self.stage_folder: Path | None = None
        self._in_stage = False

    # In and out of a stream --------------------------------------------------------------------------------------

    def enter_stream(self, progress: Progress | None = None, reader: ExpertReader | None = None) -> None:
        """Make this the merge of a stream, in which experts are read one by one; before or after it was configured.

        Args:
            progress: How far the stream has come; by default it begins.
            reader: Returns the state dict of an expert; by default the suite's.

        Raises:
            MergeError: The method, or an argument of it, makes no sense in a stream.
        """
        if reader is not None:
            self.expert_reader = reader
        if self.progress is None:
            name = type(self).__name__
            if reason := self.no_stream or self._why_no_stream():
                raise MergeError(f"{name}: it cannot merge a stream of experts: {reason}")
            self.progress = Progress()
            if hasattr(self, "bank"):
                del self.bank
        if progress is not None:
            self.progress = progress

    def _why_no_stream(self) -> str:
        if self.buffer_policy == "recalibrate":
            return "buffers: recalibrate needs images of all tasks at any time; use average or base"
        if self.storage_dtype is not None:
            return f"storage_dtype: {self.storage_dtype} would round the merge in every stage; leave it out"
        if self.storage not in ("auto", "device"):
            return f"storage: {self.storage} is for many experts, and a stream holds one at a time; leave it out"
        if self.transforms and type(self).absorb is not StageSteps.absorb:
            return "its absorb takes task vectors as they are, without the transforms; leave them out"
        return ""

    @property
    def adopting(self) -> bool:
        """Whether the first expert of a stream has arrived: it is taken as it is, so there is nothing to train."""
        return self.progress is not None and self.progress.started <= 1

    @property
    def stage_step(self) -> int:
        """Steps since this stage began; outside of a stream, since the fit began."""
        return self.trainer.global_step - (0 if self.progress is None else self.progress.first_step)

    @property
    def stage_steps(self) -> float:
        """Steps that there will be in this stage; outside of a stream, in the fit."""
        total = self.trainer.estimated_stepping_batches
        return total if self.progress is None else total / max(1, len(self.progress.order))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:  # noqa: ANN401
        """Pass over the epochs of the first expert, and all of a method that learns nothing."""
        if self.progress is not None and (self.adopting or not self._in_stage):
            return -1
        return super().on_train_batch_start(batch, batch_idx)

    def on_stage_start(self) -> None:
        """Be told that :attr:`bank` has the expert of another stage; for what is precomputed from it."""

    # One stage ---------------------------------------------------------------------------------------------------

    def read_expert(self, task: str) -> Mapping[str, Tensor]:
        """Return the state dict of an expert; of one that was absorbed, only if it is still the same."""
        assert self.progress is not None
        state = self.suite.expert(task) if self.expert_reader is None else self.expert_reader(task)
        if task in self.progress.digests:
            self.check_expert(task, state_digest(state))
        return state

    def check_expert(self, task: str, digest: str) -> None:
        """Compare an expert with the one of that name that was read before.

        Raises:
            ChangedExpertError: It is another one.
        """
        assert self.progress is not None
        known = self.progress.digests.setdefault(task, digest)
        if known != digest:
            raise ChangedExpertError(
                f"checkpoint: its expert {task!r} was sha256:{known[:12]}, this run has sha256:{digest[:12]}; give the "
                "expert of the checkpoint, or start without --ckpt_path"
            )

    def open_stage(self, number: int, *, begin: bool) -> None:
        """Put the expert of a stage into the bank.

        Args:
            number: Of the stage, from 1.
            begin: Parameters begin at what :meth:`make_parameters` gives for this bank; otherwise a resumed run is in
                the middle of the stage, and they stay.
        """
        assert self.progress is not None
        task = self.progress.order[number - 1]
        state = self.suite.expert(task) if self.expert_reader is None else self.expert_reader(task)
        self.check_expert(task, self.accumulated.receive(task, state, number))
        self.bank = self.accumulated
        for transform in self.transforms if number > 1 else ():
            self.bank = self.bank.map(transform)
        self._remake(begin)
        self.teachers.clear()
        if begin and self.perturbations is not None:
            self.perturbations.reset()
        self._in_stage = number > 1 and self.learnable
        self.on_stage_start()

    @property
    def learnable(self) -> bool:
        """Whether the method has parameters to train."""
        return False

    def make_parameters(self, bank: Any) -> None:  # noqa: ANN401 - said by MergeModule
        """Make what is learned."""

    def _remake(self, begin: bool) -> None:
        """Make parameters and what goes with them for the bank as it is now, in the tensors that are there.

        Optimizers, and the wrapper of several ranks, hold on to parameters.
        """
        if not self.learnable:
            return
        kept = self.state_dict(keep_vars=True)  # parameters, and buffers that are learned
        self.make_parameters(self.bank)
        self.to(self.device)  # buffers that are fixed
        owners = dict(self.named_modules())
        for name, old in kept.items():
            path, _, leaf = name.rpartition(".")
            owner = owners[path]
            table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
            if begin:
                with torch.no_grad():
                    old.copy_(table[leaf])
            table[leaf] = old

    @torch.no_grad()
    def close_stage(self, number: int) -> dict[str, Tensor]:
        """Absorb the expert that is in the bank.

        Args:
            number: Of the stage, from 1.

        Returns:
            The merged network with its buffers, at least in float32; what goes into the stage's file.

        Raises:
            MergeError: The method returned something else than a finite task vector.
        """
        progress, accumulated = self.progress, self.accumulated
        assert progress is not None
        numbers = deepcopy(progress.numbers)
        stage = Stage(number, progress.order[number - 1], tuple(progress.order[: number - 1]), numbers, self._vectors)
        with torch.autocast(self.device.type, enabled=False):
            merged = self.absorb(accumulated.merged, accumulated.incoming, stage)
        _check_merged(type(self).__name__, stage.task, merged, accumulated.merged)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            merged = {name: merged[name].contiguous().clone() for name in accumulated.names}
            for value in merged.values():  # whatever the devices of the ranks are
                torch.distributed.broadcast(value, src=0)
        accumulated.settle(merged)
        self.bank, self._in_stage = accumulated, False
        progress.numbers = numbers
        progress.absorbed = number
        return accumulated.settled_state(wide=True)

    def _vectors(self, task: str) -> Mapping[str, Tensor]:
        return Differences(self.read_expert(task), self.accumulated, self.device)

    # What is scored ----------------------------------------------------------------------------------------------

    def settled_state(self) -> dict[str, Tensor] | None:
        """Return the merged network between stages; ``None`` within a stage, and outside of a stream."""
        if self.progress is None or self._in_stage:
            return None
        return self.accumulated.settled_state("base" if self.buffer_policy == "base" else "average")

    def has_expert(self, task: str) -> bool:
        """Whether an expert is there to be scored beside the merge; not again if it was at its arrival."""
        if self.progress is None:
            return super().has_expert(task)
        if task in self.progress.experts or task not in self.progress.known:
            return False
        if self.expert_reader is None or task in (self._expert[0], self.accumulated.tasks[1]):
            return True
        try:  # its file may be gone since it was absorbed
            self.expert_reader(task)
        except (MergeError, OSError):
            return False
        return True

    def expert_state(self, task: str) -> dict[str, Tensor]:
        """State dict of one expert, on this module's device."""
        if task == self.accumulated.tasks[1]:
            return self.accumulated.expert(task)
        if self._expert[0] != task:
            state = self.read_expert(task)
            self._expert = (task, {name: value.to(self.device) for name, value in state.items()})
        return self._expert[1]

    def with_references(self, results: Results) -> Results:
        """Add the accuracy of experts that were scored at their arrival, and may be gone since."""
        if self.progress is None:
            return results
        for task, row in results["tasks"].items():
            correct, total = self.progress.experts.get(task, (0, 0))
            if total and total == row["n"] and "expert_accuracy" not in row:
                row["expert_accuracy"] = correct / total
                row["normalized_accuracy"] = row["accuracy"] / max(correct / total, 1 / total)
        results["mean"] = mean_over_tasks(results["tasks"])
        return results

    # Checkpoints, in a stream and outside of one ---------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of everything that the parameters belong to."""
        found = fingerprint(self.bank, self.head_digests, self.transforms)
        if self.progress is None:
            return found
        history = self.progress.history
        return found | {"tasks": list(history), "experts": {task: self.progress.digests[task] for task in history}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which base, experts and transforms the parameters were learned with."""
        checkpoint["lit_merge"] = self.fingerprint()
        self.save_stream(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse parameters that were learned with other networks."""
        if "lit_merge_stages" in checkpoint:
            self.enter_stream()
            self.configure_model()
            self.load_stream(checkpoint, self.fingerprint())
            return
        self.configure_model()
        if self.progress is not None:
            raise MergeError("checkpoint: it is not one of a stream; leave SequentialMerging or --ckpt_path out")
        check_fingerprint(checkpoint.get("lit_merge", {}), self.fingerprint())

    def save_stream(self, checkpoint: dict[str, Any]) -> None:
        """Put the state of the stream into a checkpoint."""
        if self.progress is not None:
            checkpoint["lit_merge_stages"] = deepcopy(self.progress.plain())

    def load_stream(self, checkpoint: Mapping[str, Any], current: Mapping[str, Any]) -> None:
        """Go on from the state of a stream; the merged weights are read from the stage's file.

        Args:
            checkpoint: What :meth:`save_stream` wrote into.
            current: Fingerprint of this module.

        Raises:
            MergeError: The stream was one of other networks, or its file is missing or has changed.
        """
        saved = {**checkpoint.get("lit_merge", {}), "tasks": [], "experts": {}}
        if missing := sorted(set(saved.get("heads", {})) - set(current["heads"])):
            raise MergeError(
                f"checkpoint: its stream had a task {missing[0]!r}; the suite has {', '.join(current['heads'])}"
            )
        check_fingerprint(saved, {**current, "tasks": [], "experts": {}})
        progress = Progress.of(checkpoint["lit_merge_stages"])
        self.progress, self._in_stage = progress, False
        if progress.file:
            path = find_stage(progress.file, self._folders(progress))
            self.accumulated.restore(str(path), read_state(path))

    def _folders(self, progress: Progress) -> Iterator[Path]:
        if self._trainer is not None and self.trainer.ckpt_path:
            yield Path(self.trainer.ckpt_path).parent
        if self.stage_folder is not None:
            yield self.stage_folder
        yield Path(progress.folder)


def _check_merged(method: str, task: str, merged: object, like: Mapping[str, Tensor]) -> None:
    where = f"{method}.absorb: expert {task!r}"
    if not isinstance(merged, Mapping) or set(merged) != set(like):
        found = ", ".join(sorted(map(str, merged))[:3]) if isinstance(merged, Mapping) else type(merged).__name__
        raise MergeError(f"{where}: expected a task vector with the names of `merged`, found {found}")
    for name, value in like.items():
        given = merged[name]
        if not isinstance(given, Tensor) or given.shape != value.shape:
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise MergeError(f"{where}: {name}: expected {tuple(value.shape)}, found {shape}")
        if not bool(torch.isfinite(given).all()):
            raise MergeError(f"{where}: {name}: the merge is not finite")
