"""Products of wide weights with few rows equal their definition."""

import pytest
import torch

from rorqual.kernels.dense_linear import MOST_ROWS, dense_linear, dense_linear_reference
from rorqual.kernels.native import Native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "n"), [(33, 70, 1), (16, 64, 5), (3, 5, 8), (130, 48, MOST_ROWS + 1)]
)
def test_equals_its_definition(library: Native, dtype: torch.dtype, rows: int, width: int, n: int) -> None:
    x, w = torch.randn(n, width).to(dtype), torch.randn(rows, width).to(dtype)
    bound = 1e-5 if n <= MOST_ROWS or dtype == torch.float32 else 0.01  # torch rounds its bfloat16 output
    got, want = dense_linear(x, w), dense_linear_reference(x, w)
    assert (got - want).norm() < bound * want.norm()


def test_activations_may_be_wider_than_weights(library: Native) -> None:
    x, w = torch.randn(2, 64), torch.randn(20, 64).bfloat16()
    torch.testing.assert_close(dense_linear(x, w), dense_linear_reference(x, w), rtol=1e-4, atol=1e-4)
