"""jingyaogong/minimind#758: an update of a 10M model over a group of 8 x 256 tokens stays within a fixed memory."""

import subprocess
import sys

import pytest

BUDGET_MB = 680  # 611 when it was written; the whole process, torch and 10M parameters with moments included

CODE = """
import contextlib, resource
from pathlib import Path
from rorqual.model.transformer import Transformer
from rorqual.rl.config import RLConfig, Sampling
from rorqual.rl.rollout import Rollout
from rorqual.rl.update import Updater
from rorqual.train.config import Optim
from rorqual.train.optim import Optimizer
from rorqual.train.shape import Shape

model = Transformer(Shape(family="llama", depth=6, width=320, heads=5).model(4096, 320)).init_weights(0)
assert 9e6 < sum(p.numel() for p in model.parameters()) < 13e6
config = RLConfig(model=Path("."), sampling=Sampling(max_tokens=256), keep_truncated=True, micro_tokens=1024)
rollouts = [Rollout([5] * 16, [7 + i] * 256, [-8.0] * 256, "stop") for i in range(8)]
updater = Updater(config, model, Optimizer(model.named_parameters(), Optim("adamw")), contextlib.nullcontext)
updater.step(rollouts, [0.5, -0.5] * 4, 1.0, first=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_the_peak_of_an_update_is_bounded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < BUDGET_MB
