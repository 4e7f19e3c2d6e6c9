"""RMSNorm and rotary embedding in one native call equal their definitions."""

import pytest
import torch

from rorqual.kernels import rope
from rorqual.kernels.native import Native
from rorqual.kernels.norm import rms_norm_native, rms_norm_reference
from rorqual.kernels.survey import survey, survey_reference
from rorqual.model.rope import half_reference, interleaved_reference, rotate_half, rotate_interleaved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 48), (2, 7), (1, 33)])
def test_norm(library: Native, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    # the mean square is summed in another order: its last digit may tip a rounding to bfloat16, 2^-8
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        rms_norm_native(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), rtol=bound, atol=1e-6
    )


def test_norm_of_zeros_and_of_views(library: Native) -> None:
    weight = torch.ones(16)
    assert torch.equal(rms_norm_native(torch.zeros(2, 16), weight, 1e-6), torch.zeros(2, 16))
    x = torch.randn(4, 40)[:, 3:19]
    torch.testing.assert_close(rms_norm_native(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("width", [14, 32, 80])
@pytest.mark.parametrize("batched", [True, False])
def test_rotation(library: Native, interleaved: bool, dtype: torch.dtype, width: int, batched: bool) -> None:
    """A slice of wider rows, as the rotary part of a query is; rows of tokens share their angles or have their own."""
    x = torch.randn(2, 5, 3, width + 6).to(dtype)[..., 6:]
    angles = torch.randn(2, 5, width // 2) if batched else torch.randn(5, width // 2)
    cos, sin = angles.cos(), angles.sin()
    assert rope.fits(x, cos)
    rotate, reference = (
        (rotate_interleaved, interleaved_reference) if interleaved else (rotate_half, half_reference)
    )
    found = []
    for function in (rotate, reference):
        leaf = x.clone().requires_grad_()
        out = function(leaf, cos, sin)
        (out.float() * torch.linspace(-1, 1, width)).sum().backward()
        found.append((out.detach(), leaf.grad))
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, rtol=bound, atol=bound)


@pytest.mark.parametrize("width", [5, 32, 1003])
def test_survey_equals_its_definition(library: Native, width: int) -> None:
    x = torch.randn(9, width)
    x[1, [1, 3]] = 7.0  # the first of equals
    x[2] = -5.0
    x[3, -1] = 9.0
    assert survey(x) == survey_reference(x)
    for i, bad in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[4 + i, (i * 7) % width] = bad
    assert survey(x)[1] == survey_reference(x)[1] == [True] * 4 + [False] * 3 + [True] * 2
