"""Merging as pure functions of task vectors; nothing here imports Lightning.

Transforms map ``{name: (T, *shape)}`` to ``{name: (T, *shape)}``; merges map it to ``{name: (*shape)}``.
No function changes what it is given.
"""

from lit_merge.functional.batch_norm import recalibrate_batch_norm
from lit_merge.functional.breadcrumbs import breadcrumbs
from lit_merge.functional.concrete import concrete_merge, concrete_sample, final_mask, rescale_mask
from lit_merge.functional.consensus import consensus_mask, consensus_merge, tall_masks
from lit_merge.functional.continual_metrics import ContinualMetrics, continual_metrics
from lit_merge.functional.dare import dare
from lit_merge.functional.decompositions import Factors, left_basis, polar, randomized_error_bound, truncated_svd
from lit_merge.functional.della import elected_mean_merge, magprune
from lit_merge.functional.diagonal_fisher import diagonal_fisher
from lit_merge.functional.doge import doge, shared_basis, task_aware_coefficients
from lit_merge.functional.dop import DopProblem, dop, dop_step
from lit_merge.functional.emr import emr, emr_rescalers, emr_unified
from lit_merge.functional.fisher_merge import FisherAverage, fisher_merge
from lit_merge.functional.isotropic import common_rank, iso_c, iso_cts
from lit_merge.functional.knots import align, knots
from lit_merge.functional.layer_problem import LayerProblem
from lit_merge.functional.leaf_gradient import leaf_loss
from lit_merge.functional.linear_inputs import LinearInputs
from lit_merge.functional.lines import lines, lines_intercept
from lit_merge.functional.magmax import magmax
from lit_merge.functional.masked import Mask
from lit_merge.functional.matrices import MatrixPolicy, merge_matrices
from lit_merge.functional.model_stock import model_stock
from lit_merge.functional.opcm import OpcmFacts, ProjectionFacts, opcm, opcm_projection, opcm_rescale, opcm_step
from lit_merge.functional.pcb import pcb_merge
from lit_merge.functional.regmean import NormalEquations, regmean
from lit_merge.functional.sce import sce_merge
from lit_merge.functional.selection import kth_magnitude, kth_magnitudes
from lit_merge.functional.spherical import karcher_mean, slerp
from lit_merge.functional.sums import mean_merge, sum_merge
from lit_merge.functional.svc import calibration_factors, svc
from lit_merge.functional.ties import (
    TiesFacts,
    disjoint_mean_merge,
    elect_signs,
    majority_sign,
    ties,
    ties_facts,
    ties_merge,
    trim,
)
from lit_merge.functional.tsv import (
    Decompose,
    TsvFacts,
    kept_rank,
    orthogonalize,
    singular_task_interference,
    task_overlap,
    task_singular_vectors,
    tsv_merge,
)
from lit_merge.functional.tsv_compress import compressed_bytes, tsv_compress, tsv_restore
from lit_merge.functional.weighted_average import weighted_average
from lit_merge.functional.wudi import wudi

__all__ = (
    "ContinualMetrics",
    "Decompose",
    "DopProblem",
    "Factors",
    "FisherAverage",
    "LayerProblem",
    "LinearInputs",
    "Mask",
    "MatrixPolicy",
    "NormalEquations",
    "OpcmFacts",
    "ProjectionFacts",
    "TiesFacts",
    "TsvFacts",
    "align",
    "breadcrumbs",
    "calibration_factors",
    "common_rank",
    "compressed_bytes",
    "concrete_merge",
    "concrete_sample",
    "consensus_mask",
    "consensus_merge",
    "continual_metrics",
    "dare",
    "diagonal_fisher",
    "disjoint_mean_merge",
    "doge",
    "dop",
    "dop_step",
    "elect_signs",
    "elected_mean_merge",
    "emr",
    "emr_rescalers",
    "emr_unified",
    "final_mask",
    "fisher_merge",
    "iso_c",
    "iso_cts",
    "karcher_mean",
    "kept_rank",
    "knots",
    "kth_magnitude",
    "kth_magnitudes",
    "leaf_loss",
    "left_basis",
    "lines",
    "lines_intercept",
    "magmax",
    "magprune",
    "majority_sign",
    "mean_merge",
    "merge_matrices",
    "model_stock",
    "opcm",
    "opcm_projection",
    "opcm_rescale",
    "opcm_step",
    "orthogonalize",
    "pcb_merge",
    "polar",
    "randomized_error_bound",
    "recalibrate_batch_norm",
    "regmean",
    "rescale_mask",
    "sce_merge",
    "shared_basis",
    "singular_task_interference",
    "slerp",
    "sum_merge",
    "svc",
    "tall_masks",
    "task_aware_coefficients",
    "task_overlap",
    "task_singular_vectors",
    "ties",
    "ties_facts",
    "ties_merge",
    "trim",
    "truncated_svd",
    "tsv_compress",
    "tsv_merge",
    "tsv_restore",
    "weighted_average",
    "wudi",
)
