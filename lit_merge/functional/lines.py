"""LiNeS: scale a task vector up with depth, so that shallow layers stay near the base.

Source: Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, equation 2 and
section 4, arXiv 2410.17146.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import wide

__all__ = ("depths", "intercept_of", "lines", "lines_intercept")


def depths(names: Iterable[str]) -> dict[str, float | None]:
    """Read the depth of tensors off their names: 0 in the first block of a stack, 1 in the last.

    A block is the first number in a dotted name, and a stack all names with the same text before it, so two towers of
    one network are counted apart. Stages that are numbered too, such as ``layer1.0`` to ``layer4.2`` of a ResNet, are
    one stack, stage after stage. The only block of a stack has depth 0.

    Args:
        names: Names of the tensors.

    Returns:
        Depth in [0, 1] by name, ``None`` for a tensor outside of all blocks.

    >>> depths(["stem.weight", "h.0.w", "h.1.w", "h.2.w"])
    {'stem.weight': None, 'h.0.w': 0.0, 'h.1.w': 0.5, 'h.2.w': 1.0}
    """
    places: dict[str, tuple[str, tuple[int, int]] | None] = {}
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
        if number is None:
            places[name] = None
            continue
        before = ".".join(parts[:number])
        stack = before.rstrip("0123456789")
        places[name] = stack, (int(before[len(stack) :] or 0), int(parts[number]))
    blocks: dict[str, set[tuple[int, int]]] = {}
    for place in places.values():
        if place is not None:
            blocks.setdefault(place[0], set()).add(place[1])
    ranks = {stack: {block: rank for rank, block in enumerate(sorted(found))} for stack, found in blocks.items()}
    return {
        name: None if place is None else ranks[place[0]][place[1]] / max(1, len(ranks[place[0]]) - 1)
        for name, place in places.items()
    }


def lines(
    deltas: Mapping[str, Tensor],
    alpha: float = 0.5,
    beta: float = 0.5,
    *,
    outside: float | None = None,
    network: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """Scale block l of L by α + β (l − 1)/(L − 1).

    Args:
        deltas: Task vectors, ``(T, *shape)`` each, or a merged one, ``(*shape)`` each.
        alpha: Factor of the first block; 0.5, with ``beta`` 0.5, is the published value for one fine-tuned network.
        beta: What the last block has more.
        outside: Factor of tensors outside of all blocks (embeddings, the last norm); by default α, as released.
        network: Names of all tensors of the network of which ``deltas`` is a piece; by default those of ``deltas``.

    Returns:
        The same, scaled.

    Raises:
        MergeError: A factor is not finite, or no name has a block number, so there is no depth.

    >>> import torch
    >>> lines({f"h.{block}.w": torch.ones(1) for block in range(3)}, 0.25, 0.5)
    {'h.0.w': tensor([0.2500]), 'h.1.w': tensor([0.5000]), 'h.2.w': tensor([0.7500])}
    """
    if not all(math.isfinite(value) for value in (alpha, beta, outside or 0.0)):
        raise MergeError(f"lines: expected finite factors, found alpha {alpha}, beta {beta}, outside {outside}")
    found = depths(deltas if network is None else network)
    if all(depth is None for depth in found.values()):
        raise MergeError(
            f"lines: no name has a block number, as in h.3.weight, so there is no depth: {', '.join(sorted(found))}"
        )
    edge = alpha if outside is None else outside
    scaled = {}
    for name, delta in deltas.items():
        depth = found[name]
        scaled[name] = delta * (edge if depth is None else alpha + beta * depth)
    return scaled


def lines_intercept(deltas: Mapping[str, Tensor], multi_task: Mapping[str, Tensor]) -> float:
    """Return α for a merged vector: ‖Σ_t τ_t‖ / (T ‖τ_MTL‖), so shallow layers are as far out as in the average.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        multi_task: The merged task vector, ``(*shape)`` each.

    Returns:
        α; 1/T if the merged vector is the sum, and 0 if it is zero.

    >>> import torch
    >>> deltas = {"w": torch.tensor([[1.0, 2.0], [3.0, 2.0]])}
    >>> [lines_intercept(deltas, {"w": torch.tensor(merged)}) for merged in ([4.0, 4.0], [2.0, 2.0])]
    [0.5, 1.0]
    """
    return intercept_of([(deltas, multi_task)])


def intercept_of(pieces: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> float:
    """Return :func:`lines_intercept` of a network that is read piece by piece.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, and merged ones, ``(*shape)`` each, of some tensors at a time.

    >>> import torch
    >>> halves = [{"a": torch.tensor([[1.0], [3.0]])}, {"b": torch.tensor([[2.0], [2.0]])}]
    >>> intercept_of((half, {name: torch.tensor([2.0]) for name in half}) for half in halves)
    1.0
    """
    tasks, whole, merged = 1, [0.0], [0.0]
    for deltas, multi_task in pieces:
        for name, delta in deltas.items():
            tasks = len(delta)
            whole.append(float(wide(delta).sum(0).double().square().sum()))
            merged.append(float(wide(multi_task[name]).double().square().sum()))
            del delta
        del deltas, multi_task
    length = math.fsum(merged)
    return math.sqrt(math.fsum(whole) / length) / tasks if length > 0 else 0.0
