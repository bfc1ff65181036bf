"""Merges under strategies of several ranks: which of them share a bank, and what ModelParallelStrategy leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lit_merge.storage import DenseStorage, RankGroup, StorageFactory, sharded_over

__all__ = (
    "MergeParallelStrategy",
    "adopt_strategy",
    "average_gradients",
    "shared_storage",
    "shares_banks",
)


class MergeParallelStrategy(ModelParallelStrategy):
    """ModelParallelStrategy for modules whose parameters are plain tensors, the same on all ranks.

    What a merge learns is small and whole on every rank; only its bank is sharded, and that is no part of a checkpoint.
    So checkpoints are the ordinary ones: one file, written by rank zero, whatever ``save_distributed_checkpoint`` says.
    Lightning's own would look for DTensors when it loads one.

    ``Trainer(strategy="model_parallel")`` shards over the devices of a node, and has data parallel nodes; as
    :func:`adopt_strategy` sees to it, an instance of Lightning's class will do as well.
    """

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return False

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint


for _name in ("model_parallel", "modelparallelstrategy"):  # the latter: what becomes of its bare name in a command
    StrategyRegistry.register(
        _name, MergeParallelStrategy, description=str(MergeParallelStrategy.__doc__), override=True
    )


def adopt_strategy(strategy: Strategy) -> None:
    """Let a ModelParallelStrategy keep checkpoints as a :class:`MergeParallelStrategy`.

    Configurations and any Trainer can then name Lightning's.

    Args:
        strategy: That of the Trainer, before it restores anything; one of another class stays as it is.
    """
    if type(strategy) is ModelParallelStrategy:
        strategy.__class__ = MergeParallelStrategy


def average_gradients(strategy: Strategy, parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over ranks under a ModelParallelStrategy, which leaves that to the module.

    It does not matter which of them are equal already, as those that come out of a shared bank are among its ranks.

    Args:
        strategy: That of the Trainer; others take care of it themselves.
        parameters: In the same order on all ranks.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            mean: Any = strategy.reduce(parameter.grad, reduce_op="mean")
            assert isinstance(mean, Tensor)
            parameter.grad = mean


def shares_banks(strategy: Strategy | None) -> bool:
    """Whether a strategy is there to share what is large, so that ``storage: auto`` means ``sharded``.

    Args:
        strategy: That of the Trainer, if there is one.
    """
    return isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1


def shared_storage(strategy: Strategy | None) -> StorageFactory:
    """Return a storage that the ranks of a strategy hold together.

    ===========================  ===================================================================================
    ``ddp`` and its variants     the bank is sharded over all ranks
    ``ModelParallelStrategy``    over the ``tensor_parallel_size`` ranks of a row of its mesh, and each of the
                                 ``data_parallel_size`` rows has all of it
    one process                  it is on the device, and that is said
    ===========================  ===================================================================================

    In both dimensions each rank adapts on images of its own.

    Args:
        strategy: That of the Trainer, whose processes have met; ``None`` if there is none.
    """
    group = None
    if isinstance(strategy, ParallelStrategy) and dist.is_available() and dist.is_initialized():
        mesh = isinstance(strategy, ModelParallelStrategy)
        group = RankGroup(strategy.device_mesh["tensor_parallel"].get_group() if mesh else None)  # type: ignore[attr-defined]
    if group is None or group.size == 1:
        rank_zero_info("model.storage: sharded: there is one rank to hold the bank, so all of it is on its device")
        return DenseStorage
    assert isinstance(strategy, ParallelStrategy)
    rank_zero_info(f"model.storage: sharded: each of {group.size} ranks holds 1/{group.size} of base and task vectors")
    return sharded_over(group, strategy.root_device)
