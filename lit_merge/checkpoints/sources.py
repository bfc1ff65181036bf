"""Where networks come from: files, folders, the Hugging Face hub and open_clip's tags, all as files on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_merge.checkpoints.adapters import is_adapter, read_adapter
from lit_merge.checkpoints.hub import fetch, hub_folder
from lit_merge.checkpoints.open_clip_tags import pretrained_config
from lit_merge.checkpoints.reading import read_state
from lit_merge.errors import MergeError, require

__all__ = ("Source", "chosen_files", "parse_hub_id", "weights_file")

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_TAG = re.compile(r"open_clip:(?P<name>[^/\s]+)/(?P<tag>[\w.-]+)")
# the first of these that a folder has is read; pickles come last
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "merged.safetensors",
    "merged.safetensors.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# configs, tokenizers, templates, cards
_SMALL = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken")


@dataclass(frozen=True)
class Source:
    """Where the weights of one network are: a file, a folder, a repository of the hub, or a tag of open_clip.

    ==========================================  ===================================================================
    written as                                  what it is
    ==========================================  ===================================================================
    ``weights/cars.safetensors``                a file: ``.safetensors``, ``.safetensors.index.json`` (sharded), or
                                                ``.pt``, ``.pth``, ``.bin`` with nothing but tensors
    ``weights/cars``                            a folder in Hugging Face's, open_clip's or PEFT's format
    ``openai/clip-vit-base-patch32``            a repository of the Hugging Face hub, at its newest revision
    ``openai/clip-vit-base-patch32@3d74acf``    the same at one revision
    ``open_clip:ViT-B-32-quickgelu/openai``     the weights that open_clip knows by this architecture and tag
    ==========================================  ===================================================================

    What exists on disk wins over the hub. With a ``root``, ``root/openai/clip-vit-base-patch32`` stands for the
    repository and the network is never asked.

    Attributes:
        spec: As written.
        root: Folder that relative paths and repositories are looked up in.
        cache_dir: Folder for downloads; by default that of ``huggingface_hub``.
        sha256: What the weights' file must hash to, see :func:`~lit_merge.checkpoints.read_state`.
    """

    spec: str
    root: Path | None = None
    cache_dir: Path | None = None
    sha256: str | None = None

    @property
    def open_clip_tag(self) -> tuple[str, str] | None:
        """Architecture and tag, if this is one of open_clip."""
        found = _TAG.fullmatch(self.spec)
        return None if found is None else (found["name"], found["tag"])

    @property
    def hub_id(self) -> tuple[str, str | None] | None:
        """Repository and revision, if this is one of the hub and not a path on disk."""
        if self.open_clip_tag is not None:
            repo = _open_clip_repository(*self.open_clip_tag)
            return None if repo is None else (repo, None)
        if self._on_disk() is not None or self.spec.startswith((".", "/", "~")):
            return None
        return parse_hub_id(self.spec)

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which the network may be known: its repository, its folder's name and path (of the hub's cache)."""
        known = [] if self.hub_id is None else [self.hub_id[0]]
        here = self.local()
        return tuple(known if here is None else [*known, here.name, str(here.resolve())])

    def local(self) -> Path | None:
        """Return the file or folder on disk, or ``None`` if it would have to be fetched."""
        here = self._on_disk()
        if here is not None or self.hub_id is None or self.root is not None:
            return here
        return hub_folder(*self.hub_id, cache_dir=self.cache_dir)

    def path(self) -> Path:
        """Return the file or folder, fetched first if need be.

        Raises:
            MergeError: There is no such file or folder, or the hub does not answer.
        """
        here = self._on_disk()
        if here is not None:
            return here
        if self.hub_id is None:
            if self.open_clip_tag is not None and self.root is None:
                return _open_clip_download(*self.open_clip_tag, self.cache_dir)
            raise MergeError(
                f"{self.spec}: no such file or folder{self._below()}; expected weights, a folder with weights, a "
                "repository ORG/NAME of the Hugging Face hub, or open_clip:ARCHITECTURE/TAG"
            )
        if self.root is not None:
            raise MergeError(
                f"{self.root / self.hub_id[0]}: no such folder; with a root nothing is fetched from the hub: put "
                f"{self.hub_id[0]} there, or leave the root out"
            )
        open_clip = self.open_clip_tag is not None
        return fetch(*self.hub_id, lambda files: chosen_files(files, open_clip=open_clip), cache_dir=self.cache_dir)

    def state(self, base: Mapping[str, Tensor] | None = None, base_names: Iterable[str] = ()) -> Mapping[str, Tensor]:
        """Open the weights; tensors are read when they are asked for where the format allows.

        Args:
            base: Weights that a LoRA adapter is added to.
            base_names: Names of that base; an adapter that was made for another one is refused.

        Returns:
            Tensors by name, as in the file; of an adapter: those of ``base`` with the adapter merged.

        Raises:
            MergeError: The weights are missing, damaged, of another hash, or an adapter without a base.
        """
        path = self.path()
        if not is_adapter(path):
            return read_state(weights_file(path, open_clip=self.open_clip_tag is not None), sha256=self.sha256)
        if base is None:
            raise MergeError(f"{path}: a LoRA adapter cannot stand alone; expected a complete network here")
        if self.sha256 is not None:
            read_state(_adapter_file(path), sha256=self.sha256)
        return read_adapter(path, base, base_names=tuple(base_names))

    def revision(self) -> str | None:
        """Return the commit of a repository that is on disk in the hub's cache, if there is one."""
        here = self.local()
        found = None if here is None or here.parent.name != "snapshots" else here.name
        return found or (self.hub_id[1] if self.hub_id else None)

    def _on_disk(self) -> Path | None:
        candidates = [Path(self.spec).expanduser()]
        if self.root is not None:
            found = parse_hub_id(self.spec) if self.open_clip_tag is None else None
            tag = self.open_clip_tag
            repo = found[0] if found else _open_clip_repository(*tag) if tag else None
            candidates = [self.root / self.spec, *([self.root / repo] if repo else []), *candidates]
        return next((path for path in candidates if path.exists()), None)

    def _below(self) -> str:
        return "" if self.root is None else f" here or below {self.root}"


def parse_hub_id(spec: str) -> tuple[str, str | None] | None:
    """Split ``ORG/NAME@REVISION``; ``None`` if it is not of this form.

    >>> parse_hub_id("openai/clip-vit-base-patch32@3d74acf")
    ('openai/clip-vit-base-patch32', '3d74acf')
    >>> parse_hub_id("weights/cars.safetensors") is None
    True
    """
    found = _HUB_ID.fullmatch(spec)
    if found is None or spec.endswith((".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")):
        return None
    return found["repo"], found["revision"]


def weights_file(path: Path, *, open_clip: bool = False) -> Path:
    """Return the file with the weights: ``path`` itself, or the best one of a folder.

    Args:
        path: File or folder.
        open_clip: Whether open_clip's files are preferred; repositories of timm have both kinds.

    Raises:
        MergeError: The folder has none.
    """
    if not path.is_dir():
        return path
    for name in _ordered(open_clip):
        if (path / name).is_file():
            return path / name
    raise MergeError(f"{path}: a folder without weights; expected one of {', '.join(_WEIGHTS)}")


def chosen_files(files: list[str], *, open_clip: bool = False) -> list[str]:
    """Return which files of a repository are fetched: one format of the weights, the configs and the tokenizer.

    Args:
        files: All files of the repository.
        open_clip: Whether open_clip's files are preferred.

    >>> chosen_files(["config.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin", "tf_model.h5"])
    ['config.json', 'tokenizer.model', 'model.safetensors']
    """
    here = [name for name in files if "/" not in name]
    small = [name for name in here if name.endswith(_SMALL) and not name.endswith(".index.json")]
    if "adapter_config.json" in here:
        return small + [name for name in here if name.startswith("adapter_model.")][:1]
    first = next((name for name in _ordered(open_clip) if name in here), None)
    if first == "model.safetensors.index.json":
        return [*small, first, *(name for name in here if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))]
    return [*small, first] if first else small


def _ordered(open_clip: bool) -> list[str]:
    return sorted(_WEIGHTS, key=lambda name: "open_clip" not in name) if open_clip else list(_WEIGHTS)


def _adapter_file(folder: Path) -> Path:
    found = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not found:
        raise MergeError(f"{folder}: an adapter without weights; expected adapter_model.safetensors")
    return found[0]


def _open_clip_repository(name: str, tag: str) -> str | None:
    repo = str(pretrained_config(name, tag).get("hf_hub", ""))
    return repo.rstrip("/") or None


def _open_clip_download(name: str, tag: str, cache_dir: Path | None) -> Path:
    """Fetch weights that are not on the hub; they are read weights-only like any other file."""
    pretrained = require("open_clip.pretrained", "clip")
    return Path(
        pretrained.download_pretrained(pretrained_config(name, tag), cache_dir=str(cache_dir) if cache_dir else None)
    )
