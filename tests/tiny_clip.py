"""CLIPs of a few thousand parameters in the formats of transformers and open_clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 16,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 8,
    "projection_dim": 24,
}
TEXT: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "bos_token_id": 62,
    "eos_token_id": 2,  # the value that means: the end is where the largest token stands, as in open_clip
    "pad_token_id": 0,
}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 3},
}


def register(folder: Path) -> None:
    """Make ``tiny`` (GELU) and ``tiny-quickgelu`` known to open_clip."""
    for name, quick in (("tiny", False), ("tiny-quickgelu", True)):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**OPEN_CLIP, "quick_gelu": quick}))
        open_clip.add_model_config(path)


def randomized(network: Network, seed: int = 0) -> Network:
    """Give every parameter values that matter: a fresh network has many zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            scale = value.shape[-1] ** -0.5 if value.ndim == 2 else 0.3
            value.copy_(scale * noise + (1.0 if "norm" in name or "ln_" in name else 0.0) * (value.ndim == 1))
    network.eval()
    return network


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit, whatever the order of their names."""
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in right
    )
