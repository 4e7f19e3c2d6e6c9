"""RMSNorm and rotary embedding in one native call equal their definitions."""

import pytest
import torch

from rorqual.kernels import rope
from rorqual.kernels.native import Native
from rorqual.kernels.norm import rms_norm_native, rms_norm_reference
from rorqual.kernels.survey import survey, survey_reference
from rorqual.model.rope import _half, _interleaved


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
def test_rotation(library: Native, interleaved: bool, dtype: torch.dtype) -> None:
    """A slice of wider rows, as the rotary part of a query is."""
    x = torch.randn(5, 3, 20).to(dtype)[..., 6:]
    angles = torch.randn(5, 7)
    cos, sin = angles.cos(), angles.sin()
    want = (_interleaved if interleaved else _half)(x, cos, sin)
    with torch.inference_mode():
        assert rope.fits(x, cos)
        got = rope.rope(x, cos, sin, interleaved)
    torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_gradients_go_the_plain_way() -> None:
    assert not rope.fits(torch.randn(1, 1, 4), torch.randn(1, 2))


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
