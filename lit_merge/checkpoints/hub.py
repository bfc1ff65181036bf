"""Repositories of the Hugging Face hub as folders on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Literal

from lit_merge.errors import MergeError, require

__all__ = ("Kind", "fetch", "hub_folder", "hub_sizes")

Kind = Literal["model", "dataset"]


def hub_folder(
    repo: str, revision: str | None = None, *, kind: Kind = "model", cache_dir: Path | None = None
) -> Path | None:
    """Return the folder of a repository in the hub's cache, without asking the network; ``None`` if it is not there.

    Args:
        repo: ``ORG/NAME``.
        revision: Branch, tag or commit; by default ``main``.
        kind: Kind of the repository.
        cache_dir: The cache, by default that of ``huggingface_hub``.
    """
    hub, errors = _hub()
    try:
        return Path(
            hub.snapshot_download(
                repo,
                revision=revision,
                repo_type=kind,
                cache_dir=_text(cache_dir),
                local_files_only=True,
                allow_patterns=[],  # the folder is asked for, and that it need not have every file of the repository
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError, ValueError):
        return None


def fetch(
    repo: str,
    revision: str | None,
    choose: Callable[[list[str]], list[str]],
    *,
    kind: Kind = "model",
    cache_dir: Path | None = None,
) -> Path:
    """Fetch files of a repository into the hub's cache; without a network what is there already has to do.

    Args:
        repo: ``ORG/NAME``.
        revision: Branch, tag or commit; by default ``main``.
        choose: Which of all its files are wanted.
        kind: Kind of the repository.
        cache_dir: The cache, by default that of ``huggingface_hub``.

    Returns:
        The folder, ``snapshots/COMMIT`` of the cache.

    Raises:
        MergeError: There is no such repository or revision, or no network and no copy.
    """
    hub, errors = _hub()
    where = f"{repo}@{revision}" if revision else repo
    try:
        info = hub.HfApi().repo_info(repo, revision=revision, repo_type=kind)
        wanted = choose([file.rfilename for file in info.siblings or []])
        return Path(
            hub.snapshot_download(
                repo, revision=revision, repo_type=kind, cache_dir=_text(cache_dir), allow_patterns=wanted
            )
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise MergeError(f"{where}: the Hugging Face hub has no such {kind} or revision, or it is private") from error
    except errors.HFValidationError as error:
        raise MergeError(f"{where}: not a repository of the Hugging Face hub ({error})") from error
    except Exception as error:  # whatever the HTTP library of the day raises without a network
        here = hub_folder(repo, revision, kind=kind, cache_dir=cache_dir)
        if here is None:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MergeError(
                f"{where}: the Hugging Face hub cannot be reached ({reason}) and there is no copy on this disk; "
                "download it elsewhere and point to the folder, or set HF_HOME to a cache that has it"
            ) from error
        return here


def hub_sizes(repo: str, revision: str | None = None, *, kind: Kind = "model") -> dict[str, int] | None:
    """Return the bytes of every file of a repository, or ``None`` if the hub cannot be asked."""
    hub, _ = _hub()
    try:
        info = hub.HfApi().repo_info(repo, revision=revision, repo_type=kind, files_metadata=True)
    except Exception:  # no network, no such repository, no access: the size is unknown
        return None
    return {file.rfilename: int(file.size or 0) for file in info.siblings or []}


def _hub() -> tuple[ModuleType, ModuleType]:
    return require("huggingface_hub", "hf"), require("huggingface_hub.errors", "hf")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
