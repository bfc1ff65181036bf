"""Merging as pure functions of task vectors; nothing here imports Lightning.

Transforms map ``{name: (T, *shape)}`` to ``{name: (T, *shape)}``; merges map it to ``{name: (*shape)}``.
No function changes what it is given.
"""

from lit_merge.functional.batch_norm import recalibrate_batch_norm
from lit_merge.functional.concrete import concrete_merge, concrete_sample, final_mask, rescale_mask
from lit_merge.functional.dare import dare
from lit_merge.functional.leaf_gradient import leaf_loss
from lit_merge.functional.masked import Mask
from lit_merge.functional.sums import mean_merge, sum_merge
from lit_merge.functional.ties import disjoint_mean_merge, elect_signs, ties, trim

__all__ = (
    "Mask",
    "concrete_merge",
    "concrete_sample",
    "dare",
    "disjoint_mean_merge",
    "elect_signs",
    "final_mask",
    "leaf_loss",
    "mean_merge",
    "recalibrate_batch_norm",
    "rescale_mask",
    "sum_merge",
    "ties",
    "trim",
)
