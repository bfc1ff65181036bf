"""CLIP's text towers: from prompts to embeddings, for zero-shot heads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.checks import check_finite
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.lazy import Selected
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.sources import weights_file
from lit_merge.encoders.json_files import read_json
from lit_merge.errors import MergeError, require

__all__ = ("HuggingFaceText", "OpenClipText", "TextTower")

_TOKENIZER = (
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json",
)  # fmt: skip
_LOCAL = "local-dir:"
_LARGEST_LOG_SCALE = 20.0  # a larger one is the scale itself, by mistake


@runtime_checkable
class TextTower(Protocol):
    """What a zero-shot head is made with."""

    @property
    def logit_scale(self) -> float:
        """Factor of the cosines: the exponential of the learned parameter, about 100 for CLIP."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Map N prompts to embeddings ``(N, D)``, float32, not normalised."""
        ...

    def digest(self) -> str:
        """Return a hash of all that decides the embeddings: weights, architecture, tokenizer."""
        ...


# which sizes of the configuration the shapes of tensors tell
_SIZES = {
    "text_model.embeddings.token_embedding.weight": ("vocab_size", "hidden_size"),
    "text_model.embeddings.position_embedding.weight": ("max_position_embeddings",),
    "text_model.encoder.layers.0.mlp.fc1.weight": ("intermediate_size",),
}


class _Text:
    """A text tower whose weights are read when they are needed, and whose model is made for the first prompt."""

    def __init__(self, where: str, state: Mapping[str, Tensor]) -> None:
        self.where = where
        self._state = state

    @cached_property
    def logit_scale(self) -> float:
        """Factor of the cosines: the exponential of the learned parameter.

        Raises:
            MergeError: The weights have none, or it is not a finite number.
        """
        if "logit_scale" not in self._state:
            raise MergeError(f"{self.where}: logit_scale: missing; expected the weights of a full CLIP")
        value = self._state["logit_scale"]
        if value.numel() != 1 or not abs(float(value)) < _LARGEST_LOG_SCALE:
            raise MergeError(
                f"{self.where}: logit_scale: expected one number, the logarithm of the scale (4.6 for CLIP), found "
                f"{value.tolist()}"
            )
        return math.exp(float(value))

    def _load(self, model: nn.Module) -> nn.Module:
        """Put the weights into a model, checked one by one."""
        own = model.state_dict()
        known = {name for name in self._state if name in own or name != "logit_scale"}
        for problem, names in (("missing", own.keys() - known), ("unexpected", known - own.keys())):
            if names:
                raise MergeError(
                    f"{self.where}: text tower: {len(names)} tensors {problem}: {', '.join(sorted(names)[:3])}; "
                    "expected the weights of a full CLIP of this architecture"
                )
        with torch.no_grad():
            for name, place in own.items():
                value = self._state[name]
                if value.shape != place.shape:
                    raise MergeError(
                        f"{self.where}: {name}: the architecture has shape {tuple(place.shape)}, found "
                        f"{tuple(value.shape)}"
                    )
                check_finite(self.where, name, value)
                place.copy_(value)
        return model.eval().requires_grad_(False)

    @cached_property
    def _weights(self) -> str:
        return state_digest(self._state)

    def _digest(self, *facts: object) -> str:
        text = json.dumps([self._weights, *facts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


class HuggingFaceText(_Text):
    """The text tower of a CLIP in the format of ``transformers``; its image tower is not read.

    Args:
        folder: With ``config.json``, weights (safetensors, sharded or not, or ``pytorch_model.bin``, whose pickled
            objects are never executed) and the files of the tokenizer.

    Raises:
        MergeError: The folder is not that of a full CLIP, or has no tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._config = read_json(self.folder / "config.json")
        if self._config.get("model_type") != "clip":
            raise MergeError(
                f"{self.folder / 'config.json'}: model_type: expected clip, a CLIP with its text tower, found "
                f"{self._config.get('model_type')!r}"
            )
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise MergeError(f"{self.folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt")
        state = read_state(weights_file(self.folder))
        # transformers of before 4.31 saved the numbers of the positions
        names = [
            n for n in state if n.startswith(("text_model.", "text_projection.")) and not n.endswith("position_ids")
        ]
        super().__init__(str(self.folder), Selected(state, [*names, "logit_scale"]))

    @cached_property
    def _model(self) -> nn.Module:
        transformers = require("transformers", "hf")
        try:
            config = transformers.CLIPConfig.from_pretrained(self.folder, local_files_only=True)
            text = config.text_config
            text.projection_dim = config.projection_dim
            self._check_sizes(text)
            with torch.random.fork_rng(devices=[]):
                model = transformers.CLIPTextModelWithProjection(text)
        except MergeError:
            raise
        except Exception as error:  # the validation of transformers has errors of its own
            raise MergeError(f"{self.folder}: transformers cannot make its text model ({_reason(error)})") from error
        return self._load(model)

    def _check_sizes(self, text: Any) -> None:  # noqa: ANN401 - a configuration of transformers
        """Compare the configuration with the weights before memory is spent on it."""
        found = {
            "num_hidden_layers": len(
                {n.split(".")[3] for n in self._state if n.startswith("text_model.encoder.layers.")}
            )
        }
        for name, keys in _SIZES.items():
            shape = self._state[name].shape if name in self._state else ()
            found |= dict(zip(keys, shape, strict=False))
        for key, value in found.items():
            if (said := getattr(text, key)) != value:
                raise MergeError(
                    f"{self.folder / 'config.json'}: text_config: {key}: {said!r}, and the weights have {value}; "
                    "they do not belong together"
                )

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - transformers is optional
        try:
            return require("transformers", "hf").AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (TypeError, ValueError, KeyError, OSError) as error:
            raise MergeError(f"{self.folder}: transformers cannot read its tokenizer ({_reason(error)})") from error

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Map N prompts to embeddings ``(N, D)``, float32, not normalised; what is too long is cut off.

        Raises:
            MergeError: Weights, configuration and tokenizer do not belong together.
        """
        model = self._model
        config: Any = model.config
        tokens = self._tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=config.max_position_embeddings,
            return_tensors="pt",
        )
        ids = tokens["input_ids"]
        if int(ids.max()) >= config.vocab_size:
            raise MergeError(
                f"{self.folder}: the tokenizer knows token {int(ids.max())}, the text tower only {config.vocab_size} "
                "tokens; they are of different models"
            )
        # eos_token_id 2 is a mistake of the first configs: transformers then takes the highest token
        if config.eos_token_id != 2 and not bool((ids == config.eos_token_id).any(-1).all()):
            raise MergeError(
                f"{self.folder}: the tokenizer does not end a text with token {config.eos_token_id}, which the text "
                "tower reads; they are of different models"
            )
        with torch.no_grad():
            embeddings: Tensor = model(input_ids=ids, attention_mask=tokens["attention_mask"]).text_embeds
        return embeddings

    def digest(self) -> str:
        """Return a hash of weights, configuration, tokenizer files and the version of transformers."""
        files = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in _TOKENIZER
            if (self.folder / name).is_file()
        }
        parts = {key: value for key, value in self._config.items() if key.startswith(("text_config", "projection"))}
        return self._digest("hugging_face", require("transformers", "hf").__version__, parts, files)


class OpenClipText(_Text):
    """The text tower of an architecture of open_clip, with open_clip's tokenizer.

    Args:
        name: Architecture, such as ``ViT-B-32-quickgelu``; or ``local-dir:FOLDER`` with an ``open_clip_config.json``.
        state: State dict of the whole CLIP in open_clip's names; the image tower (``visual.*``) is not read.
        force_quick_gelu: Compute x·σ(1.702 x) where the architecture says GELU.

    Raises:
        MergeError: open_clip has no such architecture, or its text tower would have to be fetched.
    """

    def __init__(self, name: str, state: Mapping[str, Tensor], force_quick_gelu: bool = False) -> None:
        self.name = name if name.startswith(_LOCAL) else name.replace("/", "-")
        self._config = _open_clip_config(self.name)
        if force_quick_gelu:
            self._config["quick_gelu"] = True
        if self._config["text_cfg"].get("hf_model_name"):
            raise MergeError(
                f"{name}: its text tower is {self._config['text_cfg']['hf_model_name']} of the Hugging Face hub, which "
                "is not read here; give heads of your own"
            )
        super().__init__(name, Selected(state, [key for key in state if not key.startswith("visual.")]))

    @cached_property
    def _model(self) -> nn.Module:
        import open_clip

        config = self._config
        # the smallest image tower that open_clip makes: the whole model has the text tower as part
        vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=32, image_size=32)
        kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
        given = {key: config[key] for key in ("quick_gelu", "init_logit_scale", "init_logit_bias") if key in config}
        try:
            with torch.random.fork_rng(devices=[]):
                model: Any = kind(config["embed_dim"], vision, open_clip.CLIPTextCfg(**config["text_cfg"]), **given)
        except (TypeError, ValueError, KeyError) as error:
            raise MergeError(f"{self.name}: open_clip cannot make its text tower ({_reason(error)})") from error
        model.visual = nn.Identity()
        return self._load(model)

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - its classes have no base in common
        import open_clip

        return open_clip.get_tokenizer(self.name)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Map N prompts to embeddings ``(N, D)``, float32, not normalised; what is too long is cut off.

        Raises:
            MergeError: The weights are not of this architecture.
        """
        model: Any = self._model
        with torch.no_grad():
            embeddings: Tensor = model.encode_text(self._tokenizer(list(prompts)))
        return embeddings

    def digest(self) -> str:
        """Return a hash of weights, configuration and the version of open_clip, which has the tokenizer in it."""
        import open_clip

        parts = {key: self._config.get(key) for key in ("embed_dim", "text_cfg", "quick_gelu", "custom_text")}
        return self._digest("open_clip", open_clip.__version__, parts)


def _open_clip_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith(_LOCAL):
        path = Path(name.removeprefix(_LOCAL)) / "open_clip_config.json"
        found, advice = read_json(path).get("model_cfg"), f"expected {path} with model_cfg"
    else:
        found, advice = open_clip.get_model_config(name), "see open_clip.list_models()"
    if not found or "text_cfg" not in found:
        raise MergeError(f"{name}: no architecture of open_clip with a text tower; {advice}")
    return dict(found)


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
