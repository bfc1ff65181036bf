"""Transforms of task vectors; any of them can stand before any rule."""

from lit_merge.transforms.base import DeltaMap, Needs, Pieces, Transform
from lit_merge.transforms.breadcrumbs import Breadcrumbs
from lit_merge.transforms.consensus import Consensus
from lit_merge.transforms.dare import Dare
from lit_merge.transforms.doge import Doge
from lit_merge.transforms.lines import Lines
from lit_merge.transforms.magprune import MagPrune
from lit_merge.transforms.ties import Ties

__all__ = (
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "DeltaMap",
    "Doge",
    "Lines",
    "MagPrune",
    "Needs",
    "Pieces",
    "Ties",
    "Transform",
)
