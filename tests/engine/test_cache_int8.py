"""A cache at 8 bits: half the bytes of bfloat16, logits within a stated bound, every form and path alike."""

from collections.abc import Callable

import pytest
import torch

from rorqual.engine import paged
from rorqual.engine.cache import PagedCache, token_bytes
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.model.published import published
from rorqual.model.transformer import Transformer

BOUND, MEAN = 0.2, 0.02  # of a log-probability on these random models, whose logits spread widely


def scores(model: Transformer, prompts: list[list[int]], **changes: object) -> list[list[float]]:
    """Log-probabilities of each prompt's tokens, computed in chunks over the cache, then of eight forced ones."""
    e = Engine(model, config=EngineConfig(**{"block_size": 4, "cache_tokens": 1024, **changes}))
    params = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0, logprobs=0, logit_bias={7: 100.0})
    for i, p in enumerate(prompts):
        e.add(Request(str(i), p, params))
    out: list[list[float]] = [[] for _ in prompts]
    while e.has_work():
        for d in e.step():
            assert d.error is None
            out[int(d.request_id)] += [s.logprob for s in d.prompt_logprobs or [] if s is not None]
    e.check()
    return out


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (n,), generator=g).tolist() for n in (70, 33, 9)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_stay_within_the_bound(model: Transformer, chunk: int) -> None:
    limits = {"max_num_batched_tokens": chunk, "max_num_seqs": min(chunk, 3)}
    wide = scores(model, prompts(), cache_dtype="float32", **limits)
    rounded = scores(model, prompts(), cache_dtype="int8", **limits)
    far = [abs(a - b) for x, y in zip(wide, rounded, strict=True) for a, b in zip(x, y, strict=True)]
    assert 0 < max(far) < BOUND
    assert sum(far) / len(far) < MEAN


def test_the_native_kernels_and_the_plain_path_read_the_same_rows(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = scores(model, prompts(), cache_dtype="int8", max_num_batched_tokens=5, max_num_seqs=3)
    monkeypatch.setattr(paged, "native", lambda: None)
    plain = scores(model, prompts(), cache_dtype="int8", max_num_batched_tokens=5, max_num_seqs=3)
    for a, b in zip(fast, plain, strict=True):
        assert a == pytest.approx(b, abs=0.05)  # the kernel rounds queries and weights to bfloat16


def test_bytes_of_a_token(model: Transformer) -> None:
    lite = published("deepseek-v2-lite")
    assert token_bytes(lite, torch.bfloat16) == 27 * 576 * 2
    assert token_bytes(lite, torch.uint8) == 27 * (576 + 2 * 9)  # a half scale for each 64
    cache = PagedCache(model.config, 32, torch.uint8, torch.device("cpu"))
    assert cache.bytes == 32 * token_bytes(model.config, torch.uint8)


def test_the_same_memory_holds_more(fresh: Callable[[str, int], Transformer]) -> None:
    def blocks(dtype: str) -> int:
        limits = EngineConfig(cache_dtype=dtype, cache_memory=20_000, max_num_seqs=256)  # type: ignore[arg-type]
        return Engine(fresh("gqa", 1), config=limits).pool.total

    assert blocks("int8") > 1.5 * blocks("bfloat16")
