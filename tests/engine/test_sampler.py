"""Formulas, filters and draws, by hand and by counting."""

import math
from collections import Counter

import pytest
import torch

from rorqual.engine.request import SamplingParams
from rorqual.engine.sampler import Drawable, keep, sample, sample_rows, shape, uniform
from rorqual.errors import RequestError

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def row(logits: torch.Tensor) -> Drawable:
    return Drawable(logits, int(logits.argmax()))


def draw(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS) -> Counter[int]:
    return Counter(sample(row(logits), params, [], [0] * i, seed=11)[0] for i in range(count))


def test_draws_follow_the_distribution() -> None:
    n = 4000
    counts = draw(SamplingParams(), n)
    for token, p in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert counts[token] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.8), {0, 1}),
        (SamplingParams(top_p=0.81), {0, 1, 2}),
        (SamplingParams(top_p=0.01), {0}),
        (SamplingParams(min_p=0.2), {0, 1, 2}),
        (SamplingParams(top_k=3, top_p=0.5), {0}),
        (SamplingParams(logit_bias={3: 100.0}), {3}),
        (SamplingParams(logit_bias={0: -100.0}), {1, 2, 3}),
    ],
)
def test_filters_keep_what_they_should(params: SamplingParams, kept: set[int]) -> None:
    assert set(draw(params, 500)) == kept


def test_temperature_extremes() -> None:
    """huggingface/text-generation-inference#440: 1e-4 is greedy in effect, 1e6 is uniform."""
    logits = torch.randn(512) * 5
    assert set(draw(SamplingParams(temperature=1e-4), 32, logits)) == {int(logits.argmax())}
    assert set(draw(SamplingParams(temperature=0), 3, logits)) == {int(logits.argmax())}
    counts = draw(SamplingParams(temperature=1e6), 20_000, logits)
    entropy = -sum(n / 20_000 * math.log2(n / 20_000) for n in counts.values())
    assert entropy > 8.9


def test_penalties_by_their_formulas() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    assert shape(logits, params, [2], [0, 0, 1]).tolist() == pytest.approx(
        [2 - 1 - 0.25, -2 - 0.5 - 0.25, 1.0]
    )
    params = SamplingParams(repetition_penalty=2.0)
    assert shape(logits, params, [2], [0, 1]).tolist() == pytest.approx([1.0, -4.0, 0.5])
    assert logits.tolist() == [2.0, -2.0, 1.0]


def test_logprobs_are_of_the_distribution_drawn_from() -> None:
    """vllm-project/vllm#42259: with top_p 0.8 token 0 has 0.5 / 0.8."""
    _, entry = sample(row(LOGITS), SamplingParams(top_p=0.8, logprobs=2, logit_bias={0: 9.0}), [], [], 1)
    assert entry is not None
    token, entry = sample(row(LOGITS), SamplingParams(top_p=0.8, logprobs=2), [], [], 1)
    assert entry is not None
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(math.log({0: 0.5, 1: 0.3}[token] / 0.8), abs=1e-5)
    assert entry.top[0] == (0, pytest.approx(math.log(0.5 / 0.8), abs=1e-5))


def test_a_mask_allows_only_its_tokens() -> None:
    class Even:
        finished = False

        def allowed(self) -> bytes:
            return bytes([0b0101])

        def accept(self, token_id: int) -> None: ...

    assert set(draw(SamplingParams(mask=Even()), 200)) == {0, 2}


def test_uniform_numbers_are_spread_and_repeat() -> None:
    values = [uniform(s, i) for s in range(50) for i in range(200)]
    assert min(values) >= 0
    assert max(values) < 1
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert len(set(values)) == len(values)
    assert uniform(3, 4) == uniform(3, 4)


def test_ties_and_top_k_never_keep_nothing() -> None:
    flat = torch.zeros(8)
    assert keep(flat, SamplingParams(top_p=0.1)).isfinite().sum() == 1
    assert keep(flat, SamplingParams(top_p=1e-46)).isfinite().sum() == 1
    assert keep(flat, SamplingParams(min_p=1.0)).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 2.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-39),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", {5: float("inf")}),
        ("logit_bias", {"5": 1.0}),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", ""),
        ("stop_token_ids", 3),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
    ],
)
def test_values_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as e:
        SamplingParams(**{field: value})
    assert e.value.param == field


def test_a_string_is_one_stop() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


SEED = 0x1234567_89ABCDEF  # beyond 64 bits from the 15th on


def test_rows_drawn_together_are_those_drawn_alone() -> None:
    logits = torch.randn(40, 17, generator=torch.Generator().manual_seed(5)) * 3
    params = [
        SamplingParams(temperature=(0.0, 0.7, 1.0)[i % 3], top_k=2 * (i % 10 == 9), logprobs=(None, 0)[i % 2])
        for i in range(40)
    ]
    together = sample_rows(
        logits, params, list(range(40)), [i * SEED for i in range(40)], logits.argmax(-1).tolist()
    )
    for i, (one, found) in enumerate(zip(logits, together, strict=True)):
        token, logprob = sample(row(one), params[i], [], [0] * i, i * SEED)
        if params[i].top_k:
            assert found is None
            continue
        assert found is not None
        assert found[0] == token
        assert (found[1] is None) == (logprob is None)
        if logprob is not None and found[1] is not None:
            assert found[1].logprob == pytest.approx(logprob.logprob, abs=1e-6)
