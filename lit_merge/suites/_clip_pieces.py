"""What a CLIP suite is made of, for ``lit-merge suite show``, and datasets that are somewhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_merge.checkpoints.hub import Kind, hub_sizes
from lit_merge.checkpoints.sources import Source, chosen_files, weights_file
from lit_merge.data.hub_images import config_of_copy
from lit_merge.data.image_sets import ImageSource, dataset_status
from lit_merge.errors import MergeError
from lit_merge.suites.inventory import Piece
from lit_merge.suites.task_files import Task

__all__ = ("moved", "pieces")

_ABSENT = "what is not here is not fetched either: paths and root name folders on this disk"
_CACHED = "images that are cached: converted by datasets before, maybe in another revision"
_SILENT = "unknown sizes: the Hugging Face hub did not answer"
_UNASKED = 'whether images are here is not known: pip install "lit-merge[hf]"'
_WHOLE = "sizes of images are those of whole repositories, with all splits and configurations"


def moved(source: ImageSource, given: str | Mapping[str, Any]) -> ImageSource:
    """Return a dataset that a user has somewhere else.

    Args:
        source: What the task file says.
        given: A folder that ``datasets`` opens, a folder with one folder per split and class, or the keys of
            ``dataset`` in a task file.

    Raises:
        MergeError: There is no such folder, or the keys are wrong.
    """
    if isinstance(given, Mapping):
        return ImageSource.parse(given, "data")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise MergeError(f"data: {folder}: no such folder; expected a dataset on disk")
    split = source.splits["test"]
    inside = folder / str(split if isinstance(split, str) else "test")
    saved = any((place / name).is_file() for place in (folder, inside) for name in ("dataset_dict.json", "state.json"))
    if not saved and inside.is_dir() and any(path.is_dir() for path in inside.iterdir()):
        return ImageSource(folder=str(folder), splits=source.splits)
    config = config_of_copy(folder, source.config)
    return replace(source, id=str(folder.resolve()), folder=None, config=config, revision=None)


def pieces(
    base: Source, experts: Mapping[str, Source], tasks: Mapping[str, tuple[Task, ImageSource]], root: Path | None
) -> tuple[Piece, ...]:
    """List base, experts and images; the hub is asked for sizes only, and only of what is not here.

    Args:
        base: Where the base is.
        experts: Where the expert of each task is.
        tasks: Each task, and where its images are.
        root: Folder with copies of repositories.
    """
    return tuple(_pieces(base, experts, tasks, root))


class _Hub:
    """Asks the hub for sizes; after the first silence it asks no more."""

    def __init__(self) -> None:
        self.silent = False

    def sizes(self, repo: str, revision: str | None, kind: Kind) -> dict[str, int] | None:
        found = None if self.silent else hub_sizes(repo, revision, kind=kind)
        self.silent = found is None
        return found


def _pieces(
    base: Source, experts: Mapping[str, Source], tasks: Mapping[str, tuple[Task, ImageSource]], root: Path | None
) -> Iterator[Piece]:
    hub = _Hub()
    yield _network("base", "all tasks", base, hub)
    for name, source in experts.items():
        yield _network("expert", name, source, hub)
    for name, (task, images) in tasks.items():
        yield _images(name, task, images, root, hub)


def _images(name: str, task: Task, images: ImageSource, root: Path | None, hub: _Hub) -> Piece:
    status = dataset_status(images, root)
    licence = task.licence.removesuffix(", see the dataset page")
    if status.state == "here":
        assert status.where is not None
        return Piece("images", name, str(status.where), size=_size(status.where), licence=licence)
    if status.state == "cached":
        return Piece("images", name, str(images), images.revision or "newest", licence=licence, note=_CACHED)
    if images.id is None or root is not None:
        return Piece("images", name, str(status.where), here=False, licence=licence, note=_ABSENT)
    note = _UNASKED if status.state == "unknown" else ""
    sizes = hub.sizes(images.id, images.revision, "dataset")
    size = task.download_bytes if sizes is None else sum(sizes.values())
    note = note or ("" if sizes is None else _WHOLE)
    return Piece(
        "images", name, images.id, images.revision or "newest", here=False, size=size, licence=licence, note=note
    )


def _network(kind: str, name: str, source: Source, hub: _Hub) -> Piece:
    here = source.local()
    file = None if here is None else _weights(here, source)
    repo, revision = source.hub_id or (source.spec, None)
    if file is not None:
        where = str(here) if source.hub_id is None else repo
        return Piece(kind, name, where, source.revision() or ("newest" if source.hub_id else None), size=_size(file))
    if source.hub_id is None or source.root is not None:
        return Piece(kind, name, repo, revision, here=False, note=_ABSENT)
    sizes = hub.sizes(repo, revision, "model")
    size = None if sizes is None else sum(sizes[name] for name in chosen_files(list(sizes)))
    return Piece(kind, name, repo, revision or "newest", here=False, size=size, note=_SILENT if sizes is None else "")


def _weights(here: Path, source: Source) -> Path | None:
    if (here / "adapter_config.json").is_file():
        return here
    try:
        return weights_file(here, open_clip=source.open_clip_tag is not None)
    except MergeError:
        return None


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        if path.name.endswith(".index.json"):
            return sum(part.stat().st_size for part in path.parent.glob("*.safetensors"))
        return path.stat().st_size
    return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
