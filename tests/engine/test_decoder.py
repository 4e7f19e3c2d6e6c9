"""All layers in one native call give what the modules give one by one."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rorqual.engine import decoder, quantize
from rorqual.engine.cache import PagedCache
from rorqual.engine.config import EngineConfig
from rorqual.engine.decoder import Decoder, Unfit
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.runner import Runner
from rorqual.engine.scheduler import Work
from rorqual.engine.sequence import Sequence
from rorqual.engine.stop import StopChecker
from rorqual.kernels.native import ISAS, Native, native
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from tests.engine.conftest import CONFIGS
from tests.native import loaded, running

V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 2.0}
GROUPS = {"n_group": 3, "topk_group": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("mla", {}),
    "v3 in groups": ("mla", GROUPS),
    "v2": ("mla", V2 | {"topk_method": "greedy"}),
    "v2 in groups, scaled after": ("mla", V2 | GROUPS | {"topk_method": "group_limited_greedy"}),
    "low-rank queries, half rotation": ("mla", {"q_lora_rank": 12, "rope_interleave": False, "n_shared_experts": 0}),
    "with norms of queries and keys": ("mla", {"qk_norm": True, "architecture": "RorqualForCausalLM"}),
    "qwen3": ("qwen", {}),
    "qwen2": ("qwen", {"architecture": "Qwen2ForCausalLM", "qk_norm": False, "qkv_bias": True}),
}  # fmt: skip


def made(config: ModelConfig, bits: int) -> Transformer:
    """A model of weights of 4, 8 or 32 bits."""
    model = Transformer(config).init_weights(3).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # as training leaves them
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    for _, router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(0, 0.1)
    return model if bits == 32 else quantize.quantize(model, quantize.formats(model, bits))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[Native]:
    yield from running(request.param)


def work(name: str, blocks: list[int], length: int, start: int, count: int) -> Work:
    """`count` tokens of a sequence of `length` after `start` that are in the cache."""
    g = torch.Generator().manual_seed(sum(name.encode()))
    tokens = torch.randint(0, 96, (length,), generator=g).tolist()
    s = Sequence(Request(name, tokens, SamplingParams()), 0, 1, StopChecker(None, ()), 0, [])
    s.blocks = blocks
    return Work(s, start, count)


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_the_modules(name: str, bits: int, dtype: torch.dtype, isa: Native) -> None:
    """One row of each sequence at a time by the modules; all rows of a chunk, and chunks of others, in one call."""
    kind, changes = MODELS[name]
    model = made(dataclasses.replace(CONFIGS[kind], **changes), bits)
    caches = [PagedCache(model.config, 64, dtype, torch.device("cpu")) for _ in range(2)]
    for rows in zip(*(c.rows for c in caches), strict=True):
        rows[0].normal_(generator=torch.Generator().manual_seed(1))
        rows[1].copy_(rows[0])
    fast, slow = (Runner(model, c, 4) for c in caches)
    assert fast.decoder is not None
    slow.decoder = None
    chunks = {"a": ([7, 2, 5], 9, 4, 5), "b": ([1], 2, 1, 1), "c": ([3, 9, 0, 4], 15, 13, 2)}
    got = fast.run([work(n, *chunk) for n, chunk in chunks.items()]).split([5, 1, 2])
    for (n, (blocks, length, start, count)), rows in zip(chunks.items(), got, strict=True):
        wanted = torch.cat([slow.run([work(n, blocks, length, start + i, 1)]) for i in range(count)])
        torch.testing.assert_close(rows, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    for mine, theirs in zip(caches[0].rows, caches[1].rows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_the_engine_uses_it(fresh: Callable[[str, int], Transformer]) -> None:
    model = quantize.quantize(fresh("qwen", 1), quantize.formats(fresh("qwen", 1), 8))
    texts = []
    for few in (True, False):
        engine = Engine(model, config=EngineConfig(block_size=4, cache_tokens=256, speculate=2))
        assert (engine.runner.decoder is None) == (native() is None)
        if not few:
            engine.runner.decoder = None
        for i, n in enumerate((1, 3, 20, 7)):
            prompt = (torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist() * 3)[:n]
            engine.add(Request(str(i), prompt, SamplingParams(max_tokens=12, temperature=0)))
        tokens: dict[str, list[int]] = {}
        while engine.has_work():
            for d in engine.step():
                tokens.setdefault(d.request_id, []).extend(d.token_ids)
        texts.append(tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("kind", "dtype", "what"),
    [("gqa", torch.float32, "tables or smear"), ("mla", torch.bfloat16, "below float32")],
    ids=["extensions", "bfloat16"],
)
def test_what_the_call_does_not_know_is_computed_by_modules(
    kind: str, dtype: torch.dtype, what: str, fresh: Callable[[str, int], Transformer]
) -> None:
    model, library = fresh(kind, 1).to(dtype), loaded()
    cache = PagedCache(model.config, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(Unfit, match=what):
        Decoder(model, cache, library)
    assert decoder.decoder(model, cache) is None


def test_weights_that_change_are_taken_over(fresh: Callable[[str, int], Transformer]) -> None:
    model, other = fresh("mla", 1), fresh("mla", 2)
    engine = Engine(model, config=EngineConfig(block_size=4, cache_tokens=64))
    loaded()
    assert engine.runner.decoder is not None

    def answer() -> list[int]:
        engine.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=8, temperature=0)))
        out: list[int] = []
        while engine.has_work():
            out += [t for d in engine.step() for t in d.token_ids]
        return out

    first = answer()
    engine.update_weights(dict(other.state_dict()))
    engine.runner.decoder, kept = None, engine.runner.decoder
    wanted = answer()
    engine.runner.decoder = kept
    engine.reset_cache()
    assert answer() == wanted != first
    with torch.no_grad():  # nobody says so, but it is seen
        for name, p in fresh("mla", 1).named_parameters():
            model.get_parameter(name).copy_(p)
    engine.pool.forget_all()
    assert answer() == first


def test_who_computed_each_token_is_recorded(fresh: Callable[[str, int], Transformer]) -> None:
    found = []
    for few in (True, False):
        engine = Engine(fresh("mla", 1), config=EngineConfig(block_size=4, cache_tokens=64))
        if not few:
            engine.runner.decoder = None
        params = SamplingParams(max_tokens=8, temperature=0, return_routed_experts=True)
        engine.add(Request("r", [1, 2, 3], params))
        deltas = []
        while engine.has_work():
            deltas += engine.step()
        assert deltas[-1].routed_experts is not None
        found.append(deltas[-1].routed_experts.sort(-1).values)
    assert torch.equal(*found)


def test_weights_that_moved_are_found_again(fresh: Callable[[str, int], Transformer]) -> None:
    engine = Engine(fresh("mla", 1), config=EngineConfig(block_size=4, cache_tokens=64))
    loaded()
    before = engine.runner.decoder
    assert before is not None
    with torch.no_grad():
        for p in engine.model.parameters():
            p.data = torch.zeros_like(p)  # as Module.to does
    assert before.moved
    engine.add(Request("r", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0)))
    tokens = []
    while engine.has_work():
        tokens += [t for d in engine.step() for t in d.token_ids]
    assert tokens == [0, 0, 0]
    assert engine.runner.decoder is not before
