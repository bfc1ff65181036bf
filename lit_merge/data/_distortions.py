"""The distortions of pictures behind :mod:`lit_merge.data.corruptions`: arrays in, arrays out.

Each takes uint8 RGB ``(H, W, 3)``, its parameters at one severity and a generator, and returns the same kind of array.
Numbers are those of the code released with Hendrycks and Dietterich, arXiv 1903.12261, for pictures of 224 pixels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_merge.errors import require

__all__ = ("DISTORTIONS", "Distortion", "Picture")

Picture = NDArray[np.uint8]
_Floats = NDArray[np.float64]

_WATER = np.array([175, 238, 238]) / 255  # pale turquoise
_MUD = np.array([63, 42, 20]) / 255  # brown


class Distortion(NamedTuple):
    """A distortion and its parameters at severities 1 to 5."""

    apply: Callable[[Picture, Any, np.random.Generator], Picture]
    parameters: tuple[Any, Any, Any, Any, Any]


def _grey_levels(x: _Floats) -> Picture:
    """Bring [0, 1] back to bytes, cutting off fractions as the released code does."""
    return (x.clip(0, 1) * 255).astype(np.uint8)


def contrast(picture: Picture, factor: float, rng: np.random.Generator) -> Picture:
    """Shrink the distance of every channel from its mean."""
    x = picture / 255
    means = x.mean(axis=(0, 1))
    return _grey_levels((x - means) * factor + means)


def gaussian_noise(picture: Picture, deviation: float, rng: np.random.Generator) -> Picture:
    """Add normal noise; the deviation is of values in [0, 1]."""
    return _grey_levels(picture / 255 + rng.normal(scale=deviation, size=picture.shape))


def impulse_noise(picture: Picture, share: float, rng: np.random.Generator) -> Picture:
    """Set a share of all values to black or white, each channel on its own."""
    hit = rng.random(picture.shape) < share
    white = rng.random(picture.shape) < 0.5
    return np.where(hit, np.where(white, 255, 0), picture).astype(np.uint8)


def jpeg_compression(picture: Picture, quality: int, rng: np.random.Generator) -> Picture:
    """Save as JPEG and read again."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def pixelate(picture: Picture, factor: float, rng: np.random.Generator) -> Picture:
    """Shrink both sides by a factor and enlarge again, by areas."""
    height, width = picture.shape[:2]
    small = (max(int(width * factor), 1), max(int(height * factor), 1))
    box = Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize(small, box).resize((width, height), box))


def motion_blur(picture: Picture, radius_sigma: tuple[int, float], rng: np.random.Generator) -> Picture:
    """Smear along a line at -45 to 45 degrees, one half of a Gaussian, as ImageMagick's motion blur does."""
    radius, sigma = radius_sigma
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.deg2rad(rng.uniform(-45, 45))
    right = np.ceil(steps * np.cos(angle) - 0.5).astype(int)
    down = np.ceil(steps * np.sin(angle) - 0.5).astype(int)
    reach = 2 * radius
    padded = np.pad(picture.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    height, width = picture.shape[:2]
    total = np.zeros(picture.shape)
    for weight, dx, dy in zip(weights / weights.sum(), right, down, strict=True):
        total += weight * padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]
    return (total + 0.5).clip(0, 255).astype(np.uint8)


def spatter(
    picture: Picture, parameters: tuple[float, float, float, float, float, bool], rng: np.random.Generator
) -> Picture:
    """Throw drops of water, or of mud, at the picture.

    The released code uses OpenCV where SciPy and scikit-image stand in here: gradients are measured by their Euclidean
    length, and distances are exact.
    """
    mean, deviation, sigma, threshold, strength, mud = parameters
    ndimage = require("scipy.ndimage", "clip")
    layer = ndimage.gaussian_filter(rng.normal(mean, deviation, picture.shape[:2]), sigma, mode="nearest")
    layer[layer < threshold] = 0
    x = picture / 255
    if mud:
        cover = ndimage.gaussian_filter((layer > threshold).astype(np.float64), strength, mode="nearest")
        cover[cover < 0.8] = 0
        return _grey_levels(x * (1 - cover[..., None]) + _MUD * cover[..., None])
    drops = (layer.clip(0, 1) * 255).astype(np.uint8)
    sheen = drops * _relief(drops)
    return _grey_levels(x + strength * sheen[..., None] / max(sheen.max(), 1e-12) * _WATER)


def _relief(drops: Picture) -> _Floats:
    """Light on the rims of drops: distance to their edges, equalised and embossed."""
    ndimage = require("scipy.ndimage", "clip")
    canny = require("skimage.feature", "clip").canny
    # thresholds are on the gradient of 3x3 Sobel filters on grey levels, not smoothed before
    edges = canny(drops.astype(np.float64), sigma=0, low_threshold=50, high_threshold=150)
    far = np.full(drops.shape, 20.0) if not edges.any() else ndimage.distance_transform_edt(~edges).clip(max=20)
    near = ndimage.uniform_filter(far, 3, mode="mirror").astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    lit = ndimage.correlate(_equalised(near).astype(np.int64), emboss, mode="mirror").clip(0, 255)
    light: _Floats = ndimage.uniform_filter(lit.astype(np.float64), 3, mode="mirror")
    return light


def _equalised(grey: Picture) -> Picture:
    """Spread grey levels so that all are about as frequent."""
    counts = np.bincount(grey.ravel(), minlength=256).cumsum()
    lowest = counts[counts > 0][0]
    if lowest == counts[-1]:
        return grey
    table = np.rint((counts - lowest).clip(0) / (counts[-1] - lowest) * 255).astype(np.uint8)
    spread: Picture = table[grey]
    return spread


DISTORTIONS: dict[str, Distortion] = {
    "contrast": Distortion(contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "gaussian_noise": Distortion(gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "impulse_noise": Distortion(impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "jpeg_compression": Distortion(jpeg_compression, (25, 18, 15, 10, 7)),
    "motion_blur": Distortion(motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "pixelate": Distortion(pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "spatter": Distortion(
        spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    ),
}
