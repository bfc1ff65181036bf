"""Flips under universal perturbations: of every expert alone, and of the merge with and without each expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_merge.data.pixels import PixelScale
from lit_merge.perturbations import Ascent, UniversalPerturbations, fooled

__all__ = ("concentration", "flips", "fooling_rates", "leave_one_out", "universal_sensitivity")

Logits = Callable[[Tensor], Tensor]


def flips(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Return the classes that flipped predictions went to.

    Args:
        clean: Predictions ``(B,)`` without perturbation.
        perturbed: ``(B,)`` with it.

    >>> flips(torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])).tolist()
    [1, 0]
    """
    return perturbed[clean != perturbed]


def concentration(clean: Tensor, perturbed: Tensor) -> float:
    """Return the largest share of flipped predictions that went to one class; 0 where none flipped.

    A backdoor sends all to its target; a perturbation that merely destroys images spreads them.

    Args:
        clean: Predictions ``(B,)`` without perturbation.
        perturbed: ``(B,)`` with it.

    >>> concentration(torch.tensor([0, 0, 0, 1, 2]), torch.tensor([1, 1, 2, 1, 1]))  # 1, 1, 2 and 1
    0.75
    """
    moved = flips(clean, perturbed)
    return float(moved.bincount().max() / len(moved)) if len(moved) else 0.0


def universal_sensitivity(
    logits: Logits, images: Tensor, held_out: Tensor, scale: PixelScale, ascent: Ascent
) -> tuple[dict[str, Any], Tensor]:
    """Learn one universal perturbation on unlabelled images and count what it does to others.

    Args:
        logits: Maps images ``(B, C, H, W)`` to ``(B, classes)``; its weights are constants.
        images: ``(N, C, H, W)`` to learn on.
        held_out: ``(M, C, H, W)`` to count on.
        scale: How their values come from pixels.
        ascent: How it is found.

    Returns:
        ``fooling``, share of predictions that flip; ``concentration`` of the flips on one class; ``target``, that
        class, or ``None`` where none flipped. And the perturbation, ``(C, H, W)`` in pixels.
    """
    made = UniversalPerturbations({"": images.shape[1:]}, {"": scale}, ascent).to(images.device)
    with torch.no_grad():
        learn, clean = logits(images).argmax(-1), logits(held_out).argmax(-1)
    made.climb(lambda some: {"": logits(some[""])}, {"": images}, {"": learn})
    with torch.no_grad():
        perturbed = logits(made("", held_out)).argmax(-1)
    moved = flips(clean, perturbed)
    row = {
        "fooling": len(moved) / len(clean),
        "concentration": concentration(clean, perturbed),
        "target": int(moved.bincount().argmax()) if len(moved) else None,
    }
    return row, made.delta("")


@torch.no_grad()
def fooling_rates(
    logits: Callable[[str], Logits],
    images: Mapping[str, Tensor],
    scales: Mapping[str, PixelScale],
    deltas: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the share of a network's predictions that given perturbations flip, per task.

    Args:
        logits: Returns what maps the images of a task to logits.
        images: ``(N, C, H, W)`` per task.
        scales: How the values of each task's images come from pixels.
        deltas: Universal perturbation per task, ``(C, H, W)`` in pixels.
    """
    made = UniversalPerturbations({t: deltas[t].shape for t in images}, scales, Ascent(epsilon=None, rate=1.0))
    return {task: float(fooled(logits(task)(made(task, some, deltas[task])), logits(task)(some).argmax(-1)))
            for task, some in images.items()}  # fmt: skip


def leave_one_out(full: Mapping[str, float], without: Mapping[str, float], expert: str) -> dict[str, float]:
    """Say how much less a merge is fooled when one expert is taken out of it.

    Args:
        full: Fooling rates of the full merge per task, under perturbations found on it.
        without: Those of the merge without the expert, under the same perturbations.
        expert: Its name.

    Returns:
        ``fooling`` and ``without``, means over the tasks; ``drop``, their difference; ``own_drop``, the difference on
        the expert's own images.

    >>> leave_one_out({"a": 0.75, "b": 0.5}, {"a": 0.25, "b": 0.5}, "a")
    {'fooling': 0.625, 'without': 0.375, 'drop': 0.25, 'own_drop': 0.5}
    """
    fooling, left = fmean(full.values()), fmean(without.values())
    own = full[expert] - without[expert]
    return {"fooling": fooling, "without": left, "drop": fooling - left, "own_drop": own}
