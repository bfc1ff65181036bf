"""Runs a network one numbered block after the other, so that the merged weights of one block live at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lit_merge.errors import MergeError
from lit_merge.functional.activation_memory import saved_bytes
from lit_merge.lazy_weights import LazyWeights

__all__ = ("BlockByBlock", "numbered_blocks")


def numbered_blocks(network: nn.Module) -> list[str]:
    """Return names of the outermost modules with a number in their name, as for the granularity ``block``.

    What cannot be called, such as an ``nn.ModuleList``, is no block, but the modules in it are.

    >>> network = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    >>> numbered_blocks(network)
    ['0', '1', '2']
    >>> numbered_blocks(nn.ModuleDict({"stem": nn.Linear(1, 2), "h": nn.ModuleList([nn.Linear(2, 2)])}))
    ['h.0']
    """
    found: list[str] = []
    seen: set[nn.Module] = set()

    def look(module: nn.Module, prefix: str, numbered: bool) -> None:
        for name, child in module.named_children():  # a module with two names once
            if child in seen:
                continue
            seen.add(child)
            inside = numbered or name.isdecimal()
            if inside and type(child).forward is not nn.Module.forward:
                found.append(prefix + name)
            else:
                look(child, f"{prefix}{name}.", inside)

    look(network, "", False)
    return found


class BlockByBlock:
    """Runs a network whose blocks merge their weights themselves, and forget them at once.

    Calling a block merges its tensors, runs it and keeps of both only what went in. The backward pass does it again,
    and takes the gradient of the block's weights to coefficients and logits before the next block's turn. Tensors
    outside of the blocks live as long as the pass.

    A network that does not call one of its blocks, but skips it or reads its tensors from outside, is found out in the
    first pass; such a block is then treated like what is outside of the blocks.

    Args:
        network: The network; its tensors may have any values.
        keys: Names of its tensors in a state dict.

    Attributes:
        blocks: Names of the blocks.
    """

    def __init__(self, network: nn.Module, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self._around: Callable[[Callable[[], Any]], Any] = _plainly
        self._use(network, tuple(numbered_blocks(network)))

    def _use(self, network: nn.Module, blocks: tuple[str, ...]) -> None:
        names = {prefix: [key for key in self.keys if key.startswith(f"{prefix}.")] for prefix in blocks}
        self._names = {prefix: own for prefix, own in names.items() if own}
        self.blocks = tuple(self._names)
        inside = {id(part) for prefix in self.blocks for part in network.get_submodule(prefix).modules()}
        parts = dict(network.named_modules(remove_duplicate=False))  # a module that has two names under both
        self._outside = [key for key in self.keys if id(parts[key.rpartition(".")[0]]) not in inside]

    def check(self, merge_by: str) -> None:
        """Refuse to merge by block where there are none.

        Raises:
            MergeError: There are none.
        """
        if merge_by == "block" and not self.blocks:
            raise MergeError(
                "model.merge_by: block: no module of the network has a number in its name, as in blocks.3, so there is "
                "nothing to merge by; use merge_by: network"
            )

    def run(self, network: nn.Module, state: LazyWeights, images: Tensor) -> Any:  # noqa: ANN401
        """Run it.

        Args:
            network: The network, or a copy of it.
            state: Complete state dict.
            images: ``(B, C, H, W)``.

        Returns:
            What the network returns.
        """
        called: set[str] = set()
        try:
            with self._diverted(network, state, called):
                result = functional_call(network, state.tensors(self._outside), (images,), tie_weights=False)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if len(called) == len(self.blocks):
                raise
        missed = [prefix for prefix in self.blocks if prefix not in called]
        if not missed:
            return result
        before, result = self.blocks, None
        self._use(network, tuple(prefix for prefix in self.blocks if prefix in called))
        try:
            result = self.run(network, state, images)
        except Exception:  # it had nothing to do with blocks
            self._use(network, before)
            raise
        rank_zero_info(f"merge_by: block: {type(network).__name__} does not call {', '.join(missed)} as a module; "
                       "it is merged for a whole pass, like all that is outside of blocks")  # fmt: skip
        return result

    def saved_bytes(self, run: Callable[[], object]) -> int:
        """Return the bytes that are kept of a pass for its way back, and those within one block, which it makes again.

        Args:
            run: Runs the network, with :meth:`run`.
        """
        inside = [0]

        def measured(block: Callable[[], Any]) -> Any:  # noqa: ANN401
            results: list[Any] = []
            inside.append(saved_bytes(lambda: results.append(block())))
            return tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), results.pop())

        self._around = measured
        try:
            return saved_bytes(run) + max(inside)
        finally:
            self._around = _plainly

    @contextmanager
    def _diverted(self, network: nn.Module, state: LazyWeights, called: set[str]) -> Iterator[None]:
        """Within it, blocks of the network run with weights of the state."""
        owners = {prefix: network.get_submodule(prefix) for prefix in self.blocks}
        before = {prefix: own["forward"] for prefix, o in owners.items() if "forward" in (own := vars(o))}  # a hook's
        try:
            for prefix, owner in owners.items():
                run = _Run(owner, state, prefix, self._names[prefix], self._around)

                def forward(*args: Any, run: _Run = run, prefix: str = prefix, **kwargs: Any) -> Any:  # noqa: ANN401
                    result = run(*args, **kwargs)
                    called.add(prefix)
                    return result

                owner.forward = forward
            yield
        finally:
            for prefix, owner in owners.items():
                del owner.forward
                if prefix in before:
                    owner.forward = before[prefix]


class _Run:
    """A block's pass, for the duration of which its weights exist.

    Args:
        block: The block.
        state: Where its weights come from.
        prefix: Its name.
        names: Names of its tensors.
        around: Is given what runs the block, and runs it.
    """

    def __init__(
        self,
        block: nn.Module,
        state: LazyWeights,
        prefix: str,
        names: Sequence[str],
        around: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self.block, self.state, self.prefix, self.names, self.around = _Bare(block), state, prefix, names, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the block takes
        keys = list(kwargs)

        def run(*values: Any) -> Any:  # noqa: ANN401
            weights = self.state.tensors(self.names)
            own = {f"block{name.removeprefix(self.prefix)}": weights.pop(name) for name in self.names}
            count = len(values) - len(keys)
            options = dict(zip(keys, values[count:], strict=True))
            return self.around(lambda: functional_call(self.block, own, values[:count], options, tie_weights=False))

        values = (*args, *kwargs.values())  # tensors at the top, where changes in place are noticed
        return checkpoint(run, *values, use_reentrant=False) if torch.is_grad_enabled() else run(*values)


def _plainly(run: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever a block returns
    return run()


class _Bare(nn.Module):
    """A block as it runs by itself, without hooks, which belong to the call of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self._forward = block, block.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run it."""
        return self._forward(*args, **kwargs)
