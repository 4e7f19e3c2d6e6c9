"""Muon and AdamW against their definitions, torch's own AdamW and the singular value decomposition."""

import dataclasses

import pytest
import torch
from torch import nn

from rorqual.errors import RunError
from rorqual.train import muon
from rorqual.train.config import Optim
from rorqual.train.optim import Optimizer, adamw_reference, clip_, flops, kind, table_reference


def parameters(*shapes: tuple[int, ...], prefix: str = "layers.0.w") -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}{i}", nn.Parameter(torch.randn(*shape))) for i, shape in enumerate(shapes)]


def set_gradients(named: list[tuple[str, nn.Parameter]]) -> None:
    for _, p in named:
        p.grad = torch.randn_like(p)


def test_adamw_equals_torchs() -> None:
    """To 1e-6 over ten steps, with a rate that changes and weight decay on what is decayed."""
    config = Optim("adamw", lr=0.01, embedding_lr=0.01, head_lr=0.01, vector_lr=0.01)
    ours = [*parameters((6, 5), (4, 3)), ("embed_tokens.weight", nn.Parameter(torch.randn(7, 5)))]
    vectors = [("norm.weight", nn.Parameter(torch.randn(5)))]
    theirs = [nn.Parameter(p.detach().clone()) for _, p in ours]
    their_vectors = [nn.Parameter(p.detach().clone()) for _, p in vectors]
    groups = [{"params": theirs, "weight_decay": 0.1}, {"params": their_vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    optimizer = Optimizer([*ours, *vectors], config)
    for step in range(10):
        set_gradients([*ours, *vectors])
        for (_, p), q in zip([*ours, *vectors], [*theirs, *their_vectors], strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        share = 1 / (1 + step)
        for group in reference.param_groups:
            group["lr"] = 0.01 * share
        optimizer.step(share)
        reference.step()
    for (name, p), q in zip([*ours, *vectors], [*theirs, *their_vectors], strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6, msg=name)


def test_adamw_equals_its_definition() -> None:
    named = parameters((3, 4))
    p = named[0][1]
    want, first, second = p.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    optimizer = Optimizer(named, Optim("adamw", lr=0.02))
    for step in range(1, 5):
        set_gradients(named)
        assert p.grad is not None
        want, first, second = adamw_reference(want, p.grad, first, second, step, 0.02, (0.9, 0.95), 0.1)
        optimizer.step(1.0)
    torch.testing.assert_close(p.detach(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (6, 17), (17, 6)])
def test_orthogonal_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """U V^T of the singular value decomposition; Polar Express leaves singular values within about 0.7 and 1.2."""
    g = torch.randn(3, *shape)
    got = muon.orthogonal(g)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    assert torch.linalg.svdvals(got).sub(1).abs().max() < 0.3
    # the same singular vectors: U^T got V is diagonal
    inner = u.mT @ got @ vh.mT
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3
    assert inner.diagonal(dim1=-2, dim2=-1).min() > 0
    assert s.min() > 0


@pytest.mark.parametrize("shape", [(32, 32), (16, 32), (8, 32), (48, 32), (4, 200)])
def test_bfloat16_does_not_run_away(shape: tuple[int, int]) -> None:
    """Rounding lifts singular values above 1, where the polynomials grow: without a margin 14,000 came out."""
    noise = torch.randn(64, *shape)
    spiked = noise + 3 * torch.randn(64, shape[0], 1) @ torch.randn(64, 1, shape[1])
    even = torch.linalg.qr(torch.randn(64, max(shape), min(shape)))[0]
    for g in (noise, spiked, even if shape[0] >= shape[1] else even.mT):
        got = muon.orthogonal(g, torch.bfloat16).float()
        assert torch.linalg.svdvals(got).max() < 1.25
        wide = muon.orthogonal(g)
        assert torch.nn.functional.cosine_similarity(got.flatten(1), wide.flatten(1)).min() > 0.98


@pytest.mark.parametrize("even_rows", [True, False])
def test_muon_on_a_batch_equals_its_definition_on_each(even_rows: bool) -> None:
    config = Optim(lr=0.02, momentum_warmup=0, even_rows=even_rows)
    named = parameters((6, 10), (6, 10), (10, 6))
    rates = muon.Rates(0.02 * 0.5, 0.95, 0.1, even_rows, torch.float32)
    want = [(p.detach().clone(), torch.zeros_like(p), torch.zeros(p.shape[0], 1)) for _, p in named]
    optimizer = Optimizer(named, config)
    for _ in range(3):
        set_gradients(named)
        want = [
            muon.muon_reference(q, p.grad, m, r, rates) for (_, p), (q, m, r) in zip(named, want, strict=True)
        ]
        optimizer.step(0.5)
    for (name, p), (q, _, _) in zip(named, want, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-5, rtol=1e-5, msg=name)


def test_experts_gate_and_up_are_two_matrices() -> None:
    """Fused [E, 2f, D]: the update is that of 2 E matrices of [f, D]."""
    fused = nn.Parameter(torch.randn(2, 8, 6))
    apart = [nn.Parameter(half.clone()) for expert in fused.detach() for half in expert.chunk(2)]
    named = [("layers.1.mlp.experts.gate_up_proj", fused)]
    others = [(f"layers.1.w{i}", p) for i, p in enumerate(apart)]
    set_gradients(named)
    assert fused.grad is not None
    for p, g in zip(apart, [half for expert in fused.grad for half in expert.chunk(2)], strict=True):
        p.grad = g.clone()
    for found in (named, others):
        Optimizer(found, Optim()).step(1.0)
    got = torch.stack([half for expert in fused.detach() for half in expert.chunk(2)])
    torch.testing.assert_close(got, torch.stack([p.detach() for p in apart]), atol=1e-5, rtol=1e-5)


def test_update_has_the_size_of_adamws() -> None:
    """0.2 RMS whatever the shape (arXiv 2502.16982, section 2.2)."""
    for shape in ((16, 16), (16, 64), (64, 16)):
        named = parameters(shape)
        before = named[0][1].detach().clone()
        set_gradients(named)
        Optimizer(named, Optim(lr=1.0, weight_decay=0.0)).step(1.0)
        rms = (named[0][1].detach() - before).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2, rel=0.15)


def test_weight_decay_acts_only_where_it_agrees_with_the_update() -> None:
    p, grad = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    rates = muon.Rates(0.1, 0.0, 0.5, False, torch.float32)
    new, _, _ = muon.muon_reference(p, grad, torch.zeros(1, 2), torch.zeros(1, 1), rates)
    update = muon.orthogonal(grad[None])[0]
    step = 0.2 * 2**0.5 * 0.1 * update
    # the first weight and its update have one sign: it decays by 0.1 * 0.5; the second moves away from 0: it does not
    torch.testing.assert_close(new, p - step - torch.tensor([[0.05, 0.0]]), atol=1e-6, rtol=1e-6)


def test_kinds() -> None:
    matrix, vector = torch.zeros(4, 4), torch.zeros(4)
    want = {
        "embed_tokens.weight": "embedding",
        "ngram.weight": "table",
        "induction.weight": "embedding",
        "induction.scale": "vector",
        "value_embeddings.1.weight": "embedding",
        "lm_head.weight": "head",
        "layers.0.self_attn.o_proj.weight": "matrix",
        "layers.1.mlp.router.weight": "vector",
        "x0_mix": "vector",
    }
    assert {name: kind(name, matrix) for name in want} == want
    assert kind("layers.0.input_layernorm.weight", vector) == "vector"
    assert kind("smear_gate.weight", torch.zeros(1, 4)) == "vector"


def test_state_comes_back_in_float32_and_refuses_another_model() -> None:
    """huggingface/nanotron#245: moments loaded in bfloat16."""
    named = parameters((4, 6), (5,))
    optimizer = Optimizer(named, Optim())
    for _ in range(2):
        set_gradients(named)
        optimizer.step(1.0)
    state = optimizer.state_dict()
    assert {t.dtype for n, t in state.items() if n != "count"} == {torch.float32}
    again = Optimizer(named, Optim())
    again.load_state_dict(state)
    assert again.count == 2
    assert all(torch.equal(again.state_dict()[n], t) for n, t in state.items())
    with pytest.raises(RunError, match="does not fit"):
        Optimizer(parameters((4, 7), (5,)), Optim()).load_state_dict(state)
    with pytest.raises(RunError, match="does not fit"):
        Optimizer(named, Optim("adamw")).load_state_dict(state)


def test_clipping_bounds_the_norm_and_leaves_what_is_not_finite() -> None:
    named = parameters((3, 3), (4,))
    set_gradients(named)
    params = [p for _, p in named]
    before = torch.cat([p.grad.flatten() for p in params]).norm().item()
    assert clip_(params, 0.0) == pytest.approx(before)
    assert clip_(params, 0.5) == pytest.approx(before)
    assert torch.cat([p.grad.flatten() for p in params]).norm().item() == pytest.approx(0.5, rel=1e-4)
    params[0].grad[0, 0] = float("inf")
    kept = params[1].grad.clone()
    assert clip_(params, 0.5) == float("inf")
    assert torch.equal(params[1].grad, kept)


def test_update_flops_by_hand() -> None:
    """Muon: 5 steps of two products r x r x c each way and one r x r x r, and 19 operations an element; AdamW: 14."""
    assert flops(Optimizer(parameters((4, 6)), Optim()), 8) == 5 * (2 * 4 * 4 * 6 * 2 + 2 * 4**3) + 19 * 24
    assert flops(Optimizer(parameters((4, 6)), Optim("adamw")), 8) == 14 * 24


@pytest.mark.parametrize("sparse", [True, False])
def test_a_table_equals_its_definition(sparse: bool) -> None:
    """Rows that a batch reads twice, one whose gradients cancel out, and rows that it does not read."""
    table = nn.Parameter(torch.randn(9, 4))
    optimizer = Optimizer([("ngram.weight", table)], Optim(table_lr=0.5, table_memory=0.9, clip=0.7))
    want, squares = table.detach().clone(), torch.zeros(9, 4)
    for step in range(4):
        ids = torch.tensor([1, 5, 1, 7, 7, step])
        weights = torch.randn(6, 4)
        weights[4] = -weights[3]
        (nn.functional.embedding(ids, table, sparse=sparse) * weights).sum().backward()
        assert table.grad is not None
        assert table.grad.is_sparse == sparse
        grad = table.grad.to_dense() if sparse else table.grad.clone()
        norm = clip_([table], 0.7)
        assert norm == pytest.approx(float(grad.norm()), rel=1e-6)
        grad *= 0.7 / (norm + 1e-6) if norm > 0.7 else 1
        want, squares = table_reference(want, grad, squares, 0.5 * 0.8, 0.9)
        optimizer.step(0.8)
        table.grad = None
    torch.testing.assert_close(table.detach(), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(optimizer.state_dict()["ngram.weight.squares"], squares, atol=1e-6, rtol=1e-6)
    assert (squares[8] == 0).all()


def test_a_tables_update_costs_what_a_batch_reads() -> None:
    named = [("ngram.weight", nn.Parameter(torch.empty(1000, 4, device="meta")))]
    assert flops(Optimizer(named, Optim()), 10) == 10 * 4 * 8
    assert flops(Optimizer(named, Optim()), 5000) == 1000 * 4 * 8


def test_even_rates_leave_none_at_its_default() -> None:
    rates = [f.name for f in dataclasses.fields(Optim) if f.name == "lr" or f.name.endswith("_lr")]
    assert len(rates) == 5
    assert all(getattr(Optim.even("adamw", 1e-5), name) == 1e-5 for name in rates)
