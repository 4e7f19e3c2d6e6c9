"""Packed weights: exact to unpack, native products equal to their definition on every instruction set.

The bound is the rounding of the inputs to 8 bits: under 1% of the output's norm (twice that through two products).
"""

import os
import subprocess
import sys

import pytest
import torch

from rorqual.kernels import quantised
from rorqual.kernels.native import FLAGS, _processor_flags, library

SETS = [name for name, flags in FLAGS.items() if flags <= _processor_flags()]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_exact(bits) -> None:
    values, scales = quantised.quantise(torch.randn(48, 96), bits)
    blocks = quantised.pack(values, scales, bits)
    assert blocks.shape == (3, 3, quantised.block_bytes(bits))
    again, s = quantised.unpack(blocks, bits)
    assert torch.equal(again, values)
    assert torch.equal(s, scales)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.09), (8, 0.006)])
def test_rounding_error_of_normal_weights(bits, bound: float) -> None:
    w = torch.randn(64, 256)
    values, scales = quantised.quantise(w, bits)
    assert relative(quantised.dequantise(values, scales, bits), w) < bound
    zero = quantised.dequantise(*quantised.quantise(torch.zeros(16, 32), bits), bits)
    assert torch.equal(zero, torch.zeros(16, 32))


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    w = torch.randn(64, 128)
    importance = torch.ones(128)
    importance[::2] = 100
    plain = quantised.dequantise(*quantised.quantise(w, 4), 4)
    weighted = quantised.dequantise(*quantised.quantise(w, 4, importance), 4)
    assert ((weighted - w)[:, ::2]).norm() < ((plain - w)[:, ::2]).norm()


@pytest.mark.skipif(library() is None, reason="no C++ compiler when the package was installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 33])
def test_native_products_equal_the_definition(bits, n: int) -> None:
    blocks = quantised.pack(*quantised.quantise(torch.randn(96, 160) * 0.1, bits), bits)
    x = torch.randn(n, 160)
    x[0, :32] = 0
    assert relative(quantised.linear(x, blocks, bits), quantised.linear_reference(x, blocks, bits)) < 0.01


@pytest.mark.skipif(library() is None, reason="no C++ compiler when the package was installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 9, 40])
def test_native_experts_equal_the_definition(bits, n: int) -> None:
    def stack(out: int, width: int) -> torch.Tensor:
        made = [
            quantised.pack(*quantised.quantise(torch.randn(out, width) * 0.2, bits), bits) for _ in range(5)
        ]
        return torch.stack(made)

    up, down = stack(128, 96), stack(96, 64)
    x, weights = torch.randn(n, 96), torch.rand(n, 3)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(n)])
    arguments = (x, ids, weights, up, down, bits)
    assert relative(quantised.experts(*arguments), quantised.experts_reference(*arguments)) < 0.02


@pytest.mark.skipif(library() is None, reason="no C++ compiler when the package was installed")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    blocks = quantised.pack(*quantised.quantise(torch.randn(64, 64), 4), 4)
    x = torch.randn(13, 64)
    whole = quantised.linear(x, blocks, 4)
    for i in range(13):
        assert torch.equal(quantised.linear(x[i : i + 1], blocks, 4)[0], whole[i])


@pytest.mark.skipif(library() is None, reason="no C++ compiler when the package was installed")
@pytest.mark.parametrize("isa", [*SETS, "off"])
def test_every_instruction_set_passes_these_tests(isa: str) -> None:
    """vllm-project/vllm#5317: the portable path is chosen where the processor has nothing better."""
    if os.environ.get("RORQUAL_ISA"):
        pytest.skip("already one of them")
    environment = {**os.environ, "RORQUAL_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        __file__.replace("quantised", "mla_decode"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
