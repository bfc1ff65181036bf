"""RankGroup: the ranks that hold one bank together, and the collectives that it takes."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lit_merge.errors import MergeError

__all__ = ("RankGroup",)


class RankGroup:
    """A process group, gloo's or NCCL's. All of its ranks call the same methods in the same order.

    Results are where the tensors are. NCCL has to have these on a CUDA device: what is elsewhere, as all of a module
    is that Lightning has taken off the device at the end of a run, goes to this rank's device and back.

    Args:
        handle: The group; by default that of all ranks.

    Attributes:
        size: Number of ranks, W.
        rank: Number of this one among them.
    """

    def __init__(self, handle: dist.ProcessGroup | None = None) -> None:
        self._handle = handle
        self.size = dist.get_world_size(handle)
        self.rank = dist.get_rank(handle)

    def _there(self, value: Tensor) -> Tensor:
        """Bring a tensor to where the group can send it from."""
        if value.device.type == "cuda" or dist.get_backend(self._handle) != "nccl":
            return value
        return value.to(torch.device("cuda", torch.cuda.current_device()))

    def own(self, flat: Tensor) -> Tensor:
        """Return this rank's shard of a vector: entries [r·s, (r + 1)·s) with s = ⌈n / W⌉, fewer at the end.

        Args:
            flat: ``(n,)``.
        """
        size = self.shard(len(flat))
        return flat[min(self.rank * size, len(flat)) : (self.rank + 1) * size]

    def shard(self, size: int) -> int:
        """Entries of a shard of ``size`` entries, padding included."""
        return -(-size // self.size)

    def gather(self, shard: Tensor, size: int) -> Tensor:
        """Return a vector ``(n,)`` of which each rank has a shard.

        Args:
            shard: ``(s,)``; zeros behind the end.
            size: n.
        """
        sent = self._there(shard).contiguous()
        whole = sent.new_empty(self.size * len(sent))
        dist.all_gather_into_tensor(whole, sent, group=self._handle)
        return whole[:size].to(shard.device)

    def gather_rows(self, shards: Tensor, size: int) -> Tensor:
        """Return rows ``(T, n)`` of which each rank has shards.

        Args:
            shards: ``(T, s)``; zeros behind the end.
            size: n.
        """
        tasks, length = shards.shape
        found = self.gather(shards.flatten(), self.size * shards.numel()).view(self.size, tasks, length)
        return found.transpose(0, 1).reshape(tasks, self.size * length)[:, :size]

    def scatter_mean(self, flat: Tensor) -> Tensor:
        """Return this rank's shard ``(s,)`` of the mean over ranks; zeros behind the end.

        Args:
            flat: ``(n,)``, this rank's own.
        """
        size = self.shard(len(flat))
        whole = pad(self._there(flat), (0, self.size * size - len(flat))).contiguous()
        mean = whole.new_empty(size)
        dist.reduce_scatter_tensor(mean, whole, group=self._handle)
        return mean.div_(self.size).to(flat.device)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum over ranks."""
        found = self._there(value).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=self._handle)
        return found.to(value.device)

    def anyone(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on any rank."""
        return bool(self.total(torch.tensor(float(flag), device=device)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of a bank is held by the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to leave the process.

        Raises:
            MergeError: Always.
        """
        raise MergeError("a sharded bank belongs to the ranks that hold it, and cannot be pickled; keep a checkpoint")
