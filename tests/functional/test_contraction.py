"""Both products with the bank: in blocks, in half precision, and as CUDA kernels under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lit_merge.functional import contraction
from lit_merge.functional.contraction import inner_products, weighted_sum

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kept", TYPES)
@pytest.mark.parametrize("asked", TYPES)
@pytest.mark.parametrize("size", [1, 7, 20, 45])
def test_blocks_change_nothing(
    kept: torch.dtype, asked: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(size)
    bank = torch.randn(5, 50, generator=generator).to(kept)
    rows, base = bank[:, 3 : 3 + size], torch.randn(size, generator=generator)
    weights, vector = torch.randn(5, generator=generator), torch.randn(size, generator=generator).to(asked)
    whole = torch.addmv(base, rows.float().T, weights).to(asked)
    monkeypatch.setattr(contraction, "_BLOCK", 8)
    assert torch.equal(weighted_sum(rows, weights, base, (asked,)), whole)
    assert torch.equal(weighted_sum(rows, weights, base, (torch.float32, asked)), whole)
    torch.testing.assert_close(weighted_sum(rows, weights), rows.float().T.mv(weights))
    products = inner_products(rows, vector, torch.float32)
    exact = rows.double().mv(vector.double())
    torch.testing.assert_close(products, exact.float(), rtol=1e-5, atol=1e-5)  # nothing was rounded to half precision


@pytest.mark.parametrize("tasks", [1, 3])
def test_rows_of_networks_beyond_32_bits(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA's BLAS refuses a stride of 2**31 and more
    bank = torch.randn(tasks, 50, generator=torch.Generator().manual_seed(0))
    rows, weights, vector = bank[:, 4:20], torch.rand(tasks), torch.rand(16)
    expected = weighted_sum(rows, weights), inner_products(rows, vector)
    strides, plain = list[int](), torch.Tensor.mv

    def noted(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        strides.extend(matrix.stride())
        return plain(matrix, vector)

    monkeypatch.setattr(torch.Tensor, "mv", noted)
    monkeypatch.setattr(contraction, "_FARTHEST", 49)
    torch.testing.assert_close((weighted_sum(rows, weights), inner_products(rows, vector)), expected)
    assert len(strides) == 4
    assert max(strides) <= 49


def test_two_roundings_are_two() -> None:
    rows = torch.tensor([[1.0 + 2**-9 + 2**-12]])  # float16 keeps 10 bits, so it is 1 + 2**-9 and then a tie
    one = torch.ones(1)
    assert weighted_sum(rows, one, None, (torch.bfloat16,)).item() == 1.0
    rows = torch.tensor([[1.0 + 2**-8 + 2**-12]])  # directly it is above the tie of bfloat16's 7 bits
    assert weighted_sum(rows, one, None, (torch.bfloat16,)).item() == 1.0 + 2**-7
    assert weighted_sum(rows, one, None, (torch.float16, torch.bfloat16)).item() == 1.0


KERNELS = """
import torch
from lit_merge.functional import contraction_cuda as kernels
from lit_merge.functional.contraction import inner_products, weighted_sum
kernels._BLOCK = 16
generator = torch.Generator().manual_seed(0)
kinds = torch.float32, torch.bfloat16, torch.float16
for tasks in (1, 3, 20):
    for number, size in enumerate((1, 16, 45)):
        kept, asked = kinds[(number + tasks) % 3], kinds[(number + 2 * tasks + 1) % 3]
        bank = torch.randn(tasks, 64, generator=generator).to(kept)
        rows, base = bank[:, 5 : 5 + size], torch.randn(size, generator=generator)
        weights, vector = torch.randn(tasks, generator=generator), torch.randn(size, generator=generator).to(asked)
        for start in (None, base):
            found = kernels.weighted_sum(rows, weights, start, asked)
            assert found.dtype == asked
            # sums in another order may round to the neighbour
            torch.testing.assert_close(found, weighted_sum(rows, weights, start, (asked,)))
        found = kernels.inner_products(rows, vector)
        torch.testing.assert_close(found, inner_products(rows, vector, torch.float32), rtol=1e-5, atol=1e-5)
print("as the plain products")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_tritons_interpreter() -> None:
    settings = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(contraction.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=settings, capture_output=True, text=True, check=False)
    assert done.stdout == "as the plain products\n", done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_merge.functional import contraction_cuda as kernels

    sizes = dict.fromkeys(("tasks", "size", "stride"), "i32")
    fixed = dict.fromkeys(("has_base", "block"), "constexpr")
    floats = dict.fromkeys(("weights", "base"), "*fp32")
    target = GPUTarget("cuda", 90, 32)
    first = {"rows": "*bf16", **floats, "result": "*bf16", **sizes, **fixed}
    second = {
        "rows": "*bf16",
        "vector": "*bf16",
        "parts": "*fp32",
        **sizes,
        "parts_stride": "i32",
        "block": "constexpr",
    }
    for kernel, types, values in (
        (kernels._sum, first, {"has_base": True, "block": 1024}),
        (kernels._products, second, {"block": 1024}),
    ):
        assert "ptx" in compile(ASTSource(kernel, types, values), target=target).asm
