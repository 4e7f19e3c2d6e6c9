"""However a request is computed, its answer is the same: chunks, neighbours, cache hits, pre-emption, aborts."""

import random
from collections.abc import Callable

import pytest
import torch

from rorqual.engine import paged, runner
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Delta, Request, SamplingParams
from rorqual.errors import CapacityError, ConfigError, RequestError
from rorqual.model.attend import Causal
from rorqual.model.cost import cost
from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer


@pytest.fixture(autouse=True, params=["one call", "modules"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps in one native call, or everything by the modules."""
    if request.param == "modules":
        monkeypatch.setattr(runner, "decoder", lambda *_: None)


GREEDY = SamplingParams(max_tokens=12, temperature=0)


def config(**changes: object) -> EngineConfig:
    return EngineConfig(
        **{"block_size": 4, "cache_tokens": 1024, "max_num_seqs": 32, "max_num_batched_tokens": 64, **changes}
    )


def prompts(count: int, seed: int = 0, low: int = 3, high: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(96) for _ in range(rng.randrange(low, high))] for _ in range(count)]


def finish(engine: Engine) -> dict[str, list[Delta]]:
    out: dict[str, list[Delta]] = {}
    for _ in range(5000):
        if not engine.has_work():
            engine.check()
            return out
        for delta in engine.step():
            out.setdefault(delta.request_id, []).append(delta)
    raise AssertionError("the engine did not come to an end")


def run(engine: Engine, asked: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    for i, prompt in enumerate(asked):
        engine.add(Request(f"r{i}", prompt, params))
    deltas = finish(engine)
    return [[t for d in deltas[f"r{i}"] for t in d.token_ids] for i in range(len(asked))]


def plain(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy by full recomputation: the definition."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            x = torch.tensor([ids])
            ids.append(
                int(model.logits(model(x, torch.arange(len(ids))[None], Causal(plain=True)))[0, -1].argmax())
            )
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_chunks_and_neighbours_change_nothing(model: Transformer, chunk: int, batch: int) -> None:
    asked = prompts(batch)
    seqs = min(batch, chunk)
    engine = Engine(model, None, config(max_num_batched_tokens=chunk, max_num_seqs=seqs))
    want = [plain(model, p, 12) for p in asked[:3]]
    assert run(engine, asked)[:3] == want


def test_long_prompts_in_chunks_give_the_same_logits(model: Transformer) -> None:
    """ggml-org/llama.cpp#26509."""
    prompt = prompts(1, low=200, high=201)[0]
    scores = []
    for chunk in (8, 64, 512):
        engine = Engine(model, None, config(max_num_batched_tokens=chunk, max_num_seqs=8))
        engine.add(
            Request("a", prompt, SamplingParams(max_tokens=8, temperature=0, logprobs=5, prompt_logprobs=0))
        )
        deltas = finish(engine)["a"]
        assert deltas[0].prompt_logprobs is not None
        values = [x.logprob for x in deltas[0].prompt_logprobs if x is not None]
        scores.append(
            (values, [d.token_ids for d in deltas], [d.logprobs[0].logprob for d in deltas if d.logprobs])
        )
    for values, tokens, logprobs in scores[1:]:
        assert tokens == scores[0][1]
        assert values == pytest.approx(scores[0][0], abs=1e-4)
        assert logprobs == pytest.approx(scores[0][2], abs=1e-4)


def test_logprobs_are_those_of_the_model(model: Transformer) -> None:
    prompt = prompts(1)[0]
    engine = Engine(model, None, config())
    engine.add(Request("a", prompt, SamplingParams(max_tokens=4, temperature=0, logprobs=3)))
    deltas = finish(engine)["a"]
    tokens = [t for d in deltas for t in d.token_ids]
    x = torch.tensor([prompt + tokens])
    with torch.no_grad():
        want = model.logits(model(x, torch.arange(x.shape[1])[None], Causal())).log_softmax(-1)[0]
    for i, delta in enumerate(deltas):
        (entry,) = delta.logprobs
        row = want[len(prompt) - 1 + i]
        assert entry.token_id == tokens[i]
        assert entry.logprob == pytest.approx(float(row[tokens[i]]), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


def test_the_same_seed_gives_the_same_text_whatever_the_neighbours(model: Transformer) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=7)
    asked = prompts(16)
    alone = run(Engine(model, None, config()), asked[:1], params)[0]
    assert run(Engine(model, None, config()), asked, params)[0] == alone
    tight = Engine(model, None, config(cache_tokens=160, max_num_seqs=8))
    assert run(tight, asked, params)[0] == alone


def test_no_seed_means_another_text_each_time(model: Transformer) -> None:
    """vllm-project/vllm#11953."""
    params = SamplingParams(max_tokens=16, temperature=1.0)
    asked = prompts(1)
    assert run(Engine(model, None, config()), asked, params) != run(
        Engine(model, None, config()), asked, params
    )


def test_a_second_prompt_finds_the_first_ones_blocks(model: Transformer) -> None:
    """sgl-project/sglang#2555: own chunks are no hits, another request's blocks are."""
    engine = Engine(model, None, config(max_num_batched_tokens=32, max_num_seqs=4))
    prompt = prompts(1, low=100, high=101)[0]
    engine.add(Request("a", prompt, GREEDY))
    first = finish(engine)["a"]
    engine.add(Request("b", prompt, GREEDY))
    second = finish(engine)["b"]
    assert {d.cached_tokens for d in first} == {0}
    assert {d.cached_tokens for d in second} == {96}
    assert [d.token_ids for d in first] == [d.token_ids for d in second]
    engine.add(Request("c", prompt, GREEDY, cache_salt="another user"))
    assert finish(engine)["c"][0].cached_tokens == 0
    assert engine.stats().prefix_hit_tokens == 96


def test_cached_tokens_are_those_of_the_admission_not_of_an_attempt(model: Transformer) -> None:
    """Of 30 blocks 12 hold a prompt's beginning, when one that shares it does not fit beside a long one, which then
    takes them: it computes its own beginning, and that is what is told."""
    beginning = list(range(48))
    engine = Engine(model, None, config(cache_tokens=120, max_num_seqs=4, max_num_batched_tokens=128))
    run(engine, [[*beginning, 50]], SamplingParams(max_tokens=2, temperature=0))
    long = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    engine.add(Request("long", [60 + i % 30 for i in range(60)], long))
    engine.step()
    engine.add(Request("waits", [*beginning, *range(30, 80)], GREEDY))
    seen: list[int] = []
    ran = engine.runner.run
    engine.runner.run = lambda works: (
        seen.extend(w.start for w in works if w.sequence.id == "waits") or ran(works)
    )
    assert finish(engine)["waits"][-1].cached_tokens == seen[0] < 48


def test_a_request_of_one_token_leaves_its_blocks_to_the_next(model: Transformer) -> None:
    """Alone, drawn together with another, and scored without any token."""
    asked = prompts(2, low=50, high=51)
    one = SamplingParams(max_tokens=1, temperature=0)
    for first, count in ((one, 1), (one, 2), (SamplingParams(max_tokens=0, prompt_logprobs=0), 1)):
        engine = Engine(model, None, config(max_num_batched_tokens=128))
        run(engine, asked[:count], first)
        for prompt in asked[:count]:
            engine.add(Request("again", prompt, one))
            assert finish(engine)["again"][-1].cached_tokens == 48


def test_pre_empted_requests_finish_with_the_same_text(model: Transformer) -> None:
    """vllm-project/vllm#15996: 256 tokens of cache, eight requests of 64 + 64."""
    asked = prompts(8, low=64, high=65)
    params = SamplingParams(max_tokens=64, temperature=0)
    engine = Engine(model, None, config(cache_tokens=256, max_num_batched_tokens=64, max_num_seqs=8))
    got = run(engine, asked, params)
    assert engine.scheduler.preemptions > 0
    assert engine.scheduler.preemptions <= 8 * 8
    roomy = run(Engine(model, None, config(cache_tokens=4096)), asked, params)
    assert got == roomy


def test_first_come_first_served_when_the_cache_is_tight(model: Transformer) -> None:
    engine = Engine(model, None, config(cache_tokens=128, max_num_seqs=8))
    for i, prompt in enumerate(prompts(6, low=60, high=61)):
        engine.add(Request(f"r{i}", prompt, SamplingParams(max_tokens=20, temperature=0)))
    ended = []
    while engine.has_work():
        ended += [d.request_id for d in engine.step() if d.finish_reason]
    assert ended == [f"r{i}" for i in range(6)]


def test_priority_overtakes(model: Transformer) -> None:
    engine = Engine(model, None, config(max_num_seqs=1))
    for name, priority in (("slow", 5), ("late", 5), ("urgent", 0)):
        engine.add(
            Request(name, prompts(1)[0], SamplingParams(max_tokens=2, temperature=0), priority=priority)
        )
    ended = []
    while engine.has_work():
        ended += [d.request_id for d in engine.step() if d.finish_reason]
    assert ended == ["urgent", "slow", "late"]


def test_a_decoding_request_advances_in_every_step_of_a_long_prefill(model: Transformer) -> None:
    """vllm-project/vllm#54919."""
    engine = Engine(model, None, config(max_num_batched_tokens=16, max_num_seqs=4))
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=30, temperature=0)))
    engine.step()
    engine.add(Request("b", prompts(1, low=200, high=201)[0], GREEDY))
    for _ in range(10):
        assert "a" in {d.request_id for d in engine.step()}


def test_swapped_weights_forget_the_cache(fresh: Callable[[str, int], Transformer]) -> None:
    """InternLM/lmdeploy#4917: the answer is that of a fresh engine, with no cached token."""
    model, other = fresh("mla", 1), fresh("mla", 2)
    prompt = prompts(1, low=50, high=51)[0]
    engine = Engine(model, None, config())
    engine.add(Request("a", prompt, GREEDY))
    finish(engine)
    engine.add(Request("half", prompt, GREEDY))
    engine.step()
    engine.update_weights(other.state_dict())
    engine.add(Request("b", prompt, GREEDY))
    deltas = finish(engine)
    assert deltas["b"][0].cached_tokens == 0
    assert [t for d in deltas["b"] for t in d.token_ids] == plain(other, prompt, 12)
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        engine.update_weights({"norm.weight": torch.zeros(3)})


def test_context_ends_a_request_and_not_the_engine(model: Transformer) -> None:
    """ggml-org/llama.cpp#8862: context 128, prompt 100, 100 wanted."""
    engine = Engine(model, None, config(max_model_len=128))
    asked = prompts(3, low=100, high=101)
    for i, p in enumerate(asked):
        engine.add(Request(f"r{i}", p, SamplingParams(max_tokens=100, temperature=0)))
    deltas = finish(engine)
    for i in range(3):
        assert deltas[f"r{i}"][-1].finish_reason == "length"
        assert sum(len(d.token_ids) for d in deltas[f"r{i}"]) == 28
    assert len(run(engine, asked[:1])[0]) == 12


def test_a_full_window_can_be_scored_but_not_continued(model: Transformer) -> None:
    """vllm-project/vllm#16445."""
    engine = Engine(model, None, config(max_model_len=128))
    prompt = prompts(1, low=128, high=129)[0]
    engine.add(Request("a", prompt, SamplingParams(max_tokens=0, prompt_logprobs=1)))
    (delta,) = finish(engine)["a"]
    assert delta.prompt_logprobs is not None
    assert len([x for x in delta.prompt_logprobs if x is not None]) == 127
    with pytest.raises(RequestError, match="one place") as e:
        engine.add(Request("b", prompt, SamplingParams(max_tokens=1)))
    assert e.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt", "params", "code"),
    [
        ([], GREEDY, "empty_prompt"),
        ([96], GREEDY, "invalid_value"),
        ([-1], GREEDY, "invalid_value"),
        ([1] * 300, GREEDY, "context_length_exceeded"),
        ([1], SamplingParams(logit_bias={96: 1.0}), "invalid_value"),
        ([1], SamplingParams(max_tokens=0), "invalid_value"),
    ],
)
def test_what_cannot_be_served_is_refused_before_work(model: Transformer, prompt, params, code: str) -> None:
    engine = Engine(model, None, config())
    with pytest.raises(RequestError) as e:
        engine.add(Request("a", prompt, params))
    assert e.value.code == code
    assert not engine.has_work()


def test_the_queue_is_bounded(model: Transformer) -> None:
    engine = Engine(model, None, config(max_waiting=2))
    for i in range(2):
        engine.add(Request(f"r{i}", [1], GREEDY))
    with pytest.raises(RequestError) as e:
        engine.add(Request("r2", [1], GREEDY))
    assert e.value.code == "queue_full"


def test_deadlines_end_a_request(model: Transformer) -> None:
    engine = Engine(model, None, config())
    engine.add(Request("a", [1], GREEDY, deadline_s=0.0))
    engine.add(Request("b", [1], GREEDY))
    deltas = finish(engine)
    assert deltas["a"][-1].finish_reason == "abort"
    assert deltas["b"][-1].finish_reason == "length"


def test_non_finite_logits_fail_one_request_and_not_its_neighbours(
    fresh: Callable[[str, int], Transformer],
) -> None:
    """vllm-project/vllm#8283."""
    model = fresh("gqa", 1)
    model.embed_tokens.weight.data[5] = float("nan")
    engine = Engine(model, None, config(prefix_cache=False))
    engine.add(Request("bad", [1, 5, 2], GREEDY))
    engine.add(Request("good", [1, 2, 3], GREEDY))
    deltas = finish(engine)
    assert deltas["bad"][-1].finish_reason == "error"
    assert "non-finite" in (deltas["bad"][-1].error or "")
    assert deltas["good"][-1].finish_reason == "length"


def test_rows_that_overflowed_reach_no_shorter_neighbour(
    fresh: Callable[[str, int], Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows of the path without kernels: NaN in the first blocks of the pool, during that request and after it."""
    monkeypatch.setattr(paged, "native", lambda: None)
    for kind in ("mla", "qwen"):
        model = fresh(kind, 1)
        model.embed_tokens.weight.data[7] = float("nan")
        engine = Engine(model, None, config(max_num_batched_tokens=32))
        engine.add(Request("bad", [7, *[30] * 50], GREEDY))
        engine.step()
        for _ in range(2):
            engine.add(Request("short", [20, 21, 22], GREEDY, priority=-1))
            engine.add(Request("longer", list(range(40, 52)), GREEDY, priority=-1))
            deltas = finish(engine)
            assert [deltas[name][-1].finish_reason for name in ("short", "longer")] == ["length"] * 2


def test_cache_memory_is_the_formula(model: Transformer) -> None:
    """LMCache/LMCache#694."""
    engine = Engine(model, None, config(cache_tokens=1000, block_size=8))
    assert engine.cache.bytes == 1000 * cost(model.config).cache_elements * 4


def test_a_cache_beyond_the_memory_is_refused_before_it_is_made(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.device.available_memory", lambda: 100_000)
    with pytest.raises(CapacityError, match=r"a cache of 1000 tokens: needs .* 100\.0 kB is available; give"):
        Engine(model, None, config(cache_tokens=1000))
    with pytest.raises(CapacityError, match="smaller cache_memory"):
        Engine(model, None, config(cache_tokens=10**20))  # nor is a list made of its blocks
    assert Engine(model, None, config(cache_tokens=100)).cache.slots == 100


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_memory", float("nan")),
        ("cache_memory", float("inf")),
        ("disk_cache_bytes", float("nan")),
        ("disk_cache_bytes", -1.0),
        ("cache_dtype", "float16"),
        ("speculate_by", "another model"),
    ],
)
def test_limits_that_cannot_be_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value!r}: must be"):
        EngineConfig(**{field: value})


def test_a_length_beyond_the_cache_is_refused_with_what_would_fit(model: Transformer) -> None:
    """vllm-project/vllm#2163."""
    with pytest.raises(CapacityError, match="holds 128 tokens"):
        Engine(model, None, config(cache_tokens=128, max_model_len=200))
    with pytest.raises(ConfigError, match="made for 256"):
        Engine(model, None, config(max_model_len=300))
    assert Engine(model, None, config(cache_tokens=128)).max_model_len == 128


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_traffic_leaves_nothing_behind(models: dict[str, Transformer], count: int) -> None:
    """Random prompts, shared beginnings, aborts, tight cache: every request ends, no block leaks."""
    rng = random.Random(3)
    engine = Engine(
        models["mla"],
        None,
        config(cache_tokens=200, max_num_seqs=6, max_num_batched_tokens=24, max_waiting=9999),
    )
    beginnings = prompts(4, seed=9, low=10, high=40)
    open_, ended = set(), 0
    for i in range(count):
        prompt = (rng.choice(beginnings) + prompts(1, seed=i, low=1, high=30)[0])[:100]
        params = SamplingParams(max_tokens=rng.randrange(1, 30), temperature=rng.choice([0.0, 1.0]))
        engine.add(
            Request(f"r{i}", prompt, params, priority=rng.randrange(3), cache_salt=rng.choice(["", "u"]))
        )
        open_.add(f"r{i}")
        if rng.random() < 0.2:
            gone = rng.choice(sorted(open_))
            engine.abort(gone)
            open_.discard(gone)
        for _ in range(rng.randrange(4)):
            for delta in engine.step():
                if delta.finish_reason:
                    open_.discard(delta.request_id)
                    ended += 1
        engine.pool.check()
    rest = finish(engine)
    assert {r for r, ds in rest.items() if ds[-1].finish_reason} >= open_
    assert engine.pool.used == 0


def test_the_experts_of_every_token_come_back(models: dict[str, Transformer]) -> None:
    """Those that the model chooses for the same tokens in one pass, whether computed anew, in chunks or found cached."""
    model = models["mla"]
    engine = Engine(
        model, None, EngineConfig(block_size=4, cache_tokens=256, max_num_seqs=2, max_num_batched_tokens=5)
    )
    params = SamplingParams(max_tokens=7, seed=1, return_routed_experts=True)
    prompt = list(range(3, 14))
    for name in ("first", "cached"):
        engine.add(Request(name, prompt, params))
        ids, experts = list(prompt), None
        while engine.has_work():
            for delta in engine.step():
                ids += delta.token_ids
                experts = delta.routed_experts
        routing = Routing()
        with torch.no_grad():
            model(torch.tensor([ids[:-1]]), torch.arange(len(ids) - 1)[None], Causal(), routing)
        assert experts is not None
        assert experts.shape == (len(ids) - 1, 1, 2)
        assert torch.equal(experts[:, 0].long().sort(-1).values, routing.chosen[1].sort(-1).values)
    with pytest.raises(RequestError, match="no experts"):
        Engine(models["gqa"]).add(Request("x", [1], params))


def test_completions_need_not_be_kept(model: Transformer) -> None:
    """A prompt that goes on from an answer finds the answer's blocks, or only the first prompt's."""
    for keep, found in ((True, 20), (False, 12)):
        engine = Engine(model, None, config(cache_completions=keep))
        ids = list(range(3, 15))
        for _ in range(2):
            engine.add(Request("x", list(ids), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)))
            cached = 0
            while engine.has_work():
                for delta in engine.step():
                    ids += delta.token_ids
                    cached = delta.cached_tokens
        assert cached == found
