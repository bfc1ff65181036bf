"""Transforms of task vectors; any of them can stand before any rule."""

from lit_merge.transforms.base import Transform
from lit_merge.transforms.dare import Dare
from lit_merge.transforms.ties import Ties

__all__ = ("Dare", "Ties", "Transform")
