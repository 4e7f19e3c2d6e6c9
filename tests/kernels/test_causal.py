"""Blocked causal attention against its definition: outputs and gradients, odd lengths, packed documents."""

import pytest
import torch

from rorqual.kernels.attention import attention_reference
from rorqual.kernels.causal import causal_attention


def both(length: int, kv_heads: int, width: int, documents: torch.Tensor | None, dtype: torch.dtype):
    torch.manual_seed(0)
    q = torch.randn(2, 4, length, 16, dtype=dtype)
    k = torch.randn(2, kv_heads, length, 16, dtype=dtype)
    v = torch.randn(2, kv_heads, length, width, dtype=dtype)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    results = []
    for fast in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = causal_attention(*leaves, 0.25, documents) if fast else attention_reference(*leaves, 0.25, mask)
        grads = torch.autograd.grad((out.float() * torch.linspace(-1, 1, width)).sum(), leaves)
        results.append([out, *grads])
    return zip(*results, strict=True)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 16), (2, 10)])
def test_equals_the_definition(length: int, kv_heads: int, width: int) -> None:
    for got, want in both(length, kv_heads, width, None, torch.float32):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_packed_documents() -> None:
    documents = torch.stack((torch.arange(150) // 40, torch.arange(150) // 130))
    for got, want in both(150, 2, 10, documents, torch.float32):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bfloat16_keeps_two_digits() -> None:
    """Scores leave the product in bfloat16, as under autocast: relative error of the output under 2%."""
    for got, want in both(130, 4, 16, None, torch.bfloat16):
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < 0.02
