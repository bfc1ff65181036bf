"""Any suite in the tangent space of its base, for experts that were fine-tuned there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.origin import expecting, read_origin
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.sources import weights_file
from lit_merge.data.pixels import PixelScale
from lit_merge.errors import MergeError
from lit_merge.linearized import LinearizedNetwork
from lit_merge.lora import LoraNetwork, LoraOptions
from lit_merge.suites.base import LabelledDataset, Split, Suite

__all__ = ("LinearizedSuite",)


class LinearizedSuite(Suite):
    """A suite whose network is the tangent of another suite's network at its base (arXiv 2305.12827).

    Heads and images are those of the other suite. Its experts have to be linearised ones, as ``lit-merge finetune
    --model.method linearized`` makes them; then task vectors act on the features without interaction.

    With ``lora`` the merge happens in the space of low-rank factors φ (partial linearisation, L-LoRA, arXiv
    2310.04742): the parameters are φ, the base is φ at its start φ0, an expert is a trained φ, and the network is
    ``f(x; φ0) + ∇f(x; φ0) · (φ − φ0)``. All experts must have been trained with the same rank, targets and seed.

    Where a ``finetune.json`` lies beside an expert's file, its method and the start of its training are compared; the
    experts of :class:`ClipSuite` and :class:`NetworkSuite` are compared too, if ``suite`` is one. Experts without that
    file are taken as they are: nothing says how they were made, and they may come from elsewhere.

    Args:
        suite: The suite with base, heads and images.
        experts: File, or folder with ``model.safetensors``, per task; the order of the tasks is that of this mapping.
            By default the experts of ``suite``.
        lora: Options of low-rank experts; ``None`` for experts in all parameters.

    Raises:
        MergeError: A task is unknown, there is no expert, or low-rank experts are not given as files.
    """

    def __init__(
        self, suite: Suite, experts: dict[str, str | Path] | None = None, lora: LoraOptions | None = None
    ) -> None:
        self.suite = suite
        self.lora = lora
        self._files = None if experts is None else {task: Path(file) for task, file in experts.items()}
        if self._files is None and lora is not None:
            raise MergeError(
                "LinearizedSuite.experts: low-rank experts are files of factors; expected {TASK: FILE, ...}"
            )
        if self._files == {}:
            raise MergeError("LinearizedSuite.experts: expected at least one, found none")
        for task in self._files or ():
            suite.check_task(task)

    @property
    def name(self) -> str:
        """Name of the suite in reports."""
        return f"{self.suite.name} ({'L-LoRA' if self.lora else 'linearised'})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the experts."""
        return self.suite.tasks if self._files is None else tuple(self._files)

    def sources(self) -> dict[str, Any]:
        """Where the networks come from."""
        own = {} if self._files is None else {"experts": {task: str(file) for task, file in self._files.items()}}
        return self.suite.sources() | own

    def pixels(self, task: str) -> PixelScale:
        """Return how the values of a task's images come from pixels."""
        return self.suite.pixels(task)

    def prepare(self) -> None:
        """Build or download what is missing."""
        if self._files is None:
            self.suite.prepare()  # also experts, which would be for nothing if there are files

    def network(self) -> nn.Module:
        """Return the tangent, mapping images ``(B, C, H, W)`` to features ``(B, D)``; the base is inside."""
        return self._tangent

    @cached_property
    def _tangent(self) -> LinearizedNetwork:
        network, base = self.suite.network(), self.suite.base()
        if self.lora is None:
            return LinearizedNetwork(network, base)
        return LinearizedNetwork(LoraNetwork(network, self.lora, base))

    def base(self) -> Mapping[str, Tensor]:
        """Return θ0, or φ0 of low-rank experts."""
        return self.suite.base() if self.lora is None else self._tangent.state_dict()

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What ``finetune.json`` of a fitting expert says."""
        return {
            "method": "lora_linearized" if self.lora else "linearized",
            "base": state_digest(self.suite.base()),
            "lora": json.loads(json.dumps(asdict(self.lora))) if self.lora else None,
            "start": state_digest(self._tangent.state_dict()),
        }

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return one expert.

        Raises:
            MergeError: The suite has no such task, or its file is missing, or was made otherwise or from another start.
        """
        if self._files is None:
            with expecting("linearized"):
                return self.suite.expert(task)
        file = weights_file(self._files[self.check_task(task)])
        self._check_origin(file)
        return read_state(file)

    def _check_origin(self, file: Path) -> None:
        if (origin := read_origin(file)) is None:
            return
        facts, found = origin
        for key, value in self._origin.items():
            if found.get(key) != value:
                raise MergeError(
                    f"{facts}: expected {key} {value}, found {found.get(key)}; an expert fits the tangent that it was "
                    "trained in: same suite, same method, and with lora the same rank, targets and seed"
                )

    def head(self, task: str) -> nn.Module:
        """Return the frozen head of a task."""
        return self.suite.head(self.check_task(task))

    def num_classes(self, task: str) -> int:
        """Return the number of classes of a task."""
        return self.suite.num_classes(self.check_task(task))

    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Return the labelled images of one split of a task."""
        return self.suite.dataset(self.check_task(task), split)
