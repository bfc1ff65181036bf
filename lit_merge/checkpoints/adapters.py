"""LoRA adapters in PEFT's format as experts: the weights of their base with the low-rank changes added."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoints._peft_config import CONFIG_NAME, LoraConfig, read_config
from lit_merge.checkpoints.checks import check_state
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.files import strict_json
from lit_merge.checkpoints.reading import read_state
from lit_merge.errors import MergeError

__all__ = ("AdaptedState", "is_adapter", "read_adapter")

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_START = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")
_VISION = "vision_model."
_TWICE_UP_TO = (0, 21)  # see read_adapter; huggingface/peft#3774 is not in 0.21


@dataclass(frozen=True)
class _LowRank:
    """One low-rank change: scale · B·A, with the file's keys of A and B."""

    a: str
    b: str
    scale: float
    transposed: bool

    def product(self, weights: Mapping[str, Tensor], kind: torch.dtype) -> Tensor:
        """Return ``(out, in)``, or ``(in, out)`` if transposed; the kernel of a convolution is part of ``in``."""
        a, b = (weights[key].to(kind).flatten(1) for key in (self.a, self.b))
        return self.scale * ((b @ a).T if self.transposed else b @ a)


class AdaptedState(Mapping[str, Tensor]):
    """The base's tensors with an adapter merged into them; a tensor is computed when it is asked for.

    Made by :func:`read_adapter`.

    Args:
        base: State dict of the base, which may be lazy.
        weights: The adapter's tensors, which may be lazy.
        added: Low-rank change per name of the base.
        biases: Key and factor of what ``lora_bias`` adds, per name of the base.
        replaced: Key of the tensor that stands instead, per name of the base.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        added: Mapping[str, _LowRank],
        biases: Mapping[str, tuple[str, float]],
        replaced: Mapping[str, str],
    ) -> None:
        self._base, self._weights = base, weights
        self._added, self._biases, self._replaced = dict(added), dict(biases), dict(replaced)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that are not taken from the base as they are, in its order."""
        names = {*self._added, *self._biases, *self._replaced}
        return tuple(name for name in self._base if name in names)

    def __getitem__(self, name: str) -> Tensor:
        value = self._base[name]
        stored, kind = value.dtype, torch.float64 if value.dtype == torch.float64 else torch.float32
        if name in self._replaced:
            value = self._weights[self._replaced[name]].to(stored)
        if name in self._added:
            value = value.to(kind) + self._added[name].product(self._weights, kind).reshape(value.shape)
        if name in self._biases:
            key, scale = self._biases[name]
            value = value.to(kind) + scale * self._weights[key].to(kind)
        return value.to(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __len__(self) -> int:
        return len(self._base)


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a folder in PEFT's format.

    >>> is_adapter("nowhere")
    False
    """
    return (Path(folder) / CONFIG_NAME).is_file()


def read_adapter(
    folder: str | Path, base: Mapping[str, Tensor], *, base_names: Collection[str] = ()
) -> Mapping[str, Tensor]:
    """Open a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) as the state dict of an expert.

    The expert's weights are W + s·B·A with B ``(out, r)``, A ``(r, in)`` and s = alpha / r, or alpha / √r with
    rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732); biases and whole modules that were trained along
    replace those of the base. Linear layers, embeddings, convolutions and ``nn.MultiheadAttention`` are known. Sums
    are fp32 (fp64 for a base in fp64), results have the base's dtype, and no result is held in memory.

    PEFT up to 0.21 adds the change of ``out_proj`` of ``nn.MultiheadAttention`` twice, in every forward pass and when
    it merges (huggingface/peft#3774). An adapter stands for what its network computed, so it is added twice here too.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, which is never executed).
        base: State dict of the network that the adapter was trained on. Its names may have the prefix
            ``vision_model.`` where the adapter's have none, and the other way round: transformers 4 and 5 differ.
        base_names: Names by which the base is known, such as ``openai/clip-vit-base-patch32``; their last parts are
            compared with the last part of what the adapter names as its base. If there are none, or the adapter names
            none, only shapes are checked. Beside an adapter that ``lit-merge finetune`` wrote, in the folder above it,
            there is ``finetune.json`` with the digest of the base, and the base must have it whatever its name.

    Returns:
        Tensors by name: those of ``base``, in its order.

    Raises:
        MergeError: The adapter is damaged, of another base, or anything else than plain LoRA.
    """
    folder = Path(folder)
    config = read_config(folder)
    config.check_base(base_names)
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise MergeError(f"{folder}: an adapter without weights; expected {' or '.join(_WEIGHTS)}")
    _check_digest(folder, base)
    return _Opened(file, read_state(file), config, base).state()


def _check_digest(folder: Path, base: Mapping[str, Tensor]) -> None:
    """Compare the base with the one that ``lit-merge finetune`` started from, if it made the adapter."""
    facts = folder.absolute().parent / "finetune.json"
    if not facts.is_file():
        return
    expected = strict_json(facts, facts.read_bytes()).get("base")
    if not isinstance(expected, str) or not re.fullmatch(r"[0-9a-f]{64}", expected):  # not one of ours
        return
    found = state_digest(base)
    if found == expected:
        return
    plain = {name.removeprefix(_VISION): name for name in base}  # the layouts of transformers 4 and 5, see read_adapter
    if len(plain) == len(base):
        for start in ("", _VISION):
            if state_digest({start + name: base[key] for name, key in plain.items()}) == expected:
                return
    raise MergeError(
        f"{facts}: the adapter in {folder} was trained on the base {expected[:12]}…, and the base here is "
        f"{found[:12]}…; give the base that it was trained on"
    )


@dataclass(frozen=True)
class _Opened:
    """An adapter's file beside its base; every tensor is checked once."""

    file: Path
    weights: Mapping[str, Tensor]
    config: LoraConfig
    base: Mapping[str, Tensor]

    def state(self) -> AdaptedState:
        """Find what each tensor of the file changes.

        Raises:
            MergeError: Something does not fit.
        """
        modules, others = self._sorted()
        if not modules:
            raise MergeError(f"{self.file}: no LoRA tensors in it; expected ….lora_A.weight and ….lora_B.weight")
        rename = self._renaming([*others, *(f"{_plain(m)}.{end}" for m in modules for end in _ENDS)])
        added, biases = dict[str, _LowRank](), dict[str, tuple[str, float]]()
        for module, parts in modules.items():
            candidates = [rename(f"{_plain(module)}.{end}") for end in _ENDS]
            target = next((name for name in candidates if name in self.base), candidates[0])
            self._check_target(module, target)
            if target in added:
                raise MergeError(f"{self.file}: {module}: a second change of {target}; expected one")
            added[target] = self._low_rank(module, parts, target)
            if key := parts.get("lora_B.bias"):
                bias = target.removesuffix("weight") + "bias"
                self._check_alike(key, bias)
                biases[bias] = (key, added[target].scale)
        replaced = {rename(name): key for name, key in others.items()}
        for name, key in replaced.items():
            self._check_alike(key, name)
        return AdaptedState(self.base, self.weights, added, biases, replaced)

    def _sorted(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return the keys of low-rank parts per module, and of tensors that stand instead of those of the base."""
        modules, others = dict[str, dict[str, str]](), dict[str, str]()
        for key in self.weights:
            check_state(str(self.file), key, self.weights[key])
            inner = key.removeprefix(_START)
            if found := _LORA.fullmatch(inner):
                modules.setdefault(found["module"], {})[found["part"]] = key
            elif _plain(inner) in others:
                raise MergeError(f"{self.file}: {key}: a second tensor for {_plain(inner)}; expected one")
            else:
                others[_plain(inner)] = key
        for key in self.weights:
            inner = key.removeprefix(_START)
            if inner == key or (others.get(_plain(inner)) == key and not self._may_replace(inner, modules)):
                raise MergeError(
                    f"{self.file}: {key}: not a tensor of plain LoRA; expected {_START}….lora_A.weight, lora_B.weight, "
                    f"lora_embedding_A, lora_embedding_B, and what bias and modules_to_save of {CONFIG_NAME} announce"
                )
        return modules, others

    def _may_replace(self, inner: str, modules: Collection[str]) -> bool:
        """Whether a tensor that is no part of a low-rank change may be in the file."""
        if ".lora_" in inner:  # magnitudes of DoRA and the like
            return False
        if self.config.biases and f".{inner}".endswith(".bias"):
            return True
        if inner.endswith(".base_layer.weight"):  # of an adapted embedding
            return inner.removesuffix(".base_layer.weight") in modules
        parts = _plain(inner).split(".")
        return any(".".join(parts[:end]).endswith(self.config.saved) for end in range(1, len(parts)))

    def _low_rank(self, module: str, parts: Mapping[str, str], target: str) -> _LowRank:
        fused = target.endswith("in_proj_weight")
        embedding = any(part.startswith("lora_embedding") for part in parts)
        pair = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        if set(parts) - {"lora_B.bias"} != set(pair):
            found = ", ".join(sorted(parts))
            raise MergeError(f"{self.file}: {module}: expected {pair[0]} and {pair[1]}, found {found}")
        if "lora_B.bias" in parts and (fused or embedding):
            raise MergeError(f"{self.file}: {module}.lora_B.bias: only known for linear layers and convolutions")
        attention, _, inside = module.rpartition(".base_layer.")  # PEFT's wrapper of nn.MultiheadAttention
        settings = attention or module
        a, b, rank = self.weights[parts[pair[0]]], self.weights[parts[pair[1]]], self.config.rank_of(settings)
        if a.ndim < 2 or b.ndim != a.ndim or len(a) != rank or b.shape[1] != rank or b.shape[2:].numel() != 1:
            raise MergeError(
                f"{self.file}: {module}: expected A ({rank}, …) and B (…, {rank}) by the rank in {CONFIG_NAME}, found "
                f"{tuple(a.shape)} and {tuple(b.shape)}"
            )
        transposed = embedding or (self.config.transposed and a.ndim == 2 and not fused)
        made = (*a.shape[1:], len(b)) if transposed else (len(b), *a.shape[1:])
        value = self.base[target]
        if value.shape != made or not value.is_floating_point():
            raise MergeError(
                f"{self.file}: {module}: it changes a tensor of floats {made}, and {target} of the base is "
                f"{tuple(value.shape)}, {value.dtype}; expected an adapter of this base"
            )
        scale = self.config.scale_of(settings) * (self._times(module) if inside == "out_proj" else 1)
        return _LowRank(parts[pair[0]], parts[pair[1]], scale, transposed)

    def _times(self, module: str) -> int:
        if self.config.version > _TWICE_UP_TO:
            last, found = (".".join(map(str, version)) for version in (_TWICE_UP_TO, self.config.version))
            raise MergeError(
                f"{self.file}: {module}: PEFT up to {last} adds this change twice, and what PEFT {found} does is not "
                "known; merge it there (merge_and_unload) and give the merged weights"
            )
        return 2

    def _renaming(self, names: Collection[str]) -> Callable[[str], str]:
        """Choose, once for all names, whether ``vision_model.`` is left as it is, added or removed."""
        ways: tuple[Callable[[str], str], ...] = (
            lambda name: name,
            lambda name: _VISION + name,
            lambda name: name.removeprefix(_VISION),
        )
        return max(ways, key=lambda way: sum(way(name) in self.base for name in names))

    def _check_target(self, origin: str, name: str) -> None:
        if name not in self.base:
            raise MergeError(
                f"{self.file}: {origin}: the base has no {name}, with or without {_VISION}; it has "
                f"{', '.join(list(self.base)[:2])}, …; expected an adapter of this base, and of nothing beside it"
            )

    def _check_alike(self, key: str, name: str) -> None:
        self._check_target(key, name)
        value, other = self.weights[key], self.base[name]
        if value.shape != other.shape or value.is_floating_point() != other.is_floating_point():
            raise MergeError(
                f"{self.file}: {key}: expected {tuple(other.shape)}, {other.dtype} as {name} of the base, found "
                f"{tuple(value.shape)}, {value.dtype}; expected an adapter of this base"
            )


_ENDS = ("weight", "in_proj_weight")  # a module of its own, or nn.MultiheadAttention


def _plain(name: str) -> str:
    """Drop what PEFT's wrappers add to the name of a module or tensor."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "modules_to_save"))
