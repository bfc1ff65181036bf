"""Are the predictions of a task collapsing onto few classes?"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.sinks import log_table

__all__ = ("CollapseMonitor",)


class CollapseMonitor(L.Callback):
    """Log the histogram and the marginal entropy of each task's predictions, and warn when they collapse.

    The marginal entropy H is that of the mean prediction over a window; exp(H) is the effective number of classes.
    A task collapses when that falls below a share of the largest value it had in this run. Without labels nothing
    else shows that entropy minimisation has gone wrong: its loss looks perfect.

    Args:
        every_n_steps: Length of a window in steps.
        threshold: Share of the largest effective number of classes below which to warn, in (0, 1).

    Raises:
        MergeError: A value is out of range.
    """

    def __init__(self, every_n_steps: int = 50, threshold: float = 0.5) -> None:
        if every_n_steps < 1 or not 0 < threshold < 1:
            raise MergeError(
                "CollapseMonitor: expected every_n_steps of at least 1 and a threshold in (0, 1), "
                f"found {every_n_steps} and {threshold}"
            )
        self.every_n_steps = every_n_steps
        self.threshold = threshold
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self._warned: set[str] = set()
        self._closed = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the first window begins."""
        self._closed = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Add up predictions; at the end of a window, log and check them."""
        for task, logits in _logits(outputs).items():
            self._sums[task] = self._sums.get(task, 0) + _counts(logits)
        step = trainer.global_step
        if step > self._closed and step % self.every_n_steps == 0:  # several batches may make one step
            self._close(trainer, check=True)
            self._closed = step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is left; a part of a window has fewer images, and is not compared with whole ones."""
        self._close(trainer, check=False)

    def _close(self, trainer: L.Trainer, *, check: bool) -> None:
        rows: list[list[str | int | float]] = []
        metrics = {}
        for task, (mass, counts) in self._totals(trainer).items():
            share = mass / mass.sum()
            entropy = float(torch.special.entr(share).sum())
            metrics[f"predictions/marginal_entropy/{task}"] = entropy
            rows += [[task, number, int(count)] for number, count in enumerate(counts)]
            if check:
                self._check(task, entropy, float(share.max()))
        self._sums = {}
        if rows and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)
            log_table(trainer, "predictions/histogram", ["task", "class", "predictions"], rows)

    def _totals(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Sums of all ranks, read from the device at once."""
        if not self._sums:
            return {}
        flat = torch.cat([local.flatten() for local in self._sums.values()])  # a copy: it is reduced in place
        parts = torch.as_tensor(trainer.strategy.reduce(flat, reduce_op="sum")).cpu()
        parts = parts.split([local.numel() for local in self._sums.values()])
        return {task: part.reshape(2, -1).clone() for task, part in zip(self._sums, parts, strict=True)}

    def _check(self, task: str, entropy: float, top: float) -> None:
        effective = float(torch.tensor(entropy).exp())
        largest = self._largest[task] = max(self._largest.get(task, 0.0), effective)
        if effective < self.threshold * largest and task not in self._warned:
            self._warned.add(task)
            rank_zero_warn(
                f"the predictions of task {task!r} collapse: {effective:.1f} effective classes after {largest:.1f}, "
                f"{top:.0%} in one class; adapt with ExpertAlignment, or add Diversity to the objective"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to remember."""
        return {"largest": self._largest, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was remembered."""
        self._largest, self._warned = dict(state_dict["largest"]), set(state_dict["warned"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the window so far; rank zero writes the checkpoint, so it has the sums of all ranks."""
        checkpoint["lit_merge_predictions"] = self._totals(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the window."""
        share = float(trainer.is_global_zero)
        sums = checkpoint.get("lit_merge_predictions", {})
        self._sums = {task: share * total.to(trainer.strategy.root_device) for task, total in sums.items()}


def _logits(outputs: Any) -> dict[str, Tensor]:  # noqa: ANN401 - whatever a training step returns
    """Logits per task; a method with a training step of its own may return none."""
    return dict(outputs.get("logits", {})) if isinstance(outputs, dict) else {}


def _counts(logits: Tensor) -> Tensor:
    """Probability mass and predictions per class, ``(2, C)``."""
    mass = logits.float().softmax(-1).sum(0)
    hits = logits.argmax(-1, keepdim=True) == torch.arange(len(mass), device=mass.device)
    # bincount would wait for the device, to see the largest class
    return torch.stack([mass, hits.sum(0).to(mass.dtype)])
