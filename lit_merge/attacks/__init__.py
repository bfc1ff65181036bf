"""Attacks on merging, for the laboratory that defences are measured in."""

import lit_merge.suites  # noqa: F401 - first, as its BackdoorSuite takes attacks, which take suites
from lit_merge.attacks.badmerging import BadMergingOn, InterpolationModule
from lit_merge.attacks.badmerging_off import BadMergingOff
from lit_merge.attacks.badnets import BadNets
from lit_merge.attacks.base import Attack, Attacker, Schedule
from lit_merge.attacks.patch_search import adversarial_images, universal_patch

__all__ = (
    "Attack",
    "Attacker",
    "BadMergingOff",
    "BadMergingOn",
    "BadNets",
    "InterpolationModule",
    "Schedule",
    "adversarial_images",
    "universal_patch",
)
