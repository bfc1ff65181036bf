"""Coefficients of singular blocks, learned at test time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import Factors, SvdMethod
from lit_merge.functional.finite import check_finite
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.scopes import share, wide
from lit_merge.functional.tsv import kept_rank, orthogonalize, task_singular_vectors
from lit_merge.methods.tsv_merge import decomposer
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("SingularAdaMerging",)


class SingularAdaMerging(MergeModule):
    """AdaMerging over task singular vectors: θ_l = θ0_l + Σ_t Σ_b α_{t,l,b} U⊥_{t,b} Σ_{t,b} V⊥_{t,b}ᵀ.

    The orthogonalised factors of TSV-M are computed once and stay fixed; what is learned is one coefficient per task,
    matrix and block of singular directions, strongest block first, and one per task for every tensor that is not a
    matrix. At the start it is TSV-M. The gradient of a coefficient is uᵀ (dL/dθ) v, summed over its block: no
    decomposition is differentiated, and a step costs two products of a matrix with the factors, whatever T is. The
    factors take at most min(m, n) · (m + n) numbers per matrix beside the bank.

    This combines TSV-M with AdaMerging's learning and is not a published method; learning rate and number of blocks are
    choices of this package.

    Args:
        blocks: Blocks per task, of as equal size as possible; fewer where fewer directions are kept.
        init: Coefficients of the blocks at the start.
        init_others: Coefficients of tensors that are not matrices, at the start; null for 1/T, their mean.
        bounds: Lowest and highest coefficient, onto which they are projected after each step.
        fraction: Share of min(m, n) that is kept of each task, in (0, 1]; null for 1/T.
        ridge: See :class:`~lit_merge.methods.tsv_merge.TsvMerge`.
        tolerance: Directions below it are dropped, relative to the longest.
        decomposition: ``auto``, ``svd``, ``gram`` or ``randomized``.
        cache_dir: Folder where the decompositions of the task vectors are kept, for runs to come.
        convolutions: Kernels are matrices ``(out, in · k · k)`` too.
        exclude: Names or patterns of matrices that get one coefficient per task instead.
        **kwargs: See :class:`~lit_merge.MergeModule`.

    Raises:
        MergeError: A value is out of range.

    Source: factors: Gargiulo et al., arXiv 2412.00081; learning: Yang et al., AdaMerging, arXiv 2310.02575.
    """

    no_blocks = "it multiplies fixed factors instead of contracting the bank; use merge_by: network"

    def __init__(
        self,
        blocks: int = 4,
        init: float = 1.0,
        init_others: float | None = None,
        bounds: tuple[float, float] | None = None,
        fraction: float | None = None,
        ridge: float = 0.0,
        tolerance: float = 1e-6,
        decomposition: SvdMethod = "auto",
        cache_dir: str | None = None,
        convolutions: bool = False,
        exclude: Sequence[str] = (),
        **kwargs: Any,  # noqa: ANN401 - passed on to the base class
    ) -> None:
        super().__init__(**kwargs)
        if blocks < 1:
            raise MergeError(f"SingularAdaMerging.blocks: expected at least 1, found {blocks}")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise MergeError(f"SingularAdaMerging.bounds: expected lowest < highest, found {bounds}")
        self.blocks = blocks
        check_finite(f"{type(self).__name__}.init", init)
        check_finite(f"{type(self).__name__}.init_others", init_others)
        self.init = init
        self.init_others = init_others
        self.bounds = bounds
        self.fraction = None if fraction is None else share(f"{type(self).__name__}.fraction", fraction)
        check_finite(f"{type(self).__name__}.ridge", ridge, least=0)
        self.ridge = ridge
        check_finite(f"{type(self).__name__}.tolerance", tolerance, least=0)
        self.tolerance = tolerance
        self.decomposition = decomposition
        self.cache_dir = cache_dir
        self.policy = MatrixPolicy(convolutions=convolutions, exclude=exclude)

    @torch.no_grad()
    def make_parameters(self, bank: TaskVectors) -> None:
        """Make the factors, and the coefficients ``(T, matrices, blocks)`` and ``(T, other tensors)``."""
        deltas, tasks = bank.deltas, len(bank.tasks)
        decompose = decomposer(self.decomposition, self.tolerance, self.cache_dir)
        self.matrices = tuple(name for name, delta in deltas.items() if self.policy.covers(name, delta))
        self.others = tuple(name for name in deltas if name not in set(self.matrices))
        for number, name in enumerate(self.matrices):
            matrices = deltas[name].flatten(2)
            rank = kept_rank(matrices.shape[1], matrices.shape[2], tasks, self.fraction)
            factors = task_singular_vectors(matrices, rank, decompose)
            factors = orthogonalize(factors, ridge=self.ridge, tolerance=self.tolerance)
            block = torch.arange(rank, device=matrices.device) * min(self.blocks, rank) // rank
            for part, value in factors._asdict().items():
                self.register_buffer(f"_{part}_{number}", value.to(bank.compute_dtype), persistent=False)
            self.register_buffer(f"_block_{number}", block, persistent=False)
        shape = (tasks, len(self.matrices), self.blocks)
        start = 1 / tasks if self.init_others is None else self.init_others
        blocks = torch.full(shape, float(self.init), dtype=bank.compute_dtype)
        self.coefficients = nn.Parameter(blocks, requires_grad=bool(self.matrices))  # else no step gives it a gradient
        others = torch.full((tasks, len(self.others)), float(start), dtype=bank.compute_dtype)
        self.other_coefficients = nn.Parameter(others, requires_grad=bool(self.others))

    def fingerprint(self) -> dict[str, Any]:
        """Return hashes of everything that the coefficients belong to, and how the factors are made."""
        names = ("fraction", "ridge", "tolerance", "decomposition")
        return super().fingerprint() | {"factors": {name: getattr(self, name) for name in names}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse coefficients that were learned with other networks or for other factors.

        Raises:
            MergeError: Something differs.
        """
        super().on_load_checkpoint(checkpoint)
        now = self.fingerprint()["factors"]
        for name, value in checkpoint["lit_merge"].get("factors", now).items():
            if value != now[name]:
                raise MergeError(
                    f"checkpoint: its factors were made with {name} {value!r}, this run has {now[name]!r}; give {name} "
                    "as it was"
                )

    def factors(self, name: str) -> Factors:
        """Return the fixed factors of a matrix, task after task: ``u`` ``(m, T·k)``, ``s``, ``vh`` ``(T·k, n)``."""
        number = self.matrices.index(name)
        return Factors(*(getattr(self, f"_{part}_{number}") for part in Factors._fields))

    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 plus the weighted blocks; every tensor has coefficients."""
        deltas, shapes, merged = bank.deltas, bank.shapes, {}
        with torch.autocast(self.coefficients.device.type, enabled=False):
            for number, name in enumerate(self.matrices):
                u, s, vh = self.factors(name)
                weights = self.coefficients[:, number][:, getattr(self, f"_block_{number}")].flatten()
                merged[name] = ((u * (s * weights)) @ vh).reshape(shapes[name])
            for number, name in enumerate(self.others):
                merged[name] = torch.tensordot(self.other_coefficients[:, number], wide(deltas[name]), dims=1)
            return bank.offset(merged)

    def project(self) -> None:
        """Bring the coefficients back into their bounds."""
        if self.bounds is not None:
            self.coefficients.clamp_(*self.bounds)
            self.other_coefficients.clamp_(*self.bounds)

    def coefficient_table(self) -> Tensor:
        """Coefficients per task and tensor, ``(T, L)``: of matrices the mean over the blocks."""
        means = torch.stack([part.mean(-1) for part in self._used()], 1).unbind(1) if self.matrices else ()
        columns = dict(zip(self.matrices, means, strict=True))
        columns |= dict(zip(self.others, self.other_coefficients.detach().unbind(1), strict=True))
        return torch.stack([columns[name] for name in self.bank.names], dim=1)

    def report_extra(self) -> dict[str, Any]:
        """Return the mean coefficient of each block, strongest first, per task."""
        used = self._used()
        most = max((part.shape[1] for part in used), default=0)
        means = [torch.stack([p[:, b] for p in used if p.shape[1] > b]).mean(0).tolist() for b in range(most)]
        return {"singular_blocks": {task: [block[t] for block in means] for t, task in enumerate(self.bank.tasks)}}

    def _used(self) -> list[Tensor]:
        """Coefficients ``(T, b)`` of each matrix; one of few directions has fewer blocks than :attr:`blocks`."""
        counts = [min(self.blocks, len(getattr(self, f"_block_{number}"))) for number in range(len(self.matrices))]
        return [self.coefficients.detach()[:, number, :count] for number, count in enumerate(counts)]
