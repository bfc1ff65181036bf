"""Small networks, datasets and suites that are made in milliseconds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_merge.data.pixels import PixelScale
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.vit import small_vit
from lit_merge.suites import NetworkSuite

Kind = Literal["vit", "cnn", "tied", "mlp"]
SIZE = 8


class ToyData(Dataset[tuple[Tensor, int]]):
    """Noisy prototypes: learnable, deterministic, of any size."""

    pixels = PixelScale((0.5,), (0.125,))  # values in [-4, 4]

    def __init__(self, size: int, classes: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randn(classes, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.arange(size) % classes
        self.images = prototypes[self.labels] + 0.5 * torch.randn(size, 3, SIZE, SIZE, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class ConvNet(nn.Module):
    """Convolutions with batch normalisation."""

    def __init__(self, width: int = 6, features: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width))
        self.out = nn.Linear(width, features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        features: Tensor = self.out(self.blocks(x).relu().mean((-1, -2)))
        return features


class TiedNet(nn.Module):
    """Two layers that share their weight, and an integer buffer."""

    index: Tensor

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * SIZE * SIZE, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("index", torch.arange(width).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(self.stem(x.flatten(1))).tanh()
        features: Tensor = self.second(hidden[:, self.index])
        return features


def network(kind: Kind = "cnn", seed: int = 0) -> nn.Module:
    """A network with random values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "vit":
            vit: nn.Module = small_vit(
                image_size=SIZE, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
            )
            return vit
        if kind == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6), nn.Tanh(), nn.Linear(6, 4))
        return ConvNet() if kind == "cnn" else TiedNet()


def expert_state(base: nn.Module, seed: int, spread: float = 0.3) -> dict[str, Tensor]:
    """The base with noise on every parameter and running statistic; tied tensors stay tied."""
    generator = torch.Generator().manual_seed(seed)
    state, done = {}, dict[int, Tensor]()
    for name, value in base.state_dict().items():
        if not value.is_floating_point():
            state[name] = value.clone()
        else:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            changed = value + spread * noise.abs() if "running_var" in name else value + spread * noise
            state[name] = done.setdefault(value.data_ptr(), changed)
    return state


class ToySuite(NetworkSuite):
    """Three tasks of different sizes and numbers of classes."""

    def __init__(
        self,
        kind: Kind = "cnn",
        tasks: int = 3,
        seed: int = 0,
        changed: bool = False,
        dtype: str = "float32",
        heads: int = 0,
        train: bool = False,
    ) -> None:
        base = network(kind, seed).to(getattr(torch, dtype)).eval()
        names = [f"task.{chr(97 + t)}" for t in range(tasks)]  # a dot in a name must not matter
        width = len(base(torch.zeros(1, 3, SIZE, SIZE, dtype=getattr(torch, dtype)))[0])
        experts = {name: expert_state(base, seed + 100 + t) for t, name in enumerate(names)}
        if changed:
            experts[names[-1]] = expert_state(base, seed + 999)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + heads)
            made = {name: CosineHead(torch.randn(3 + t, width), scale=5.0) for t, name in enumerate(names)}
        test = {name: ToyData(21 + 6 * t, 3 + t, seed + t) for t, name in enumerate(names)}
        more = {name: ToyData(11 + 2 * t, 3 + t, seed + 50 + t) for t, name in enumerate(names)}
        super().__init__(
            network=base,
            experts=experts,  # type: ignore[arg-type]
            heads={name: head.to(getattr(torch, dtype)) for name, head in made.items()},
            test=test,  # type: ignore[arg-type]
            train=more if train else None,  # type: ignore[arg-type]
            name="toys",
        )
