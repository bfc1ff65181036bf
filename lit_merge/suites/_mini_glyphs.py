"""Glyphs of the fonts inside matplotlib's wheel, rendered as small noisy images.

The fonts are DejaVu (Bitstream Vera licence), STIX (its own free licence) and BaKoMa's Computer Modern (free).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lit_merge.errors import MergeError, require

__all__ = ("GLYPH_TASKS", "GlyphTask", "render_task")

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Look = Literal["paper", "neon", "chalk"]

SIZE = 28
_CANVAS = 2 * SIZE  # glyphs are drawn at twice the size and halved: smooth edges after rotation

_SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-BoldOblique")
_SERIF = ("DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBolIta")


@dataclass(frozen=True)
class GlyphTask:
    """How the images of one glyph task are drawn.

    Attributes:
        texts: Strings of each class in the training and in the test images; one entry per class or one for all.
        faces: Font files (stems) of each class in the training and in the test images; likewise.
        look: Ink, ground and noise.
        size: Height of the em square in pixels of the final image, smallest and largest.
        rotation: Largest rotation in degrees.
    """

    texts: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]
    faces: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]
    look: Look
    size: tuple[float, float] = (18.0, 24.0)
    rotation: float = 8.0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return max(len(self.texts[0]), len(self.faces[0]))

    def choices(self, split: int, label: int) -> tuple[Sequence[str], Sequence[str]]:
        """Return the strings and the font files with which class ``label`` is drawn in split 0 or 1."""
        texts, faces = self.texts[split], self.faces[split]
        return texts[label if len(texts) > 1 else 0], faces[label if len(faces) > 1 else 0]


def _characters(characters: str, train: Sequence[str], test: Sequence[str], look: Look) -> GlyphTask:
    """Return the task of telling characters apart in fonts that were not seen in training."""
    texts = [(character,) for character in characters]
    return GlyphTask((texts, texts), ([train], [test]), look)


_PAIRS = [first + second for first in "abdeghknpqruwy" for second in "abdeghknpqrstuy"]
_TYPEFACES = ("DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono", "STIXGeneralBolIta", "cmtt10")
_EACH_TYPEFACE = [(face,) for face in _TYPEFACES]

GLYPH_TASKS: dict[str, GlyphTask] = {
    "letters": _characters(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (*_SANS, *_SERIF, "cmr10", "cmss10", "cmti10", "STIXGeneralItalic"),
        ("DejaVuSansMono-Bold", "DejaVuSerif-Italic", "STIXGeneralBol", "DejaVuSans-BoldOblique", "cmb10"),
        "paper",
    ),
    "symbols": _characters(
        "∀∂∃∇∈∏∑√∞∠∧∩∫≈≠≡≤⊂⊕⊗←↑⇒÷",
        ("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSansMono-Bold", "DejaVuSerif", "STIXGeneral"),
        ("DejaVuSans-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralBol"),
        "chalk",
    ),
    "fonts": GlyphTask(([_PAIRS[::2]], [_PAIRS[1::2]]), (_EACH_TYPEFACE, _EACH_TYPEFACE), "neon", (18.0, 19.0), 3.0),
}


def render_task(task: GlyphTask, split: int, count: int, rng: np.random.Generator) -> tuple[Pixels, Labels]:
    """Draw the images of one split.

    Args:
        task: What is drawn.
        split: 0 for the training images, 1 for the test images.
        count: Number of images; the classes take turns.
        rng: Source of every random choice.

    Returns:
        Images ``(N, C, 28, 28)`` and labels ``(N,)``; C is 1 for grey looks and 3 for coloured ones.
    """
    labels = np.arange(count) % task.classes
    masks = np.stack([_draw_sample(task, split, int(label), rng) for label in labels])
    return _LOOKS[task.look](masks.astype(np.float32) / 255, rng), labels


def _draw_sample(task: GlyphTask, split: int, label: int, rng: np.random.Generator) -> Pixels:
    """Draw one image of class ``label`` as coverage ``(28, 28)``."""
    text, face = (str(rng.choice(some)) for some in task.choices(split, label))
    pixels = round(2 * rng.uniform(*task.size))
    return _draw(text, face, pixels, rng.uniform(-task.rotation, task.rotation), rng.uniform(-4, 4, size=2))


def _draw(text: str, face: str, pixels: int, degrees: float, shift: npt.NDArray[np.float64]) -> Pixels:
    """Draw ``text`` with its ink centred, then shifted and rotated."""
    font = _font(face, pixels)
    left, top, right, bottom = font.getbbox(text)
    corner = (_CANVAS - right - left) / 2 + shift[0], (_CANVAS - bottom - top) / 2 + shift[1]
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(canvas).text((round(corner[0]), round(corner[1])), text, fill=255, font=font)
    turned = canvas.rotate(degrees, resample=Image.Resampling.BILINEAR)
    return np.asarray(turned.reduce(2), dtype=np.uint8)


@functools.cache
def _font(face: str, pixels: int) -> ImageFont.FreeTypeFont:
    """Open one font of matplotlib; basic layout, so that the result does not depend on libraqm."""
    folder = Path(require("matplotlib", "demo").get_data_path()) / "fonts" / "ttf"
    try:
        return ImageFont.truetype(str(folder / f"{face}.ttf"), pixels, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise MergeError(f"{folder / face}.ttf cannot be read ({error}); reinstall matplotlib") from error


def _paper(masks: npt.NDArray[np.floating], rng: np.random.Generator) -> Pixels:
    """Dark ink on light, uneven paper; grey."""
    n = len(masks)
    ground = rng.uniform(0.7, 1.0, (n, 1, 1)) + _slopes(n, 0.25, rng)
    ink = rng.uniform(0.0, 0.3, (n, 1, 1))
    return _to_pixels((ground + (ink - ground) * masks)[:, None], 0.05, rng)


def _chalk(masks: npt.NDArray[np.floating], rng: np.random.Generator) -> Pixels:
    """Light, crumbling strokes on a dark board; grey."""
    n = len(masks)
    crumbs = rng.uniform(0.5, 1.0, masks.shape)
    board = rng.uniform(0.05, 0.2, (n, 1, 1)) + _slopes(n, 0.2, rng)
    return _to_pixels((board + (1 - board) * masks * crumbs)[:, None], 0.06, rng)


def _neon(masks: npt.NDArray[np.floating], rng: np.random.Generator) -> Pixels:
    """Bright colours on a dark ground that shades from one colour into another."""
    n = len(masks)
    ground = rng.uniform(0, 0.4, (n, 3, 1, 1)) + _slopes(3 * n, 0.2, rng).reshape(n, 3, SIZE, SIZE)
    ink = rng.uniform(0.6, 1.0, (n, 3, 1, 1))
    return _to_pixels(ground + (ink - ground) * masks[:, None], 0.04, rng)


_LOOKS: dict[Look, Callable[[npt.NDArray[np.floating], np.random.Generator], Pixels]] = {
    "paper": _paper,
    "chalk": _chalk,
    "neon": _neon,
}


def _slopes(count: int, height: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return ``count`` tilted planes ``(N, 28, 28)`` with values in about +-``height``."""
    ramp = np.linspace(-0.5, 0.5, SIZE)
    tilt = rng.uniform(-height, height, (2, count, 1, 1))
    return np.asarray(tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :])


def _to_pixels(values: npt.NDArray[np.floating], noise: float, rng: np.random.Generator) -> Pixels:
    """Add Gaussian noise and turn values in [0, 1] into bytes."""
    noisy = values + noise * rng.standard_normal(values.shape)
    return (np.clip(noisy, 0, 1) * 255).round().astype(np.uint8)
