"""Reading what is merged into a bank, and where the bank is kept: the part of MergeModule for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.model_parallel import shared_storage, shares_banks
from lit_merge.skeleton import Skeleton
from lit_merge.storage import StorageChoice, StorageFactory, StorageKind
from lit_merge.suites.base import Suite
from lit_merge.task_vectors import TaskVectors
from lit_merge.transforms import Transform

__all__ = ("BankReading", "StorageDtype")

StorageDtype = Literal["float32", "bfloat16", "float16"]


class BankReading:
    """The part of :class:`~lit_merge.MergeModule` that makes its bank.

    Attributes:
        storage: Where task vectors are kept.
        storage_dtype: Type in which they are kept.
        no_sharding: Why ranks cannot share the bank of this method; empty if they can.
    """

    no_sharding: ClassVar[str] = ""

    suite: Suite
    skeleton: Skeleton
    transforms: tuple[Transform, ...]
    device: Any  # as Lightning says
    _trainer: Any

    def keep_in(
        self, dtype: StorageDtype | None, kind: StorageKind, rank: int | float, budget: int | None, folder: str | None
    ) -> None:
        """Take notice of the options, see :class:`~lit_merge.MergeModule`.

        Raises:
            MergeError: One of them is out of range.
        """
        if dtype not in (None, *get_args(StorageDtype)):
            raise MergeError(f"model.storage_dtype: expected float32, bfloat16 or float16, found {dtype!r}")
        if kind == "sharded" and self.no_sharding:
            raise MergeError(f"model.storage: the bank of {type(self).__name__} cannot be sharded: {self.no_sharding}")
        self.storage: StorageKind = kind
        self.storage_dtype = dtype
        self._storage_options: dict[str, Any] = {"kind": kind, "rank": rank, "budget": budget, "folder": folder}
        StorageChoice(**self._storage_options)  # says what is wrong with them

    @property
    def bank_dtype(self) -> torch.dtype | None:
        """Type in which task vectors are kept; ``None``: that of the base, at least float32."""
        found: torch.dtype | None = None if self.storage_dtype is None else getattr(torch, self.storage_dtype)
        return found

    def storage_factory(self) -> StorageFactory:
        """Return what makes the storage, on the device of the trainer if there is one."""
        trainer = self._trainer
        strategy = None if trainer is None else trainer.strategy
        if self.storage == "sharded" or (self.storage == "auto" and not self.no_sharding and shares_banks(strategy)):
            return shared_storage(strategy)
        device = self.device if trainer is None else trainer.strategy.root_device
        # Lightning makes a model in the context of its device; anywhere else everything is made on the CPU, and moved
        there = device if torch.get_default_device() == device else torch.device("cpu")
        ranks = 1 if trainer is None else max(1, trainer.num_devices)
        copies = 2 if self.transforms else 1
        return StorageChoice(**self._storage_options, device=device, made_on=there, ranks=ranks, copies=copies)

    def read_bank(self, base: Mapping[str, Tensor]) -> TaskVectors:
        """Read what is merged, the experts of the suite, as task vectors.

        Args:
            base: State dict of the base, in the order of the network.
        """
        return TaskVectors.from_state_dicts(
            base,
            {task: self.suite.expert(task) for task in self.suite.tasks},
            buffers=self.skeleton.buffers_of,
            tied=self.skeleton.tied,
            dtype=self.bank_dtype,
            storage=self.storage_factory(),
        )

    def transformed_bank(self, base: Mapping[str, Tensor]) -> TaskVectors:
        """Read the bank and transform it; say what was lost, if the storage loses anything.

        Args:
            base: State dict of the base, in the order of the network.
        """
        bank = self.read_bank(base)
        for transform in self.transforms:
            bank = bank.map(transform)
        if lost := bank.storage_report():
            rank_zero_info(_in_words(lost))
        return bank


def _in_words(lost: Mapping[str, Any]) -> str:
    errors: Sequence[float] = list(lost["tasks"].values())
    share = lost["bytes"] / max(lost["dense_bytes"], 1)
    return (
        f"storage: low_rank {lost['rank']}: {share:.0%} of the bytes; relative error of the task vectors "
        f"{lost['relative_error']:.2g} ({min(errors):.2g} to {max(errors):.2g} per task), most in "
        f"{lost['worst']['tensor']}: {lost['worst']['relative_error']:.2g}"
    )
