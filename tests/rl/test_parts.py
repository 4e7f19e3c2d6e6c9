"""Intervals, the guard, batches of rollouts, the mismatch between sampler and trainer."""

import contextlib
import math
from typing import Any

import pytest
import torch

from rorqual.model.transformer import Transformer
from rorqual.rl.config import Guard, RLConfig, Sampling
from rorqual.rl.guard import Watch
from rorqual.rl.losses import k3
from rorqual.rl.rollout import Rollout, Sampler
from rorqual.rl.rows import Batch, Row, lay_out
from rorqual.rl.tokens import write_characters
from rorqual.rl.update import Updater, score
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.config import Optim
from rorqual.train.optim import Optimizer
from rorqual.train.shape import Shape
from rorqual.verify.interval import pass_at, wilson


def test_wilson_by_hand() -> None:
    """10 of 10: 1 / (1 + 1.96²/10) from below (Wilson, 1927)."""
    low, high = wilson(10, 10)
    assert low == pytest.approx(1 / (1 + 1.96**2 / 10))
    assert high == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)


def test_pass_at_k_by_counting() -> None:
    """Of 5 with 2 right, 2 drawn: 1 - C(3,2)/C(5,2)."""
    assert pass_at(2, 2, 5) == pytest.approx(1 - 3 / 10)
    assert pass_at(1, 2, 5) == pytest.approx(0.4)
    assert pass_at(16, 1, 16) == 1.0
    assert pass_at(4, 0, 5) == 0.0


def test_the_guard_trips_where_reward_fell_and_groups_are_dead() -> None:
    watch = Watch(Guard(memory=0.0))
    assert not watch.collapsed(0.5, 0.6)
    assert not watch.collapsed(0.9, 0.05)  # nearly all right: few groups are live, and that is well
    assert not watch.collapsed(0.3, 0.5)  # low, but there is something to learn
    assert watch.collapsed(0.2, 0.05)
    watch.went_back()
    assert watch.share == 0.5
    again = Watch(Guard(memory=0.0))
    again.load_state_dict(watch.state_dict())
    assert again.state_dict() == watch.state_dict()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("characters")
    write_characters(folder)
    return Tokenizer.load(folder)


def test_characters_are_one_token_each_and_come_back(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x20, 0x7F))) + "\n"
    ids = tokenizer.encode(text, add_bos=False, special=False)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def model_of(family: str, tokenizer: Tokenizer) -> Transformer:
    more: dict[str, Any] = {"experts": 4, "experts_per_token": 2} if family == "deepseek" else {}
    shape = Shape(family=family, depth=3, width=32, heads=2, zero_output=False, **more)  # type: ignore[arg-type]
    config = shape.model(tokenizer.vocab_size, 64, tokenizer.bos_id, tokenizer.eos_ids[0])
    return Transformer(config).init_weights(3)


def drawn(
    model: Transformer, tokenizer: Tokenizer, sampling: Sampling, count: int = 4
) -> list[list[Rollout]]:
    sampler = Sampler(model, tokenizer, sampling, contextlib.nullcontext)
    prompts = [tokenizer.encode(t) for t in ("12+34=", "7+8+9=", "1+1=")]
    return sampler.draw(prompts, count, [1, 2, 3])


@pytest.mark.parametrize("family", ["deepseek", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(tokenizer: Tokenizer, family: str, temperature: float) -> None:
    """At rate zero the divergence is at most 1e-6 in float32, and every on-policy ratio within 1e-4 of 1, also where the
    temperature is not 1 (huggingface/trl#4159, vllm-project/vllm#42259)."""
    model = model_of(family, tokenizer)
    groups = drawn(model, tokenizer, Sampling(max_tokens=20, max_prompt=16, temperature=temperature))
    flat = [r for g in groups for r in g]
    batch = Batch.of(flat, [0.0] * len(flat))
    with torch.no_grad():
        found = score(model, batch, temperature, contextlib.nullcontext, replay=True)
    counts = batch.mask.bool()
    assert int(counts.sum()) == sum(len(r.ids) for r in flat)
    divergence = k3(batch.sampled[counts].double(), found.logprobs[counts].double()).mean()
    assert float(divergence) < 1e-6
    assert float((found.logprobs - batch.sampled)[counts].exp().sub(1).abs().max()) < 1e-4


def test_rollouts_depend_on_their_seed_alone(tokenizer: Tokenizer) -> None:
    model = model_of("deepseek", tokenizer)
    small = drawn(model, tokenizer, Sampling(max_tokens=6, max_prompt=16, at_once=3))
    large = drawn(model, tokenizer, Sampling(max_tokens=6, max_prompt=16, at_once=64, block_size=4))
    assert [[r.ids for r in g] for g in small] == [[r.ids for r in g] for g in large]
    assert len({tuple(r.ids) for r in small[0]}) > 1


def test_an_update_moves_the_policy_towards_what_was_right(tokenizer: Tokenizer, tmp_path: Any) -> None:
    model = model_of("deepseek", tokenizer)
    sampling = Sampling(prompts=3, group=4, max_tokens=8, max_prompt=16)
    config = RLConfig(out=tmp_path, model=tmp_path, sampling=sampling, keep_truncated=True)
    flat = [r for g in drawn(model, tokenizer, sampling) for r in g]
    advantage = [1.0 if i % 4 == 0 else -1 / 3 for i in range(len(flat))]
    optimizer = Optimizer(model.named_parameters(), Optim("adamw", 1e-3, 1e-3, 1e-3, 1e-3, weight_decay=0.0))
    updater = Updater(config, model, optimizer, contextlib.nullcontext)
    batch = Batch.of(flat, advantage)

    def likelihood() -> torch.Tensor:
        with torch.no_grad():
            return (score(model, batch, 1.0, contextlib.nullcontext, True).logprobs * batch.mask).sum(1)

    before = likelihood()
    figures = updater.step(flat, advantage, 1.0, first=True)
    change = likelihood() - before
    right = torch.tensor(advantage) > 0
    assert figures.mismatch_most < 1e-4
    assert float(change[right].mean()) > 0 > float(change[~right].mean())


def test_truncated_rollouts_do_not_teach(tokenizer: Tokenizer, tmp_path: Any) -> None:
    model = model_of("llama", tokenizer)
    sampling = Sampling(prompts=3, group=2, max_tokens=2, max_prompt=16)
    config = RLConfig(out=tmp_path, model=tmp_path, sampling=sampling)
    flat = [Rollout([0, 30], [31, 32], [-1.0, -1.0], "length"), Rollout([0, 30], [31], [-1.0], "length")]
    optimizer = Optimizer(model.named_parameters(), Optim("adamw"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    figures = Updater(config, model, optimizer, contextlib.nullcontext).step(flat, [1.0, -1.0], 1.0, False)
    assert figures.tokens == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_micro_batches_do_not_change_the_update(tokenizer: Tokenizer, tmp_path: Any) -> None:
    results = []
    for micro in (64, 4096):
        model = model_of("deepseek", tokenizer)
        sampling = Sampling(prompts=3, group=4, max_tokens=8, max_prompt=16)
        config = RLConfig(
            out=tmp_path, model=tmp_path, sampling=sampling, micro_tokens=micro, keep_truncated=True
        )
        flat = [r for g in drawn(model, tokenizer, sampling) for r in g]
        optimizer = Optimizer(model.named_parameters(), Optim("adamw", 1e-3, 1e-3, 1e-3, 1e-3))
        updater = Updater(config, model, optimizer, contextlib.nullcontext)
        figures = updater.step(flat, [0.5, -0.5] * 6, 1.0, first=True)
        results.append((figures.norm, figures.entropy))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert all(math.isfinite(x) for r in results for x in r)


@pytest.mark.parametrize("family", ["deepseek", "llama"])
def test_a_prompt_computed_once_for_its_group_gives_the_same_scores_and_gradients(
    tokenizer: Tokenizer, family: str
) -> None:
    model = model_of(family, tokenizer)
    flat = [r for g in drawn(model, tokenizer, Sampling(max_tokens=12, max_prompt=16)) for r in g]
    alone = [Row((i,), len(r.prompt_ids) + len(r.ids) - 1) for i, r in enumerate(flat)]
    shared = lay_out(flat)
    assert len(shared) == 3
    found = []
    for rows in (alone, shared):
        batch = Batch.of(flat, [0.0] * len(flat), rows)
        scores = score(model, batch, 1.0, contextlib.nullcontext, True).logprobs
        order = [i for row in rows for i in row.numbers]
        by_number = torch.zeros(len(flat), 12)
        by_number = by_number.index_put(
            (torch.tensor(order),), torch.nn.functional.pad(scores, (0, 12 - scores.shape[1]))
        )
        (by_number * torch.linspace(-1, 1, 12)).sum().backward()
        found.append((by_number.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_rows_hold_every_rollout_once_and_are_bounded() -> None:
    rollouts = [Rollout([0, i % 2], list(range(1, 60)), [0.0] * 59) for i in range(10)]
    rows = lay_out(rollouts)
    assert sorted(i for r in rows for i in r.numbers) == list(range(10))
    assert all(len({tuple(rollouts[i].prompt_ids) for i in r.numbers}) == 1 for r in rows)
    assert max(r.length for r in rows) <= 192
