"""SwiGLU's native passes against their definitions: outputs and gradients, every variant, both dtypes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rorqual.kernels.gated import backward_rows, backward_rows_reference, forward_rows, gated, gated_reference
from rorqual.kernels.native import Native

# bfloat16 keeps 8 bits: the passes round once where torch rounds after each operation
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def close(a: Tensor, b: Tensor) -> None:
    bound = BOUNDS[a.dtype]
    torch.testing.assert_close(a.float(), b.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (513, 64)])
def test_outputs_and_gradients(library: Native, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pairs = []
    for function in (gated, gated_reference):
        torch.manual_seed(1)
        gate, up = (torch.randn(shape, dtype=dtype).mul(3).requires_grad_() for _ in range(2))
        out = function(gate, up)
        out.backward(torch.randn(shape, dtype=dtype))
        pairs.append((out, gate.grad, up.grad))
    for ours, reference in zip(*pairs, strict=True):
        assert ours is not None
        assert reference is not None
        close(ours, reference)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_rows_of_experts(library: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, grad = torch.randn(77, 64, dtype=dtype), torch.randn(77, 32, dtype=dtype)
    by = torch.rand(77)
    by[5] = 0  # a row that only fills
    for ours, reference in zip(
        backward_rows(hidden, grad, by), backward_rows_reference(hidden, grad, by), strict=True
    ):
        close(ours.to(dtype), reference.to(dtype))
    close(forward_rows(*hidden.chunk(2, -1)), gated_reference(*hidden.chunk(2, -1)))


def test_extremes_stay_finite(library: Native) -> None:
    gate = torch.tensor([-1e4, -200, -90, -1, 0, 1, 90, 1e4] * 2, requires_grad=True).view(1, 16)
    leaf = gate.detach().clone().requires_grad_()
    up = torch.ones(1, 16)
    gated(leaf, up).sum().backward()
    close(gated(leaf, up), gated_reference(leaf, up))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert abs(leaf.grad[0, 0]) < 1e-30
    assert leaf.grad[0, 7] == 1


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:, :15], lambda x: x.double(), lambda x: x.mT.contiguous().mT],
    ids=["width", "dtype", "strides"],
)
def test_what_the_kernel_does_not_take_goes_the_plain_way(change: Callable[[Tensor], Tensor]) -> None:
    gate, up = (change(torch.randn(32, 32)) for _ in range(2))
    assert torch.equal(gated(gate, up), gated_reference(gate, up))
