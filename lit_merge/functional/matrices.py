"""Which tensors are matrices, and what methods on matrices do with all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.layer_problem import Others, merge_other

__all__ = ("MatrixPolicy", "Others", "merge_matrices")


@dataclass(frozen=True)
class MatrixPolicy:
    """Which tensors a method on matrices acts on, and how it merges the rest.

    Tensors with two dimensions are matrices, position embeddings included, as in the released code of TSV and of
    isotropic merging. Biases, norms and class tokens never are. The tensors of zero size are none either.

    Args:
        others: ``mean`` of the task vectors, as in the released code of TSV, Iso-C and Iso-CTS (the TSV paper says
            task arithmetic); ``sum``; ``base``: no change.
        convolutions: Tensors with more dimensions, kernels, are matrices ``(out, in · k · k)`` too. The papers take
            them for others, which for a vision transformer is its patch embedding and for a convolutional network
            is nearly everything.
        exclude: Names, or patterns such as ``*.text_projection``, of matrices that are treated as others.

    Raises:
        MergeError: ``others`` is unknown, or ``exclude`` is not a list.

    >>> import torch
    >>> policy = MatrixPolicy(exclude=["pos*"])
    >>> [policy.covers(name, torch.zeros(8, 4, 3)) for name in ("fc.weight", "pos_embed")]
    [True, False]
    """

    others: Others = "mean"
    convolutions: bool = False
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.others not in get_args(Others):
            raise MergeError(f"others: expected mean, sum or base, found {self.others!r}")
        if isinstance(self.exclude, str):
            raise MergeError(f"exclude: expected a list of names or patterns, found {self.exclude!r}")

    def covers(self, name: str, delta: Tensor) -> bool:
        """Say whether a tensor ``(T, *shape)`` is a matrix."""
        dimensions = delta.ndim - 1
        shape = dimensions == 2 or (self.convolutions and dimensions > 2)
        return shape and delta.numel() > 0 and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def merge_other(self, delta: Tensor) -> Tensor:
        """Merge a tensor ``(T, *shape)`` that is not a matrix: ``(*shape)``, at least in float32."""
        return merge_other(delta, self.others)


def merge_matrices(
    deltas: Mapping[str, Tensor],
    rule: Callable[[str, Tensor], Tensor],
    policy: MatrixPolicy | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Merge matrices by a rule and everything else by the policy, one tensor at a time.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        rule: Maps name and task matrices ``(T, m, n)`` to the merged matrix ``(m, n)``.
        policy: Which are matrices; by default the papers'.
        scale: Factor of everything.

    Returns:
        Merged task vector, ``(*shape)`` each, at least in float32.

    >>> import torch
    >>> both = {"w": torch.ones(2, 1, 1), "b": torch.tensor([[1.0], [3.0]])}
    >>> merge_matrices(both, lambda name, matrices: matrices.sum(0))
    {'w': tensor([[2.]]), 'b': tensor([2.])}
    """
    policy = policy or MatrixPolicy()
    merged = {}
    for name, delta in deltas.items():
        if policy.covers(name, delta):
            value = rule(name, delta.flatten(2)).reshape(delta.shape[1:])
        else:
            value = policy.merge_other(delta)
        merged[name] = value if scale == 1 else scale * value
    return merged
