"""Where labelled images come from, and one way to open them all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_merge.data.file_images import FolderImages, TorchvisionImages
from lit_merge.data.hub_images import HubImages, ImageSet, Transform, config_of_copy, is_path
from lit_merge.errors import MergeError, MissingExtraError, require

__all__ = (
    "DatasetStatus",
    "FolderImages",
    "HubImages",
    "ImageSet",
    "ImageSource",
    "TorchvisionImages",
    "dataset_status",
    "open_images",
)


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a task are: a dataset of the hub, folders of pictures, or a dataset of torchvision.

    ==================================  ==============================================================================
    given                               what a split is
    ==================================  ==============================================================================
    ``id: ylecun/mnist``                a split of that dataset, or of a folder that ``datasets`` opens: ``id: ./mnist``
    ``folder: pictures``                a folder in it, with one folder per class: ``pictures/test/CLASS/PICTURE``
    ``torchvision: SVHN, folder: data``  arguments of the class: ``splits: {test: {split: test}}``
    ==================================  ==============================================================================

    Attributes:
        id: ``ORG/NAME`` of the Hugging Face hub, or a folder that ``datasets`` opens.
        folder: Folder of the pictures, or ``root`` of the torchvision class.
        torchvision: Name of a class of ``torchvision.datasets``.
        config: Configuration of a dataset of the hub.
        revision: Commit, branch or tag of the hub.
        splits: What each split is called there; at least ``test``.
        image: Column of the pictures.
        label: Column of the labels.
        label_offset: Label of the first class.

    Raises:
        MergeError: Not exactly one of them is given, or there is no test split.
    """

    id: str | None = None
    folder: str | None = None
    torchvision: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str | Mapping[str, Any]] = field(default_factory=lambda: {"train": "train", "test": "test"})
    image: str = "image"
    label: str = "label"
    label_offset: int = 0

    def __post_init__(self) -> None:
        if (self.id is None) == (self.folder is None) or (self.torchvision is not None and self.folder is None):
            raise MergeError(
                "dataset: expected id: ORG/NAME, or folder: PATH, or torchvision: CLASS with folder: PATH; found "
                + (", ".join(name for name in ("id", "folder", "torchvision") if getattr(self, name)) or "none of them")
            )
        if "test" not in self.splits:
            raise MergeError(f"dataset: splits: expected at least test, found {', '.join(self.splits) or 'none'}")
        wanted = str if self.torchvision is None else Mapping
        for name, value in self.splits.items():
            if not isinstance(value, wanted):
                expected = "a name" if wanted is str else "the arguments of the class, such as {split: test}"
                raise MergeError(f"dataset: splits: {name}: expected {expected}, found {value!r}")

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str = "dataset", folder: Path | None = None) -> ImageSource:
        """Make a source from the ``dataset`` of a task file.

        Args:
            content: Keys and values.
            where: Name for messages.
            folder: What relative paths are relative to.

        Raises:
            MergeError: A key is unknown or a value of the wrong type.
        """
        known = {entry.name for entry in fields(cls)}
        if not isinstance(content, Mapping) or not set(content) <= known:
            found = ", ".join(map(str, set(content) - known)) if isinstance(content, Mapping) else repr(content)
            raise MergeError(f"{where}: unknown {found}; expected keys {', '.join(sorted(known))}")
        given = {name: value for name, value in content.items() if value is not None}
        for name, value in given.items():
            kind = {"splits": Mapping, "label_offset": int}.get(name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise MergeError(f"{where}: {name}: expected {kind.__name__}, found {value!r}")
        if folder is not None:
            for name in ("id", "folder"):
                if name in given and (name == "folder" or is_path(given[name])):
                    given[name] = str(folder / Path(given[name]).expanduser())
        try:
            return cls(**given)
        except MergeError as error:
            raise MergeError(f"{where}: {str(error).removeprefix('dataset: ')}") from None

    def __str__(self) -> str:
        """Show where the images are."""
        if self.torchvision is not None:
            return f"torchvision {self.torchvision} in {self.folder}"
        return str(self.id or self.folder)

    def mirrored(self, root: str | Path | None) -> Path | None:
        """Return the folder that stands for a dataset of the hub: ``root/ORG/NAME``; ``None`` if there is no need."""
        if self.id is None or root is None or is_path(self.id):
            return None
        return Path(root).expanduser() / self.id


def open_images(
    source: ImageSource | Mapping[str, Any],
    split: str = "test",
    *,
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
    root: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> ImageSet:
    """Open one split of a source.

    Args:
        source: Where the images are; a mapping is parsed first.
        split: One of the source's ``splits``.
        classes: Names of the classes in the order of the labels; folders of pictures are matched with them.
        transform: Maps an RGB picture to a float tensor ``(3, H, W)``.
        root: Folder with copies of datasets of the hub at ``root/ORG/NAME``; given one, the hub is not asked.
        cache_dir: Where ``datasets`` keeps what it downloads and converts; by default its own folder.

    Returns:
        A map-style dataset of ``(image, label)``.

    Raises:
        MergeError: The source has no such split, or it cannot be opened.
        MissingExtraError: It needs a package that is not installed.
    """
    source = source if isinstance(source, ImageSource) else ImageSource.parse(source)
    if split not in source.splits:
        raise MergeError(f"{source}: no split {split!r}; the task has {', '.join(source.splits)}")
    name = source.splits[split]
    if source.torchvision is not None:
        assert source.folder is not None
        assert isinstance(name, Mapping)
        return TorchvisionImages(source.torchvision, source.folder, name, transform, source.label_offset)
    assert isinstance(name, str)
    if source.folder is not None:
        return FolderImages(Path(source.folder).expanduser() / name, classes, transform, source.label_offset)
    mirror = source.mirrored(root)
    if mirror is not None and not mirror.is_dir():
        raise MergeError(
            f"{mirror}: no such folder; with a root nothing is fetched from the hub: put {source.id} there, "
            "or leave the root out"
        )
    return HubImages(
        mirror or str(source.id),
        name,
        config=config_of_copy(mirror, source.config) if mirror else source.config,
        image=source.image,
        label=source.label,
        transform=transform,
        revision=None if mirror else source.revision,
        cache_dir=cache_dir,
        label_offset=source.label_offset,
    )


class DatasetStatus(NamedTuple):
    """Whether images are on this disk.

    Attributes:
        state: ``here``: a folder of the user's; ``cached``: fetched before; ``missing``: would have to be fetched, or a
            folder that does not exist; ``unknown``: ``datasets`` is not installed, so that nobody can say.
        where: The folder that was found, or looked for.
    """

    state: Literal["here", "cached", "missing", "unknown"]
    where: Path | None


def dataset_status(
    source: ImageSource, root: str | Path | None = None, cache_dir: str | Path | None = None
) -> DatasetStatus:
    """Say whether the images are on this disk, without opening them and without the network.

    ``cached`` means that ``datasets`` has converted some revision and configuration of the dataset before.

    Args:
        source: Where the images are.
        root: As for :func:`open_images`.
        cache_dir: As for :func:`open_images`.
    """
    folder = source.mirrored(root)
    if folder is None and (source.folder is not None or is_path(str(source.id)) or Path(str(source.id)).is_dir()):
        folder = Path(str(source.folder or source.id)).expanduser()
    if folder is not None:
        return DatasetStatus("here" if folder.is_dir() else "missing", folder)
    try:
        datasets = require("datasets", "hf")
    except MissingExtraError:
        return DatasetStatus("unknown", None)
    organisation, _, name = str(source.id).partition("/")
    snake = require("datasets.naming", "hf").camelcase_to_snakecase(name)
    cache = Path(cache_dir or os.fspath(datasets.config.HF_DATASETS_CACHE)) / f"{organisation}___{snake}"
    done = any(path.is_file() for path in cache.glob("*/*/*/dataset_info.json"))
    return DatasetStatus("cached" if done else "missing", cache)
