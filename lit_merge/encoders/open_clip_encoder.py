"""The image towers of open_clip, which is imported when one is made, see :mod:`lit_merge.encoders.vit`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoints.open_clip_tags import pretrained_config
from lit_merge.encoders.activations import GELU, QUICK_GELU, activation_of
from lit_merge.encoders.base import ImageEncoder, built
from lit_merge.encoders.json_files import read_json
from lit_merge.encoders.preprocessing import preprocessor_of
from lit_merge.errors import MergeError

__all__ = ("OpenClipEncoder", "open_clip_activation")

_LOCAL = "local-dir:"


class OpenClipEncoder(ImageEncoder):
    """The image tower of any architecture that open_clip knows; its text tower is not made.

    The tensors have open_clip's names (``visual.*``), with the projection ``visual.proj`` as one of them: it is merged
    like the others. Nothing is downloaded, and the values are random until a state dict is loaded. Under
    ``torch.device("meta")`` they take no time and no memory: ``load_state_dict(state, assign=True)`` brings them.

    Args:
        name: Architecture, such as ``ViT-B-32-quickgelu``, ``RN50``, ``ViT-SO400M-14-SigLIP``; or ``local-dir:FOLDER``
            with an ``open_clip_config.json``.
        force_quick_gelu: Compute x·σ(1.702 x) where the architecture says GELU.
        tag: Weights that are meant, such as ``openai``: decides the preprocessing where the weights of an architecture
            do not agree on it, and is checked against the activation.

    Attributes:
        visual: open_clip's own module.
        config: open_clip's configuration of the architecture.
        preprocess_config: Size, mean, std, interpolation and resize mode of ``preprocess``.

    Raises:
        MergeError: The name is unknown, or the weights of the tag were trained with another activation.
    """

    layout = "open_clip"

    def __init__(self, name: str, force_quick_gelu: bool = False, tag: str | None = None) -> None:
        from open_clip.model import _build_vision_tower
        from open_clip.transform import PreprocessCfg, image_transform_v2

        super().__init__()
        self.name = name if ":" in name else name.replace("/", "-")  # ViT-B/32 is ViT-B-32
        self.config = _config(self.name)
        if force_quick_gelu:
            self.config["quick_gelu"] = True
        vision = {**self.config["vision_cfg"], "output_tokens": False}
        if vision.get("timm_model_name"):
            vision["timm_model_pretrained"] = False
        quick = bool(self.config.get("quick_gelu", False))
        self.visual = built(lambda: _build_vision_tower(self.config["embed_dim"], dict(vision), quick))
        self.activation = activation_of(self.visual)
        if force_quick_gelu and self.activation == GELU:
            raise MergeError(
                f"{name}: force_quick_gelu: this image tower comes from timm and has its own activation; leave it out"
            )
        self.preprocess_config = {**_preprocess_config(self.name, tag), "size": self.visual.image_size}
        self.preprocess = image_transform_v2(PreprocessCfg(**self.preprocess_config), is_train=False)
        if tag is not None:
            self.require_activation(open_clip_activation(self.name, tag), f"open_clip:{self.name}/{tag}")

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to embeddings ``(B, D)``, which are not normalised."""
        features: Tensor = self.visual(images)
        return features

    def activation_advice(self, expected: str) -> str:
        """Name the architecture of open_clip that has the activation."""
        import open_clip

        if expected == QUICK_GELU:
            other = f"{self.name}-quickgelu"
            return f"use {other}" if other in open_clip.list_models() else "set force_quick_gelu: true"
        other = self.name.removesuffix("-quickgelu")
        return f"use {other}" if other != self.name and other in open_clip.list_models() else "use plain GELU"

    def hugging_face_config(self) -> dict[str, Any]:
        """Return the ``config.json`` of the same tower as Hugging Face's ``CLIPVisionModel``.

        Raises:
            MergeError: The architecture is none that ``CLIPVisionModel`` can be.
        """
        vision = self.config["vision_cfg"]
        width, layers = vision.get("width", 768), vision.get("layers", 12)
        norm = {"eps": 1e-5, **(vision.get("norm_kwargs") or {})}
        strange = [key for key in _NOT_IN_HUGGING_FACE if vision.get(key)] + [key for key in norm if key != "eps"]
        if strange or not isinstance(layers, int) or vision.get("pool_type", "tok") != "tok":
            found = ", ".join(strange) or ("a ResNet" if not isinstance(layers, int) else "pooling by mean")
            raise MergeError(
                f"{self.name}: expected CLIP's plain vision transformer, found {found}; Hugging Face's CLIPVisionModel "
                "cannot compute it: export to open_clip instead"
            )
        height, side = (self.visual.image_size, self.visual.patch_size)
        return {
            "architectures": ["CLIPVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": self.activation,
            "hidden_size": width,
            "image_size": height[0] if isinstance(height, tuple) else height,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "layer_norm_eps": norm["eps"],
            "model_type": "clip_vision_model",
            "num_attention_heads": width // vision.get("head_width", 64),
            "num_channels": 3,
            "num_hidden_layers": layers,
            "patch_size": side[0] if isinstance(side, tuple) else side,
            "projection_dim": self.config["embed_dim"],
        }

    def hugging_face_preprocessor(self) -> dict[str, Any]:
        """Return the ``preprocessor_config.json`` that does what ``preprocess`` does."""
        return preprocessor_of(self.preprocess_config)


_NOT_IN_HUGGING_FACE = (
    "act_kwargs",
    "attentional_pool",
    "block_type",
    "ls_init_value",
    "no_ln_pre",
    "qk_norm",
    "scale_attn",
    "scale_attn_inner",
    "scale_fc",
    "scale_heads",
    "scaled_cosine_attn",
    "timm_model_name",
)


def open_clip_activation(name: str, tag: str) -> str:
    """Return the activation that weights of open_clip were trained with: ``quick_gelu`` or ``gelu``.

    Args:
        name: Architecture.
        tag: Weights, such as ``openai``.

    Raises:
        MergeError: open_clip has no such weights.

    >>> open_clip_activation("ViT-B-32", "openai"), open_clip_activation("ViT-B-32", "laion2b_s34b_b79k")
    ('quick_gelu', 'gelu')
    """
    return QUICK_GELU if pretrained_config(name, tag).get("quick_gelu", False) else GELU


def _config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("hf-hub:"):
        raise MergeError(
            f"{name}: an encoder downloads nothing; download the repository and give {_LOCAL}FOLDER, or name the "
            "architecture"
        )
    if name.startswith(_LOCAL):
        return dict(_local_config(name)["model_cfg"])
    found = open_clip.get_model_config(name)
    if found is None:
        near = ", ".join(get_close_matches(name, open_clip.list_models(), n=4)) or "see open_clip.list_models()"
        raise MergeError(f"{name}: no architecture of open_clip; near: {near}")
    return dict(found)


def _local_config(name: str) -> dict[str, Any]:
    path = Path(name.removeprefix(_LOCAL)) / "open_clip_config.json"
    content = read_json(path)
    if "vision_cfg" not in content.get("model_cfg", {}):
        raise MergeError(f"{path}: expected open_clip's configuration with model_cfg, found {_found(path, content)}")
    return content


def _found(path: Path, content: dict[str, Any]) -> str:
    return ", ".join(content) if content else "nothing" if path.is_file() else "no such file"


def _preprocess_config(name: str, tag: str | None) -> dict[str, Any]:
    """Preprocessing of the weights: of the tag, or of all tags if they agree, else CLIP's."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    default = PreprocessCfg()
    if name.startswith(_LOCAL):
        return dict(merge_preprocess_dict(default, _local_config(name).get("preprocess_cfg", {})))
    tags = [tag] if tag is not None else open_clip.list_pretrained_tags_by_model(name)
    found = [merge_preprocess_dict(default, pretrained_config(name, tag)) for tag in tags]
    agreed = found and all(one == found[0] for one in found)
    return dict(found[0] if agreed else merge_preprocess_dict(default, {}))
