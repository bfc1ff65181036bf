"""Writing the merged network of a run: plain, for transformers or for open_clip, with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from torch import Tensor

from lit_merge.checkpoints.export import write_card, write_merged
from lit_merge.checkpoints.hugging_face_export import write_hugging_face, write_open_clip
from lit_merge.checkpoints.model_card import model_card
from lit_merge.checkpoints.reading import read_checkpoint
from lit_merge.encoders.base import ImageEncoder
from lit_merge.encoders.hugging_face_encoder import HuggingFaceEncoder
from lit_merge.encoders.json_files import read_json
from lit_merge.encoders.open_clip_encoder import OpenClipEncoder
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.provenance import provenance

__all__ = ("ExportFormat", "card_of", "export_merge")

ExportFormat = Literal["safetensors", "hugging_face", "open_clip"]

_LIBRARIES = {"safetensors": None, "hugging_face": "transformers", "open_clip": "open_clip"}


def export_merge(
    folder: str | Path,
    trainer: L.Trainer,
    model: MergeModule,
    form: ExportFormat = "safetensors",
    origin: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write weights, ``merge.json`` and a model card.

    ================  ==========================================================================================
    ``safetensors``   ``merged.safetensors`` with the network's own names; any network
    ``hugging_face``  ``model.safetensors``, ``config.json``, ``preprocessor_config.json``: a folder that
                      ``CLIPVisionModel.from_pretrained`` loads; CLIP's vision transformers
    ``open_clip``     ``open_clip_model.safetensors`` with ``visual.*``, ``open_clip_config.json`` where known; CLIP
    ================  ==========================================================================================

    Args:
        folder: Where to; made if missing.
        trainer: Whose callbacks know configuration and scores.
        model: The merge.
        form: Which of these.
        origin: Checkpoint that the merge was loaded from: steps, configuration and scores are then those of its run.
        state: The merged network, if it is at hand: one rank of several that share a bank cannot merge alone.

    Returns:
        Path of the weights.

    Raises:
        MergeError: The network is not one that the format can hold.
    """
    if form not in get_args(ExportFormat):
        raise MergeError(f"format: expected safetensors, hugging_face or open_clip, found {form!r}")
    state = model.merged_state() if state is None else state
    facts = provenance(trainer, model) | _facts_of(origin)
    card = card_of(trainer, model, form, origin)
    if form == "safetensors":
        path = write_merged(folder, state, facts)
        write_card(folder, card)
        return path
    encoder = model.skeleton.network
    if not isinstance(encoder, ImageEncoder):
        raise MergeError(
            f"format: {form} holds image towers of CLIP, and the network of {model.suite.name} is a "
            f"{type(encoder).__name__}; expected HuggingFaceEncoder or OpenClipEncoder, or the format safetensors"
        )
    return _write_clip(folder, form, encoder, state, facts, card)


def _write_clip(
    folder: str | Path, form: str, encoder: ImageEncoder, state: Mapping[str, Tensor], facts: dict[str, Any], card: str
) -> Path:
    projection = getattr(encoder, "projection", None)
    if form == "open_clip":
        known = (encoder.config, encoder.preprocess_config) if isinstance(encoder, OpenClipEncoder) else (None, None)
        return write_open_clip(
            folder, state, facts, card,
            config=known[0], preprocess=known[1], activation=encoder.activation, projection=projection,
        )  # fmt: skip
    assert isinstance(encoder, HuggingFaceEncoder | OpenClipEncoder)
    config, preprocessor = encoder.hugging_face_config(), encoder.hugging_face_preprocessor()
    return write_hugging_face(folder, state, config, preprocessor, facts, card, projection=projection)


def _facts_of(origin: Path | None) -> dict[str, Any]:
    """Steps and configuration of the run that left a checkpoint."""
    if origin is None:
        return {}
    config = origin.parent / "config.yaml"
    known = {"config": config.read_text(encoding="utf-8")} if config.is_file() else {}
    return {"steps": int(read_checkpoint(origin).get("global_step", 0)), **known}


def card_of(
    trainer: L.Trainer, model: MergeModule, form: ExportFormat = "safetensors", origin: Path | None = None
) -> str:
    """Return the model card, with scores if the merge was evaluated.

    Args:
        trainer: Whose callbacks know configuration and scores.
        model: The merge.
        form: Format of the export, for the words on how to load it.
        origin: See :func:`export_merge`.
    """
    from lit_merge.callbacks.report import Report

    reports = [c.content for c in trainer.callbacks if isinstance(c, Report) and c.content]  # type: ignore[attr-defined]
    encoder = model.skeleton.network
    facts = provenance(trainer, model) | _facts_of(origin)
    if origin is not None and (origin.parent / "report.json").is_file():
        reports.append(read_json(origin.parent / "report.json"))
    if isinstance(encoder, ImageEncoder):
        facts |= {"activation": encoder.activation}
    if isinstance(encoder, OpenClipEncoder):
        facts |= {"architecture": encoder.name}
    return model_card(facts, reports[0] if reports else None, library=_LIBRARIES[form])
