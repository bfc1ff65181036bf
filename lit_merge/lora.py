"""Low-rank fine-tuning: a frozen network whose weight matrices have trainable low-rank changes."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_merge.errors import MergeError, require
from lit_merge.reparametrized import Reparametrized, plant, tensor_at

__all__ = ("LoraNetwork", "LoraOptions", "write_adapter")


@dataclass(frozen=True)
class LoraOptions:
    """Which matrices get low-rank changes, and of which rank.

    Args:
        rank: Rank r of every change.
        alpha: The change is scaled by ``alpha / rank``.
        targets: Names of linear or attention modules, or the ends of such names (``["q_proj", "v_proj"]``); by
            default all of them.
        seed: Decides the factors A at the start. Experts whose factors are merged must have the same.

    Raises:
        MergeError: A number is out of range, or ``targets`` is empty.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise MergeError(f"lora.rank: expected at least 1, found {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise MergeError(f"lora.alpha: expected a positive number, found {self.alpha}")
        if self.targets is not None and (isinstance(self.targets, str) or not self.targets):
            raise MergeError(f"lora.targets: expected a list of names of modules, found {self.targets!r}")


class _Target(NamedTuple):
    """One weight matrix, and the module whose name its factors have."""

    weight: str
    module: str


class LoraNetwork(Reparametrized):
    """A frozen network with low-rank changes of its matrices (Hu et al. 2021, "LoRA", arXiv 2106.09685).

    ``W = W0 + alpha / rank · B A`` for every targeted matrix ``(out, in)``, with A ``(rank, in)`` uniform in
    ±1/√in and B ``(out, rank)`` zero at the start, so that the network starts as its base. The parameters of this
    module are the factors, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``, and nothing else.

    The changed matrices are computed in each forward pass and put into the network, which therefore can be of any
    kind. In ``nn.MultiheadAttention``, the attention of open_clip, the input projections of queries, keys and values
    are one matrix, which gets one pair of factors as in peft; the output projection there stays as it is, because
    peft up to 0.21 adds a change of that one twice (huggingface/peft#3774). There is no dropout on the factors, and
    the network runs in evaluation mode.

    Args:
        network: Maps images ``(B, C, H, W)`` to features ``(B, D)``. It is copied, not changed.
        options: Which matrices, and which rank.
        base: W0 and everything else: a state dict, or a file with one; by default the values of ``network``.

    Raises:
        MergeError: No module has one of the targeted names, a targeted matrix is tied to another tensor, or ``base``
            does not fit.

    >>> lora = LoraNetwork(nn.Sequential(nn.Linear(3, 2)), LoraOptions(rank=1))
    >>> {name: tuple(value.shape) for name, value in lora.state_dict().items()}
    {'0.lora_A.weight': (1, 3), '0.lora_B.weight': (2, 1)}
    """

    def __init__(
        self,
        network: nn.Module,
        options: LoraOptions | None = None,
        base: Mapping[str, Tensor] | str | Path | None = None,
    ) -> None:
        super().__init__(network, base)
        self.options = options or LoraOptions()
        self.targets = tuple(_targets(network, self.options.targets))
        for target in self.targets:
            weight = tensor_at(self.frozen, target.weight)
            for name, value in _start(weight, target.module, self.options).items():
                plant(self, name, nn.Parameter(value))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to features ``(B, D)``."""
        return self.run(self.changed(), images)

    def changed(self) -> dict[str, Tensor]:
        """Return the targeted matrices with their changes ``(out, in)`` by name, in full precision."""
        result = {}
        for target in self.targets:
            weight = tensor_at(self.frozen, target.weight)
            a, b = (tensor_at(self, f"{target.module}.lora_{side}.weight") for side in "AB")
            with torch.autocast(weight.device.type, enabled=False):
                result[target.weight] = weight + self.options.alpha / self.options.rank * (b @ a)
        return result

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """Return a complete state dict of the plain network, with the changes added to its matrices."""
        return {name: tensor_at(self.frozen, name).detach() for name in self.names} | self.changed()


def write_adapter(folder: str | Path, network: nn.Module, lora: LoraNetwork, *, base_name: str | None = None) -> Path:
    """Write the factors as an adapter of the ``peft`` library, which loads it onto the base.

    Args:
        folder: Where to; it is replaced as a whole.
        network: The plain network with the values of the base. It is changed: peft puts its layers into it.
        lora: Has the factors.
        base_name: Repository or path of the base, for ``base_model_name_or_path``; with it the adapter is refused on
            a base of another name.

    Returns:
        The folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        MissingExtraError: ``peft`` is not installed.
        MergeError: peft gives the factors other names.
    """
    peft = require("peft", "hf")
    modules = sorted({target.module for target in lora.targets})
    config = peft.LoraConfig(r=lora.options.rank, lora_alpha=lora.options.alpha, target_modules=modules, bias="none")
    adapted = peft.get_peft_model(network, config)
    factors = {f"base_model.model.{name}": value.detach().cpu() for name, value in lora.state_dict().items()}
    known = peft.get_peft_model_state_dict(adapted)
    if unknown := sorted(set(factors) - set(known)):
        raise MergeError(f"{folder}: peft {peft.__version__} has other names for {', '.join(unknown[:4])}")
    # peft also has factors for the output projections of attention; their change is zero whatever it is scaled by
    zeros = {name: torch.zeros_like(value) for name, value in known.items() if name.endswith("lora_B.weight")}
    peft.set_peft_model_state_dict(adapted, known | zeros | factors)
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        adapted.peft_config["default"].base_model_name_or_path = base_name
        adapted.save_pretrained(temporary, save_embedding_layers=False)  # else it asks the hub about the base
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _targets(network: nn.Module, wanted: Sequence[str] | None) -> Iterator[_Target]:
    """Yield the matrices to change, in the order of the network."""
    modules = {name: module for name, module in network.named_modules() if name}
    own = {}
    for name, module in modules.items():
        inside = isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:  # else of unequal widths
            own[name] = _Target(f"{name}.in_proj_weight", name)
        elif isinstance(module, nn.Linear) and not inside:
            own[name] = _Target(f"{name}.weight", name)
    ends = [*own] if wanted is None else wanted
    if missing := [end for end in ends or [""] if not any(_ends(name, end) for name in own)]:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in own})) or "none"
        raise MergeError(f"lora.targets: no linear or attention module is called {missing[0]!r}; there are {known}")
    chosen = [name for name in own if any(_ends(name, end) for end in ends)]
    tied = _tied(network)
    for name in chosen:
        if own[name].weight in tied:
            raise MergeError(f"lora.targets: {own[name].weight} is tied to another tensor; give targets without {name}")
        yield own[name]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _tied(network: nn.Module) -> set[str]:
    """Return all names of parameters that have more than one."""
    names: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _start(weight: Tensor, name: str, options: LoraOptions) -> dict[str, Tensor]:
    """Return A and B at the start; A depends on nothing but seed, name and shape."""
    rows, columns = weight.shape
    seed = int.from_bytes(hashlib.sha256(f"{options.seed}/{name}".encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    uniform = 2 * torch.rand(options.rank, columns, generator=generator) - 1
    return {
        f"{name}.lora_A.weight": (uniform / math.sqrt(columns)).to(weight),
        f"{name}.lora_B.weight": weight.new_zeros(rows, options.rank),
    }
