"""Routers by hand and from public reports; experts against the plain loop; balance."""

import dataclasses

import pytest
import torch

from rorqual.kernels.grouped import grouped_linear, grouped_linear_reference
from rorqual.model.attend import Causal
from rorqual.model.moe import Experts, MoE, Router, Routing, balance_loss, update_selection_bias


def router_with(config, logits: torch.Tensor) -> Router:
    """A router whose logits for the unit vectors are the rows of `logits` [N, E]."""
    router = Router(dataclasses.replace(config, hidden_size=logits.shape[0]))
    router.weight.data = logits.T.clone()
    return router


def test_banned_groups_never_win_with_negative_biases(make_config) -> None:
    """huggingface/transformers#45440: filling with 0 would choose experts 2 and 3."""
    config = make_config(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    router = Router(config)
    router.e_score_correction_bias = torch.tensor([-0.5, -0.5, -0.9, -0.9])
    chosen = router.choose(torch.tensor([[0.1, 0.2, 0.05, 0.04]]))
    assert set(chosen[0].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("norm", "scale_after_norm", "want"),
    [(False, True, [8.0, 4.0]), (True, True, [10.667, 5.333]), (True, False, [0.667, 0.333])],
)
def test_normalising_and_scaling(make_config, norm: bool, scale_after_norm: bool, want: list[float]) -> None:
    """sgl-project/sglang-jax#1282: probabilities .5 and .25 of four, factor 16."""
    config = make_config(
        n_routed_experts=4,
        num_experts_per_tok=2,
        architecture="DeepseekV2ForCausalLM",
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=norm,
        scale_after_norm=scale_after_norm,
        routed_scaling_factor=16.0,
    )
    router = router_with(config, torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log())
    ids, weights, _ = router(torch.ones(1, 1))
    assert dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
        {0: want[0], 1: want[1]}, abs=1e-3
    )


def test_group_limited_greedy_takes_the_groups_of_the_best_experts(make_config) -> None:
    """DeepSeek-V2, section 2.2.2: a group's score is its best expert's."""
    config = make_config(
        architecture="DeepseekV2ForCausalLM",
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=1,
        norm_topk_prob=False,
    )
    chosen = Router(config).choose(torch.tensor([[0.4, 0.01, 0.25, 0.24, 0.05, 0.05]]))
    assert set(chosen[0].tolist()) == {0, 1}


def test_v3_groups_are_scored_by_their_two_best(make_config) -> None:
    config = make_config(n_routed_experts=6, num_experts_per_tok=2, n_group=3, topk_group=1)
    router = Router(config)
    router.e_score_correction_bias.zero_()
    chosen = router.choose(torch.tensor([[0.9, 0.01, 0.6, 0.5, 0.05, 0.05]]))
    assert set(chosen[0].tolist()) == {2, 3}


def test_the_bias_chooses_but_does_not_weigh(make_config) -> None:
    config = make_config(
        n_routed_experts=4, num_experts_per_tok=1, norm_topk_prob=False, routed_scaling_factor=1.0
    )
    router = router_with(config, torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
    router.e_score_correction_bias = torch.tensor([9.0, 0.0, 0.0, 0.0])
    ids, weights, _ = router(torch.ones(1, 1))
    assert ids.item() == 0
    assert weights.item() == pytest.approx(0.5)  # sigmoid(0), bias left out


def test_routing_is_float32_in_a_bfloat16_model(make_model) -> None:
    """pytorch/torchtitan#2389 and sgl-project/sglang#37133: 238 biases near 7 are 9 different ones in
    bfloat16."""
    bias = torch.linspace(6.817, 7.063, 238)
    assert bias.to(torch.bfloat16).unique().numel() == 9
    model = make_model(n_routed_experts=238, num_experts_per_tok=8)
    router = model.layers[1].mlp.router
    router.e_score_correction_bias.copy_(bias)
    model.to(torch.bfloat16)
    assert torch.equal(router.e_score_correction_bias, bias)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights, scores = router(torch.randn(3, 48, dtype=torch.bfloat16))
    assert weights.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("width", [24, 22])  # 22 floats are not a multiple of 16 bytes: the loop takes over
@pytest.mark.parametrize("n", [1, 40])
def test_experts_equal_the_plain_loop_with_gradients(make_config, width: int, n: int) -> None:
    config = make_config(moe_intermediate_size=width)
    experts = Experts(config)
    for p in experts.parameters():
        p.data.normal_(0, 0.2)
    x = torch.randn(n, 48, requires_grad=True)
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(n)])
    weights = torch.rand(n, 2, requires_grad=True)
    grads = []
    outs = []
    for fast in (True, False):
        out = (
            experts(x, ids, weights, torch.bincount(ids.flatten(), minlength=8))
            if fast
            else experts.forward_reference(x, ids, weights)
        )
        outs.append(out)
        leaves = [x, weights, *experts.parameters()]
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 1, 48)).sum(), leaves))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_equals_its_loop_with_empty_experts(dtype: torch.dtype) -> None:
    x, w = torch.randn(10, 32).to(dtype), torch.randn(4, 16, 32).to(dtype)
    ends = torch.tensor([0, 7, 7, 10], dtype=torch.int32)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        grouped_linear(x, w, ends), grouped_linear_reference(x, w, ends), atol=tolerance, rtol=tolerance
    )


def test_neighbours_do_not_change_a_token(make_model) -> None:
    moe = make_model().layers[1].mlp
    x = torch.randn(9, 48)
    with torch.no_grad():
        together = moe(x)
        for i in range(9):
            torch.testing.assert_close(moe(x[i : i + 1])[0], together[i], atol=1e-6, rtol=1e-5)


def test_balance_loss_by_hand() -> None:
    """jingyaogong/minimind#290: even routing gives exactly alpha; everybody on two of eight experts gives 4
    alpha."""
    even = torch.full((64, 8), 1 / 8)
    ids = torch.arange(128).remainder(8).view(64, 2)
    assert 0.01 * balance_loss(even, ids).item() == pytest.approx(0.01, abs=1e-7)
    scores = torch.zeros(64, 8)
    scores[:, :2] = 0.5
    lopsided = torch.tensor([[0, 1]]).expand(64, 2)
    assert 0.01 * balance_loss(scores, lopsided).item() == pytest.approx(0.04, abs=1e-7)


def test_sequence_wise_loss_sees_each_row(make_config) -> None:
    """Two rows, each on its own experts: balanced over the batch, unbalanced in every row."""
    scores = torch.zeros(8, 4)
    scores[:4, :2] = 0.5
    scores[4:, 2:] = 0.5
    ids = torch.tensor([[0, 1]] * 4 + [[2, 3]] * 4)
    assert balance_loss(scores, ids, rows=1).item() == pytest.approx(1)
    assert balance_loss(scores, ids, rows=2).item() == pytest.approx(2)


def test_selection_bias_moves_to_the_mean_and_keeps_its_sum() -> None:
    """pytorch/torchtitan#1506."""
    bias = torch.zeros(2)
    update_selection_bias(bias, torch.tensor([3, 1]), 0.3)
    assert bias.tolist() == pytest.approx([-0.3, 0.3])
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        update_selection_bias(bias, torch.randint(0, 9, (2,), generator=generator), 0.01)
    assert bias.sum().item() == pytest.approx(0, abs=1e-5)


def test_recomputing_counts_each_token_once_and_mtp_is_seen(make_model) -> None:
    """pytorch/torchtitan#1593, #3686, #4494."""
    model = make_model(num_nextn_predict_layers=1, aux_loss_alpha=0.01).train()
    ids, positions = torch.randint(0, 160, (2, 9)), torch.arange(9).expand(2, 9)
    records = []
    for recompute in (False, True):
        routing = Routing()
        h = model(ids, positions, Causal(), routing, recompute=recompute)
        further = model.predict_further(0, h, ids, positions, Causal(), routing)
        (h.sum() + further.sum() + routing.balance_loss).backward()
        records.append(routing)
    for routing in records:
        assert set(routing.load) == {1, 2, 3}
        assert all(int(load.sum()) == 2 * 9 * 2 for load in routing.load.values())
    assert all(torch.equal(records[0].load[i], records[1].load[i]) for i in (1, 2, 3))
    assert records[0].balance_loss.item() == pytest.approx(records[1].balance_loss.item())


def test_replayed_choices_are_the_ones_used_and_weights_keep_their_gradient(make_model) -> None:
    moe: MoE = make_model().layers[1].mlp
    x = torch.randn(5, 48)
    forced = torch.tensor([[6, 7]]).expand(5, 2)
    routing = Routing(replay={1: forced})
    out = moe(x, routing)
    assert torch.equal(routing.chosen[1], forced)
    out.sum().backward()
    grad = moe.router.weight.grad
    assert grad is not None
    assert grad[6:].abs().sum() > 0
    assert grad[:6].abs().sum() == 0
