"""Merged image towers as folders that transformers and open_clip load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.checks import check_keys
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.export import write_json
from lit_merge.checkpoints.key_maps import PROJECTION, convert_layout
from lit_merge.checkpoints.lazy import Selected
from lit_merge.checkpoints.model_card import model_card
from lit_merge.errors import MergeError

__all__ = ("write_hugging_face", "write_open_clip")


def write_hugging_face(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    provenance: Mapping[str, Any],
    card: str | None = None,
    *,
    projection: Tensor | None = None,
    with_projection: bool = False,
) -> Path:
    """Write a folder that ``CLIPVisionModel.from_pretrained`` of transformers 4 and 5 loads, nothing missing or over.

    ======================================  =======================================================================
    ``model.safetensors``                   the image tower, ``vision_model.*``
    ``visual_projection.safetensors``       its projection, if there is one: ``CLIPVisionModel`` has no place for it
    ``config.json``                         the architecture
    ``preprocessor_config.json``            how images are prepared
    ``merge.json``                          where it comes from, and the hash of the weights
    ``README.md``                           the model card
    ======================================  =======================================================================

    Every file is written under a temporary name and renamed, the weights last.

    Args:
        folder: Where to; made if missing.
        state: Complete image tower in any layout of :mod:`~lit_merge.checkpoints.clip_keys`.
        config: Content of ``config.json``, see ``hugging_face_config`` of the encoders.
        preprocessor: Content of ``preprocessor_config.json``, see ``hugging_face_preprocessor`` of the encoders.
        provenance: What ``merge.json`` says besides the hash of the weights; plain data.
        card: Content of ``README.md``; by default :func:`~lit_merge.checkpoints.model_card.model_card`.
        projection: The projection ``(D_out, D_in)``, if ``state`` is without.
        with_projection: Put the projection into ``model.safetensors``: a folder for
            ``CLIPVisionModelWithProjection``.

    Returns:
        Path of ``model.safetensors``.

    Raises:
        MergeError: ``state`` is not such a tower, does not fit the config, or has no projection where one is wanted.
    """
    folder = Path(folder)
    plain = _plain(convert_layout(state, "hugging_face", projection=projection, where="merged network"))
    matrix = plain.pop(PROJECTION, None)
    _check_config(plain, matrix, config)
    if with_projection and matrix is None:
        raise MergeError("merged network: with_projection: it has no projection; give projection=")
    if matrix is not None and with_projection:
        plain[PROJECTION] = matrix
    kind = "CLIPVisionModelWithProjection" if with_projection else "CLIPVisionModel"
    said = {
        **provenance,
        "layout": "hugging_face",
        "activation": config["hidden_act"],
        "weights": {"file": "model.safetensors", "sha256": state_digest(plain)},
    }
    if matrix is not None and not with_projection:
        said["projection"] = {"file": "visual_projection.safetensors", "sha256": state_digest({PROJECTION: matrix})}
    write_json(folder / "config.json", {**config, "architectures": [kind], "model_type": "clip_vision_model"})
    write_json(folder / "preprocessor_config.json", preprocessor)
    _write_text(folder / "README.md", model_card(said, library="transformers") if card is None else card)
    write_json(folder / "merge.json", said)
    if "projection" in said:
        assert matrix is not None
        _write_weights(folder / "visual_projection.safetensors", {PROJECTION: matrix}, said["projection"]["sha256"])
    return _write_weights(folder / "model.safetensors", plain, said["weights"]["sha256"])


def write_open_clip(
    folder: str | Path,
    state: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    card: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    activation: str | None = None,
    projection: Tensor | None = None,
    rest: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a folder in open_clip's format.

    ``open_clip_model.safetensors`` holds ``visual.*`` and, with ``rest``, the other tensors of a full CLIP. Then
    ``open_clip.create_model("local-dir:FOLDER")`` loads it; without, it fills the image tower of any model of the
    architecture by ``model.load_state_dict(safetensors.torch.load_file(path), strict=False)``.

    Args:
        folder: Where to; made if missing.
        state: Complete image tower in open_clip's layout with or without prefix, or any layout that converts to it.
        provenance: What ``merge.json`` says besides the hash of the weights; plain data.
        card: Content of ``README.md``; by default :func:`~lit_merge.checkpoints.model_card.model_card`.
        config: open_clip's configuration of the architecture, see ``OpenClipEncoder.config``; makes
            ``open_clip_config.json``.
        preprocess: See ``OpenClipEncoder.preprocess_config``.
        activation: ``quick_gelu`` or ``gelu``; by default as the config says.
        projection: The projection ``(D_out, D_in)``, if ``state`` is a Hugging Face tower, which has none.
        rest: Full CLIP in open_clip's layout whose text tower goes with the merged image tower.

    Returns:
        Path of ``open_clip_model.safetensors``.

    Raises:
        MergeError: ``state`` does not convert, or ``rest`` is not the full CLIP of this tower.
    """
    folder = Path(folder)
    plain = _plain(convert_layout(state, "open_clip", projection=projection, where="merged network"))
    if rest is not None:
        check_keys(
            "rest", [name for name in rest if name.startswith("visual.")], plain, of="merged image tower",
            advice="give the full CLIP that was merged, in open_clip's layout",
        )  # fmt: skip
        plain |= _plain(Selected(rest, [name for name in rest if name not in plain]))
    if activation is None and config is not None:
        activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    said = {
        **provenance,
        "layout": "open_clip" if rest is None else "open_clip_full",
        **({} if activation is None else {"activation": activation}),
        "weights": {"file": "open_clip_model.safetensors", "sha256": state_digest(plain)},
    }
    if config is not None:
        settings = {"model_cfg": dict(config)} | ({"preprocess_cfg": dict(preprocess)} if preprocess else {})
        write_json(folder / "open_clip_config.json", settings)
    _write_text(folder / "README.md", model_card(said, library="open_clip") if card is None else card)
    write_json(folder / "merge.json", said)
    return _write_weights(folder / "open_clip_model.safetensors", plain, said["weights"]["sha256"])


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, as safetensors wants it."""
    found = {}
    for name in state:
        value = state[name].detach().cpu()
        found[name] = value.clone(memory_format=torch.contiguous_format)
    return found


def _check_config(state: Mapping[str, Tensor], projection: Tensor | None, config: Mapping[str, Any]) -> None:
    """Compare what the config says with the shapes; transformers would fill what does not fit with random numbers."""
    convert_layout({PROJECTION: torch.empty(0), **state}, "open_clip", where="merged network")  # only compares names
    layers = int(config["num_hidden_layers"])
    found_layers = sum(name.endswith(".layer_norm1.weight") for name in state)
    if found_layers != layers:
        raise MergeError(f"merged network: the config means {layers} layers, found {found_layers}")
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    size, side, channels = int(config["image_size"]), int(config["patch_size"]), int(config.get("num_channels", 3))
    expected = {
        "vision_model.embeddings.patch_embedding.weight": (width, channels, side, side),
        "vision_model.embeddings.position_embedding.weight": ((size // side) ** 2 + 1, width),
        "vision_model.encoder.layers.0.mlp.fc1.weight": (inner, width),
    }
    found = {name: tuple(state[name].shape) for name in expected}
    if projection is not None and "projection_dim" in config:
        expected[PROJECTION] = (int(config["projection_dim"]), width)
        found[PROJECTION] = tuple(projection.shape)
    for name, shape in expected.items():
        if found[name] != shape:
            raise MergeError(f"merged network: {name}: the config means shape {shape}, found {found[name]}")


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_weights(path: Path, state: dict[str, Tensor], digest: str) -> Path:
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "producer": "lit-merge", "sha256": digest})
    return path
