"""Sampled softmax against the loss over the whole vocabulary."""

from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import cost
from rorqual.model.transformer import Transformer
from rorqual.parallel.mesh import Mesh
from rorqual.train.batch import Lesson
from rorqual.train.candidates import LEAST, Candidates, share_of
from rorqual.train.config import TrainConfig
from rorqual.train.loss import cross_entropy, cross_entropy_reference
from rorqual.train.objective import objective
from rorqual.train.run import check_sampling
from rorqual.train.shape import Shape

V = 64


def shape(**more: Any) -> ModelConfig:
    return Shape("llama", depth=1, width=32, heads=2, **more).model(128, 32)


def test_targets_are_among_them_and_the_others_stand_for_all_others() -> None:
    targets = torch.tensor([[3, 9, 3], [40, 3, 9]])
    drawn = Candidates.draw(targets, V, 0.5, seed=1)
    assert len(drawn.ids) == 32
    assert torch.equal(drawn.ids[drawn.places[targets]], targets)
    assert (drawn.places >= 0).sum() == 32
    stood = dict(zip(drawn.ids.tolist(), drawn.biases.exp().tolist(), strict=True))
    assert [stood[t] for t in (3, 9, 40)] == [1, 1, 1]
    assert sum(stood.values()) == pytest.approx(V)


def test_the_sum_over_the_vocabulary_is_right_on_average() -> None:
    logits, targets = torch.randn(V) * 2, torch.tensor([5, 6, 7])
    sums = []
    for seed in range(4000):
        drawn = Candidates.draw(targets, V, 0.25, seed)
        sums.append(float((logits[drawn.ids] + drawn.biases).exp().sum()))
    mean = torch.tensor(sums).mean().item()
    assert log(mean) == pytest.approx(
        float(logits.logsumexp(0)), abs=4 * torch.tensor(sums).std().item() / 63 / mean
    )
    assert log(mean) > sum(map(log, sums)) / len(sums)  # the loss itself errs to the low side


def test_a_batch_of_many_tokens_gets_more_than_its_share() -> None:
    drawn = Candidates.draw(torch.arange(40), V, 0.5, seed=0)
    assert len(drawn.ids) == 40 + 24 // LEAST
    assert drawn.biases.max().item() == pytest.approx(log(LEAST))
    whole = Candidates.draw(torch.arange(V), V, 0.5, seed=0)
    assert torch.equal(whole.ids, torch.arange(V))
    assert not whole.biases.any()


def test_the_seed_decides() -> None:
    targets = torch.tensor([1, 2])
    a, b, c = (Candidates.draw(targets, V, 0.5, seed).ids for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_value_and_gradients_equal_the_definition() -> None:
    h, head, targets, weights = (
        torch.randn(70, 12),
        torch.randn(V, 12),
        torch.randint(0, 9, (70,)),
        torch.rand(70),
    )
    drawn = Candidates.draw(targets, V, 0.4, seed=0)
    results = []
    for op in (cross_entropy, cross_entropy_reference):
        a, b = h.clone().requires_grad_(), head.clone().requires_grad_()
        value = op(a, b[drawn.ids], drawn.places[targets], weights, biases=drawn.biases)
        value.backward()
        results.append((value.detach(), a.grad, b.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    untouched = torch.ones(V, dtype=torch.bool)
    untouched[drawn.ids] = False
    assert not results[0][2][untouched].any()  # type: ignore[index]


def test_the_objective_over_all_tokens_is_the_plain_one() -> None:
    model = Transformer(shape()).init_weights(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    lesson = Lesson(ids, torch.arange(8).expand(2, 8), None, torch.ones(2, 8))
    drawn = Candidates.draw(lesson.targets, model.config.vocab_size, 1.0, seed=0)
    plain, sampled = (objective(model, lesson, 16.0, candidates=c)[0].language for c in (None, drawn))
    torch.testing.assert_close(plain, sampled)
    few = Candidates.draw(lesson.targets, model.config.vocab_size, 0.3, seed=0)
    assert exp(float(objective(model, lesson, 16.0, candidates=few)[0].language)) > 1


def test_what_it_spares() -> None:
    bill = cost(shape())
    c = bill.config
    assert bill.train_flops(8) - bill.train_flops(8, 0.25) == pytest.approx(
        6 * 0.75 * c.vocab_size * c.hidden_size
    )


def test_the_share_of_a_run_is_that_of_the_logits_it_computed() -> None:
    assert share_of({"tokens": 10}, V) == 1
    assert share_of({"tokens": 10, "logits": 10 * 48}, V) == 0.75


def test_refused() -> None:
    with pytest.raises(ConfigError, match="softmax_share=0"):
        TrainConfig(softmax_share=0.0)
    config = TrainConfig(out=Path("x"), softmax_share=0.5)
    check_sampling(config, shape(), Mesh())
    with pytest.raises(ConfigError, match="logit_softcap"):
        check_sampling(config, shape(logit_softcap=15.0), Mesh())
