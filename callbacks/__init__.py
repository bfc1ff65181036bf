"""Callbacks of lit-merge, importable as ``lit_merge.callbacks``."""

from lit_merge.callbacks.backdoor_monitor import BackdoorMonitor
from lit_merge.callbacks.coefficient_monitor import CoefficientMonitor
from lit_merge.callbacks.collapse_monitor import CollapseMonitor
from lit_merge.callbacks.export_merge import ExportMerge
from lit_merge.callbacks.log_config import LogConfig
from lit_merge.callbacks.report import Report
from lit_merge.callbacks.resume_point import ResumePoint
from lit_merge.callbacks.sequential_merging import SequentialMerging

__all__ = (
    "BackdoorMonitor",
    "CoefficientMonitor",
    "CollapseMonitor",
    "ExportMerge",
    "LogConfig",
    "Report",
    "ResumePoint",
    "SequentialMerging",
)
