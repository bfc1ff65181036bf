"""Suites: what is merged, and on which images."""

from lit_merge.suites.backdoor import BackdoorSuite
from lit_merge.suites.base import LabelledDataset, Split, Suite
from lit_merge.suites.clip import ClipSuite
from lit_merge.suites.linearized import LinearizedSuite
from lit_merge.suites.mini import MiniSuite
from lit_merge.suites.network import NetworkSuite
from lit_merge.suites.weights import WeightsSuite

__all__ = (
    "BackdoorSuite",
    "ClipSuite",
    "LabelledDataset",
    "LinearizedSuite",
    "MiniSuite",
    "NetworkSuite",
    "Split",
    "Suite",
    "WeightsSuite",
)
