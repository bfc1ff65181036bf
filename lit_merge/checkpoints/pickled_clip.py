"""What the image encoders and heads of the task-vectors code base look like from inside.

Those checkpoints (Ilharco et al., Editing Models with Task Arithmetic, arXiv 2212.04089; also used by AdaMerging and
Representation Surgery) are whole modules: an open_clip CLIP without its text transformer under the name ``model``, and
linear layers whose weights are text embeddings times the logit scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lit_merge.checkpoints.checks import check_keys, check_state
from lit_merge.checkpoints.inert import StandIn, flat_state, walk
from lit_merge.errors import MergeError

__all__ = ("Found", "encoder_of", "head_of")

_TEXT = re.compile(
    r"(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask|(token_embedding|ln_final|transformer)\..+)"
)
_NORMS = tuple(f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias"))
_OUTER = ("class_embedding", "positional_embedding", "proj", "conv1.weight", *_NORMS)
_ARCHITECTURES = {(768, 12, 32, 512): "ViT-B-32", (768, 12, 16, 512): "ViT-B-16", (1024, 24, 14, 768): "ViT-L-14"}
"""Width, depth, patch size and embedding width of OpenAI's vision transformers, and open_clip's names of them."""


class Found(NamedTuple):
    """What a checkpoint held: tensors, and plain facts for the sidecar."""

    state: dict[str, Tensor]
    facts: dict[str, Any]


def encoder_of(root: StandIn, where: Path) -> Found:
    """Return the vision tower of an ``ImageEncoder`` with open_clip's names, ``visual.*``, and facts about it.

    Args:
        root: The encoder as a stand-in.
        where: The file, for messages.

    Raises:
        MergeError: It is not exactly a vision transformer of CLIP with finite weights and one known activation.
    """
    everything = flat_state(root, where)
    if outside := [name for name in everything if not name.startswith("model.")]:
        raise MergeError(f"{where}: {outside[0]}: expected everything below model, as in an ImageEncoder")
    inner = {name.removeprefix("model."): value for name, value in everything.items()}
    dropped = sorted(name for name in inner if _TEXT.fullmatch(name))
    state = {name: value for name, value in inner.items() if name not in dropped}
    facts = _check_vision(state, where)
    facts |= {"heads": _heads(root, where, facts["width"]), "activation": _activation(root, where)}
    size = (facts["width"], facts["depth"], facts["patch"], facts["embedding_width"])
    name = _ARCHITECTURES.get(size)
    quick = name is not None and facts["activation"] == "quick_gelu"
    return Found(
        state,
        {"layout": "open_clip", "architecture": f"{name}-quickgelu" if quick else name, **facts, "dropped": dropped},
    )


def head_of(root: StandIn, where: Path) -> Found:
    """Return weight ``(C, D)`` and bias ``(C,)`` of a ``ClassificationHead``, and whether it normalises features.

    Args:
        root: The head as a stand-in.
        where: The file, for messages.

    Raises:
        MergeError: It is not exactly a linear layer with finite weights and a ``normalize`` flag.
    """
    state = flat_state(root, where)
    check_keys(str(where), state, ("weight", "bias"), "head", "expected a ClassificationHead with nothing added")
    weight, bias = state["weight"], state["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise MergeError(
            f"{where}: expected weight (C, D) and bias (C,), found {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    _check_floats(state, where)
    normalize = root.attribute("normalize")
    if not isinstance(normalize, bool):
        raise MergeError(f"{where}: normalize: expected true or false, found {normalize!r}; it is not a zero-shot head")
    lengths = weight.double().norm(dim=1)
    baked = normalize and bool((lengths - lengths.mean()).abs().max() <= 1e-4 * lengths.mean())
    return Found(
        state,
        {
            "classes": weight.shape[0],
            "embedding_width": weight.shape[1],
            "normalize": normalize,
            "logit_scale": float(lengths.mean()) if baked else None,  # unequal rows: the head itself was trained
        },
    )


def _check_vision(state: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    numbers = {m[1] for name in state if (m := re.match(r"visual\.transformer\.resblocks\.(\d+)\.", name))}
    names = [f"visual.{name}" for name in _OUTER]
    names += [f"visual.transformer.resblocks.{n}.{name}" for n in range(len(numbers)) for name in _block_shapes(0, 0)]
    advice = "only vision transformers of CLIP are known; save the state_dict() of anything else"
    check_keys(str(where), state, names, f"CLIP vision transformer of {len(numbers)} blocks", advice)
    if not numbers:
        raise MergeError(f"{where}: expected a vision transformer, found no block of one")
    _check_floats(state, where)
    conv, tokens = state["visual.conv1.weight"].shape, state["visual.positional_embedding"].shape
    hidden = state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape
    projection = state["visual.proj"].shape
    if len(conv) != 4 or len(tokens) != 2 or len(hidden) != 2 or len(projection) != 2:
        raise MergeError(f"{where}: visual.conv1, positional_embedding, proj or mlp.c_fc is not of CLIP's shape")
    width, patch, embedding = conv[0], conv[3], projection[1]
    grid = round((tokens[0] - 1) ** 0.5)
    shapes: dict[str, tuple[int, ...]] = {f"visual.{name}": (width,) for name in _OUTER}
    shapes["visual.conv1.weight"] = (width, 3, patch, patch)
    shapes["visual.positional_embedding"] = (grid * grid + 1, width)
    shapes["visual.proj"] = (width, embedding)
    for n in range(len(numbers)):
        block = _block_shapes(width, hidden[0])
        shapes |= {f"visual.transformer.resblocks.{n}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise MergeError(f"{where}: {name}: expected shape {shape}, found {tuple(state[name].shape)}")
    sizes = {"width": width, "depth": len(numbers), "mlp_width": hidden[0], "patch": patch}
    return {**sizes, "image_size": grid * patch, "embedding_width": embedding}


def _block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    norms = {f"{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return norms | {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,),
        "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }


def _check_floats(state: Mapping[str, Tensor], where: Path) -> None:
    for name, value in state.items():
        if not value.is_floating_point():
            raise MergeError(f"{where}: {name}: expected floating-point weights, found {value.dtype}")
        check_state(str(where), name, value)
        if value.numel() == 0:
            raise MergeError(f"{where}: {name}: expected weights, found an empty tensor {tuple(value.shape)}")


def _activation(root: StandIn, where: Path) -> str:
    """Return the activation's name: it has no weights, so a state dict alone cannot tell which one was trained."""
    below = [module for path, module in walk(root, where) if path.startswith("model.visual.")]
    found = [module for module in below if module.name.endswith("GELU")]
    known = {module.name.rpartition(".")[2] for module in found}
    exact = all(module.attribute("approximate") in (None, "none") for module in found)
    if known not in ({"QuickGELU"}, {"GELU"}) or not exact:
        what = ", ".join(sorted(known)) or "none"
        raise MergeError(f"{where}: expected either QuickGELU or exact GELU in all blocks, found {what}")
    return "quick_gelu" if known == {"QuickGELU"} else "gelu"


def _heads(root: StandIn, where: Path, width: int) -> int:
    attention = [m for path, m in walk(root, where) if re.fullmatch(r"model\.visual\..*\.attn", path)]
    found = [module.attribute("num_heads") for module in attention]
    if not found or any(type(heads) is not int or heads != found[0] for heads in found):
        raise MergeError(f"{where}: expected the same number of attention heads in all blocks, found {found[:3]}")
    heads: int = found[0]
    if heads < 1 or width % heads:
        raise MergeError(f"{where}: expected a number of attention heads that divides {width}, found {heads}")
    return heads
