"""StageBank: the bank of a stream, which has two rows however many experts there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor

from lit_merge.checkpoints.checks import check_finite, check_keys, check_tied, common_layout
from lit_merge.checkpoints.digests import read_hashed
from lit_merge.errors import MergeError
from lit_merge.stack import Stack
from lit_merge.task_vectors import BufferPolicy, TaskVectors

__all__ = ("MERGED", "Differences", "StageBank")

MERGED = "(merged)"


class StageBank(TaskVectors):
    """Base and two task vectors: row 0 is what was merged so far, row 1 the expert that has arrived.

    The rows are written again in place in every stage. Running statistics of the merge are the mean of all experts'
    so far: while expert number t is in row 1, it counts 1/t.

    >>> bank = StageBank.of_base({"w": torch.zeros(2)})
    >>> digest = bank.receive("a", {"w": torch.tensor([1.0, 3.0])}, number=1)
    >>> bank.settle(bank.incoming)
    >>> bank.settled_state()["w"]
    tensor([1., 3.])
    """

    share: float = 0.5
    _free: frozenset[str] = frozenset()

    @classmethod
    def of_base(
        cls,
        base: Mapping[str, Tensor],
        *,
        buffers: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> Self:
        """Return a bank without experts: both rows are zeros.

        Args:
            base: State dict of the pretrained network.
            buffers: Names that are buffers, not parameters (running statistics).
            tied: Second names of tied tensors, ``{alias: name}``; by default those that share memory in ``base``.

        Raises:
            MergeError: A value is NaN or infinite, or of an unusable type; tied tensors differ.
        """
        layout = common_layout(base, {MERGED: base}, buffers=buffers, tied=tied)
        digest = read_hashed("base", base)
        check_tied("base", base, layout.tied)
        rows = Stack(layout.parameters, base, 2), Stack(layout.buffers, base, 2)
        constants = {name: base[name] for name in layout.constants}
        bank = cls((MERGED, ""), *rows, constants, layout.tied, {"": digest})
        bank._free = frozenset(buffers)
        return bank

    @property
    def merged(self) -> dict[str, Tensor]:
        """Merged task vector so far, ``(*shape)`` each: views, read-only."""
        return {name: value[0] for name, value in self._weights.views().items()}

    @property
    def incoming(self) -> dict[str, Tensor]:
        """Task vector of the expert that has arrived, ``(*shape)`` each: views, read-only."""
        return {name: value[1] for name, value in self._weights.views().items()}

    @torch.no_grad()
    def receive(self, task: str, state: Mapping[str, Tensor], number: int) -> str:
        """Put an expert into row 1, tensor by tensor.

        Args:
            task: Its task.
            state: Its state dict, which may be lazy.
            number: Of the stage, from 1.

        Returns:
            Its SHA-256.

        Raises:
            MergeError: Keys, shapes or dtypes are not those of the base, or a value is NaN or infinite.
        """
        where = f"expert {task!r}"
        common_layout(self.base, {task: state}, buffers=self._free, tied=self._tied)

        def put(name: str, value: Tensor) -> None:
            self._weights.put(1, name, value)
            self._statistics.put(1, name, value)

        if number == 1:  # also of a second fit
            for stack in (self._weights, self._statistics):
                for value in stack.views().values():
                    value[0].zero_()
        digest = read_hashed(where, state, put)
        check_tied(where, state, self._tied)
        self.tasks, self.digests, self.share = (MERGED, task), {**self.digests, task: digest}, 1 / number
        return digest

    @torch.no_grad()
    def settle(self, merged: Mapping[str, Tensor]) -> None:
        """Put a merged task vector into row 0, rounded so that a file of the weights brings back every bit of it.

        Args:
            merged: By name, ``(*shape)`` each.
        """
        statistics = {name: value[0].lerp(value[1], self.share) for name, value in self._statistics.views().items()}
        for stack, values in ((self._weights, merged), (self._statistics, statistics)):
            base, rows = stack.base(), stack.views()
            for name, row in rows.items():
                row[0].copy_(_kept(base[name].to(stack.compute_dtype), values[name].to(row)))

    @torch.no_grad()
    def restore(self, where: str, state: Mapping[str, Tensor]) -> None:
        """Put merged weights that :meth:`settled_state` returned into row 0.

        Args:
            where: Their file, for messages.
            state: Weights, at least in float32.

        Raises:
            MergeError: They are not those of this base.
        """
        known = self.settled_state(wide=True)
        check_keys(where, state, known, advice="it belongs to another network")
        for name in sorted(known):
            if (value := state[name]).shape != known[name].shape or value.dtype != known[name].dtype:
                expected, found = ((v.dtype, tuple(v.shape)) for v in (known[name], value))
                raise MergeError(f"{where}: {name}: expected {expected}, found {found}; it belongs to another network")
            check_finite(where, name, value)
            self._weights.put(0, name, value)
            self._statistics.put(0, name, value)

    def settled_state(self, buffers: BufferPolicy = "average", *, wide: bool = False) -> dict[str, Tensor]:
        """Return the complete state dict of θ0 + row 0.

        Args:
            buffers: ``average``: running statistics are the mean of the experts' so far; ``base``: the base's.
            wide: In the dtype of the arithmetic, at least float32; by default in the dtypes of the base.
        """
        state: dict[str, Tensor] = {}
        for stack in (self._weights, self._statistics):
            rows = stack.views() if stack is self._weights or buffers == "average" else {}
            for name, base in stack.base().items():
                value = base.to(stack.compute_dtype) + rows[name][0] if name in rows else base
                state[name] = value if wide else value.to(base.dtype)
        return self._assemble(state, {})

    def complete(self, parameters: Mapping[str, Tensor], buffers: BufferPolicy = "average") -> dict[str, Tensor]:
        """Add to merged parameters what a network needs besides, see :meth:`lit_merge.TaskVectors.complete`.

        While an expert is being absorbed, it counts in running statistics as any other one.
        """
        base, rows = self._statistics.base(), self._statistics.views()
        if buffers == "average":
            base = {
                name: (value + rows[name][0].lerp(rows[name][1], self.share)).to(value.dtype)
                for name, value in base.items()
            }
        return self._assemble(parameters, base)

    def map(self, transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Self:
        """Return a bank with transformed rows; base, running statistics and digests stay."""
        bank = super().map(transform)
        bank.share, bank._free = self.share, self._free
        return bank


class Differences(Mapping[str, Tensor]):
    """Task vector of an expert, tensor by tensor as it is asked for.

    Args:
        state: State dict of the expert, which may be lazy.
        bank: Has the base.
        device: Where to.
    """

    def __init__(self, state: Mapping[str, Tensor], bank: StageBank, device: torch.device) -> None:
        self._state, self._names, self._dtype, self._device = state, bank.names, bank.compute_dtype, device
        self._base = bank.base  # all of it is put together whenever it is asked for

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name].to(self._device, self._dtype) - self._base[name].to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _kept(base: Tensor, change: Tensor, most: int = 16) -> Tensor:
    """Return ``change`` as it is after base + change was written down and the base subtracted again.

    One such round is enough where weights move little. Where a sum is far smaller than its terms, it takes more.
    """
    for _ in range(most):
        again = (base + change) - base
        if torch.equal(again, change):
            break
        change = again
    return change
