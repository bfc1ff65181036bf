"""From a picture to the input of a network, as the libraries' own configuration files say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

from lit_merge.errors import MergeError

__all__ = ("CenterCropFloor", "Scale", "clip_preprocessor", "hugging_face_preprocess", "preprocessor_of", "to_rgb")

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_RESAMPLE = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}
_BICUBIC, _BILINEAR = 3, 2


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture with three channels; transparency is dropped."""
    return picture.convert("RGB")


@dataclass(frozen=True)
class CenterCropFloor:
    """Crop the centre of a picture; where that lies between two pixels the upper left one counts, as in transformers.

    ``torchvision.transforms.CenterCrop`` rounds half to even, which is another pixel for some sizes.

    Attributes:
        height: Pixels.
        width: Pixels.
    """

    height: int
    width: int

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Crop; what is too small is padded with black."""
        top, left = (picture.height - self.height) // 2, (picture.width - self.width) // 2
        return picture.crop((left, top, left + self.width, top + self.height))


@dataclass(frozen=True)
class Scale:
    """Multiply an image.

    Attributes:
        factor: By what.
    """

    factor: float

    def __call__(self, image: Tensor) -> Tensor:
        """Return the product."""
        return image * self.factor


def clip_preprocessor(size: int = 224) -> dict[str, Any]:
    """Return the ``preprocessor_config.json`` of CLIP.

    Args:
        size: Pixels; the shorter side is resized to it, bicubic, and the centre cropped.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_MEAN),
        "image_std": list(_STD),
    }


def preprocessor_of(open_clip: Mapping[str, Any]) -> dict[str, Any]:
    """Translate open_clip's preprocessing into a ``preprocessor_config.json``.

    Args:
        open_clip: ``size``, ``mean``, ``std``, ``interpolation``, ``resize_mode`` as in ``open_clip.PreprocessCfg``.

    Raises:
        MergeError: Hugging Face's image processor of CLIP cannot do it (``resize_mode: longest``).
    """
    size = open_clip["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode = open_clip["resize_mode"]
    if mode == "longest" or (mode == "shortest" and height != width):
        raise MergeError(
            f"preprocessing: expected resize_mode squash, or shortest to a square; found {mode} to {height}x{width}, "
            "which CLIPImageProcessor cannot do"
        )
    squash = mode == "squash"
    return clip_preprocessor(height) | {
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": _BILINEAR if open_clip["interpolation"] == "bilinear" else _BICUBIC,
        "do_center_crop": not squash,
        "image_mean": list(open_clip["mean"]),
        "image_std": list(open_clip["std"]),
    }


def hugging_face_preprocess(config: Mapping[str, Any], where: str = "preprocessor_config.json") -> Compose:
    """Make the transform of a ``preprocessor_config.json`` out of torchvision's: fast, picklable, for one picture.

    It equals ``CLIPImageProcessorPil`` of ``transformers`` to float rounding (1e-6); the same processor on torchvision
    tensors resizes slightly differently.

    Args:
        config: Its content; what is not there is as in CLIP.
        where: The file, for messages.

    Returns:
        Maps a ``PIL.Image`` to a float tensor ``(3, H, W)``.

    Raises:
        MergeError: Something in it is not known.
    """
    config = {**clip_preprocessor(), **config}
    steps: list[Any] = [to_rgb] if config["do_convert_rgb"] is not False else []
    if config["do_resize"]:
        if config["resample"] not in _RESAMPLE:
            raise MergeError(f"{where}: resample: expected 0 to 5, found {config['resample']!r}")
        steps.append(Resize(_size(config["size"], where, "size"), interpolation=_RESAMPLE[config["resample"]]))
    if config["do_center_crop"]:
        crop = _size(config["crop_size"], where, "crop_size")
        steps.append(CenterCropFloor(*((crop, crop) if isinstance(crop, int) else crop)))
    steps.append(ToTensor())
    factor = 255 * (config["rescale_factor"] if config["do_rescale"] else 1)
    if abs(factor - 1) > 1e-6:
        steps.append(Scale(factor))
    if config["do_normalize"]:
        steps.append(Normalize(config["image_mean"], config["image_std"]))
    return Compose(steps)


def _size(value: object, where: str, name: str) -> int | list[int]:
    """A whole number stands for the shorter side, as for ``shortest_edge``; a crop of it is a square."""
    match value:
        case int() if value > 0:
            return value
        case {"shortest_edge": int(side), **rest} if side > 0 and not any(rest.values()):
            return side
        case {"height": int(height), "width": int(width)} if height > 0 and width > 0:
            return [height, width]
    raise MergeError(f"{where}: {name}: expected pixels, shortest_edge, or height and width; found {value!r}")
