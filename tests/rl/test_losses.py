"""Advantages and losses: by hand, by public bug reports, and by the numbers of TRL (tests/rl/trl_losses.json)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.errors import ConfigError
from rorqual.rl.losses import (
    LossConfig,
    PolicyLoss,
    Totals,
    advantages,
    aggregate,
    correction,
    counting,
    k3,
    policy_loss,
)

TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
X = {name: torch.tensor(values) for name, values in TRL["inputs"].items()}
CASES: dict[str, LossConfig] = {
    "dapo": LossConfig(),
    "grpo": LossConfig(kind="grpo"),
    "dr_grpo": LossConfig(kind="dr_grpo"),
    "cispo": LossConfig(kind="cispo", cispo_max=1.2),
    "dapo sequence": LossConfig(ratio="sequence"),
    "grpo sequence": LossConfig(kind="grpo", ratio="sequence"),
    "dapo with divergence": LossConfig(beta=0.04),
    "dapo with correction": LossConfig(correction="truncate"),
}


def run(name: str, new: torch.Tensor, rows: slice = slice(None)) -> PolicyLoss:
    c = CASES[name]
    weight = X["weight"][rows] if c.correction != "none" else None
    reference = X["reference"][rows] if c.beta else None
    totals = Totals.of(X["mask"], 8)
    part = X["old"][rows], X["mask"][rows], X["advantage"][rows]
    return policy_loss(new[rows], *part, totals, c, reference, weight)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trls(name: str) -> None:
    """Expected values: TRL 1.16.0's GRPOTrainer._compute_loss on the same tensors (tests/oracle/test_trl.py)."""
    new = X["new"].clone().requires_grad_()
    found = run(name, new)
    found.total.backward()
    want: dict[str, Any] = TRL["expected"][name]
    assert float(found.total.detach()) == pytest.approx(want["loss"], abs=1e-6)
    torch.testing.assert_close(new.grad, torch.tensor(want["gradient"]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_cut_into_pieces_has_the_loss_of_the_whole(name: str) -> None:
    """Token means are over the batch, not the micro-batch."""
    whole = run(name, X["new"]).total
    pieces = [run(name, X["new"], rows).total for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(pieces), whole)


def test_normalisations_by_hand() -> None:
    """huggingface/trl#3138: rollout A of 2 tokens at 1.0, B of 4 at 0.5: per rollout 0.75, per token 4/6, fixed length 8
    4/16."""
    each = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.5] * 4])
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0] * 4])
    totals = Totals.of(mask, 8)
    assert float(aggregate(each, mask, totals, "grpo")) == pytest.approx(0.75)
    assert float(aggregate(each, mask, totals, "dapo")) == pytest.approx(4 / 6)
    assert float(aggregate(each, mask, totals, "dr_grpo")) == pytest.approx(0.25)


def test_truncated_rollouts_leave_numerator_and_denominator() -> None:
    """huggingface/trl#6369: lengths 4 (kept) and 8 (truncated) at 1 a token: 1.0, not 0.333; none kept: 0, finite."""
    mask = torch.tensor([[1.0] * 4 + [0.0] * 4, [1.0] * 8])
    for kind in ("dapo", "grpo"):
        kept = counting(mask, torch.tensor([False, True]))
        assert float(aggregate(torch.ones(2, 8), kept, Totals.of(kept, 8), kind)) == pytest.approx(1.0)
        none = counting(mask, torch.tensor([True, True]))
        assert float(aggregate(torch.ones(2, 8), none, Totals.of(none, 8), kind)) == 0.0


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    centred = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]])
    torch.testing.assert_close(advantages(rewards), centred)
    group = centred / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages(rewards, scale="group"), group)
    torch.testing.assert_close(advantages(rewards, scale="batch"), centred / (rewards.std() + 1e-4))


def test_what_the_grader_could_not_judge_is_out_of_the_statistics() -> None:
    """macanderson/stella#3264: a grader that failed is no wrong answer."""
    rewards = torch.tensor([[1.0, 0.0, 0.0]])
    scored = torch.tensor([[True, True, False]])
    torch.testing.assert_close(advantages(rewards, scored), torch.tensor([[0.5, -0.5, 0.0]]))
    assert torch.equal(advantages(rewards, torch.zeros(1, 3, dtype=torch.bool)), torch.zeros(1, 3))


def test_a_group_of_equals_teaches_nothing() -> None:
    for scale in ("none", "group", "batch"):
        assert torch.equal(advantages(torch.ones(2, 4), scale=scale), torch.zeros(2, 4))


def test_the_first_step_on_policy_has_ratio_1_and_the_plain_policy_gradient() -> None:
    new = X["new"].clone().requires_grad_()
    totals = Totals.of(X["mask"], 8)
    loss = policy_loss(new, X["new"], X["mask"], X["advantage"], totals, LossConfig())
    loss.total.backward()
    assert float(loss.clipped) == 0
    want = -X["advantage"][:, None] * X["mask"] / X["mask"].sum()
    torch.testing.assert_close(new.grad, want)


def test_the_ratio_of_a_rollout_is_a_mean_not_a_sum() -> None:
    """huggingface/trl PR 5815: by the sum, 8 tokens 0.07 apart give 0.57; by the mean 0.93."""
    new = torch.full((1, 8), -1.07)
    old, mask = torch.full((1, 8), -1.0), torch.ones(1, 8)
    loss = policy_loss(
        new, old, mask, torch.ones(1), Totals.of(mask, 8), LossConfig(kind="grpo", ratio="sequence")
    )
    assert float(loss.total) == pytest.approx(-0.9324, abs=1e-4)


def test_correction_caps_or_drops() -> None:
    trainer, sampler = torch.tensor([[0.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
    weight, kept = correction(trainer, sampler, LossConfig(correction="truncate", correction_max=2.0))
    assert weight.tolist() == [[2.0, 1.0]]
    assert kept.tolist() == [[1.0, 1.0]]
    weight, kept = correction(trainer, sampler, LossConfig(correction="mask", correction_max=2.0))
    assert weight.tolist() == [[0.0, 1.0]]
    assert kept.tolist() == [[0.0, 1.0]]


def test_k3_is_never_negative() -> None:
    a, b = X["new"], X["reference"]
    assert bool((k3(a, b) >= 0).all())
    assert torch.equal(k3(a, a), torch.zeros_like(a))


def test_options_that_would_be_ignored_are_refused() -> None:
    for wrong in (
        {"cispo_max": 3.0},
        {"kind": "cispo", "clip_high": 0.3},
        {"correction_max": 3.0},
        {"clip_low": 1.5},
    ):
        with pytest.raises(ConfigError, match="loss"):
            LossConfig(**wrong)  # type: ignore[arg-type]
