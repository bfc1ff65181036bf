"""How a bank of task vectors is kept; methods do not notice."""

from lit_merge.storage.base import Block, Layout, Storage, StorageFactory, layout_of
from lit_merge.storage.choice import StorageChoice, StorageKind
from lit_merge.storage.dense import DenseBlock, DenseStorage
from lit_merge.storage.host import HostStorage
from lit_merge.storage.low_rank import LowRankStorage
from lit_merge.storage.mmap import MappedStorage
from lit_merge.storage.ranks import RankGroup
from lit_merge.storage.sharded import ShardedBlock, ShardedStorage, sharded_over

__all__ = (
    "Block",
    "DenseBlock",
    "DenseStorage",
    "HostStorage",
    "Layout",
    "LowRankStorage",
    "MappedStorage",
    "RankGroup",
    "ShardedBlock",
    "ShardedStorage",
    "Storage",
    "StorageChoice",
    "StorageFactory",
    "StorageKind",
    "layout_of",
    "sharded_over",
)
