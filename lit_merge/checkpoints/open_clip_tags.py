"""Weights that open_clip knows by architecture and tag."""

from __future__ import annotations

from typing import Any

from lit_merge.errors import MergeError

__all__ = ("pretrained_config",)


def pretrained_config(name: str, tag: str) -> dict[str, Any]:
    """Return what open_clip knows of weights: where they are, activation and preprocessing.

    Args:
        name: Architecture, such as ``ViT-B-32``.
        tag: Weights, such as ``openai``.

    Raises:
        MergeError: open_clip has no such weights.

    >>> pretrained_config("ViT-B-32", "openai")["quick_gelu"]
    True
    """
    import open_clip  # here, as it takes long

    found: dict[str, Any] = open_clip.get_pretrained_cfg(name, tag)
    if not found:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        known = f"for {name} it has {tags}" if tags else f"it knows none for {name}: see open_clip.list_pretrained()"
        raise MergeError(f"open_clip:{name}/{tag}: open_clip has no such weights; {known}")
    return found
