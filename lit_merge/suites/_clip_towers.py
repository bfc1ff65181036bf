"""The two libraries that CLIP comes from, behind one interface: image tower, preprocessing, text tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.key_maps import PROJECTION, convert_layout, detect_layout
from lit_merge.checkpoints.lazy import Selected, Widened
from lit_merge.checkpoints.sources import Source
from lit_merge.encoders.activations import activation_name
from lit_merge.encoders.hugging_face_encoder import HuggingFaceEncoder
from lit_merge.encoders.json_files import read_json
from lit_merge.encoders.open_clip_encoder import OpenClipEncoder
from lit_merge.encoders.text_towers import HuggingFaceText, OpenClipText, TextTower
from lit_merge.errors import MergeError

__all__ = ("HuggingFaceTower", "OpenClipTower", "Tower", "tower_of")

State = Mapping[str, Tensor]


class Tower(ABC):
    """An image tower, and what belongs to it.

    Args:
        base: Where its pretrained weights are.
        text: Where the complete CLIP is that heads are made with, mostly the same.

    Attributes:
        layout: Key scheme of the network's state dict, see :mod:`lit_merge.checkpoints.clip_keys`.
    """

    layout: str

    def __init__(self, base: Source, text: Source) -> None:
        self.source = base
        self.text_source = text
        self._shape: nn.Module | None = None

    @abstractmethod
    def make(self) -> nn.Module:
        """Return the architecture; called on the meta device too."""

    @abstractmethod
    def text(self) -> TextTower:
        """Return the text tower.

        Raises:
            MergeError: The weights are those of an image tower only.
        """

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features that heads take."""

    @abstractmethod
    def adopted(self, where: str, given: State, layout: str) -> State:
        """Return an image tower in this network's layout."""

    @property
    def shape(self) -> Any:  # noqa: ANN401 - one of two encoders
        """The architecture without memory for its values, made once."""
        if self._shape is None:
            with torch.device("meta"):
                self._shape = self.make()
        return self._shape

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """What turns a picture into the network's input ``(3, H, W)``."""
        found: Callable[[Any], Tensor] = self.shape.preprocess
        return found

    def network(self) -> nn.Module:
        """Return the architecture with the base's values."""
        network = self.make()
        network.load_state_dict(dict(self.base()))
        return network

    def base(self) -> State:
        """Return the pretrained image tower; tensors are read when they are asked for."""
        return self.expert(str(self.source.spec), self.source.state())

    def expert(self, where: str, given: State) -> State:
        """Return an image tower in this network's layout; tensors are read when they are asked for.

        Args:
            where: What it is, for messages.
            given: Weights in any layout, maybe with a text tower, which must be that of the base.

        Raises:
            MergeError: The layout is unknown, tensors are missing or too many, or a text tower or projection that is
                not merged differs from that of the base.
        """
        names = self.shape.state_dict().keys()
        given = Widened(given)
        if set(names) == set(given):
            return Selected(given, names)
        layout = detect_layout(given, where)
        if layout.endswith("_full"):
            self._check_text(where, given)
        adopted = self.adopted(where, given, layout)
        return Selected(adopted, [*names, *adopted])  # in the network's order; what is too much is found by the bank

    def _check_text(self, where: str, given: State) -> None:
        """Refuse a text tower that is not the base's: it would be lost without a word."""
        base = Widened(self.source.state())
        for name in given:
            if name.startswith(("vision_model.", "visual.")) or name == PROJECTION:
                continue
            if name in base and not torch.equal(base[name], given[name]):
                raise MergeError(
                    f"{where}: {name}: its text tower differs from that of {self.source.spec}; only image towers are "
                    "merged, and the heads come from the base's text tower: give the image tower alone, or freeze text"
                )


class HuggingFaceTower(Tower):
    """A folder in the format of ``transformers``: ``config.json``, ``preprocessor_config.json``, tokenizer.

    The projection is frozen and not merged, as in the published experiments with ``CLIPVisionModel``.
    """

    layout = "hugging_face"

    def __init__(self, base: Source, text: Source, config: Source) -> None:
        super().__init__(base, text)
        self.config = config
        self._projection: tuple[Tensor | None] | None = None

    def make(self) -> HuggingFaceEncoder:
        """Return the vision model of ``config.json`` with the projection of the complete CLIP."""
        return HuggingFaceEncoder(self.config.path(), self.projection())

    @property
    def width(self) -> int:
        """Number of features: of the embedding, or of the pooled output if there is no projection."""
        projection = self.projection()
        return int(self.shape.config["hidden_size"]) if projection is None else len(projection)

    def projection(self) -> Tensor | None:
        """Return the projection ``(D, width)``, or ``None`` if the weights are those of an image tower only."""
        if self._projection is None:
            state = self.text_source.state()
            layout = detect_layout(state, self.text_source.spec)
            state = convert_layout(state, "hugging_face", source=layout, where=self.text_source.spec)
            self._projection = (Widened(state).get(PROJECTION),)
        return self._projection[0]

    def text(self) -> TextTower:
        """Return the text model of the folder."""
        return HuggingFaceText(self.text_source.path())

    def adopted(self, where: str, given: State, layout: str) -> State:
        """Return the tower without its projection, which must be that of the base."""
        state = convert_layout(given, self.layout, source=layout, where=where)
        own = state.get(PROJECTION)
        if own is None:
            return state
        expected = self.projection()
        if expected is not None and not torch.equal(own, expected):
            raise MergeError(
                f"{where}: its projection differs from that of {self.text_source.spec}, and Hugging Face's vision "
                "model has none to merge; give encoder: open_clip:ARCHITECTURE, where the projection is merged too"
            )
        return Selected(state, [name for name in state if name != PROJECTION])


class OpenClipTower(Tower):
    """An architecture of open_clip; the projection is a part of the image tower and merged with it."""

    layout = "open_clip"

    def __init__(self, base: Source, text: Source, name: str) -> None:
        super().__init__(base, text)
        self.name = name

    def make(self) -> OpenClipEncoder:
        """Return the image tower of the architecture.

        Raises:
            MergeError: The weights were trained with another activation than the architecture has.
        """
        tag = self.source.open_clip_tag
        encoder = OpenClipEncoder(self.name, tag=tag[1] if tag else None)
        if tag is None and (said := _activation(self.source.path())) is not None:
            encoder.require_activation(*said)
        return encoder

    @property
    def width(self) -> int:
        """Number of features of the embedding."""
        return int(self.shape.config["embed_dim"])

    def text(self) -> TextTower:
        """Return the text tower in open_clip's form."""
        where = self.text_source.spec
        state = self.text_source.state()
        layout = detect_layout(state, where)
        if not layout.endswith("_full"):
            raise MergeError(f"{where}: it has no text tower to make heads with; give text: a complete CLIP, or heads:")
        return OpenClipText(self.name, convert_layout(state, "open_clip_full", source=layout, where=where))

    def adopted(self, where: str, given: State, layout: str) -> State:
        """Return the tower; one of Hugging Face's takes the projection of the base."""
        if not layout.startswith("hugging_face") or PROJECTION in given:
            return convert_layout(given, self.layout, source=layout, where=where)
        base = self.source.state()
        whole = Widened(convert_layout(base, "hugging_face", where=self.source.spec))
        return convert_layout(given, self.layout, source=layout, projection=whole.get(PROJECTION), where=where)


def tower_of(base: Source, text: Source, encoder: str | None) -> Tower:
    """Choose the library.

    Args:
        base: Where the pretrained weights are.
        text: Where the complete CLIP is.
        encoder: ``open_clip:ARCHITECTURE``, or a folder or repository with Hugging Face's ``config.json``; by default
            told from ``base``.

    Raises:
        MergeError: It cannot be told.
    """
    if encoder is not None and encoder.startswith("open_clip:"):
        return OpenClipTower(base, text, encoder.removeprefix("open_clip:"))
    if encoder is None and base.open_clip_tag is not None:
        return OpenClipTower(base, text, base.open_clip_tag[0])
    config = base if encoder is None else Source(encoder, root=base.root, cache_dir=base.cache_dir)
    if (path := config.path()).is_dir():
        if (path / "config.json").is_file():
            return HuggingFaceTower(base, text, config)
        if (path / "open_clip_config.json").is_file():
            return OpenClipTower(base, text, f"local-dir:{path}")
    raise MergeError(
        f"{config.spec}: it does not say what architecture it is; give encoder: open_clip:ARCHITECTURE, such as "
        "open_clip:ViT-B-32-quickgelu, or a folder with Hugging Face's config.json"
    )


def _activation(path: Path) -> tuple[str, str] | None:
    """Return the activation that the weights were trained with and the file that says so, if one does."""
    for name in ("config.json", f"{path.stem}.json"):
        found = (path if path.is_dir() else path.parent) / name
        if found.is_file() and (said := _said(found)) is not None:
            return said, str(found)
    return None


def _said(path: Path) -> str | None:
    content = read_json(path)
    content = content.get("vision_config") or content
    said = content.get("hidden_act") or content.get("activation")
    return activation_name(said) if isinstance(said, str) else None
