"""Labelled images from folders of pictures, and from the dataset classes of torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchvision import datasets as tv

from lit_merge.data.hub_images import ImageSet, Transform, refusing
from lit_merge.errors import MergeError

__all__ = ("FolderImages", "TorchvisionImages")


class FolderImages(ImageSet):
    """Pictures in one folder per class: ``folder/CLASS/PICTURE``.

    Which folder is which class: where the folders have the names of the classes, by name; where all of them are
    numbers, by number (so that ``10`` comes after ``2``); else in alphabetical order, as torchvision's ``ImageFolder``
    has it.

    Args:
        folder: Where the folders of the classes are.
        classes: Names of the classes in the order of the labels, if they are known from elsewhere.
        transform: See :class:`ImageSet`.
        label_offset: Number of the first class, for folders that are numbers.

    Raises:
        MergeError: There is no such folder, no picture in one of its folders, or not one folder per class.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str] | None = None,
        transform: Transform | None = None,
        label_offset: int = 0,
    ) -> None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            beside = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else []
            raise MergeError(
                f"{path}: no such folder; expected one folder per class in it"
                + (f" ({path.parent} has {', '.join(beside[:5])})" if beside else "")
            )
        with refusing(str(path), "expected one folder per class with pictures in it"):
            self._data = tv.ImageFolder(path)
        found = self._data.classes
        if classes is not None and len(classes) != len(found):
            raise MergeError(
                f"{path}: found {len(found)} class folders ({', '.join(found[:3])}, …), expected {len(classes)}: "
                f"{', '.join(classes[:3])}, …"
            )
        self._labels, numbered = _labels_of(found, classes)
        names = classes or [name for _, name in sorted(zip(self._labels, found, strict=True))]
        super().__init__(str(path), names, transform, label_offset if numbered else 0)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[object, object]:
        """Return the picture and the number of its class."""
        image, folder = self._data[index]
        return image, self._labels[folder]


class TorchvisionImages(ImageSet):
    """One of torchvision's image classification datasets, already on disk.

    Nothing is downloaded: do that once with torchvision itself, ``torchvision.datasets.SVHN(root, download=True)``.

    Args:
        name: Name of the class, such as ``"SVHN"``.
        root: Folder that the class takes as ``root``.
        arguments: Its further arguments, such as ``{"split": "test"}`` or ``{"train": False}``.
        transform: See :class:`ImageSet`.
        label_offset: See :class:`ImageSet`; 1 for ``EMNIST`` with ``{"split": "letters"}``.

    Raises:
        MergeError: torchvision has no such class, the files are not there, or an argument is wrong.
    """

    def __init__(
        self,
        name: str,
        root: str | Path,
        arguments: Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        label_offset: int = 0,
    ) -> None:
        arguments = dict(arguments or {})
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        where = f"torchvision {name} ({shown})"
        kind = getattr(tv, name, None) if name in tv.__all__ else None
        if not (isinstance(kind, type) and issubclass(kind, tv.VisionDataset)):
            raise MergeError(f"{where}: torchvision.datasets has no image dataset of this name")
        if arguments.get("download"):
            raise MergeError(f"{where}: download: nothing is downloaded here; make it once with torchvision itself")
        advice = f"expected its files in {root}; torchvision.datasets.{name}(…, download=True) fetches them"
        with refusing(where, advice):
            self._data = kind(root=Path(root).expanduser(), **arguments)
            size = len(self._data)
        if size == 0:
            raise MergeError(f"{where}: it is empty; expected images")
        found = getattr(self._data, "classes", None)
        known = isinstance(found, Sequence) and all(isinstance(item, str) for item in found)
        super().__init__(where, found[label_offset:] if known and found else None, transform, label_offset)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> tuple[object, object]:
        """Return picture and label as torchvision has them."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # not all of torchvision's classes raise it
        image, label = self._data[index]
        return image, label


def _labels_of(folders: Sequence[str], classes: Sequence[str] | None) -> tuple[list[int], bool]:
    """Return the label of each class folder, and whether the folders' own names are these numbers."""
    if classes is not None and set(classes) == set(folders):
        return [list(classes).index(name) for name in folders], False
    if all(name.isdecimal() for name in folders) and len({int(name) for name in folders}) == len(folders):
        return [int(name) for name in folders], True
    return list(range(len(folders))), False
