"""Losses, gradients and advantages beside TRL's GRPOTrainer, on the tensors of tests/rl/trl_losses.json.

Where trl is importable these run its own code; `python tests/oracle/test_trl.py` writes the file anew, from which the
fast tests take the expected numbers.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl") if __name__ != "__main__" else __import__("trl")

FILE = Path(__file__).parent.parent / "rl" / "trl_losses.json"
LONGEST = 8
CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "dapo sequence": {"loss_type": "dapo", "importance_sampling_level": "sequence"},
    "grpo sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo with divergence": {"loss_type": "dapo", "beta": 0.04},
    "dapo with correction": {"loss_type": "dapo", "use_vllm": True},
}


def inputs() -> dict[str, torch.Tensor]:
    """4 rollouts of 3 to 8 tokens; ratios reach past both clips."""
    g = torch.Generator().manual_seed(20260101)
    new = -torch.rand(4, LONGEST, generator=g) * 3
    lengths = torch.tensor([8, 3, 5, 8])
    return {
        "new": new,
        "old": new + torch.randn(4, LONGEST, generator=g) * 0.3,
        "reference": new + torch.randn(4, LONGEST, generator=g) * 0.2,
        "weight": (torch.randn(4, LONGEST, generator=g) * 0.4).exp().clamp(max=2.0),
        "mask": (torch.arange(LONGEST) < lengths[:, None]).float(),
        "advantage": torch.tensor([0.75, -0.25, -0.25, 0.5]),
    }


def trl_loss(case: dict[str, Any], x: dict[str, torch.Tensor]) -> tuple[float, list[list[float]]]:
    """TRL's loss and its gradient with respect to the new log-probabilities."""
    new = x["new"].clone().requires_grad_()
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.28, use_vllm=False,
        vllm_importance_sampling_correction=True, max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
    )  # fmt: skip
    for key, value in case.items():
        setattr(trainer, key, value)
    batch = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, LONGEST, dtype=torch.long),
        "completion_mask": x["mask"],
        "advantages": x["advantage"],
        "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["reference"],
        "importance_sampling_ratio": x["weight"],
        "num_items_in_batch": x["mask"].sum(),
    }
    from trl import GRPOTrainer

    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    assert new.grad is not None
    return float(loss.detach()), new.grad.tolist()


def written() -> dict[str, Any]:
    x = inputs()
    expected = {}
    for name, case in CASES.items():
        loss, gradient = trl_loss(case, x)
        expected[name] = {"loss": loss, "gradient": gradient}
    return {
        "from": f"trl {trl.__version__}, torch {torch.__version__}: GRPOTrainer._compute_loss",
        "inputs": {k: v.tolist() for k, v in x.items()},
        "expected": expected,
    }


@pytest.mark.slow
def test_the_kept_numbers_are_trls() -> None:
    kept, now = json.loads(FILE.read_text()), written()
    for name in CASES:
        for key in ("loss", "gradient"):
            torch.testing.assert_close(
                torch.tensor(now["expected"][name][key]), torch.tensor(kept["expected"][name][key])
            )


if __name__ == "__main__":
    FILE.write_text(json.dumps(written(), indent=1) + "\n")
