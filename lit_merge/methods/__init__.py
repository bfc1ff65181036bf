"""Merging methods, one a file."""

from lit_merge.methods.adamerging import AdaMerging
from lit_merge.methods.concrete import ConcreteMerging
from lit_merge.methods.dare import Dare
from lit_merge.methods.simple_average import SimpleAverage
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.methods.ties import Ties

__all__ = ("AdaMerging", "ConcreteMerging", "Dare", "SimpleAverage", "TaskArithmetic", "Ties")
