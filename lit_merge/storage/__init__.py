"""How a bank of task vectors is kept; methods do not notice."""

from lit_merge.storage.base import Block, Layout, Storage, StorageFactory, layout_of
from lit_merge.storage.dense import DenseBlock, DenseStorage

__all__ = ("Block", "DenseBlock", "DenseStorage", "Layout", "Storage", "StorageFactory", "layout_of")
