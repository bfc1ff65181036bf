"""TaskVectors: the bank of task vectors, and the one seam where coefficients meet it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from lit_merge.checkpoints.checks import check_tied, common_layout
from lit_merge.checkpoints.digests import read_hashed
from lit_merge.checkpoints.threads import in_threads
from lit_merge.coefficients import Coefficient, Granularity, Tying, per_tensor, spread, tying
from lit_merge.contract import WayBack
from lit_merge.errors import MergeError
from lit_merge.functional.masked import Mask
from lit_merge.lazy_weights import LazyWeights
from lit_merge.stack import Stack, StackPieces
from lit_merge.storage import DenseStorage, Storage, StorageFactory
from lit_merge.transforms.base import Transform

__all__ = ("BufferPolicy", "Granularity", "TaskVectors")

BufferPolicy = Literal["average", "base"]


class TaskVectors(nn.Module):
    """Base network and stacked task vectors τ_t = θ_t − θ0; frozen, and never part of a checkpoint.

    Make one with :meth:`from_state_dicts`. Everything is held in non-persistent buffers, so it moves with the module.

    * Floating parameters have task vectors, and these are what coefficients act on.
    * Floating buffers (running statistics) are kept beside them and merged by policy, see :meth:`complete`.
    * Integer and boolean tensors keep the value of the base.
    * Tied tensors appear once, under the first of their names; :meth:`complete` writes all names again.

    Attributes:
        tasks: Names of the tasks, in the order of the first dimension of every stacked tensor.
        names: Names of the tensors that coefficients act on, in the order of the base: the columns of ``(T, L)``.
        digests: SHA-256 of the base (key ``""``) and of each expert (by task), over names, shapes and values.
        network: ``names`` of the whole network, of which this may be a piece: what the depth of a tensor is read off.

    >>> bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> bank.tasks, bank.deltas["w"].shape
    (('a',), torch.Size([1, 2]))
    """

    def __init__(
        self,
        tasks: Sequence[str],
        parameters: Stack,
        buffers: Stack,
        constants: Mapping[str, Tensor],
        tied: Mapping[str, str],
        digests: Mapping[str, str],
        network: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.digests = dict(digests)
        self.network = parameters.names if network is None else tuple(network)
        self._weights = parameters
        self._statistics = buffers
        self._tied = dict(tied)
        self._lazy = False
        self._constant_names = tuple(constants)
        for number, value in enumerate(constants.values()):
            self.register_buffer(f"_constant_{number}", value.clone(), persistent=False)

    @classmethod
    def from_state_dicts(
        cls,
        base: Mapping[str, Tensor],
        experts: Mapping[str, Mapping[str, Tensor]],
        *,
        buffers: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        storage: StorageFactory = DenseStorage,
        threads: int | None = None,
    ) -> Self:
        """Subtract the base from every expert; nothing is mutated and each thread reads one tensor at a time.

        Args:
            base: State dict of the pretrained network.
            experts: State dict per task, with the keys, shapes and dtypes of the base; may be lazy mappings. An expert
                is read by one thread, but what several of them are made of, such as the base of adapters, by several.
            buffers: Names that are buffers, not parameters (running statistics).
            tied: Second names of tied tensors, ``{alias: name}``; by default those that share memory in ``base``.
            dtype: Storage of the task vectors; by default that of the base, at least float32.
            storage: How they are kept, see :mod:`lit_merge.storage`; running statistics are always on the device.
                Rows of different experts are put by different threads.
            threads: How many experts are read at the same time, see
                :func:`~lit_merge.checkpoints.threads.in_threads`; 1 for lazy mappings of your own that cannot be.

        Returns:
            The bank.

        Raises:
            MergeError: No expert; keys, shapes or dtypes differ; a value is NaN or infinite; tied tensors differ.
        """
        layout = common_layout(base, experts, buffers=buffers, tied=tied)
        weights = Stack(layout.parameters, base, len(experts), dtype=dtype, storage=storage)
        statistics = Stack(layout.buffers, base, len(experts))
        digests = {"": read_hashed("base", base)}
        check_tied("base", base, layout.tied)

        def read(row: int, task: str, state: Mapping[str, Tensor]) -> str:
            def put(name: str, value: Tensor) -> None:
                weights.put(row, name, value)
                statistics.put(row, name, value)

            digest = read_hashed(where := f"expert {task!r}", state, put)
            check_tied(where, state, layout.tied)
            return digest

        jobs = [partial(read, row, task, state) for row, (task, state) in enumerate(experts.items())]
        digests |= zip(experts, in_threads(jobs, threads), strict=True)
        weights.storage.finish()
        constants = {name: base[name] for name in layout.constants}
        return cls(tuple(experts), weights, statistics, constants, layout.tied, digests)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that coefficients act on, in the order of the base."""
        return self._weights.names

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each of these tensors."""
        return self._weights.sizes

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each of these tensors."""
        return dict(zip(self.names, self._weights.layout.shapes, strict=True))

    @property
    def storage(self) -> Storage:
        """How the task vectors are kept."""
        return self._weights.storage

    def storage_report(self) -> dict[str, Any]:
        """Return plain data on what the storage lost of the task vectors; nothing if nothing was."""
        found: dict[str, Any] = self.storage.report()
        return found | ({"tasks": dict(zip(self.tasks, found["tasks"], strict=True))} if "tasks" in found else {})

    @property
    def base(self) -> Mapping[str, Tensor]:
        """Complete state dict of the base, in its own dtypes; treat it as read-only."""
        return self._assemble(self._weights.base(), self._statistics.base())

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """Task vectors by name, ``(T, *shape)`` each: views of the bank, treat them as read-only."""
        return self._weights.views()

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of coefficients and of their arithmetic: float32, or float64 if the base is in float64."""
        return self._weights.compute_dtype

    def groups(self, granularity: Tying) -> tuple[tuple[str, ...], Tensor]:
        """Say which coefficient acts on which tensor.

        Args:
            granularity: ``task``: one for the whole network; ``block``: one per numbered block, and one per module
                outside the blocks; ``tensor`` (alias ``layer``, the word of the AdaMerging paper): one per tensor; or
                by name, see :mod:`lit_merge.coefficients`.

        Returns:
            Names of the G groups, and the group of each tensor, ``(L,)``.

        Raises:
            MergeError: Unknown granularity.

        >>> state = {"h.0.w": torch.zeros(1), "h.0.b": torch.zeros(1), "h.1.w": torch.zeros(1)}
        >>> TaskVectors.from_state_dicts(state, {"a": state}).groups("block")
        (('h.0', 'h.1'), tensor([0, 0, 1]))
        """
        groups, shares = tying(granularity, self.names)
        if not bool((shares.sum(0) == shares.max(0).values).all()):
            raise MergeError(f"granularity: expected {', '.join(get_args(Granularity))} or filters, found "
                             f"{granularity!r}, by which tensors are between two coefficients")  # fmt: skip
        return groups, shares.argmax(0)

    def columns(self, coefficient: Coefficient) -> Tensor:
        """Return a fixed coefficient as ``(T, L)``, the same for all tasks.

        Args:
            coefficient: See :mod:`lit_merge.coefficients`.

        Raises:
            MergeError: It is not a number for every tensor.
        """
        found = per_tensor(coefficient, self.network)
        row = torch.tensor([found[name] for name in self.names], dtype=self.compute_dtype)
        return row.expand(len(self.tasks), -1)

    def contract(self, coefficients: float | Tensor, mask: Mask | None = None) -> dict[str, Tensor]:
        """Return θ_l = θ0_l + m_l ⊙ Σ_t λ_{t,l} τ_{t,l}, differentiable with respect to coefficients and mask logits.

        Both directions read the bank once: forward the sum, backward dL/dλ_{t,l} = ⟨dL/dθ_l ⊙ m_l, τ_{t,l}⟩, or the
        sum again for dL/dm_l = dL/dθ_l ⊙ Σ_t λ_{t,l} τ_{t,l}. No graph over the bank is kept, and no mask.

        Args:
            coefficients: A number, one per task ``(T,)``, or one per task and tensor ``(T, L)``.
            mask: Factors of the entries, shared by the tasks, from logits ``(P,)`` with P the sum of :attr:`sizes`.

        Returns:
            Merged parameters by name, in the dtypes of the base.

        Raises:
            MergeError: The shape of the coefficients is none of these, or that of the logits is wrong.

        >>> bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
        >>> bank.contract(0.25)["w"]
        tensor([0.2500, 0.2500])
        """
        size = len(self.tasks), len(self.names)
        values = spread(torch.as_tensor(coefficients, dtype=self.compute_dtype, device=self._weights.device), *size)
        if mask is not None:
            mask.check(len(self._weights))
        if self._lazy:
            return cast("dict[str, Tensor]", LazyWeights(self._weights, values, mask))
        return self._weights.contract(values, mask)

    @contextmanager
    def lazily(self) -> Iterator[None]:
        """Within it, :meth:`contract` returns a recipe, :class:`~lit_merge.lazy_weights.LazyWeights`."""
        before, self._lazy = self._lazy, True
        try:
            yield
        finally:
            self._lazy = before

    def contracting_to(self, types: Mapping[str, torch.dtype]) -> AbstractContextManager[set[WayBack | None]]:
        """Within it, :meth:`contract` rounds tensors to these types, by name, unless they are float64."""
        return self._weights.contracting_to(types)

    def pull_back(
        self,
        gradients: Mapping[str, Tensor],
        coefficients: Tensor,
        mask: Mask,
        wanted: Sequence[bool] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Turn the gradient of a loss by the merged weights into that by coefficients and logits; :meth:`contract`'s.

        For losses that are taken one after the other: their gradients by the weights can be summed up, and brought
        here at any moment. One pass over the bank.

        Args:
            gradients: dL/dθ_l by name, ``(*shape)`` each; a tensor that is left out has none.
            coefficients: ``(T, L)``.
            mask: The mask.
            wanted: For the coefficients and for each of the logits, whether its gradient is asked for; by default all.

        Returns:
            dL/dλ as ``(T, L)``, and dL/dx ``(P,)`` for each of the logits; ``None`` where none is asked for.

        >>> bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, 3.0])}})
        >>> plain = Mask(lambda number, x: x, (torch.tensor([1.0, 0.5]),))
        >>> bank.pull_back({"w": torch.tensor([1.0, 1.0])}, torch.tensor([[2.0]]), plain)
        (tensor([[2.5000]]), tensor([2., 6.]))
        """
        ordered = [gradients.get(name) for name in self.names]
        asked = (True,) * (1 + len(mask.logits)) if wanted is None else tuple(wanted)
        with torch.autocast(self._weights.device.type, enabled=False):
            return self._weights.masked_gradients(coefficients.detach(), mask.detach(), ordered, asked)

    def offset(self, delta: Mapping[str, Tensor], scale: Coefficient = 1.0) -> dict[str, Tensor]:
        """Return θ0 + scale · delta for one merged task vector.

        Args:
            delta: Merged task vector by name, ``(*shape)`` each, as the merges in :mod:`lit_merge.functional` return.
            scale: Its factor; see :mod:`lit_merge.coefficients`.

        Returns:
            Merged parameters by name, in the dtypes of the base.

        Raises:
            MergeError: The factor is not a number for every tensor.
        """
        factors = per_tensor(scale, self.network)
        return {
            name: (value + factors[name] * delta[name].to(self.compute_dtype)).to(value.dtype)
            for name, value in self._weights.base().items()
        }

    def expert(self, task: str) -> dict[str, Tensor]:
        """Return the complete state dict of one expert: θ0 + τ_t, with the expert's own buffers.

        After :meth:`map` this is what the transform left of the expert.

        Raises:
            MergeError: Unknown task.
        """
        if task not in self.tasks:
            raise MergeError(f"unknown task {task!r}; the bank has {', '.join(self.tasks)}")
        row = self.tasks.index(task)
        return self._assemble(self._weights.row(row), self._statistics.row(row))

    def complete(self, parameters: Mapping[str, Tensor], buffers: BufferPolicy = "average") -> dict[str, Tensor]:
        """Add to merged parameters what a network needs besides: buffers, integer tensors and tied names.

        Args:
            parameters: Merged parameters by name.
            buffers: ``average``: mean of the experts' running statistics; ``base``: those of the base.

        Returns:
            State dict with the keys of the base.
        """
        statistics = self._statistics.mean() if buffers == "average" else self._statistics.base()
        return self._assemble(parameters, statistics)

    def map(self, transform: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Self:
        """Return a bank with transformed task vectors; base, buffers and digests stay.

        Where the bank may be larger than the memory, a :class:`~lit_merge.transforms.Transform` that does not need the
        whole network at once takes it tensor by tensor, with the same result.

        Args:
            transform: Maps ``{name: (T, *shape)}`` to the same names and shapes.

        Returns:
            A new bank that shares the base with this one.

        Raises:
            MergeError: The transform changed a name or a shape, or made a value that is not finite.
        """
        if self.storage.lazy and isinstance(transform, Transform) and transform.needs in ("tensor", "statistics"):
            stack = self._weights.mapped(transform.streamed(StackPieces(self._weights)))
        else:
            stack = self._weights.replaced(transform(self.deltas))
        others = self._statistics, self._constants(), self._tied, self.digests, self.network
        return type(self)(self.tasks, stack, *others)

    def _assemble(self, parameters: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        constants = self._constants()
        if isinstance(parameters, LazyWeights):
            return cast("dict[str, Tensor]", parameters.with_tensors({**statistics, **constants}, self._tied))
        state = {**parameters, **statistics, **constants}
        return state | {alias: state[name] for alias, name in self._tied.items()}

    def _constants(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"_constant_{i}") for i, name in enumerate(self._constant_names)}
