"""Universal perturbations: one learned change per task that is added to every image, as a stand-in for a trigger.

A defender knows no trigger. What it can have is the change of the images, the same for all of them, that flips the
most predictions: parameters that carry a backdoor answer it more than others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from lit_merge.data.pixels import PixelScale, per_channel
from lit_merge.errors import MergeError
from lit_merge.suites.base import Suite

__all__ = ("Ascent", "Box", "UniversalPerturbations", "fooled")


Box = Literal["valid", "unit", "none"]


@dataclass(frozen=True)
class Ascent:
    """How universal perturbations are found.

    Args:
        epsilon: Largest change of a pixel; pixels are in [0, 1]. ``None``: no bound, as in DAM's released code.
        steps: Steps of ascent each time.
        rate: Change of a pixel by one step; by default a quarter of ``epsilon``.
        direction: ``sign``: every pixel changes by ``rate``, as in PGD (arXiv 1706.06083); ``adam``: by Adam's rule
            with ``rate`` as learning rate, as in DAM's released code.
        box: What perturbed images are cut to while climbing, see :class:`UniversalPerturbations`.

    Raises:
        MergeError: A value is out of range.
    """

    epsilon: float | None = 0.1
    steps: int = 1
    rate: float | None = None
    direction: Literal["sign", "adam"] = "sign"
    box: Box = "valid"

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 <= self.epsilon < inf:
            raise MergeError(f"Ascent.epsilon: expected at least 0, or null for no bound, found {self.epsilon}")
        if self.steps < 0:
            raise MergeError(f"Ascent.steps: expected at least 0, found {self.steps}")
        if self.direction not in ("sign", "adam"):
            raise MergeError(f"Ascent.direction: expected sign or adam, found {self.direction!r}")
        if self.box not in get_args(Box):
            raise MergeError(f"Ascent.box: expected valid, unit or none, found {self.box!r}")
        if self.rate is None and self.epsilon is None:
            raise MergeError("Ascent.rate: expected a number, as there is no epsilon to derive it from")
        if self.rate is not None and not 0 < self.rate < inf:
            raise MergeError(f"Ascent.rate: expected a number above 0, found {self.rate}")

    @property
    def pixel_rate(self) -> float:
        """Change of a pixel by one step."""
        return self.rate if self.rate is not None else (self.epsilon or 0.0) / 4


class UniversalPerturbations(nn.Module):
    """One perturbation δ_t per task, held in pixels: in a ball of the largest norm, applied within the valid box.

    They start at 0, are kept from step to step and go into checkpoints, so a resumed run has them.

    Args:
        shapes: Shape ``(C, H, W)`` of each task's images.
        scales: How the values of each task's images come from pixels.
        ascent: How they are found.

    >>> scale = PixelScale.of_range(-1, 1)
    >>> deltas = UniversalPerturbations({"a": torch.Size([1, 1, 2])}, {"a": scale}, Ascent(0.25, rate=0.2))
    >>> deltas.ascend("a", torch.tensor([[[1.0, -2.0]]]))
    >>> deltas.ascend("a", torch.tensor([[[1.0, 1.0]]]))
    >>> deltas.delta("a").tolist()  # 0.4 is cut to 0.25
    [[[0.25, 0.0]]]
    >>> deltas("a", torch.tensor([[[[0.9, -1.0]]]])).tolist()  # a pixel is at most 1
    [[[[1.0, -1.0]]]]
    """

    def __init__(self, shapes: Mapping[str, Iterable[int]], scales: Mapping[str, PixelScale], ascent: Ascent) -> None:
        super().__init__()
        self.tasks = tuple(shapes)
        self.scales = dict(scales)
        self.ascent = ascent
        for number, shape in enumerate(shapes.values()):
            self.register_buffer(f"delta_{number}", torch.zeros(*shape))
            if ascent.direction == "adam":
                self.register_buffer(f"moments_{number}", torch.zeros(2, *shape))
                self.register_buffer(f"count_{number}", torch.zeros((), dtype=torch.long))

    @classmethod
    def of_suite(cls, suite: Suite, ascent: Ascent) -> Self:
        """Return perturbations for the images of a suite's merged tasks.

        Raises:
            MergeError: Nothing tells how the values of the images come from pixels.
        """
        shapes = {task: suite.dataset(task, "test")[0][0].shape for task in suite.tasks}
        return cls(shapes, {task: suite.pixels(task) for task in suite.tasks}, ascent)

    def delta(self, task: str) -> Tensor:
        """Return the perturbation of a task, ``(C, H, W)`` in pixels."""
        return self.get_buffer(f"delta_{self.tasks.index(task)}")

    def forward(self, task: str, images: Tensor, delta: Tensor | None = None, box: Box = "valid") -> Tensor:
        """Return images with the perturbation, cut to values that pixels in [0, 1] have.

        Args:
            task: Whose perturbation.
            images: ``(B, C, H, W)``, as the network takes them.
            delta: ``(C, H, W)`` in pixels, in place of the task's own; differentiable.
            box: ``valid``; or as in DAM's released code, ``none``, or ``unit``: values are cut to [0, 1] although they
                are normalised, which flattens whatever is darker than the mean.
        """
        scale = self.scales[task]
        change = (self.delta(task) if delta is None else delta).to(images)
        std = per_channel(scale.std, images)
        if box == "unit":
            return (images + change / std).clamp(0, 1)
        if box == "none":
            return images + change / std
        black, white = (scale.values(images.new_full((1, images.shape[-3], 1, 1), level)) for level in (0, 1))
        # an image whose own values lie outside of the box, as those of a transform may, keeps them
        return (images + change / std).maximum(black.minimum(images)).minimum(white.maximum(images))

    @torch.no_grad()
    def ascend(self, task: str, gradient: Tensor) -> None:
        """Take one step of ascent and go back into the ball.

        Args:
            task: Whose perturbation.
            gradient: ``(C, H, W)``, of what is to grow; the same on all ranks. Where it is not finite, as half
                precision may make it, it counts as 0.
        """
        number, rate = self.tasks.index(task), self.ascent.pixel_rate
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        delta = self.delta(task)
        if self.ascent.direction == "sign":
            delta += rate * gradient.sign()
        else:
            first, second = self.get_buffer(f"moments_{number}")
            count = self.get_buffer(f"count_{number}").add_(1)
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            delta += rate * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        if self.ascent.epsilon is not None:
            delta.clamp_(-self.ascent.epsilon, self.ascent.epsilon)

    def climb(
        self,
        logits: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        images: Mapping[str, Tensor],
        classes: Mapping[str, Tensor],
        shares: Mapping[str, float] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Take the steps of ascent on CE(f_t(x + δ_t), argmax f_t(x)): uphill is where predictions flip.

        Args:
            logits: Maps images per task to logits ``(B, C)`` per task, of a network whose weights are constants.
            images: ``(B, C, H, W)`` per task, without the perturbation.
            classes: ``(B,)`` per task, what is predicted for them.
            shares: Weight of this rank in the mean over ranks, per task; see :class:`~lit_merge.data.UnlabelledBatch`.
            reduce: Mean of a gradient over ranks.
            scale: Factor of the loss on its way back, for half precision; it does not change the result.
        """
        for _ in range(self.ascent.steps):
            with torch.enable_grad():
                deltas = {task: self.delta(task).detach().clone().requires_grad_() for task in images}
                found = logits({task: self(task, images[task], deltas[task], self.ascent.box) for task in images})
                losses = [
                    tf.cross_entropy(found[task].float(), classes[task]) * (1.0 if shares is None else shares[task])
                    for task in images
                ]
                gradients = torch.autograd.grad(torch.stack(losses).sum() * scale, list(deltas.values()))
            for task, gradient in zip(images, gradients, strict=True):
                self.ascend(task, (gradient if reduce is None else reduce(gradient)) / scale)

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again at 0."""
        for value in self.buffers():
            value.zero_()

    def largest(self) -> dict[str, float]:
        """Largest change of a pixel per task."""
        return {task: float(self.delta(task).abs().max()) for task in self.tasks}


def fooled(perturbed: Tensor, classes: Tensor) -> Tensor:
    """Share of predictions that a perturbation flips.

    Args:
        perturbed: Logits ``(B, C)`` with it.
        classes: ``(B,)``, predictions without it.

    >>> fooled(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    return (perturbed.argmax(-1) != classes).float().mean()
