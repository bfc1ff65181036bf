"""Whole-module checkpoints as the task-vectors code base wrote them, made without that code.

The classes below have the structure of open_clip 2.0.2 and carry its names only while they are being saved.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torchvision import transforms

WIDTH, HEADS, LAYERS, PATCH, IMAGE, EMBED = 32, 2, 2, 4, 8, 16


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.ln_1 = nn.LayerNorm(WIDTH)
        layers = [("c_fc", nn.Linear(WIDTH, 4 * WIDTH)), ("gelu", act_layer()), ("c_proj", nn.Linear(4 * WIDTH, WIDTH))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.width, self.layers, self.grad_checkpointing = WIDTH, LAYERS, False
        self.resblocks = nn.ModuleList([ResidualAttentionBlock(act_layer) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisualTransformer(nn.Module):
    def __init__(self, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.image_size, self.output_dim = (IMAGE, IMAGE), EMBED
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(act_layer)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).transpose(0, 1)).transpose(0, 1)  # positions, images, width: as it was
        features: Tensor = self.ln_post(x[:, 0]) @ self.proj
        return features


class CLIP(nn.Module):
    """What is left after the text transformer was deleted."""

    attn_mask: Tensor

    def __init__(self, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.context_length = 7
        self.visual = VisualTransformer(act_layer)
        self.token_embedding = nn.Embedding(20, 24)
        self.positional_embedding = nn.Parameter(torch.randn(7, 24))
        self.ln_final = nn.LayerNorm(24)
        self.text_projection = nn.Parameter(torch.randn(24, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(4.6052))
        self.register_buffer("attn_mask", torch.full((7, 7), float("-inf")).triu(1), persistent=False)


def _convert_to_rgb(image: Any) -> Any:
    return image.convert("RGB")


class ImageEncoder(nn.Module):
    def __init__(self, act_layer: type[nn.Module] = QuickGELU) -> None:
        super().__init__()
        self.model = CLIP(act_layer)
        bicubic = transforms.InterpolationMode.BICUBIC
        self.train_preprocess = self.val_preprocess = transforms.Compose(
            [
                transforms.Resize(IMAGE, interpolation=bicubic),
                transforms.CenterCrop(IMAGE),
                _convert_to_rgb,
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.3, 0.3, 0.3)),
            ]
        )
        self.cache_dir: Any = "/cache"

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.visual(x)
        return features


class ClassificationHead(nn.Linear):
    def __init__(self, weights: Tensor, normalize: bool = True) -> None:
        classes, width = weights.shape
        super().__init__(width, classes)
        self.normalize = normalize
        self.weight = nn.Parameter(weights.clone())
        self.bias = nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.normalize:
            inputs = inputs / inputs.norm(dim=-1, keepdim=True)
        return super().forward(inputs)


_OPEN_CLIP = (QuickGELU, ResidualAttentionBlock, Transformer, VisualTransformer, CLIP)


def encoder(act_layer: type[nn.Module] = QuickGELU, seed: int = 0) -> ImageEncoder:
    """An encoder with random values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImageEncoder(act_layer).eval()


def head(classes: int = 5, normalize: bool = True) -> ClassificationHead:
    """A zero-shot head with the logit scale 100 in its weight."""
    rows = torch.randn(classes, EMBED, generator=torch.Generator().manual_seed(1))
    return ClassificationHead(100 * nn.functional.normalize(rows, dim=-1), normalize)


@contextmanager
def present(*extra: Any, modeling: str = "src.modeling") -> Iterator[None]:
    """Let the old code exist, for saving or for loading without care; afterwards it is gone from ``sys.modules``.

    Args:
        extra: More classes and functions of the module with encoder and head.
        modeling: The name of that module.
    """
    homes: dict[str, tuple[Any, ...]] = {
        modeling: (ImageEncoder, ClassificationHead, *extra),
        "open_clip.model": _OPEN_CLIP,
        "open_clip.transform": (_convert_to_rgb,),
    }
    before = {name: sys.modules.get(name) for name in (*homes, *(n.rpartition(".")[0] for n in homes)) if name}
    own = {member: member.__module__ for member in extra}
    try:
        for name, members in homes.items():
            if package := name.rpartition(".")[0]:
                sys.modules[package] = ModuleType(package)
            sys.modules[name] = ModuleType(name)
            for member in members:
                member.__module__ = name
                setattr(sys.modules[name], member.__name__, member)
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        for member, name in own.items():
            member.__module__ = name


def save_whole(
    content: object, path: str, modeling: str = "src.modeling", extra: tuple[Any, ...] = (), **how: Any
) -> None:
    """``torch.save`` under the names of the old code; ``how`` is for it."""
    with present(*extra, modeling=modeling), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the legacy format looks for source code
        with patch.object(transforms.InterpolationMode, "__reduce_ex__", lambda self, _: (type(self), (self.value,))):
            torch.save(content, Path(path), **how)  # Python 3.11.0 to 3.11.3 wrote enumerations by name, with getattr
