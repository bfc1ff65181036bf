"""CLIP's image tower as in Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_merge.checkpoints.checks import check_finite
from lit_merge.checkpoints.key_maps import PROJECTION
from lit_merge.checkpoints.reading import read_state
from lit_merge.encoders.activations import activation_name
from lit_merge.encoders.base import ImageEncoder
from lit_merge.encoders.json_files import read_json
from lit_merge.encoders.preprocessing import clip_preprocessor, hugging_face_preprocess
from lit_merge.errors import MergeError, require

__all__ = ("HuggingFaceEncoder",)


class HuggingFaceEncoder(ImageEncoder):
    """``CLIPVisionModel`` of transformers, 4 or 5, with the projection of the CLIP that it belongs to.

    The tensors have the names of ``CLIPVisionModel`` in transformers 4 (``vision_model.*``) under either version. The
    projection is not one of them: ``CLIPVisionModel`` has none, experts that were fine-tuned with it share that of the
    base, and it is not merged. Nothing is downloaded, and the values are random until a state dict is loaded. Under
    ``torch.device("meta")`` they take no time and no memory: ``load_state_dict(state, assign=True)`` brings them.

    Args:
        config: ``config.json`` of a CLIP or of its vision model, the folder with it, or its content.
        projection: The matrix ``(D_out, D_in)``, or a file with ``visual_projection.weight``; copied. Without it
            there are no embeddings but the pooled outputs ``(B, D_in)``.
        attn_implementation: How attention is computed, as in transformers: ``sdpa`` or ``eager``.

    Attributes:
        vision_model: The module of transformers.
        config: Content of the vision model's ``config.json``.
        preprocessor: Content of ``preprocessor_config.json`` beside the config, or that of CLIP.

    Raises:
        MergeError: The config is missing, not that of a CLIP, or does not fit the projection.
        MissingExtraError: transformers is not installed.
    """

    layout = "hugging_face"
    projection: Tensor | None

    def __init__(
        self,
        config: str | Path | dict[str, Any],
        projection: Tensor | str | Path | None = None,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__()
        self.where, content, folder = _content(config)
        self.config = _vision_config(content, self.where)
        self.vision_model = _vision_model(self.config, attn_implementation, self.where)
        self.activation = activation_name(str(self.config["hidden_act"]))
        width = int(self.config["hidden_size"])
        self.register_buffer("projection", _projection(projection, width, self.where), persistent=False)
        self.preprocessor = _preprocessor(folder, int(self.config["image_size"]))
        self.preprocess = hugging_face_preprocess(self.preprocessor, self.where)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to embeddings ``(B, D_out)``, which are not normalised."""
        pooled: Tensor = self.vision_model(pixel_values=images).pooler_output
        return pooled if self.projection is None else F.linear(pooled, self.projection)

    def activation_advice(self, expected: str) -> str:
        """Name the key of the configuration."""
        return f"set hidden_act: {expected} in {self.where}"

    def hugging_face_config(self) -> dict[str, Any]:
        """Return the ``config.json`` of this ``CLIPVisionModel``."""
        return {**self.config, "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}

    def hugging_face_preprocessor(self) -> dict[str, Any]:
        """Return the ``preprocessor_config.json`` that does what ``preprocess`` does."""
        return dict(self.preprocessor)


def _content(config: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any], Path | None]:
    """Name for messages, content and folder of a configuration."""
    if isinstance(config, Mapping):
        return "config", dict(config), None
    path = Path(config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise MergeError(f"{path}: no such file; expected the config.json of a CLIP in Hugging Face's format")
    return str(path), read_json(path), path.parent


_KEYS = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "image_size",
    "initializer_factor",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "projection_dim",
)
# far above every published CLIP; a file that says more would only fill the memory
_LARGEST = {
    "hidden_size": 65536,
    "image_size": 4096,
    "intermediate_size": 4 * 65536,
    "num_attention_heads": 65536,
    "num_channels": 64,
    "num_hidden_layers": 512,
    "patch_size": 4096,
    "projection_dim": 65536,
}
_MOST_PARAMETERS = 8 * 10**9


def _vision_config(content: dict[str, Any], where: str) -> dict[str, Any]:
    """All values of the vision model's configuration, also those that the file leaves to the defaults."""
    transformers = require("transformers", "hf")
    kind = content.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise MergeError(
            f"{where}: model_type: expected clip or clip_vision_model, found {kind!r}; other encoders can be had with "
            "OpenClipEncoder or as an nn.Module of your own"
        )
    given = content
    if kind == "clip":  # vision_config_dict: what the first files had instead; the projection is described outside
        outside = {key: content[key] for key in ("projection_dim",) if key in content}
        parts = {key: content.get(key) or {} for key in ("vision_config", "vision_config_dict")}
        for key, part in parts.items():
            if not isinstance(part, Mapping):
                raise MergeError(f"{where}: {key}: expected an object with options, found {_shown(part)}; {_AGAIN}")
        given = {**parts["vision_config"], **parts["vision_config_dict"], **outside}
    _check_given(given, where)
    try:
        whole = transformers.CLIPVisionConfig(**{key: value for key, value in given.items() if key in _KEYS})
    except Exception as error:  # whatever the validation of the day raises
        raise MergeError(f"{where}: not a configuration that transformers takes ({_one_line(error)})") from error
    config = {key: getattr(whole, key) for key in _KEYS}
    _check_sizes(config, where)
    return config


_AGAIN = "fetch or correct the file"


def _check_given(given: Mapping[str, Any], where: str) -> None:
    for key, largest in _LARGEST.items():
        if key in given:
            value = given[key]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise MergeError(
                    f"{where}: {key}: expected a whole number from 1 to {largest}, found {_shown(value)}; {_AGAIN}"
                )


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that do not go together or are beyond every machine; all are known to be whole and positive."""
    hidden, heads, image, patch = (
        config[key] for key in ("hidden_size", "num_attention_heads", "image_size", "patch_size")
    )
    if hidden % heads:
        raise MergeError(
            f"{where}: num_attention_heads: expected a number by which hidden_size {hidden} is divisible, found "
            f"{heads}; {_AGAIN}"
        )
    if patch > image:
        raise MergeError(f"{where}: patch_size: expected at most image_size {image}, found {patch}; {_AGAIN}")
    layers = config["num_hidden_layers"] * (4 * hidden + 2 * config["intermediate_size"])
    parameters = hidden * (layers + (image // patch) ** 2 + config["num_channels"] * patch**2)
    if parameters > _MOST_PARAMETERS:
        raise MergeError(
            f"{where}: hidden_size {hidden}, num_hidden_layers {config['num_hidden_layers']}: expected at most "
            f"{_MOST_PARAMETERS:.0e} parameters, found {parameters:.0e}; {_AGAIN}"
        )


def _vision_model(config: dict[str, Any], attn_implementation: str, where: str) -> nn.Module:
    transformers = require("transformers", "hf")
    try:
        whole = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**config, attn_implementation=attn_implementation)
        )
    except Exception as error:  # as above
        raise MergeError(f"{where}: transformers cannot build this model ({_one_line(error)})") from error
    # transformers 4 wraps the tower, transformers 5 is the tower
    tower: nn.Module = whole._modules.get("vision_model") or whole
    embeddings = tower.embeddings
    assert isinstance(embeddings, nn.Module)
    if "position_ids" in embeddings._non_persistent_buffers_set:  # on the meta device it would never get a value
        places = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
        positions = torch.arange(places, device="cpu").expand((1, -1))
        embeddings.register_buffer("position_ids", positions, persistent=False)
    return tower


def _projection(given: Tensor | str | Path | None, width: int, config: str) -> Tensor | None:
    where = "projection"
    if isinstance(given, str | Path):
        where, state = str(given), read_state(given)
        if PROJECTION not in state:
            raise MergeError(f"{where}: expected {PROJECTION} of a full CLIP, found {', '.join(sorted(state)[:3])}, …")
        given = state[PROJECTION]
    if given is None:
        return None
    if given.ndim != 2 or given.shape[1] != width:
        raise MergeError(
            f"{where}: expected a matrix (D_out, {width}) by hidden_size in {config}, found shape "
            f"{tuple(given.shape)}; give the configuration and the projection of the same CLIP"
        )
    check_finite(where, PROJECTION, given)
    return given.detach().clone(memory_format=torch.contiguous_format)


def _preprocessor(folder: Path | None, size: int) -> dict[str, Any]:
    """What is beside the configuration; transformers 5 writes it into ``processor_config.json`` with the tokenizer."""
    if folder is not None:
        alone = read_json(folder / "preprocessor_config.json")
        found = alone or read_json(folder / "processor_config.json").get("image_processor")
        if found:
            return dict(found)
    return clip_preprocessor(size)


def _shown(value: object) -> str:
    return repr(value)[:60] if not isinstance(value, int) or abs(value) < 10**18 else "a number beyond 1e18"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
