"""With `batch_invariant` a request's log-probabilities are the same to the bit, whoever else is there."""

from collections.abc import Callable

import pytest
import torch

from rorqual.engine import quantize
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer

Scores = dict[str, list[tuple[int, float]]]


def config(**changes: int | bool) -> EngineConfig:
    return EngineConfig(
        **{"block_size": 4, "cache_tokens": 2048, "max_num_batched_tokens": 16, "max_num_seqs": 8}
        | {"batch_invariant": True, **changes}
    )


def run(engine: Engine, prompts: dict[str, list[int]], tokens: int = 10) -> Scores:
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=3, logprobs=0)
    for name, prompt in prompts.items():
        engine.add(Request(name, prompt, params))
    out: Scores = {name: [] for name in prompts}
    while engine.has_work():
        for d in engine.step():
            assert d.error is None
            out[d.request_id] += [(p.token_id, p.logprob) for p in d.logprobs]
    engine.check()
    return out


def prompts(count: int) -> dict[str, list[int]]:
    g = torch.Generator().manual_seed(1)
    return {f"r{i}": torch.randint(0, 96, (5 + 11 * i,), generator=g).tolist() for i in range(count)}


@pytest.mark.parametrize("kind", ["mla", "gqa", "quantised"])
def test_alone_with_neighbours_after_hits_and_pre_empted(
    kind: str, fresh: Callable[[str, int], Transformer]
) -> None:
    model = fresh("mla" if kind == "quantised" else kind, 1)
    if kind == "quantised":
        quantize.quantize(model, quantize.formats(model, 8))
    asked = prompts(8)
    alone: Scores = {}
    for name, prompt in asked.items():
        alone |= run(Engine(model, config=config()), {name: prompt})
    crowd = Engine(model, config=config())
    assert run(crowd, asked) == alone
    assert run(crowd, asked) == alone  # and from the cache
    assert crowd.stats().prefix_hit_tokens > 0
    small = Engine(model, config=config(cache_tokens=140))
    assert run(small, asked) == alone
    assert small.stats().preemptions > 0


def test_a_conversation_finds_its_prompt_but_not_what_was_said_one_by_one(model: Transformer) -> None:
    first = prompts(8)["r7"]
    engine = Engine(model, config=config())
    said = [t for t, _ in run(engine, {"a": first}, 30)["a"]]
    longer = {"b": first + said + [1, 2, 3]}
    assert run(engine, longer) == run(Engine(model, config=config()), longer)
    assert engine.stats().prefix_hit_tokens == len(first) // 16 * 16


def test_what_it_said_is_not_taken_from_a_prompt_that_repeats_it(
    fresh: Callable[[str, int], Transformer],
) -> None:
    """Pre-empted by the conversation's next turn, whose prompt holds its words: computed in chunks, not one by one."""
    model, prompt = fresh("qwen", 1), {"a": list(range(20, 28))}
    alone = run(Engine(model, config=config()), prompt, 60)["a"]
    engine = Engine(model, config=config(cache_tokens=112, max_model_len=80))
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, logprobs=0)
    engine.add(Request("a", prompt["a"], params, priority=1))
    said: list[tuple[int, float]] = []
    while engine.has_work():
        said += [(p.token_id, p.logprob) for d in engine.step() if d.request_id == "a" for p in d.logprobs]
        if len(said) == 44:
            turn = prompt["a"] + [t for t, _ in said[:36]]
            engine.add(Request("b", turn, SamplingParams(max_tokens=36, temperature=0)))
    assert engine.stats().preemptions > 0
    assert said == alone


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="speculate=2"):
        config(speculate=2)
    with pytest.raises(ConfigError, match="must hold a block of 32"):
        config(block_size=32)
