"""Attention over paged caches equals its definition, in every variant.

The definitions compute in float32. Natively so does everything but MLA over a cache below float32 with AVX-512, whose
queries and softmax weights are bfloat16: 2^-9 relative each, averaged over the keys, so 5e-3 of the output's norm.
"""

import pytest
import torch

from rorqual.kernels.gqa_attention import gqa_attention, gqa_attention_reference
from rorqual.kernels.mla_attention import mla_attention, mla_attention_reference
from rorqual.kernels.native import Native
from rorqual.kernels.paged import PagedRows, restore_rows, round_rows, row_bytes

LENGTHS = [[1], [0, 5, 70], [600, 1], [1300]]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def paged(lengths: list[int], block_size: int) -> tuple[PagedRows, int]:
    """One decoding row per request over shuffled blocks, and the slots that the cache must have."""
    blocks = max(1, *(-(-n // block_size) for n in lengths))
    table = torch.randperm(len(lengths) * blocks).int().view(len(lengths), blocks)
    rows = PagedRows(table, torch.arange(len(lengths)).int(), torch.tensor(lengths).int(), block_size)
    return rows, table.numel() * block_size


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return round_rows(x) if dtype == torch.uint8 else x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "rank", "rotary"), [(16, 64, 32), (4, 12, 4), (20, 48, 16), (3, 32, 8)])
def test_mla(
    library: Native, heads: int, rank: int, rotary: int, lengths: list[int], dtype: torch.dtype
) -> None:
    rows, slots = paged(lengths, 16)
    q = (torch.randn(len(lengths), heads, rank + rotary) * 2).bfloat16().float()
    cache = stored(torch.randn(slots, rank + rotary), dtype)
    got = mla_attention(q, cache, rows, rank, 0.1)
    bound = 5e-3 if library.isa == "avx512" and dtype != torch.float32 else 1e-5
    assert relative(got, mla_attention_reference(q, cache, rows, rank, 0.1)) < bound
    assert (got[[n == 0 for n in lengths]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 12), (6, 1, 20), (40, 2, 32)])
def test_gqa(
    library: Native, heads: int, kv_heads: int, width: int, lengths: list[int], dtype: torch.dtype
) -> None:
    rows, slots = paged(lengths, 16)
    q = torch.randn(len(lengths), heads, width) * 2
    keys, values = (stored(torch.randn(slots, kv_heads, width), dtype) for _ in range(2))
    got = gqa_attention(q, keys, values, rows, 0.3)
    assert relative(got, gqa_attention_reference(q, keys, values, rows, 0.3)) < 1e-5
    assert (got[[n == 0 for n in lengths]] == 0).all()


@pytest.mark.parametrize("block_size", [1, 5, 32, 64])
def test_any_block_size(library: Native, block_size: int) -> None:
    rows, slots = paged([130, 7], block_size)
    q, cache = torch.randn(2, 4, 48), torch.randn(slots, 48)
    got = mla_attention(q, cache, rows, 32, 0.2)
    assert relative(got, mla_attention_reference(q, cache, rows, 32, 0.2)) < 1e-5


def test_rows_of_a_chunk_see_up_to_themselves(library: Native) -> None:
    """Five new tokens after 30 cached ones: row i sees 31 + i tokens of the one request."""
    table = torch.randperm(4).int()[None]
    rows = PagedRows(table, torch.zeros(5).int(), torch.arange(31, 36).int(), 16)
    q, cache = torch.randn(5, 16, 96).bfloat16().float(), torch.randn(64, 96).bfloat16()
    got = mla_attention(q, cache, rows, 64, 0.1)
    assert relative(got, mla_attention_reference(q, cache, rows, 64, 0.1)) < 5e-3
    for i in range(5):
        alone = PagedRows(table, rows.request[i : i + 1], rows.length[i : i + 1], 16)
        assert torch.equal(mla_attention(q[i : i + 1], cache, alone, 64, 0.1)[0], got[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(library: Native, dtype: torch.dtype) -> None:
    """Long rows alone are shared out among threads in pieces, many at once are not: the same sums either way."""
    lengths = [1500, 3, 700, 1100, 512, 513, 20, 1, 900]
    rows, slots = paged(lengths, 16)
    q, cache = torch.randn(9, 4, 96), stored(torch.randn(slots, 96), dtype)
    keys = stored(torch.randn(slots, 2, 48), dtype)
    narrow = q[..., :48].contiguous()
    together = mla_attention(q, cache, rows, 64, 0.1), gqa_attention(narrow, keys, keys, rows, 0.1)
    for i in range(9):
        one = PagedRows(rows.table, rows.request[i : i + 1], rows.length[i : i + 1], 16)
        assert torch.equal(mla_attention(q[i : i + 1], cache, one, 64, 0.1)[0], together[0][i])
        assert torch.equal(gqa_attention(narrow[i : i + 1], keys, keys, one, 0.1)[0], together[1][i])


def test_huge_scores_stay_finite(library: Native) -> None:
    """A softmax that is one key's alone, and scores beyond what exp can take."""
    rows, slots = paged([200], 16)
    q, cache = torch.full((1, 16, 96), 50.0), torch.randn(slots, 96)
    got = mla_attention(q, cache, rows, 64, 1.0)
    assert got.isfinite().all()
    assert relative(got, mla_attention_reference(q, cache, rows, 64, 1.0)) < 1e-4


def test_a_nan_in_one_row_of_the_cache_stays_with_its_readers(library: Native) -> None:
    rows, slots = paged([40, 40], 16)
    q, cache = torch.randn(2, 4, 96), torch.randn(slots, 96)
    cache[rows.slots(0)[17]] = float("nan")
    got = mla_attention(q, cache, rows, 64, 0.1)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("width", [64, 576, 20, 130])
def test_rows_at_8_bits(width: int) -> None:
    """Half a step of each group of 64: 1/254 of its largest value, and the scale's own rounding."""
    x = torch.randn(7, width) * torch.logspace(-3, 3, 7)[:, None]
    rows = round_rows(x)
    assert rows.shape == (7, row_bytes(width))
    assert (restore_rows(rows, width) - x).abs().max(-1).values.lt(x.abs().amax(-1) / 250).all()
    assert torch.equal(restore_rows(round_rows(torch.zeros(1, width)), width), torch.zeros(1, width))
