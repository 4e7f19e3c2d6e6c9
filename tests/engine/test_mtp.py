"""Speculation by the model's own module: the same text, fewer steps where it is right, guesses as by one whole pass."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.runner import Runner
from rorqual.errors import ConfigError
from rorqual.model.attend import Causal
from rorqual.model.transformer import Transformer


@pytest.fixture(scope="module", params=["mla", "qwen"])
def predictor(request: pytest.FixtureRequest, models: dict[str, Transformer]) -> Transformer:
    config = replace(models[request.param].config, num_nextn_predict_layers=1)
    return Transformer(config).init_weights(1).eval()


def engine(model: Transformer, by: str | None = "mtp", **changes: object) -> Engine:
    speculation = {} if by is None else {"speculate": 1, "speculate_by": by}
    return Engine(
        model,
        config=EngineConfig(**{"block_size": 4, "cache_tokens": 600, "max_num_batched_tokens": 16, "max_num_seqs": 8}
                            | speculation | changes),
    )  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(0, 96, (9 + 8 * i,), generator=g).tolist() for i in range(count)]


def run(e: Engine, asked: list[list[int]], temperature: float = 0.0) -> tuple[list[list[int]], int]:
    for i, p in enumerate(asked):
        e.add(Request(str(i), p, SamplingParams(max_tokens=20, temperature=temperature, seed=i)))
    out: list[list[int]] = [[] for _ in asked]
    steps = 0
    while e.has_work():
        steps += 1
        for d in e.step():
            assert d.error is None
            out[int(d.request_id)] += d.token_ids
    e.check()
    return out, steps


def whole(model: Transformer, tokens: list[int]) -> int:
    """The guess of the token after the newest, by one pass over everything: the definition."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens) - 1)[None]
    with torch.no_grad():
        h = model(ids[:, :-1], positions, Causal(plain=True))
        further = model.predict_further(0, h, ids[:, 1:], positions, Causal(plain=True))
        return int(model.logits(further[:, -1]).argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_text_is_the_same_with_it_and_without(
    predictor: Transformer, temperature: float, batch: int
) -> None:
    asked = prompts(batch)
    expected, _ = run(engine(predictor, None), asked, temperature)
    assert run(engine(predictor), asked, temperature)[0] == expected
    tight = engine(predictor, cache_tokens=100)
    assert run(tight, asked, temperature)[0] == expected  # pre-empted and computed again
    assert batch == 1 or tight.stats().preemptions


def test_its_guesses_are_those_of_a_pass_over_everything(predictor: Transformer) -> None:
    e = engine(predictor, prefix_cache=False)
    for i, p in enumerate(prompts(3)):
        e.add(Request(str(i), p, SamplingParams(max_tokens=12, temperature=0)))
    seen = 0
    while e.has_work():
        e.step()
        for s in e._sequences.values():
            if s.guess:
                assert s.guess == [whole(predictor, s.tokens)]
                seen += 1
    assert seen > 20


def test_right_guesses_save_steps(predictor: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(2)
    expected, steps = run(engine(predictor, None), asked)
    e = engine(predictor)

    def knowing(self: Runner, works: list, h: Tensor) -> None:
        for w in works:
            s = w.sequence
            s.guess = expected[int(s.id)][s.generated : s.generated + 1]

    monkeypatch.setattr(Runner, "guess", knowing)
    found, fewer = run(e, asked)
    assert found == expected
    assert fewer < 0.65 * steps


def test_what_cannot_be_is_refused(models: dict[str, Transformer]) -> None:
    with pytest.raises(ConfigError, match="no multi-token prediction modules"):
        engine(models["mla"])
    with pytest.raises(ConfigError, match="speculate=3"):
        EngineConfig(speculate=3, speculate_by="mtp")
