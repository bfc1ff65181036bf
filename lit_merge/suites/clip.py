"""CLIP and its fine-tuned experts from the hub or from disk: the suites of 8, 14 and 20 tasks, and one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.checkpoints.origin import check_origin
from lit_merge.checkpoints.sources import Source
from lit_merge.data.corruptions import CorruptedImages, Corruption
from lit_merge.data.datasets import EvenlySpread
from lit_merge.data.image_sets import ImageSet, ImageSource, open_images
from lit_merge.encoders.heads import read_head
from lit_merge.encoders.text_towers import TextTower
from lit_merge.encoders.zero_shot import zero_shot_head
from lit_merge.errors import MergeError
from lit_merge.suites._clip_pieces import moved, pieces
from lit_merge.suites._clip_towers import OpenClipTower, Tower, tower_of
from lit_merge.suites.base import LabelledDataset, Split, Suite
from lit_merge.suites.inventory import Piece
from lit_merge.suites.task_files import Task, load_task

__all__ = ("ClipSuite",)


class ClipSuite(Suite):
    """A pretrained CLIP, experts that were fine-tuned from it, zero-shot heads, and the tasks' images.

    The bundled suites ``clip-vit-{b-32,b-16,l-14}-{8,14,20}`` are arguments of this class. What is named by a
    repository is fetched from the Hugging Face hub when it is first needed (``pip install "lit-merge[hf]"``), or taken
    from ``root``. ``{task}`` in a path stands for the name of the task. For the ways to name weights see
    :class:`lit_merge.checkpoints.sources.Source`, for files that describe a task
    :mod:`lit_merge.suites.task_files`.

    Files in half precision are read as float32, which is exact; merged networks are in float32.

    Heads are zero-shot: the base's text tower encodes the class names in every template (Radford et al. 2021, arXiv
    2103.00020, Section 3.1.4); they are made once and kept. Networks of Hugging Face are merged without their
    projection, which no expert changes; those of open_clip with it.

    Args:
        base: The pretrained CLIP.
        experts: Its fine-tuned image towers: one pattern with ``{task}``, or one source per task. LoRA adapters are
            merged into the base's weights.
        tasks: What is merged: names of bundled task files, or YAML files of the same form.
        unseen: Further tasks that are scored, but neither merged nor adapted on.
        encoder: ``open_clip:ARCHITECTURE``, or a folder or repository with Hugging Face's ``config.json``; by default
            told from ``base``.
        text: The complete CLIP for heads and projection, if ``base`` is an image tower only.
        heads: Files with linear heads instead, as ``lit-merge convert`` makes them: a pattern, or one per task.
        data: Images instead of those of the task files: a pattern such as ``data/{task}``, or one per task; folders
            saved by ``datasets``, of Parquet files, or of one folder per class and split (``test/cat/1.jpg``).
        root: Folder with copies of repositories, ``root/openai/clip-vit-base-patch32``; with it nothing is fetched.
        corruption: ``contrast``, ``gaussian_noise``, ``impulse_noise``, ``jpeg_compression``, ``motion_blur``,
            ``pixelate`` or ``spatter``: corrupts the test images, those adapted on as well as those scored
            (Hendrycks and Dietterich 2019, arXiv 1903.12261).
        severity: Its severity, 1 to 5.
        test_split: Split of the datasets that is tested on instead of the one in the task files, such as the
            corrupted splits of the published experiments (``contrast``, ``gaussian_noise``, …).
        limit: At most so many test images per task, evenly spread; for a first try.
        sha256: What files must hash to: ``base`` or a task → ``sha256:…`` as the hub shows it.
        cache_dir: For heads; by default ``$LIT_MERGE_CACHE``, else ``~/.cache/lit-merge``. Downloads are kept where
            ``huggingface_hub`` and ``datasets`` keep them.
        name: Name in reports.

    Raises:
        MergeError: Arguments that do not agree.
    """

    def __init__(
        self,
        base: str,
        experts: str | dict[str, str],
        tasks: list[str],
        unseen: list[str] | None = None,
        encoder: str | None = None,
        text: str | None = None,
        heads: str | dict[str, str] | None = None,
        data: str | dict[str, str | dict[str, Any]] | None = None,
        root: Path | None = None,
        corruption: str | None = None,
        severity: int = 3,
        test_split: str | None = None,
        limit: int | None = None,
        sha256: dict[str, str] | None = None,
        cache_dir: Path | None = None,
        name: str = "ClipSuite",
    ) -> None:
        self._name = name
        self._tasks = {task.name: task for task in map(load_task, tasks)}
        self._unseen = {task.name: task for task in map(load_task, unseen or [])}
        if len(self._tasks) + len(self._unseen) != len({*self._tasks, *self._unseen}) or len(tasks) != len(self._tasks):
            raise MergeError(f"{name}.tasks: a task is named twice in {', '.join([*tasks, *(unseen or [])])}")
        if not tasks:
            raise MergeError(f"{name}.tasks: expected at least one, found none")
        if limit is not None and limit < 1:
            raise MergeError(f"{name}.limit: expected at least 1, found {limit}")
        self._experts, self._heads, self._data = experts, heads, data
        for argument, given in (("experts", experts), ("heads", heads), ("data", data), ("sha256", sha256)):
            self._check_names(argument, given)
        self.root = None if root is None else Path(root).expanduser()
        if self.root is not None and not self.root.is_dir():
            raise MergeError(f"{name}.root: {self.root}: no such folder")
        self.corruption = None if corruption is None else Corruption(corruption, severity)
        self.test_split = test_split
        self.limit = limit
        self.cache_dir = cache_dir
        self._sha256 = dict(sha256 or {})
        self._base = self._source(base, self._sha256.get("base"))
        self._text = self._base if text is None else self._source(text)
        self._encoder = encoder
        self._tower: Tower | None = None
        self._text_tower: TextTower | None = None
        self._made: dict[str, nn.Module] = {}
        self._opened: dict[tuple[str, Split], LabelledDataset] = {}

    @property
    def name(self) -> str:
        """Name of the suite in reports; it says which corruption there is."""
        parts = [self._name, self.corruption.name if self.corruption else None, self.test_split]
        return "-".join(part for part in parts if part)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are merged, in the order in which they index every stacked tensor."""
        return tuple(self._tasks)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Names of the tasks that are only scored."""
        return tuple(self._unseen)

    @property
    def tower(self) -> Tower:
        """The library's view of the network."""
        if self._tower is None:
            self._tower = tower_of(self._base, self._text, self._encoder)
        return self._tower

    def task(self, name: str) -> Task:
        """Return what is known of a task."""
        return {**self._tasks, **self._unseen}[self.check_task(name)]

    def images(self, task: str) -> ImageSource:
        """Return where the images of ``task`` are: the task's own dataset, or what ``data`` says instead."""
        given = _of(self._data, task)
        return self.task(task).dataset if given is None else moved(self.task(task).dataset, given)

    def prepare(self) -> None:
        """Fetch what is not on this disk and make the heads that are not cached."""
        self._base.path()
        for task in self.scored:
            if self.has_expert(task):
                self.expert_source(task).path()
            self.head(task)
            self.dataset(task, "test")
        self._text_tower = None  # the heads are made

    def network(self) -> nn.Module:
        """Return the image tower with the base's values, mapping images ``(B, 3, H, W)`` to embeddings ``(B, D)``."""
        return self.tower.network()

    def base(self) -> Mapping[str, Tensor]:
        """Return the pretrained image tower, read tensor by tensor."""
        return self.tower.base()

    def has_expert(self, task: str) -> bool:
        """Whether there is a network for ``task``; a pattern has one for every task."""
        return isinstance(self._experts, str) or task in self._experts

    def expert_source(self, task: str) -> Source:
        """Return where the expert of ``task`` is."""
        spec = _of(self._experts, self.check_task(task))
        if spec is None:
            raise MergeError(f"{self.name}: task {task!r} has no expert; give experts: {{{task}: ...}}")
        return self._source(spec, self._sha256.get(task))

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return the image tower fine-tuned on ``task`` in the base's key scheme, read tensor by tensor."""
        source = self.expert_source(task)
        base, where = self.base(), f"expert {task!r} ({source.spec})"
        check_origin(source.path(), base, where)
        return self.tower.expert(where, source.state(base, self._base.names))

    def head(self, task: str) -> nn.Module:
        """Return the frozen head of ``task``: zero-shot, made and cached first if need be, or from its file."""
        if task not in self._made:
            spec = _of(self._heads, self.check_task(task))
            if spec is None:
                known = self.task(task)
                self._text_tower = self._text_tower or self.tower.text()
                self._made[task] = zero_shot_head(
                    self._text_tower, self._classes(known), known.templates, self.cache_dir, f"head of {task}"
                )
            else:
                self._made[task] = self._checked_head(task, self._source(spec).path())
        return self._made[task]

    def _checked_head(self, task: str, path: Path) -> nn.Module:
        head = read_head(path)
        expected = (self.num_classes(task), self.tower.width)
        if tuple(head.weight.shape) != expected:
            raise MergeError(
                f"{path}: head of {task!r}: expected a weight (classes, features) of {expected}, found "
                f"{tuple(head.weight.shape)}; it belongs to another task or encoder"
            )
        return head

    def num_classes(self, task: str) -> int:
        """Return the number of classes of ``task``."""
        return len(self._classes(self.task(task)))

    def _classes(self, task: Task) -> Sequence[str]:
        return task.class_names(None if task.classes else self.dataset(task.name, "test"))

    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Return the labelled images of one split, opened lazily and preprocessed as the network wants them."""
        if (task, split) not in self._opened:
            self._opened[task, split] = self._open(self.task(task), split)
        return self._opened[task, split]

    def _open(self, task: Task, split: Split) -> LabelledDataset:
        source, wanted = self.images(task.name), str(split)
        if split == "test" and self.test_split is not None:
            source, wanted = replace(source, splits={**source.splits, "test": self.test_split}), "test"
        data: ImageSet | CorruptedImages = open_images(
            source, wanted, classes=task.classes, transform=self.tower.preprocess, root=self.root
        )
        _check_order(f"{self.name}: {data.where}", task, data.classes)
        if split == "train":
            return data
        if self.corruption is not None:
            assert isinstance(data, ImageSet)
            data = CorruptedImages(data, self.corruption)
        return data if self.limit is None else EvenlySpread(data, self.limit)

    def sources(self) -> dict[str, Any]:
        """Where base and experts come from, with their revisions."""
        found = {"base": self._base} | {task: self.expert_source(task) for task in self.tasks}
        return {name: {"source": source.spec, "revision": source.revision()} for name, source in found.items()}

    def inventory(self) -> Sequence[Piece]:
        """List networks and datasets; nothing is fetched."""
        experts = {task: self.expert_source(task) for task in self.scored if self.has_expert(task)}
        images = {task: (self.task(task), self.images(task)) for task in self.scored}
        return pieces(self._base, experts, images, self.root)

    @property
    def architecture(self) -> str:
        """Name of the architecture for model cards."""
        return self.tower.name if isinstance(self.tower, OpenClipTower) else self._base.spec

    def _source(self, spec: str, sha256: str | None = None) -> Source:
        return Source(spec, root=self.root, sha256=sha256)

    def _check_names(self, argument: str, given: str | Mapping[str, Any] | None) -> None:
        if isinstance(given, str) and "{task}" not in given and len(self.scored) > 1:
            raise MergeError(f"{self._name}.{argument}: expected {{task}} in {given!r}, or one entry per task")
        known = (*self.scored, *(["base"] if argument == "sha256" else []))
        if isinstance(given, dict) and (unknown := sorted(set(given) - set(known))):
            raise MergeError(f"{self._name}.{argument}: unknown tasks {unknown}; it has {', '.join(known)}")
        if argument == "experts" and isinstance(given, dict) and (missing := sorted(set(self._tasks) - set(given))):
            raise MergeError(f"{self._name}.experts: no expert for {', '.join(missing)}")


def _check_order(where: str, task: Task, found: Sequence[str] | None) -> None:
    """Refuse the same classes under other labels: every label would be wrong, and no count would tell."""
    names = task.classes
    if found is None or names is None or set(found) != set(names):
        return
    for label, (theirs, ours) in enumerate(zip(found, names, strict=True)):
        if theirs != ours:
            raise MergeError(
                f"{where}: its classes have another order than those of task {task.name!r}: label {label} is "
                f"{theirs!r} there and {ours!r} here; give a task file with the order of the images"
            )


def _of(given: str | Mapping[str, Any] | None, task: str) -> Any:  # noqa: ANN401 - what the mapping holds
    """The source of one task: from a pattern or from a mapping."""
    return given.replace("{task}", task) if isinstance(given, str) else (given or {}).get(task)
