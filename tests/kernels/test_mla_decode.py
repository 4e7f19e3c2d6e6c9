"""Decode attention over a paged latent cache against its definition."""

import pytest
import torch

from rorqual.kernels.mla_decode import mla_decode, mla_decode_reference, supported

RANK, ROTARY, HEADS = 48, 16, 5


def case(lengths: list[int]):
    cache = torch.randn(700, RANK + ROTARY).to(torch.bfloat16)
    slots = [torch.randperm(700)[:n] for n in lengths]
    q = (torch.randn(len(lengths), HEADS, RANK + ROTARY) * 0.3).to(torch.bfloat16).float()
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return q, cache, slots, torch.cat(slots), offsets


def test_a_request_without_rows_gives_zeros() -> None:
    """ikawrakow/ik_llama.cpp#2344."""
    q, cache, slots, table, offsets = case([3, 0])
    assert torch.equal(mla_decode_reference(q, cache, slots, RANK, 0.1)[1], torch.zeros(HEADS, RANK))
    if supported(cache, RANK):
        assert torch.equal(mla_decode(q, cache, table, offsets, RANK, 0.1)[1], torch.zeros(HEADS, RANK))


@pytest.mark.skipif(
    not supported(torch.zeros(1, 64, dtype=torch.bfloat16), RANK), reason="no native library here"
)
@pytest.mark.parametrize("lengths", [[1], [64], [65, 1, 0, 700], [3] * 17, [600, 700]])
def test_native_equals_the_definition(lengths: list[int]) -> None:
    q, cache, slots, table, offsets = case(lengths)
    got = mla_decode(q, cache, table, offsets, RANK, 0.2)
    torch.testing.assert_close(got, mla_decode_reference(q, cache, slots, RANK, 0.2), atol=1e-4, rtol=1e-4)


def test_caches_that_do_not_fit_go_the_plain_way() -> None:
    assert not supported(torch.zeros(1, 64), RANK)
    assert not supported(torch.zeros(1, 60, dtype=torch.bfloat16), RANK)
