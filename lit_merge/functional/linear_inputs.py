"""Gram matrices of what enters the linear layers of a network, taken while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ("LinearInputs", "linear_weights")

_OWN = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def linear_weights(network: nn.Module, tied: Mapping[str, str] | None = None) -> set[str]:
    """Names of the weights of linear layers, projections of attention included.

    Args:
        network: The network.
        tied: Second names of tied weights, ``{alias: name}``.

    >>> sorted(linear_weights(nn.MultiheadAttention(2, 1)))
    ['in_proj_weight', 'out_proj.weight']
    """
    found = set()
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Linear):
            found.add(f"{prefix}weight")
        elif isinstance(module, nn.MultiheadAttention):
            names = _OWN if module.in_proj_weight is None else ("in_proj_weight",)
            found.update(prefix + name for name in names)
    return {(tied or {}).get(name, name) for name in found}


class _Reached(Exception):
    """Everything that is wanted was seen."""


class LinearInputs:
    """Sums of x xᵀ over the rows x that enter linear layers, by the name of the layer's weight.

    Every ``nn.Linear`` is watched, and ``nn.MultiheadAttention``, which calls none: query, key and value enter its
    packed projection, as one block of rows if they are the same tensor and as three if not; what enters its output
    projection is read off by running the attention again with the identity in place of that projection. Weights that
    are used otherwise, such as a bare ``x @ self.proj``, are not seen.

    Several tokens, images and calls of one layer add up. Half precision is summed in float32.

    Args:
        network: Runs in evaluation mode within the context, by itself or through ``functional_call``.
        only: Names of the weights to watch; by default all.
        tied: Second names of tied weights, ``{alias: name}``: what enters either counts for ``name``.
        stop: Leave the forward pass at once when all of ``only`` were seen; see :meth:`run`.

    Attributes:
        grams: ``(k, n, n)`` per weight ``(m, n)``, in the order of the first calls; k blocks of m / k rows each.
        rows: Number of rows x that were summed, per weight.

    >>> layer = nn.Linear(2, 1)
    >>> with LinearInputs(layer) as seen:
    ...     _ = layer(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> seen.grams["weight"], seen.rows["weight"]  # (1, 2)ᵀ (1, 2) + (3, 0)ᵀ (3, 0)
    (tensor([[[10.,  2.],
             [ 2.,  4.]]]), 2)
    """

    def __init__(
        self,
        network: nn.Module,
        only: Collection[str] | None = None,
        tied: Mapping[str, str] | None = None,
        stop: bool = False,
    ) -> None:
        self.network = network
        self.only = None if only is None else frozenset(only)
        self.tied = dict(tied or {})
        self.stop = stop
        self.grams: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self._handles: list[Any] = []
        self._probing = False
        self._pending: set[str] = set()

    def __enter__(self) -> Self:
        inside = set[nn.Module]()
        for path, module in self.network.named_modules():
            prefix = f"{path}." if path else ""
            if isinstance(module, nn.MultiheadAttention):
                inside.add(module.out_proj)
                hook = partial(self._attention, prefix)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
            elif isinstance(module, nn.Linear) and module not in inside:
                self._handles.append(module.register_forward_pre_hook(partial(self._linear, f"{prefix}weight")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def run(self, forward: Callable[[], object]) -> None:
        """Run the network once; with ``stop`` no further than to the last weight that is watched."""
        self._pending = set(self.only or ())
        with suppress(_Reached):
            forward()

    def _linear(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and self._wanted(name):
            self._add(name, args[0])

    @torch.no_grad()
    def _attention(
        self, prefix: str, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        if self._probing:
            return
        entering = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))]
        if module.in_proj_weight is None:
            for name, value in zip(_OWN, entering, strict=True):
                if self._wanted(prefix + name):
                    self._add(prefix + name, value)
        elif self._wanted(f"{prefix}in_proj_weight"):
            same = all(value is entering[0] for value in entering)
            self._add(f"{prefix}in_proj_weight", *(entering[:1] if same else entering))
        if self._wanted(f"{prefix}out_proj.weight"):
            self._add(f"{prefix}out_proj.weight", self._before_projection(module, args, kwargs))

    def _before_projection(
        self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """What enters the output projection: no module is called with it, and fused kernels never show it."""
        weight = module.out_proj.weight
        probe = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if module.out_proj.bias is not None:
            probe["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
        self._probing = True
        try:
            entered: Tensor = functional_call(module, probe, args, kwargs)[0]
        finally:
            self._probing = False
        return entered

    def _wanted(self, name: str) -> bool:
        return not self._probing and (self.only is None or self.tied.get(name, name) in self.only)

    @torch.no_grad()
    def _add(self, name: str, *values: Tensor) -> None:
        found = self.tied.get(name, name)
        blocks = [value.detach().reshape(-1, value.shape[-1]) for value in values]
        wide = [block.to(torch.promote_types(block.dtype, torch.float32)) for block in blocks]
        with torch.autocast(wide[0].device.type, enabled=False):
            gram = torch.stack([block.mT @ block for block in wide])
        self.grams[found] = self.grams[found] + gram if found in self.grams else gram
        self.rows[found] = self.rows.get(found, 0) + len(blocks[0])
        self._pending.discard(found)
        if self.stop and not self._pending and self.only:
            raise _Reached
