"""Causal attention of whole rows against its definition: outputs and gradients, odd lengths, packed documents, trees."""

import pytest
import torch

from rorqual.kernels.attention import attention_reference
from rorqual.kernels.causal import causal_attention, fits, seen_attention
from rorqual.kernels.native import Native


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


def tree(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A beginning and two continuations: shared, start, mask."""
    third = length // 3
    branch = (torch.arange(length) // max(third, 1)).clamp(max=2).expand(2, -1)
    own = branch[:, None] == branch[:, :, None]
    mask = (own | (branch == 0)[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    return (
        (branch == 0).sum(1, keepdim=True).expand(2, length).int().contiguous(),
        own.int().argmax(-1).int(),
        mask[:, None],
    )


@pytest.mark.parametrize("queries", [1, 8, 47, 48, 49, 200])
@pytest.mark.parametrize("sight", ["all", "last", "tree"])
@pytest.mark.parametrize(("kv_heads", "width", "value_width"), [(4, 16, 16), (2, 48, 32), (1, 32, 80)])
def test_native_equals_the_definition(
    library: Native, queries: int, sight: str, kv_heads: int, width: int, value_width: int
) -> None:
    torch.manual_seed(0)
    keys = queries + 77 if sight == "last" else queries
    leaves = [
        torch.randn(2, n, h, w).transpose(1, 2)  # as projections leave them: heads of a token side by side
        for n, h, w in ((queries, 4, width), (keys, kv_heads, width), (keys, kv_heads, value_width))
    ]
    mask, shared, start = (
        torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None],
        None,
        None,
    )
    if sight == "tree":
        shared, start, mask = tree(queries)
    found = []
    for fast in (True, False):
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        assert fits(q, k, v)
        out = seen_attention(q, k, v, 0.3, shared, start) if fast else attention_reference(q, k, v, 0.3, mask)
        grads = torch.autograd.grad((out * torch.linspace(-1, 1, value_width)).sum(), (q, k, v))
        found.append((out.detach(), *grads))
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want, atol=2e-5, rtol=1e-4)


def test_a_query_does_not_depend_on_the_chunk_it_is_in(library: Native) -> None:
    q, k, v = (torch.randn(1, 2, 120, 32) for _ in range(3))
    whole = seen_attention(q, k, v, 0.2)
    for start in (1, 50, 119):
        assert torch.equal(seen_attention(q[:, :, start:], k, v, 0.2), whole[:, :, start:])


def test_non_finite_keys_reach_only_those_who_see_them(library: Native) -> None:
    q, k, v = (torch.randn(1, 1, 60, 16) for _ in range(3))
    k[0, 0, 50] = float("nan")
    out = seen_attention(q, k, v, 0.2)[0, 0]
    assert bool(out[:50].isfinite().all())
    assert not bool(out[50:].isfinite().any())


def test_key_heads_that_are_taken_in_several_goes(library: Native) -> None:
    q, k, v = torch.randn(6, 4, 1, 16), *(torch.randn(6, 2, 60_000, 16) for _ in range(2))
    torch.testing.assert_close(
        seen_attention(q, k, v, 0.25), attention_reference(q, k, v, 0.25), atol=1e-5, rtol=1e-4
    )
