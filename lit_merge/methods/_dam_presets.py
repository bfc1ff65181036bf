"""Where the paper and the released code of DAM differ."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lit_merge.objectives.consistency import Safety
from lit_merge.perturbations import Ascent, Box

__all__ = ("PRESETS", "MaskUpdate", "Masks", "Preset", "Stage")

Masks = Literal["single", "dual"]
Stage = Literal["none", "entropy", "safe"]
MaskUpdate = Literal["normalized", "adam"]


class Preset(NamedTuple):
    """What the paper and the released code do differently, beyond what Concrete merging's presets say."""

    masks: Masks
    safety: Safety
    alpha: float
    ascent: Ascent
    box: Box
    mask_update: MaskUpdate
    mask_rate: float
    coefficient_stage: Stage

    def ascent_with(self, epsilon: float | None, steps: int | None, rate: float | None, box: Box) -> Ascent:
        """Return the ascent with what is given in place of the preset's; an infinite ``epsilon`` is no bound.

        The box is for climbing too if it is the valid one; the released code has none there.
        """
        return Ascent(
            self.ascent.epsilon if epsilon is None else None if epsilon == float("inf") else epsilon,
            self.ascent.steps if steps is None else steps,
            self.ascent.rate if rate is None else rate,
            self.ascent.direction,
            "valid" if box == "valid" else "none",
        )


PRESETS = {
    "paper": Preset("dual", "consistency", 1.0, Ascent(0.05), "valid", "normalized", 5e-3, "safe"),
    "released": Preset(
        "single", "entropy", 0.1, Ascent(None, 1, 2.7e-5, "adam", "none"), "unit", "adam", 1e-3, "entropy"
    ),
}
