"""The native softmax of rows against its definition: every variant, both dtypes, widths that fill no vector."""

import pytest
import torch

from rorqual.kernels.native import Native
from rorqual.kernels.softmax import softmax_rows, softmax_rows_reference


@pytest.mark.parametrize("width", [1, 15, 16, 33, 2048, 5003])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_sums_and_probabilities(
    library: Native, width: int, dtype: torch.dtype, bound: float, size: float
) -> None:
    torch.manual_seed(0)
    logits, by = (torch.randn(9, width) * size).to(dtype), torch.rand(9)
    by[3] = 0  # a row that does not count
    ours, reference = torch.empty_like(logits), torch.empty_like(logits)
    sums = softmax_rows(logits, by, ours)
    torch.testing.assert_close(sums, softmax_rows_reference(logits, by, reference), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours, reference, rtol=bound * max(1, size / 5), atol=1e-8)
    assert torch.equal(softmax_rows(logits, by, None), sums)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(library: Native, value: float) -> None:
    logits = torch.zeros(2, 40)
    logits[0, 3] = value
    out = torch.empty_like(logits)
    sums = softmax_rows(logits, torch.ones(2), out)
    assert not sums[0].isfinite()
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


def test_extremes(library: Native) -> None:
    """Differences beyond what exp can hold, and logits that a mask has taken away."""
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e4, -1e4, float("-inf")]])
    out = torch.empty_like(logits)
    sums = softmax_rows(logits, torch.ones(2), out)
    torch.testing.assert_close(sums, torch.tensor([1e30, -1e4 + 0.693147]))
    torch.testing.assert_close(out, torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]]), rtol=1e-3, atol=1e-12)
