"""One training step equals that of transformers' model under torch's AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rorqual.checkpoint import hf  # noqa: E402 - after the check that the oracle is there
from rorqual.data.loader import Batch  # noqa: E402
from rorqual.model.transformer import Transformer  # noqa: E402
from rorqual.train.batch import Lesson  # noqa: E402
from rorqual.train.config import Optim  # noqa: E402
from rorqual.train.objective import objective  # noqa: E402
from rorqual.train.optim import Optimizer, clip_  # noqa: E402
from rorqual.train.shape import Shape  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "deepseek": {"experts": 8, "experts_per_token": 2, "balance_alpha": 0.0},
}


@pytest.mark.parametrize("family", SHAPES)
def test_one_step_equals_transformers(family: str, tmp_path: Path) -> None:
    config = Shape(
        depth=3, width=64, heads=4, initializer_range=0.08, zero_output=False, **SHAPES[family]
    ).model(192, 64)
    ours = Transformer(config).init_weights(0).train()
    hf.save_model(ours, tmp_path / "before")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "before", dtype=torch.float32
    ).train()
    ids = torch.randint(0, 192, (3, 25))

    lesson = Lesson.of(
        Batch(ids, torch.arange(25).expand(3, -1), torch.zeros(3, 25, dtype=torch.int32)), masks=True
    )
    loss, _ = objective(ours, lesson, float(lesson.weights.sum()))
    loss.total.backward()
    rates = {"lr": 0.01, "embedding_lr": 0.01, "head_lr": 0.01, "vector_lr": 0.01}
    norm = clip_(list(ours.parameters()), 0.5)
    Optimizer(ours.named_parameters(), Optim("adamw", weight_decay=0.0, **rates)).step(1.0)

    their_loss = theirs(input_ids=ids, labels=ids).loss
    their_loss.backward()
    their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    # an epsilon so large would hide differences; ours is torch's default
    torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0).step()

    assert loss.total.item() == pytest.approx(their_loss.item(), abs=1e-5)
    assert norm == pytest.approx(float(their_norm), rel=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    after = hf.load_model(tmp_path / "theirs", torch.float32)
    for (name, got), want in zip(ours.named_parameters(), after.parameters(), strict=True):
        # Adam's first step is rate * sign(gradient): where a gradient is rounding noise its sign is, too
        assert got.grad is not None
        sure = got.grad.abs() > 1e-6
        assert sure.float().mean() > 0.5 or "experts" in name or "embed" in name, name
        torch.testing.assert_close(got[sure], want[sure], atol=1e-5, rtol=1e-5, msg=name)
