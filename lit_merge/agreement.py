"""What all ranks must have in common: networks, images, settings and learned values, compared before they are used.

DistributedDataParallel compares the shapes of parameters and nothing else. Ranks that read other files, hold other
images or were given other settings run happily, and learn something that no single process would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_merge.checkpoints.digests import state_digest
from lit_merge.errors import MergeError

if TYPE_CHECKING:
    from lit_merge.module import MergeModule

__all__ = ("check_agreement", "compare", "described", "settings")

_DEPTH = 5  # of nested settings
_PATHS = ("merged",)  # with whatever ends in _dir: files may lie elsewhere on another machine; contents are compared
_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "precision", "world_size")


def check_agreement(module: MergeModule, *, learned: bool) -> None:
    """Compare this rank with all others; one hash is exchanged, and more only if it differs.

    Args:
        module: A merge that read its networks; all ranks call this together. Outside of a distributed run nothing
            happens.
        learned: Whether learned values and optimizers are there to be compared too.

    Raises:
        MergeError: Something differs; the message, the same on all ranks, says what.
    """
    if module._trainer is None or module.trainer.world_size == 1 or not dist.is_initialized():
        return
    own = settings(module, learned=learned)
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    digests: list[Any] = [None] * module.trainer.world_size
    dist.all_gather_object(digests, digest)
    if len(set(digests)) > 1:
        everyone: list[Any] = [None] * len(digests)
        dist.all_gather_object(everyone, own)
        compare(everyone)


def compare(everyone: Sequence[Mapping[str, str]]) -> None:
    """Refuse settings that differ.

    Args:
        everyone: What :func:`settings` gave on each rank.

    Raises:
        MergeError: Something differs.

    >>> compare([{"seed": "0"}, {"seed": "0"}])
    >>> compare([{"seed": "0"}, {"seed": "1"}])
    Traceback (most recent call last):
    ...
    lit_merge.errors.MergeError: ranks differ: seed is 0 on rank 0 and 1 on rank 1; all ranks must read the same files \
and have the same configuration
    """
    found = []
    for key in dict.fromkeys(key for rank in everyone for key in rank):
        values = [rank.get(key, "missing") for rank in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"{key} is {values[0]} on rank 0 and {values[other]} on rank {other}")
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise MergeError(
            f"ranks differ: {'; '.join(found[:3])}{more}; all ranks must read the same files and have the same "
            "configuration"
        )


def settings(module: MergeModule, *, learned: bool) -> dict[str, str]:
    """Return everything that must be the same on all ranks, in words or as a hash, by a name for messages.

    Args:
        module: A merge that read its networks.
        learned: With hashes of learned values, and with the settings of optimizers, once the Trainer has them.
    """
    from lit_merge import __version__

    trainer, marks = module.trainer, module.fingerprint()
    found = {
        "version of lit-merge": __version__,
        "method": f"{type(module).__module__}.{type(module).__qualname__}",
        "suite": module.suite.name,
        "tasks": described([module.suite.tasks, module.suite.unseen]),
        "base": _short(marks["base"]),
        **{f"expert {task!r}": _short(digest) for task, digest in marks["experts"].items()},
        **{f"head of {task!r}": _short(digest) for task, digest in marks["heads"].items()},
        "order of the tensors": _short(marks["names"]),
        "model.transforms": described(module.transforms),
        "model.objective": described(module.objective),
    }
    hidden = {key for key in module.hparams if key in _PATHS or key.endswith("_dir") or key.startswith("_")}
    found |= {f"model.{key}": described(value) for key, value in module.hparams.items() if key not in hidden}
    found |= {f"trainer.{key}": described(getattr(trainer, key, None)) for key in _TRAINER}
    found |= _images(getattr(trainer, "datamodule", None))
    # a shard is meant to differ
    state = {n: v for n, v in module.state_dict().items() if isinstance(v, Tensor) and not hasattr(v, "device_mesh")}
    found |= {f"shape of {name}": described(tuple(value.shape)) for name, value in state.items()}
    if learned:
        found |= {f"values of {name}": _short(state_digest({name: value})) for name, value in state.items()}
        for number, optimizer in enumerate(trainer.optimizers):
            groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            found[f"optimizer {number}"] = f"{type(optimizer).__name__} {described(groups)}"
    return found


def _images(data: Any) -> dict[str, str]:  # noqa: ANN401 - any data module, or none
    """Return how many images each task has, and how steps draw from them; nothing of another data module."""
    from lit_merge.data.datamodule import TaskDataModule

    if not isinstance(data, TaskDataModule):
        return {}
    found = {f"data: {key}": described(value) for key, value in data.state_dict().items()}
    for part in ("adapt", "score"):
        for task, positions in data.positions(part).items():
            found[f"images of {task!r} to {part}"] = str(len(positions))
    return found


def described(value: object, depth: int = _DEPTH) -> str:
    """Return a setting in words that are the same in every process: no address of an object is in them.

    >>> described({"b": (1, None), "a": partial(torch.optim.SGD, lr=0.1)})
    "{'a': partial {'args': [], 'func': SGD, 'keywords': {'lr': 0.1}}, 'b': [1, None]}"
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return repr(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return str(value.__qualname__)
    name = type(value).__name__
    if depth == 0:
        return name
    if isinstance(value, Tensor):
        return f"tensor {_short(state_digest({'': value}))}"
    if isinstance(value, Mapping):
        entries = sorted((repr(key), described(entry, depth - 1)) for key, entry in value.items())
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in entries) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(described(entry, depth - 1) for entry in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(described(entry, depth - 1) for entry in value)) + "}"
    if isinstance(value, partial):
        parts: Mapping[str, object] = {"args": value.args, "func": value.func, "keywords": value.keywords}
    else:
        parts = {key: entry for key, entry in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    return f"{name} {described(parts, depth - 1)}" if parts else name


def _short(digest: str) -> str:
    return f"sha256:{digest[:12]}"
