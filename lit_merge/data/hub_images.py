"""Labelled images from datasets in the formats of Hugging Face's ``datasets``, on the hub or on disk."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from lit_merge.errors import MergeError, require

__all__ = ("HubImages", "ImageSet", "Transform", "config_of_copy", "is_path", "refusing")

Transform = Callable[[Any], Tensor]
"""Maps an RGB picture of Pillow to a float tensor ``(3, H, W)``."""

# what Pillow and torch raise on files that are no pictures, beside OSError
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    Image.DecompressionBombError,
)


class ImageSet(Dataset[tuple[Tensor, int]], ABC):
    """Labelled pictures, decoded when asked for, then made RGB and transformed.

    Args:
        where: Name for messages, such as ``"ylecun/mnist (test)"``.
        classes: Names of the classes in the order of the labels, where known.
        transform: Maps an RGB picture to a float tensor ``(3, H, W)``; by default one in [0, 1] of the picture's size.
        label_offset: Label of the first class in the data, subtracted from every label.
    """

    def __init__(
        self, where: str, classes: Sequence[str] | None, transform: Transform | None, label_offset: int = 0
    ) -> None:
        self.where = where
        self.classes = None if classes is None else tuple(classes)
        self.transform: Transform = to_tensor if transform is None else transform
        self.label_offset = label_offset

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[object, object]:
        """Return picture and label as the data has them."""

    def picture(self, index: int) -> tuple[Image.Image, int]:
        """Return an RGB picture, untransformed, and its label.

        Raises:
            IndexError: There is no such index.
            MergeError: The picture cannot be decoded, or the label is not an integer.
        """
        try:
            image, label = self.read(index)
        except IndexError:
            raise  # the end of the dataset, which ends a for loop
        except _UNREADABLE as error:
            raise MergeError(f"{self.where}: image {index}: cannot be decoded ({_first_line(error)})") from error
        if not isinstance(image, Image.Image):
            raise MergeError(f"{self.where}: image {index}: expected a picture, found {type(image).__name__}")
        return image.convert("RGB"), self._label(label, index)

    def _label(self, label: object, index: int) -> int:
        try:
            number = operator.index(label)  # type: ignore[arg-type]
        except TypeError:
            raise MergeError(
                f"{self.where}: image {index}: expected an integer label, found {label!r}; number the classes first"
            ) from None
        if number < self.label_offset:
            raise MergeError(f"{self.where}: image {index}: label {number} is below the first one, {self.label_offset}")
        return number - self.label_offset

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.picture(index)
        return self.transform(image), label


class HubImages(ImageSet):
    """One split of a dataset that ``datasets`` reads: from the Hugging Face hub, or from a folder.

    A folder is in the layout of a repository of the hub (Parquet files, WebDataset, folders of pictures, …), or was
    written by ``save_to_disk``. Only ``datasets`` uses the network, and only where ``source`` is no folder; code that
    comes with a dataset is not run. Pickles into loader workers: the images stay in files that are mapped into memory.

    Args:
        source: A folder, or ``ORG/NAME`` of the hub; what exists on disk wins.
        split: Name of the split, such as ``"test"``.
        config: Configuration, for datasets with more than one.
        image: Column of the pictures.
        label: Column of the labels: integers, booleans or class labels.
        transform: See :class:`ImageSet`.
        revision: Commit, branch or tag on the hub.
        cache_dir: Where ``datasets`` keeps what it downloads and converts; by default its own folder.
        label_offset: See :class:`ImageSet`.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        MergeError: The dataset cannot be opened, is empty, or has no such split or column.
    """

    def __init__(
        self,
        source: str | Path,
        split: str,
        *,
        config: str | None = None,
        image: str = "image",
        label: str = "label",
        transform: Transform | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        label_offset: int = 0,
    ) -> None:
        where = f"{source} ({split})"
        folder = Path(source).expanduser()
        if folder.is_dir():
            saved = _from_disk(folder, split)
            data = _from_repository(str(folder), split, config, None, cache_dir) if saved is None else saved
        elif is_path(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise MergeError(f"{source}: no such folder; expected one with a dataset, or ORG/NAME of the hub")
        else:
            data = _from_repository(str(source), split, config, revision, cache_dir)
        for column, what in ((image, "image"), (label, "label")):
            if column not in data.column_names:
                raise MergeError(
                    f"{where}: no column {column!r} for the {what}s; it has {', '.join(data.column_names)}: "
                    f"name the right one as {what}"
                )
        if len(data) == 0:
            raise MergeError(f"{where}: the split is empty; expected images")
        data = _decoding(data.select_columns(list(dict.fromkeys((image, label)))), image, where)
        names = _class_names(data.features[label], label, where)
        super().__init__(where, None if names is None else names[label_offset:], transform, label_offset)
        self._data = data
        self._image, self._label_column = image, label

    def __len__(self) -> int:
        return len(self._data)

    def labels(self) -> list[int]:
        """Return all labels, without reading the images."""
        return [self._label(label, index) for index, label in enumerate(self._data[self._label_column])]

    def read(self, index: int) -> tuple[object, object]:
        """Return picture and label as the dataset has them."""
        row = self._data[index]
        return row[self._image], row[self._label_column]


def is_path(source: str | Path) -> bool:
    """Whether this is written as a path, not as ``ORG/NAME``.

    >>> is_path("./data/mnist"), is_path("~/mnist"), is_path("ylecun/mnist")
    (True, True, False)
    """
    return isinstance(source, Path) or source.startswith((".", "/", "~"))


@contextmanager
def refusing(where: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises while it opens a dataset into one error.

    ``datasets``, Arrow, the hub's client and torchvision share no base class below ``Exception``.

    Raises:
        MergeError: The block failed.
    """
    try:
        yield
    except MergeError:
        raise
    except Exception as error:
        reason = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        raise MergeError(f"{where}: cannot be opened ({_first_line(reason)}); {advice}") from error


def config_of_copy(folder: Path, config: str | None) -> str | None:
    """Return the configuration to ask a copy of a repository for: one that holds a single one may not know its name.

    Args:
        folder: The copy.
        config: Name of the configuration on the hub.

    Raises:
        MergeError: The folder cannot be opened.
    """
    if config is None or _saved_to_disk(folder):
        return config
    with refusing(str(folder), "expected Parquet files or another layout that datasets.load_dataset opens"):
        names = require("datasets", "hf").get_dataset_config_names(str(folder))
    return None if names == ["default"] else config


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _from_disk(folder: Path, split: str) -> Any:  # noqa: ANN401 - datasets is optional
    """Open what ``save_to_disk`` wrote, if it did."""
    if not _saved_to_disk(folder):
        return None
    many = (folder / "dataset_dict.json").is_file()
    with refusing(str(folder), "save it to disk again, with images in every split"):
        found = require("datasets", "hf").load_from_disk(str(folder))
        if not many:
            found = {split if found.split is None else str(found.split): found}
    return _choose(found, split, str(folder))


def _from_repository(
    source: str, split: str, config: str | None, revision: str | None, cache_dir: str | Path | None
) -> Any:  # noqa: ANN401
    datasets = require("datasets", "hf")
    advice = (
        f"check its name, config and revision and the network, or give a root: a folder with a copy in ROOT/{source}"
        if not Path(source).is_dir()
        else "expected Parquet files or another layout that datasets.load_dataset opens, or what save_to_disk writes"
    )
    with refusing(source, advice):
        builder = datasets.load_dataset_builder(
            source, config, revision=revision, cache_dir=None if cache_dir is None else str(cache_dir)
        )
        builder.download_and_prepare()
    if _choose(builder.info.splits, split, source).num_examples == 0:
        raise MergeError(f"{source} ({split}): the split is empty; expected images")
    with refusing(f"{source} ({split})", "remove it from the cache of datasets, and let it be made again"):
        return builder.as_dataset(split=split)


def _choose(splits: Any, split: str, where: str) -> Any:  # noqa: ANN401
    if split not in splits:
        raise MergeError(f"{where}: no split {split!r}; it has {', '.join(map(str, splits))}: name the right one")
    return splits[split]


def _decoding(data: Any, image: str, where: str) -> Any:  # noqa: ANN401
    """Make the column of the pictures decode itself."""
    datasets = require("datasets", "hf")
    feature = data.features[image]
    if isinstance(feature, datasets.Image):
        return data.cast_column(image, datasets.Image())  # whatever decode and mode it was saved with
    kind = getattr(feature, "dtype", feature)
    # encoded bytes without the feature; a string could be an address, which would be fetched
    if kind in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
        with refusing(f"{where}: column {image!r}", "save it as a column of images"):
            return data.cast_column(image, datasets.Image())
    raise MergeError(f"{where}: column {image!r}: expected images, found {kind}")


def _class_names(feature: Any, label: str, where: str) -> list[str] | None:  # noqa: ANN401
    """Return the names of the classes, if the column has any; refuse labels that are no integers."""
    names = getattr(feature, "names", None)
    kind = getattr(feature, "dtype", type(feature).__name__)
    if names is None and not re.fullmatch(r"u?int\d+|bool", kind):
        raise MergeError(
            f"{where}: column {label!r}: expected integers, booleans or class labels, found {kind}; "
            "number the classes first, as class_encode_column of datasets does"
        )
    return names


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
