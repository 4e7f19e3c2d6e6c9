"""Speculation changes how many steps a text takes, never the text."""

import random

import pytest

from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.speculative import propose
from rorqual.model.transformer import Transformer


def test_what_followed_the_longest_match_is_proposed() -> None:
    assert propose([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert propose([5, 1, 2, 7, 7, 4, 1, 2, 8, 1, 2], 1) == [8]  # the most recent
    assert propose([0, 3, 4, 1, 2, 6, 3, 4, 1, 2], 1) == [6]
    assert propose([1, 2, 3, 4], 3) == []
    assert propose([1], 3) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_text_is_the_same_with_it_and_without(model: Transformer, temperature: float, batch: int) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(4) for _ in range(40)] for _ in range(batch)]
    answers, steps = [], []
    for speculate in (0, 4):
        config = EngineConfig(
            block_size=4, cache_tokens=600, max_num_seqs=8, max_num_batched_tokens=64, speculate=speculate
        )
        engine = Engine(model, None, config)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(
                max_tokens=30,
                temperature=temperature,
                seed=i,
                logprobs=2,
                logit_bias=dict.fromkeys(range(3), 9.0),
            )
            engine.add(Request(f"r{i}", prompt, params))
        found: dict[str, list] = {f"r{i}": [] for i in range(batch)}
        logprobs: dict[str, list[float]] = {f"r{i}": [] for i in range(batch)}
        count = 0
        while engine.has_work():
            count += 1
            for delta in engine.step():
                found[delta.request_id] += delta.token_ids
                logprobs[delta.request_id] += [x.logprob for x in delta.logprobs]
        engine.check()
        answers.append((found, logprobs))
        steps.append(count)
    assert answers[0][0] == answers[1][0]
    for name, values in answers[0][1].items():
        assert values == pytest.approx(answers[1][1][name], abs=1e-4)
    assert steps[1] < steps[0]


def test_it_survives_a_tight_cache_and_stops_at_the_limit(model: Transformer) -> None:
    texts = []
    for speculate in (0, 6):
        config = EngineConfig(
            block_size=4, cache_tokens=120, max_num_seqs=6, max_num_batched_tokens=24, speculate=speculate
        )
        engine = Engine(model, None, config)
        for i in range(6):
            params = SamplingParams(max_tokens=25, temperature=0, logit_bias={1: 30.0, 2: 30.0})
            engine.add(Request(f"r{i}", [1, 2] * (5 + i), params))
        found: dict[str, list[int]] = {}
        while engine.has_work():
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.check()
        texts.append(found)
    assert texts[0] == texts[1]
    assert {len(t) for t in texts[1].values()} == {25}
