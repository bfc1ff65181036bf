"""Zero-shot heads: one direction per class, from prompts through CLIP's text tower (arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lit_merge.checkpoints.atomic import atomic_path, cache_root
from lit_merge.checkpoints.reading import read_state
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.text_towers import TextTower
from lit_merge.errors import MergeError

__all__ = ("zero_shot_head", "zero_shot_weights")

_VERSION = 1  # raised when the meaning of a cached file changes
_BATCH = 256  # prompts at a time
_LONG = 4  # batches from which on there is a progress bar


def zero_shot_weights(
    tower: TextTower, classes: Sequence[str], templates: Sequence[str], title: str = "zero-shot head"
) -> Tensor:
    """Return the directions of the classes: embeddings of all prompts, normalised, averaged, normalised.

    ``w_c = normalise(mean_k normalise(text(template_k(c))))``, as in the released code of CLIP and in the papers on
    task arithmetic and AdaMerging. The sum is in double precision, so that batches do not matter.

    Args:
        tower: The text tower.
        classes: Names of the C classes, in the order of the labels.
        templates: Prompts with ``{c}`` for the name.
        title: What the progress bar says.

    Returns:
        ``(C, D)``, float32, rows of length 1.

    Raises:
        MergeError: A list is empty, a template has no ``{c}``, or an embedding is zero or not finite.
    """
    if isinstance(classes, str) or isinstance(templates, str) or not classes or not templates:
        raise MergeError(
            f"zero-shot head: expected classes and templates as lists, found {classes!r} and {templates!r}"
        )
    if wrong := next((text for text in templates if "{c}" not in text), None):
        raise MergeError(f"zero-shot head: template {wrong!r}: expected {{c}} where the name of the class goes")
    prompts = [template.replace("{c}", name) for name in classes for template in templates]
    starts = range(0, len(prompts), _BATCH)
    hidden = len(starts) < _LONG or not sys.stderr.isatty()
    total: Tensor | None = None
    for start in tqdm(starts, desc=title, unit="batch", leave=False, disable=hidden):
        features = tower.encode(prompts[start : start + _BATCH]).double()
        lengths = features.norm(dim=-1)
        if broken := [i for i, length in enumerate(lengths.tolist()) if not 0 < length < float("inf")]:
            raise MergeError(f"zero-shot head: the embedding of {prompts[start + broken[0]]!r} is zero or not finite")
        total = torch.zeros(len(classes), features.shape[1], dtype=torch.float64) if total is None else total
        owners = torch.arange(start, start + len(features)) // len(templates)
        total.index_add_(0, owners, features / lengths[:, None])
    assert total is not None
    if not bool((total.norm(dim=-1) > 0).all()):
        raise MergeError("zero-shot head: the embeddings of a class cancel out; expected templates that agree")
    return F.normalize(total, dim=-1).float()


def zero_shot_head(
    tower: TextTower,
    classes: Sequence[str],
    templates: Sequence[str],
    cache_dir: str | Path | None = None,
    title: str = "zero-shot head",
) -> CosineHead:
    """Return the frozen zero-shot head: ``logits = logit_scale * cos(features, w_c)``.

    The learned scale is in the head and nowhere else: features go in as they are. Heads are kept in the cache under a
    hash of everything that decides them: the tower's weights and tokenizer, class names and templates in their order.

    Args:
        tower: The text tower.
        classes: Names of the C classes, in the order of the labels.
        templates: Prompts with ``{c}`` for the name.
        cache_dir: Where to keep heads; by default as in :func:`~lit_merge.checkpoints.cache_root`.
        title: What the progress bar says.

    Raises:
        MergeError: See :func:`zero_shot_weights`.
    """
    facts = [_VERSION, tower.digest(), list(classes), list(templates)]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    path = cache_root(cache_dir) / "heads" / f"{name}.safetensors"
    weight = _cached(path, len(classes))
    if weight is None:
        weight = zero_shot_weights(tower, classes, templates, title)
        note = {"classes": json.dumps(list(classes)), "templates": json.dumps(list(templates))}
        with atomic_path(path) as temporary:
            save_file({"weight": weight}, temporary, metadata=note)
    return CosineHead(weight, scale=tower.logit_scale)


def _cached(path: Path, classes: int) -> Tensor | None:
    """Read a kept head; ``None`` if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        weight = read_state(path)["weight"]
    except (MergeError, KeyError) as error:
        reason = str(error)
    else:
        lengths = weight.norm(dim=-1) if weight.ndim == 2 and len(weight) == classes else torch.zeros(1)
        if bool(((lengths - 1).abs() < 1e-3).all()):
            return weight
        reason = f"expected {classes} rows of length 1, found shape {tuple(weight.shape)}"
    warnings.warn(f"{path} is damaged ({reason}) and is made again", stacklevel=3)
    return None
