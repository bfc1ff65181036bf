"""Singular value calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_keys, check_state
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.sources import weights_file
from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import SvdMethod
from lit_merge.functional.finite import check_finite
from lit_merge.functional.sums import sum_merge
from lit_merge.functional.svc import svc
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Needs, Pieces

__all__ = ("Svc",)


class Svc(MergeModule):
    """SVC: any merge, with its singular values calibrated against the task vectors: θ0 + U diag(γ σ) Vᵀ.

    Directions that several tasks share are in a sum once per task; γ takes them back to once, and lifts what the merge
    holds too little of, by at most 1 / α. Data-free. Matrices are calibrated, position embeddings included; other
    tensors stay as merged, and so do running statistics, unless ``buffers`` says otherwise.

    Args:
        merged: The merge: ``merged.safetensors`` of an export, its folder, or a state dict; null for task arithmetic.
        scale: Scaling coefficient of task arithmetic, if ``merged`` is null.
        alpha: Least projection coefficient, above 0; 0.1 is that of the tables for CLIP.
        exclude: Names or patterns of matrices that stay as merged.
        decomposition: ``auto``, ``svd``, ``gram`` or ``randomized``, see :func:`~lit_merge.functional.truncated_svd`.
        **kwargs: See :class:`~lit_merge.MergeModule`. Transforms act on the task vectors, before either use.

    Raises:
        MergeError: A value is out of range; or, later, the merged network is not one of the suite's base.

    Source: Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, arXiv 2602.05536.
    """

    def __init__(
        self,
        merged: dict[str, Tensor] | str | Path | None = None,
        scale: float = 0.3,
        alpha: float = 0.1,
        exclude: Sequence[str] = (),
        decomposition: SvdMethod = "auto",
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        # hyper-parameters are taken from the arguments as they stand now: a path is one, as text, a network is not
        network, merged = merged, None if merged is None or isinstance(merged, Mapping) else str(merged)
        super().__init__(**kwargs)
        check_finite("Svc.alpha", alpha, above=0)
        if isinstance(exclude, str):
            raise MergeError(f"Svc.exclude: expected a list of names or patterns, found {exclude!r}")
        self.merged: Mapping[str, Tensor] | str | None = network if isinstance(network, Mapping) else merged
        check_finite(f"{type(self).__name__}.scale", scale)
        self.scale = scale
        self.alpha = alpha
        self.exclude = tuple(exclude)
        self.decomposition: SvdMethod = decomposition
        self._statistics: dict[str, Tensor] = {}
        self._made: tuple[TaskVectors, dict[str, Tensor]] | None = None

    @property
    def needs(self) -> Needs:
        """One tensor at a time, or all of a merge that was given."""
        return "tensor" if self.merged is None else "network"

    def streamed(self, pieces: Pieces) -> Callable[[TaskVectors], dict[str, Tensor]]:
        """Return what merges a piece, and keeps nothing of it."""
        return lambda bank: bank.offset(self._calibrated(bank))

    @torch.no_grad()
    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return the calibrated merge, which is made when it is first asked for."""
        with torch.autocast(self.device.type, enabled=False):
            if self._made is None or self._made[0] is not bank:
                self._made = (bank, self._calibrated(bank))
            return bank.offset({name: value.to(self.device) for name, value in self._made[1].items()})

    def complete(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add what a network needs besides; running statistics that would be averaged are those of the given merge."""
        statistics = self._statistics if self.buffer_policy == "average" else {}
        return super().complete(parameters) | {name: value.to(self.device) for name, value in statistics.items()}

    def _calibrated(self, bank: TaskVectors) -> dict[str, Tensor]:
        return svc(self._merged_deltas(bank), bank.deltas, self.alpha, self.exclude, self.decomposition)

    def _merged_deltas(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Task vector of the merge that is calibrated, ``(*shape)`` each."""
        if self.merged is None:
            return sum_merge({name: delta.to(bank.compute_dtype) for name, delta in bank.deltas.items()}, self.scale)
        if not hasattr(self, "skeleton"):  # base and experts by themselves do not say what running statistics are
            raise MergeError("Svc.merged: a merge that is given needs a suite: lit-merge merge --config svc.yaml …")
        given = isinstance(self.merged, Mapping)
        where = "Svc.merged" if given else f"Svc.merged {self.merged}"
        state = self.merged if isinstance(self.merged, Mapping) else read_state(weights_file(Path(self.merged)))
        base = bank.base
        advice = "give a merge of this very base under the network's own names, such as merged.safetensors"
        check_keys(where, state, base, of="network", advice=advice)
        for name, value in base.items():
            if state[name].shape != value.shape:
                found = tuple(state[name].shape)
                raise MergeError(f"{where}: {name}: expected shape {tuple(value.shape)}, found {found}; {advice}")
            check_state(where, name, state[name])
        floating = {name for name in self.skeleton.buffers_of if base[name].is_floating_point()}
        self._statistics = {name: state[name].clone() for name in floating}
        wide = bank.compute_dtype
        return {name: state[name].to(base[name].device, wide) - base[name].to(wide) for name in bank.names}
