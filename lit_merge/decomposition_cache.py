"""A cache of truncated singular value decompositions, by the content of the matrix."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.digests import StateDigest
from lit_merge.checkpoints.safetensors_files import SafetensorsFile
from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import Factors, SvdMethod, truncated_svd

__all__ = ("DecompositionCache",)


class DecompositionCache:
    """Decomposes matrices, and remembers the factors by SHA-256 of the matrix and by all settings.

    An instance can be given as ``decompose`` to :func:`lit_merge.functional.tsv_merge` and its relatives. A task vector
    is decomposed once, whatever other tasks it is merged with later at the same rank, and whatever the coefficient is.

    Args:
        folder: Where factors are kept, one safetensors file each, written under a temporary name and renamed; several
            processes may share it. By default they are kept in memory only, on the device of the matrix.
        method: See :func:`lit_merge.functional.truncated_svd`, as for the rest.
        tolerance: Relative size of directions that are none.
        oversampling: Further columns of ``randomized``.
        power_iterations: Of ``randomized``.
        seed: Of ``randomized``.

    Attributes:
        hits: How often nothing had to be decomposed.
        misses: How often it had to.

    >>> import torch
    >>> cache = DecompositionCache()
    >>> cache(torch.eye(3), 2).s, cache(torch.eye(3), 2).s, cache.hits, cache.misses
    (tensor([1., 1.]), tensor([1., 1.]), 1, 1)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        method: SvdMethod = "auto",
        tolerance: float = 1e-6,
        oversampling: int = 16,
        power_iterations: int = 4,
        seed: int = 0,
    ) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self.settings: dict[str, Any] = {"method": method, "tolerance": float(tolerance)}
        if method == "randomized":
            self.settings |= {"oversampling": oversampling, "power_iterations": power_iterations, "seed": seed}
        self.hits = 0
        self.misses = 0
        self._kept: dict[str, Factors] = {}
        self._lock = Lock()  # of the counts: several matrices are decomposed at once

    def __call__(self, matrix: Tensor, rank: int) -> Factors:
        """Return the leading triplets of a matrix ``(m, n)``; see :func:`lit_merge.functional.truncated_svd`."""
        key = self.key(matrix, rank)
        found = self._kept.get(key) if self.folder is None else self._read(self.folder / f"{key}.safetensors")
        if found is not None:
            with self._lock:
                self.hits += 1
            return Factors(*(part.to(matrix.device) for part in found))
        with self._lock:
            self.misses += 1
        made = truncated_svd(matrix, rank, **self.settings)
        if self.folder is None:
            self._kept[key] = made
        else:
            with atomic_path(self.folder / f"{key}.safetensors") as temporary:
                save_file({name: part.cpu().contiguous() for name, part in made._asdict().items()}, temporary)
        return made

    def key(self, matrix: Tensor, rank: int) -> str:
        """Return the SHA-256 of a matrix, the rank and the settings."""
        digest = StateDigest()
        digest.update(json.dumps({"format": 1, "rank": rank, **self.settings}, sort_keys=True), matrix)
        return digest.hexdigest()

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        self._kept.clear()

    def _read(self, path: Path) -> Factors | None:
        if not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
            return Factors(file["u"], file["s"], file["vh"])
        except (MergeError, KeyError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is made again", stacklevel=3)
            return None
