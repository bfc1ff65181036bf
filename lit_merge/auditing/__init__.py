"""Looking at experts before they are merged: signals of a backdoor that need no labels and no trigger."""

from lit_merge.auditing.audit import AuditOptions, audit, inversion_row
from lit_merge.auditing.inversion import Candidates, Inversion, invert, project_budget, reach, reach_of_classes
from lit_merge.auditing.outliers import leading_share, task_vector_outliers
from lit_merge.auditing.robust import robust_z
from lit_merge.auditing.sensitivity import (
    concentration,
    flips,
    fooling_rates,
    leave_one_out,
    universal_sensitivity,
)
from lit_merge.auditing.suspicion import THRESHOLDS, precision_recall, suspicion

__all__ = (
    "THRESHOLDS",
    "AuditOptions",
    "Candidates",
    "Inversion",
    "audit",
    "concentration",
    "flips",
    "fooling_rates",
    "inversion_row",
    "invert",
    "leading_share",
    "leave_one_out",
    "precision_recall",
    "project_budget",
    "reach",
    "reach_of_classes",
    "robust_z",
    "suspicion",
    "task_vector_outliers",
    "universal_sensitivity",
)
