"""RMSNorm for training against its definition."""

import pytest
import torch

from rorqual.kernels.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 7)])
def test_norm_and_gradients_equal_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.rand(shape[-1], dtype=dtype) + 0.5
    found = []
    for op in (rms_norm, rms_norm_reference):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        out = op(*leaves, 1e-6)
        grads = torch.autograd.grad((out.float() * torch.arange(shape[-1])).sum(), leaves)
        found.append((out, *grads))
    tolerance = (
        1e-5 if dtype == torch.float32 else 0.06
    )  # the weight's gradient is a sum of rows rounded to 8 bits
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_under_autocast_it_leaves_its_dtype_and_takes_gradients_in_float32() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = rms_norm(x, weight, 1e-6)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.float(), rms_norm_reference(x, weight, 1e-6), atol=0.02, rtol=0.02)
