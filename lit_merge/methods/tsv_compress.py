"""Task singular vector compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lit_merge.coefficients import Coefficient
from lit_merge.data.batches import LabelledBatch
from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import Factors, SvdMethod
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import share, wide
from lit_merge.functional.tsv_compress import compressed_bytes, tsv_compress, tsv_restore
from lit_merge.methods._on_matrices import OnMatrices
from lit_merge.methods.tsv_merge import decomposer

__all__ = ("TsvCompress",)


class TsvCompress(OnMatrices):
    """TSV-C: every expert for itself, with the leading singular triplets of its task matrices: θ_t = θ0 + U_t Σ_t V_tᵀ.

    This is storage, not one network: whoever runs it must know the task. Scores are those of the task's own compressed
    expert, with its own running statistics. Where one network is asked for (an export, tasks without an expert) it is
    the mean of the compressed experts.

    Args:
        fraction: Share of min(m, n) that is kept of each task, in (0, 1]; null for 1/T. Published: 0.1 keeps 99 % of
            the experts' accuracy, 0.03 about 98.5 %.
        dtype: Storage of factors and other tensors: ``float32``, ``bfloat16`` or ``float16``; null for that of the
            task vectors.
        tolerance: Directions below it are dropped, relative to the longest.
        decomposition: ``auto``, ``svd``, ``gram`` or ``randomized``.
        cache_dir: Folder where the decompositions of the task vectors are kept, for runs to come.
        scale: The coefficient of the task vectors; 1 is the published value.
        **kwargs: ``convolutions``, ``exclude``: see :class:`~lit_merge.functional.MatrixPolicy`; the rest: see
            :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range, or ``others`` is given: what is not a matrix is kept whole.

    Source: Gargiulo et al., Task Singular Vectors, section 3.2, arXiv 2412.00081.
    """

    no_sharding = "it makes a network per task during an evaluation, in which every rank is elsewhere"

    def __init__(
        self,
        fraction: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        tolerance: float = 1e-6,
        decomposition: SvdMethod = "auto",
        cache_dir: str | None = None,
        scale: Coefficient = 1.0,
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise MergeError(f"TsvCompress.dtype: expected float32, bfloat16 or float16, found {dtype!r}")
        if self.policy.others != "mean":
            raise MergeError(
                f"TsvCompress.others: every expert keeps its own tensors that are not matrices, found "
                f"{self.policy.others!r}; leave it out"
            )
        self.fraction = None if fraction is None else share(f"{type(self).__name__}.fraction", fraction)
        self.dtype_name = dtype
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance
        self.decomposition = decomposition
        self.cache_dir = cache_dir
        self.compressed: dict[str, Factors | Tensor] = {}
        self._chosen: tuple[str, dict[str, Tensor]] = ("", {})

    def combine(self, deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compress the task vectors, and return the mean of what can be restored."""
        decompose = decomposer(self.decomposition, self.tolerance, self.cache_dir)
        dtype = None if self.dtype_name is None else getattr(torch, self.dtype_name)
        self.compressed = tsv_compress(
            deltas, fraction=self.fraction, policy=self.policy, decompose=decompose, dtype=dtype
        )
        shapes = {name: delta.shape[1:] for name, delta in deltas.items()}
        tasks = len(next(iter(deltas.values())))
        total = {name: wide(delta[0]).new_zeros(delta.shape[1:]) for name, delta in deltas.items()}
        for task in range(tasks):
            for name, value in tsv_restore(self.compressed, shapes, task).items():
                total[name] += value.to(total[name]) / tasks
        return total

    @torch.no_grad()
    def task_state(self, task: str) -> dict[str, Tensor]:
        """Return the complete state dict of one task's compressed expert.

        Raises:
            MergeError: Unknown task.
        """
        self.merge(self.bank)  # compresses, once
        expert = self.bank.expert(task)
        shapes = {name: delta.shape[1:] for name, delta in self.bank.deltas.items()}
        with torch.autocast(self.device.type, enabled=False):  # steps of an evaluation ask
            restored = tsv_restore(self.compressed, shapes, self.bank.tasks.index(task))
        state = self.bank.complete(self.bank.offset(restored, self.scale))
        return {name: expert[name] if name in self.skeleton.buffers_of else value for name, value in state.items()}

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Return the logits of a task's compressed expert: images ``(B, C, H, W)`` to ``(B, classes)``."""
        return self.outputs(self._state_for(task), task, images)[1]

    def predict_step(self, batch: LabelledBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the task, positions ``(B,)`` and predicted classes ``(B,)`` of a batch."""
        self._merged = self._state_for(self._task(self.trainer.predict_dataloaders, dataloader_idx))
        return super().predict_step(batch, batch_idx, dataloader_idx)

    @property
    def stored_bytes(self) -> int:
        """Bytes to be kept to serve all tasks: base, compressed task vectors, and the tasks' running statistics."""
        self.merge(self.bank)
        statistics = len(self.bank.tasks) * sum(self.bank.base[name].nbytes for name in self.skeleton.buffers_of)
        return super().stored_bytes + compressed_bytes(self.compressed) + statistics

    def report_extra(self) -> dict[str, Any]:
        """Return the bytes of the compressed task vectors, of the whole ones and of the base, and their ratio."""
        self.merge(self.bank)
        compressed = compressed_bytes(self.compressed)
        whole = sum(delta.nbytes for delta in self.bank.deltas.values())
        base = sum(value.nbytes for name, value in self.bank.base.items() if name in self.bank.names)
        ratio = compressed / whole if whole else 1.0
        return {"bytes": {"compressed": compressed, "task_vectors": whole, "base": base, "ratio": ratio}}

    def on_predict_end(self) -> None:
        """Keep no network."""
        self._chosen = ("", {})
        super().on_predict_end()

    def _evaluate(self, batch: LabelledBatch, task: str) -> None:
        self._merged = self._state_for(task)
        super()._evaluate(batch, task)

    def _end_evaluation(self, prefix: str) -> None:
        self._chosen = ("", {})
        super()._end_evaluation(prefix)

    def _state_for(self, task: str) -> dict[str, Tensor]:
        """State of a task; the last one is kept, as tasks come one after the other."""
        if self._chosen[0] != task:
            known = task in self.bank.tasks  # it is not if it is unseen
            self._chosen = (task, self.task_state(task) if known else self.merged_state())
        return self._chosen[1]
