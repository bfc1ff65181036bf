"""Which GELU a network was trained with. A state dict does not say it, and loads into the wrong one without a word.

OpenAI's CLIP uses x·σ(1.702 x), called QuickGELU; most later ones use the exact GELU. In open_clip the two are
different architectures (``ViT-B-32-quickgelu`` and ``ViT-B-32``); since its version 2.29 a mismatch is only a warning.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lit_merge.encoders.json_files import read_json
from lit_merge.errors import MergeError

__all__ = (
    "GELU",
    "NO_GELU",
    "QUICK_GELU",
    "activation_name",
    "activation_of",
    "check_activation",
    "declared_activation",
)

QUICK_GELU = "quick_gelu"
GELU = "gelu"
NO_GELU = "none"


def activation_name(name: str) -> str:
    """Return ``quick_gelu`` or ``gelu`` for what libraries call them, other names in lower case.

    The tanh approximation counts as GELU: it differs by less than 0.0005.

    >>> [activation_name(name) for name in ("QuickGELU", "gelu_pytorch_tanh", "GELU", "ReLU")]
    ['quick_gelu', 'gelu', 'gelu', 'relu']
    """
    plain = name.lower()
    if "quick" in plain:
        return QUICK_GELU
    return GELU if "gelu" in plain else plain


def activation_of(network: nn.Module) -> str:
    """Return the GELU that a network has: ``quick_gelu``, ``gelu``, or ``none`` if it has no such module.

    >>> activation_of(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    'gelu'
    """
    kinds = {activation_name(type(module).__name__) for module in network.modules()}
    return next((kind for kind in (QUICK_GELU, GELU) if kind in kinds), NO_GELU)


def check_activation(found: str, expected: str, where: str, advice: str) -> None:
    """Refuse a network whose activation is not the one its weights were trained with.

    Args:
        found: Activation of the network; ``none`` fits everything.
        expected: Activation that the weights need.
        where: What the weights are, for the message.
        advice: What to do about it.

    Raises:
        MergeError: They differ.
    """
    found, expected = activation_name(found), activation_name(expected)
    if found not in (NO_GELU, expected):
        raise MergeError(
            f"{where}: these weights were trained with {expected}, and the network computes {found}: they would load "
            f"and give wrong features; {advice}"
        )


def declared_activation(path: str | Path) -> str | None:
    """Return the activation that the files beside some weights declare, if any does.

    Read are, in this order: the sidecar ``NAME.json`` of a file, ``merge.json`` (both: ``activation``),
    ``config.json`` of a Hugging Face CLIP (``hidden_act``, there ``quick_gelu`` unless stated) and
    ``open_clip_config.json`` (``model_cfg.quick_gelu``).

    Args:
        path: Weights, or the folder with them.

    Raises:
        MergeError: One of the files is not a JSON object.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix != ".json":
        sidecar = read_json(path.with_suffix(".json"))
        if isinstance(sidecar.get("activation"), str):
            return activation_name(sidecar["activation"])
    if isinstance(said := read_json(folder / "merge.json").get("activation"), str):
        return activation_name(said)
    config = read_json(folder / "config.json")
    if str(config.get("model_type", "")).startswith("clip"):
        return activation_name(config.get("vision_config", config).get("hidden_act", QUICK_GELU))
    model = read_json(folder / "open_clip_config.json").get("model_cfg")
    if isinstance(model, dict):
        return QUICK_GELU if model.get("quick_gelu") else GELU
    return None
