"""Making experts: fine-tune a suite's base on one of its tasks, in full, by LoRA, or in the tangent space."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.checks import check_finite
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.export import write_json
from lit_merge.checkpoints.sources import Source
from lit_merge.errors import MergeError, require
from lit_merge.finetune import SupervisedModule
from lit_merge.linearized import LinearizedNetwork
from lit_merge.lora import LoraNetwork, LoraOptions, write_adapter
from lit_merge.provenance import versions
from lit_merge.reparametrized import load_base
from lit_merge.suites.base import Suite

__all__ = ("ExpertModule", "Method", "tuned_form", "write_expert")

Method = Literal["full", "lora", "linearized", "lora_linearized"]
_LORA = LoraOptions()


class ExpertModule(SupervisedModule):
    """Fine-tune the base of a suite on one task, under the task's frozen head.

    ===================  ==========================================  ==================================================
    method               what is trained                             the expert's tensors
    ===================  ==========================================  ==================================================
    ``full``             every parameter                             those of the network
    ``lora``             low-rank changes of matrices                those of the network, changes added; and the
                         (arXiv 2106.09685)                          changes alone as an adapter of peft
    ``linearized``       every parameter of the network's tangent    those of the network; to be run in the tangent:
                         at the base (arXiv 2305.12827)              :class:`~lit_merge.suites.LinearizedSuite`
    ``lora_linearized``  low-rank changes, in the tangent at their   the low-rank factors; to be merged and run in the
                         start (L-LoRA, arXiv 2310.04742)            tangent: ``LinearizedSuite`` with ``lora``
    ===================  ==========================================  ==================================================

    The two tangent methods are the half of reducing representation bias that comes before merging: task vectors of a
    linear model add without interference of higher order.

    Nothing is read before the Trainer starts. The Trainer's precision may be mixed, but not half throughout.

    Args:
        suite: Base, heads and images.
        task: The task to learn.
        method: What is trained, see above.
        lora: Rank, scale, targets and seed of low-rank changes.
        label_smoothing: Share of the target that goes to all classes alike, in [0, 1).
        learning_rate: Largest learning rate, after the warm-up. 1e-5 is published for ``full`` and ``linearized``;
            low-rank changes take more, such as 1e-4 or 1e-3.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Optimiser steps of linear warm-up.

    Raises:
        MergeError: Unknown method, or a number is out of range.
        MissingExtraError: ``peft`` is missing, which writes the adapter of ``lora``.
    """

    def __init__(
        self,
        suite: Suite,
        task: str,
        method: Method = "full",
        lora: LoraOptions = _LORA,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 500,
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
        if method not in get_args(Method):
            raise MergeError(f"model.method: expected {', '.join(get_args(Method))}, found {method!r}")
        if method == "lora":
            require("peft", "hf")  # an error after the training would be a pity
        self.suite = suite
        self.task = task
        self.method: Method = method
        self.lora = lora
        self.origin: dict[str, str] = {}

    def configure_model(self) -> None:
        """Read base and head; idempotent, as Lightning calls it for every stage."""
        if self.tasks:
            return
        head = self.suite.head(self.suite.check_task(self.task))
        base = self.suite.base()
        network = tuned_form(self.suite.network(), base, self.method, self.lora)
        self.origin = {
            "task": self.task,
            "method": self.method,
            "base": state_digest(base),
            "start": state_digest(network.state_dict()),
            "head": state_digest(head.state_dict()),
        }
        self.hold(network, {self.task: head})
        # what no checkpoint holds is the same on all ranks; broadcasting it at every step would be a waste
        kept = set(self.state_dict())
        fixed = [name for name, _ in self.named_buffers() if name not in kept]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, fixed)

    def setup(self, stage: str) -> None:
        """Refuse precisions in which small steps are lost.

        Raises:
            MergeError: A half ``*-true`` precision.
        """
        precision = str(self.trainer.precision)
        if precision in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"):
            raise MergeError(f"trainer.precision: {precision} would round the weights; use bf16-mixed or 32-true")

    def expert_state(self) -> dict[str, Tensor]:
        """Return the tensors of the expert by name, on the CPU; the table above says which these are."""
        network = self.network
        state = network.merged_state() if isinstance(network, LoraNetwork) else network.state_dict()
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load into a network that is made first, as strategies that fork need it."""
        self.configure_model()
        return super().load_state_dict(state_dict, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is trained."""
        checkpoint["lit_merge"] = dict(self.origin)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another task, method or base.

        Raises:
            MergeError: Something differs.
        """
        self.configure_model()
        saved = found if isinstance(found := checkpoint.get("lit_merge"), Mapping) else {}
        for key, value in self.origin.items():
            if saved.get(key) != value:
                raise MergeError(
                    f"checkpoint: its {key} is {saved.get(key)}, that of this run is {value}; give the arguments of "
                    "the run that is resumed, or start without --ckpt_path"
                )


def tuned_form(network: nn.Module, base: Mapping[str, Tensor], method: Method, lora: LoraOptions = _LORA) -> nn.Module:
    """Return the module whose parameters a method trains, at its start, where it computes what the base computes.

    Args:
        network: The plain network; it is copied.
        base: State dict of the base.
        method: See :class:`ExpertModule`.
        lora: Options of the low-rank methods.

    Raises:
        MergeError: The base does not fit, or there is nothing to change by low rank.
    """
    if method == "full":
        return load_base(deepcopy(network), base)
    if method == "linearized":
        return LinearizedNetwork(network, base)
    changed = LoraNetwork(network, lora, base)
    return LinearizedNetwork(changed) if method == "lora_linearized" else changed


def write_expert(
    folder: str | Path, trainer: L.Trainer, module: ExpertModule, *, more: Mapping[str, Any] | None = None
) -> Path:
    """Write ``model.safetensors``, which suites take as an expert, and ``finetune.json``, which says how it was made.

    With the method ``lora`` there is also the folder ``adapter`` in peft's format. Each file is written under a
    temporary name and renamed, the weights last.

    Args:
        folder: Where to; made if missing.
        trainer: The Trainer that fitted the module.
        module: The fitted module.
        more: Further plain data for ``finetune.json``, such as accuracies.

    Returns:
        Path of ``model.safetensors``.

    Raises:
        MergeError: A value is NaN or infinite.
    """
    folder = Path(folder)
    state = module.expert_state()
    for name, value in state.items():
        check_finite(f"expert of {module.task!r}", name, value)
    if isinstance(module.network, LoraNetwork):
        plain = load_base(deepcopy(module.suite.network()), module.suite.base())
        write_adapter(folder / "adapter", plain, module.network, base_name=_base_name(module.suite))
    digest = state_digest(state)
    weights = {"file": "model.safetensors", "sha256": digest}
    write_json(folder / "finetune.json", _provenance(trainer, module) | dict(more or {}) | {"weights": weights})
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt", "producer": "lit-merge", "sha256": digest})
    return folder / "model.safetensors"


def _base_name(suite: Suite) -> str | None:
    """Return the name by which the suite's base is known to others, without a revision, if it has one."""
    base = suite.sources().get("base")
    spec = base.get("source") if isinstance(base, Mapping) else None
    if not isinstance(spec, str):
        return None
    source = Source(spec)
    if source.hub_id is not None:
        return source.hub_id[0]
    return spec if source.open_clip_tag is None else None  # weights of open_clip that no repository has


def _provenance(trainer: L.Trainer, module: ExpertModule) -> dict[str, Any]:
    """Return where the expert comes from, as plain data; the hashes are those of :func:`state_digest`."""
    data = getattr(trainer, "datamodule", None)
    return {
        "schema": 1,
        "suite": module.suite.name,
        "sources": module.suite.sources(),
        **module.origin,
        "lora": asdict(module.lora) if module.method.startswith("lora") else None,
        "recipe": {
            "optimizer": "AdamW",
            "schedule": "linear warm-up, cosine",
            "learning_rate": module.learning_rate,
            "weight_decay": module.weight_decay,
            "warmup_steps": module.warmup_steps,
            "label_smoothing": module.label_smoothing,
            "batch_size": getattr(data, "batch_size", None),
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": str(trainer.precision),
        },
        "steps": trainer.global_step,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
        "versions": versions(),
    }
