"""Merging methods, one a file."""

from lit_merge.methods.adamerging import AdaMerging
from lit_merge.methods.awm import AWM
from lit_merge.methods.concrete import ConcreteMerging
from lit_merge.methods.dam import DAM
from lit_merge.methods.dare import Dare
from lit_merge.methods.sau import SAU
from lit_merge.methods.simple_average import SimpleAverage
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.methods.ties import Ties

__all__ = ("AWM", "DAM", "SAU", "AdaMerging", "ConcreteMerging", "Dare", "SimpleAverage", "TaskArithmetic", "Ties")
