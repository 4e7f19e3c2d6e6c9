"""The loss of a step: each part once, the same however the step is cut, gradients of every path as by its definition."""

import dataclasses
from typing import Any

import pytest
import torch

from rorqual.data.loader import Batch
from rorqual.model.attend import Causal
from rorqual.model.moe import Experts, Routing
from rorqual.model.transformer import Transformer
from rorqual.train.batch import Lesson
from rorqual.train.loss import cross_entropy_reference
from rorqual.train.objective import objective
from rorqual.train.shape import Shape


def model_of(**changes: Any) -> Transformer:
    small = {"depth": 3, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 2}
    config = Shape(**{**small, **changes}).model(128, 32)
    model = Transformer(dataclasses.replace(config, initializer_range=0.1)).init_weights(0).train()
    return model.requires_grad_(True)


def batch_of(rows: int = 4, length: int = 16, seed: int = 0) -> Batch:
    """Rows of two or three packed documents."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (rows, length + 1), generator=generator)
    documents = torch.zeros(rows, length + 1, dtype=torch.int32)
    for r in range(rows):
        documents[r, 3 + 2 * r :] += 1
        documents[r, 11 + r :] += 1
    starts = torch.cat((torch.ones(rows, 1, dtype=torch.bool), documents[:, 1:] != documents[:, :-1]), 1)
    at = torch.arange(length + 1).expand(rows, -1)
    positions = at - torch.where(starts, at, 0).cummax(1).values
    return Batch(ids, positions, documents)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_the_balance_loss_is_counted_once_with_its_coefficient() -> None:
    """huggingface/trl#4070, jingyaogong/minimind#140: total == language + .01 * balance, to 1e-6."""
    model = model_of(balance_alpha=0.01)
    lesson = Lesson.of(batch_of(), masks=True)
    loss, routing = objective(model, lesson, float(lesson.weights.sum()))
    assert routing is not None
    assert loss.total.item() == pytest.approx(loss.language.item() + 0.01 * loss.balance.item(), abs=1e-6)
    assert loss.balance.item() > 1.9  # two layers of experts, at least about 1 each
    with_none, _ = objective(model_of(balance_alpha=0.0), lesson, float(lesson.weights.sum()))
    assert with_none.total.item() == pytest.approx(loss.language.item(), abs=1e-6)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    """Also where they hold unequal numbers of targets: the mean is over the step's tokens."""
    model = model_of(mtp=1)
    whole = Lesson.of(batch_of(), masks=True)
    whole.weights[0, 3:] = 0
    tokens = float(whole.weights.sum())
    objective(model, whole, tokens, mtp_weight=0.3)[0].total.backward()
    want = gradients(model)
    model.zero_grad()
    for start in (0, 2):
        rows = slice(start, start + 2)
        assert whole.documents is not None
        part = Lesson(whole.ids[rows], whole.positions[rows], whole.documents[rows], whole.weights[rows])
        objective(model, part, tokens, 0.5, mtp_weight=0.3)[0].total.backward()
    for name, got in gradients(model).items():
        torch.testing.assert_close(got, want[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["deepseek", "llama"])
def test_gradients_equal_those_of_the_plain_twins(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention, experts and MTP: the training path against plain attention, a loop over experts and torch's
    cross entropy."""
    model = (
        model_of(mtp=1)
        if family == "deepseek"
        else model_of(family="llama", mtp=1, experts=16, experts_per_token=3)
    )
    lesson = Lesson.of(batch_of(), masks=True)
    tokens = float(lesson.weights.sum())
    objective(model, lesson, tokens, mtp_weight=0.3)[0].total.backward()
    got = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(Experts, "forward", lambda self, x, ids, w, load: self.forward_reference(x, ids, w))
    plain_loss(model, lesson, tokens).backward()
    for name, want in gradients(model).items():
        scale = want.abs().max().clamp(min=1e-6)
        assert (got[name] - want).abs().max() / scale < 1e-4, name


def plain_loss(model: Transformer, lesson: Lesson, tokens: float) -> torch.Tensor:
    """Language, balance and MTP losses by their definitions."""
    routing = Routing()
    h = model(lesson.inputs, lesson.positions, Causal(lesson.documents, plain=True), routing)
    head, flat = model.lm_head.weight, lesson.weights.flatten()
    total = cross_entropy_reference(h.flatten(0, 1), head, lesson.targets.flatten(), flat) / tokens
    assert lesson.documents is not None
    short = lesson.documents[:, :-1]
    further = model.predict_further(
        0, h[:, :-1], lesson.ids[:, 1:-1], lesson.positions[:, :-1], Causal(short, plain=True), routing
    )
    both = (lesson.weights[:, :-1] * lesson.weights[:, 1:]).flatten()  # t+1 and t+2 of the same document
    mtp = cross_entropy_reference(further.flatten(0, 1), head, lesson.ids[:, 2:].flatten(), both) / tokens
    return total + routing.balance_loss + 0.3 * mtp


def test_a_target_beyond_its_document_does_not_count() -> None:
    batch = batch_of()
    lesson = Lesson.of(batch, masks=True)
    crossing = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert torch.equal(lesson.weights == 0, crossing)
    assert Lesson.of(batch, masks=False).weights.all()
    model = model_of()
    losses = []
    for _ in range(2):
        losses.append(objective(model, lesson, 1.0)[0].language.item())
        ids = lesson.ids.clone()
        ids[:, 1:][crossing] = 5  # the first token of the next document: seen by its own document only
        lesson = dataclasses.replace(lesson, ids=ids, weights=lesson.weights * ~crossing)
    model2, alone = model_of(), batch_of()
    first = alone.document_ids[0] == 0
    part = Lesson(
        alone.ids[:1, first], alone.positions[:1, first][:, :-1], None, torch.ones(1, int(first.sum()) - 1)
    )
    only = Lesson.of(batch_of(), masks=True)
    only.weights[:] = 0
    only.weights[0, : int(first.sum()) - 1] = 1
    apart, packed = objective(model2, part, 1.0)[0].language, objective(model2, only, 1.0)[0].language
    assert apart.item() == pytest.approx(packed.item(), rel=1e-5)


def test_recompute_changes_neither_gradients_nor_counts() -> None:
    """pytorch/torchtitan#1593: counts doubled by recomputation."""
    lesson = Lesson.of(batch_of(), masks=True)
    found = []
    for recompute in (False, True):
        model = model_of(mtp=1)
        loss, routing = objective(model, lesson, 10.0, mtp_weight=0.3, recompute=recompute)
        loss.total.backward()
        assert routing is not None
        found.append((gradients(model), routing.load))
    assert set(found[0][1]) == {1, 2, 3}  # the MTP module's experts are layer 3
    for layer, load in found[0][1].items():
        assert torch.equal(load, found[1][1][layer])
    for name, g in found[0][0].items():
        torch.testing.assert_close(g, found[1][0][name], atol=1e-6, rtol=1e-5, msg=name)


def test_routing_is_float32_under_autocast() -> None:
    """pytorch/torchtitan#2389."""
    model = model_of()
    seen = []
    model.layers[1].mlp.router.register_forward_hook(
        lambda _m, _i, out: seen.append((out[1].dtype, out[2].dtype))
    )
    lesson = Lesson.of(batch_of(), masks=True)
    with torch.autocast("cpu", torch.bfloat16):
        objective(model, lesson, 10.0)[0].total.backward()
    assert seen == [(torch.float32, torch.float32)]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
