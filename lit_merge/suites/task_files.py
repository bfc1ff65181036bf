"""Tasks as data: one YAML file says where a task's images are, what its classes are called and how to ask for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lit_merge.data.image_sets import ImageSource
from lit_merge.errors import MergeError, require

__all__ = ("Task", "load_task", "parse_task", "task_names")

_FOLDER = Path(__file__).parent / "tasks"
_ORDER = (
    *("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"),
    *("oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"),
    *("cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"),
)
_KEYS = ("dataset", "classes", "templates", "name", "test_images", "download_bytes", "licence", "source")
_UNKNOWN = "unknown, see the dataset page"
_FILES = {"classes": "en_classnames.json", "templates": "en_zeroshot_classification_templates.json"}


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
        name: Its name in suites and reports.
        dataset: Where the images are.
        classes: Names of the classes in the order of the labels; ``None``: those that the dataset itself has.
        templates: Prompts with ``{c}`` for the name of a class.
        test_images: Number of test images, where known.
        download_bytes: Bytes to fetch for all splits, where known.
        licence: Licence of the images, as their authors state it.
        source: Paper that introduced them.
    """

    name: str
    dataset: ImageSource
    classes: tuple[str, ...] | None
    templates: tuple[str, ...]
    test_images: int | None = None
    download_bytes: int | None = None
    licence: str = _UNKNOWN
    source: str = ""

    def class_names(self, images: object = None) -> tuple[str, ...]:
        """Return the names of the classes.

        Args:
            images: The opened dataset, whose ``classes`` are taken if the task names none.

        Raises:
            MergeError: Neither the task nor the dataset names them.
        """
        if self.classes is not None:
            return self.classes
        found = getattr(images, "classes", None)
        if not found:
            raise MergeError(
                f"task {self.name}: classes: dataset, but {self.dataset} does not name its classes; list them instead"
            )
        return _strings(list(found), f"task {self.name}: classes of {self.dataset}")


def task_names() -> tuple[str, ...]:
    """Return the names of the bundled tasks, in the order of the 8, 14 and 20 task suites.

    >>> len(task_names()), task_names()[:3]
    (20, ('sun397', 'stanford-cars', 'resisc45'))
    """
    return _ORDER


def load_task(name_or_path: str | Path) -> Task:
    """Read a task file.

    The format, with what may be left out in brackets::

        dataset:
          id: ylecun/mnist                 # or folder: PATH, or torchvision: CLASS with folder: PATH
          [config: null]
          [revision: null]                 # a commit of the hub pins the images
          [splits: {train: train, test: test}]
          [image: image]                   # names of the columns
          [label: label]
          [label_offset: 0]                # label of the first class
        classes: [zero, one]               # or dataset: the dataset's own; or {clip_benchmark: mnist}
        templates: ['a photo of a {c}.']   # or {clip_benchmark: mnist}
        [name: digits]                     # by default the file's name
        [test_images: 10000]
        [download_bytes: null]
        [licence: MIT]
        [source: a paper]

    Relative paths are relative to the file. ``clip_benchmark`` takes the lists of the package of that name.

    Args:
        name_or_path: A bundled task, see :func:`task_names`, or a YAML file.

    Raises:
        MergeError: There is no such task or file, or its content is not as above.
        MissingExtraError: It refers to ``clip-benchmark``, which is not installed.

    >>> load_task("eurosat").templates[0].format(c=load_task("eurosat").classes[1])
    'a centered satellite photo of forest.'
    """
    path = Path(name_or_path).expanduser()
    if str(name_or_path) in _ORDER:
        path = _FOLDER / f"{name_or_path}.yaml"
    elif not path.is_file():
        close = get_close_matches(str(name_or_path), _ORDER, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(close)}?" if close else f"bundled are {', '.join(_ORDER)}"
        raise MergeError(f"task {name_or_path}: neither a bundled task nor a file; {known}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    return parse_task(content, path.stem, where=str(path), folder=path.parent)


def parse_task(content: object, name: str, where: str | None = None, folder: Path | None = None) -> Task:
    """Make a task from the content of a task file.

    Args:
        content: What :func:`load_task` describes.
        name: Name of the task, unless the content has one.
        where: What to call it in messages.
        folder: What relative paths are relative to.

    Raises:
        MergeError: The content is not as described.
    """
    where = where or f"task {name}"
    if not isinstance(content, Mapping):
        raise MergeError(f"{where}: expected keys dataset, classes and templates, found {type(content).__name__}")
    if unknown := [str(key) for key in content if key not in _KEYS]:
        raise MergeError(f"{where}: unknown keys {', '.join(unknown)}; expected {', '.join(_KEYS)}")
    if missing := [key for key in _KEYS[:3] if content.get(key) is None]:
        raise MergeError(f"{where}: {', '.join(missing)} missing; expected at least dataset, classes and templates")
    classes = None
    if content["classes"] != "dataset":
        listed = _listed(content["classes"], "classes", where)
        # clip-benchmark's imagenet1k has two names twice, as published
        classes = _strings(listed, f"{where}: classes", unique=listed is content["classes"])
    templates = _strings(_listed(content["templates"], "templates", where), f"{where}: templates")
    if wrong := next((text for text in templates if "{c}" not in text), None):
        raise MergeError(f"{where}: templates: {wrong!r}: expected {{c}} where the name of the class goes")
    return Task(
        name=_text(content.get("name") or name, "name", where),
        dataset=ImageSource.parse(content["dataset"], f"{where}: dataset", folder),
        classes=classes,
        templates=templates,
        test_images=_count(content.get("test_images"), "test_images", where),
        download_bytes=_count(content.get("download_bytes"), "download_bytes", where),
        licence=_text(content.get("licence") or _UNKNOWN, "licence", where),
        source=_text(content.get("source") or "", "source", where),
    )


def _count(value: object, key: str, where: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise MergeError(f"{where}: {key}: expected a positive integer or null, found {value!r}")
    return value


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise MergeError(f"{where}: {key}: expected text, found {value!r}; put it in quotes")
    return value


def _listed(value: object, key: str, where: str) -> object:
    """Replace a reference to clip-benchmark by its list."""
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"clip_benchmark"} or not isinstance(value["clip_benchmark"], str):
        raise MergeError(f"{where}: {key}: expected a list or {{clip_benchmark: NAME}}, found {dict(value)}")
    package = require("clip_benchmark", "clip")
    path = Path(str(package.__file__)).parent / "datasets" / _FILES[key]
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path}: not as in clip-benchmark 1.6 ({error}); list the {key} in the file") from error
    name = value["clip_benchmark"]
    if name not in lists:
        raise MergeError(f"{where}: {key}: clip-benchmark has none for {name!r}; it has {', '.join(sorted(lists))}")
    return lists[name]


def _strings(value: object, where: str, unique: bool = True) -> tuple[str, ...]:
    """Check a list of texts."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise MergeError(f"{where}: expected a list of at least one text, found {value!r}")
    for place, text in enumerate(value):
        if not isinstance(text, str):
            raise MergeError(f"{where}: number {place}: expected text, found {text!r}; put it in quotes")
        if not text.strip():
            raise MergeError(f"{where}: number {place}: it is empty; expected text")
    if unique and (twice := [text for text, count in Counter(value).items() if count > 1]):
        raise MergeError(f"{where}: {twice[0]!r} is listed twice; every one must differ from the others")
    return tuple(value)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise yaml.YAMLError(f"key {twice[0]} is given twice")
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
