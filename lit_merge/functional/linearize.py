"""First-order models: a function and its directional derivative, by forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_merge.errors import MergeError

__all__ = ("first_order", "forward_differentiable")


def first_order(
    function: Callable[[dict[str, Tensor]], Tensor], start: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> Tensor:
    """Return f(θ0) + ∇f(θ0)·v, in one pass and without forming the Jacobian.

    The result is differentiable with respect to the direction (reverse over forward), and linear in it up to rounding.

    Args:
        function: Maps tensors by name to one tensor.
        start: θ0 by name.
        direction: v by name, with the names, shapes and dtypes of ``start``.

    Returns:
        A tensor of the shape of f(θ0).

    Raises:
        MergeError: Some operation of the function has no forward-mode derivative.

    >>> square = lambda at: at["x"] ** 2  # at 3: 9, with slope 6
    >>> first_order(square, {"x": torch.tensor(3.0)}, {"x": torch.tensor(0.5)})
    tensor(12.)
    """
    with forward_differentiable():
        try:
            value, change, *_ = jvp(function, (dict(start),), (dict(direction),))
        except NotImplementedError as error:  # the first line names the operation, the others ask for a bug report
            raise MergeError(
                f"linearised network: {str(error).splitlines()[0]}; use layers of plain operations "
                "(with transformers: attn_implementation sdpa or eager)"
            ) from error
    result: Tensor = value + change
    return result


@contextmanager
def forward_differentiable() -> Iterator[None]:
    """Let attention run by plain matrix products while the block runs: fused kernels have no forward derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
