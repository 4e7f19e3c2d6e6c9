"""The Triton kernels in Triton's interpreter, against the plain definitions. Each runs in a process of its own: Triton
decides when it is imported whether to interpret."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

MLA = """
import torch
from rorqual.kernels.mla_attention import mla_attention_reference
from rorqual.kernels.paged import PagedRows
from rorqual.kernels.triton_mla import mla_attention_triton
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
    for heads, rank, rope, block in ((5, 24, 8, 4), (16, 512, 64, 16), (20, 40, 16, 1)):
        cache = torch.randn(16 * block, rank + rope).to(dtype)
        table = torch.stack([torch.randperm(16)[:8] for _ in range(2)]).int()
        request, length = torch.tensor([0, 1, 1, 0]).int(), torch.tensor([8 * block, 1, 5 * block - (block > 1), 0]).int()
        rows = PagedRows(table, request, length, block)
        q = torch.randn(4, heads, rank + rope).to(dtype)
        got = mla_attention_triton(q, cache, rows, rank, 0.1)
        want = mla_attention_reference(q.float(), cache, rows, rank, 0.1)
        assert torch.isfinite(got).all()
        assert (got[3] == 0).all(), "a row that sees nothing"
        worst = (got - want).abs().max()
        assert worst < bound, (dtype, heads, rank, rope, block, worst)
"""
GROUPED = """
import torch
from rorqual.kernels.grouped import grouped_linear_reference
from rorqual.kernels.triton_grouped import grouped_linear_triton
torch.manual_seed(0)
for shares in ([3, 0, 70, 1], [0, 0, 5, 0], [40, 33, 32, 31], [0, 0, 0, 0]):
    for inner, outputs in ((24, 40), (96, 130)):
        x, weight = torch.randn(sum(shares), inner), torch.randn(4, outputs, inner)
        ends = torch.tensor(shares).cumsum(0).int()
        got, want = grouped_linear_triton(x, weight, ends), grouped_linear_reference(x, weight, ends)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
"""


@pytest.mark.parametrize("program", [MLA, GROUPED], ids=["mla", "grouped"])
def test_equals_the_definition(program: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rorqual.kernels import triton_grouped, triton_mla
def build(kernel, pointers, constants):
    names = kernel.arg_names
    signature = {n: pointers.get(n, "i32") if n not in constants else "constexpr" for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()})
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in found.asm["ptx"]
for kind in ("bf16", "fp32"):
    build(
        triton_mla._mla_kernel,
        {"q": f"*{kind}", "cache": f"*{kind}", "table": "*i32", "request": "*i32", "length": "*i32", "out": "*fp32",
         "scale": "fp32"},
        {"rank": 512, "rope": 64, "block_size": 16, "HEADS": 16, "TOKENS": 32, "RANK": 512, "ROPE": 64},
    )
    build(
        triton_grouped._grouped_kernel,
        {"x": f"*{kind}", "weight": f"*{kind}", "ends": "*i32", "out": f"*{kind}"},
        {"ROWS": 32, "OUTPUTS": 64, "INNER": 64},
    )
"""


@pytest.mark.slow
def test_compiles_for_a_gpu_that_is_not_here() -> None:
    """What the interpreter takes, a compiler may not: both kernels at DeepSeek-V2's sizes become PTX for sm_90."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
