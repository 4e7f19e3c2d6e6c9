"""One training run of a comparison: found by what it depends on, resumed where it was cut off, its result kept."""

from __future__ import annotations

import functools
import hashlib
import json
import resource
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rorqual
from rorqual.checkpoint.files import write_whole
from rorqual.compare.budget import Budget
from rorqual.compare.setting import Setting
from rorqual.config import from_dict, put, to_dict
from rorqual.errors import RunError
from rorqual.train.config import TrainConfig

RESULT = "result.json"
SOURCE = frozenset({".py", ".h", ".cpp"})
CURVE_POINTS = 5  # held-out losses along a run, for the chart: each costs a pass over all of its rows


@dataclass(frozen=True)
class Job:
    """A setting trained for `steps` on the pool in `data`, judged on the held-out set of `target`."""

    setting: Setting
    budget: Budget
    steps: int
    seed: int
    data: Path
    target: Path
    runs: Path

    @property
    def config(self) -> TrainConfig:
        """The run's config; the folder carries a hash of all that its result depends on: the text, not where it lies, and
        the code."""
        b = self.budget
        tree: dict[str, Any] = {}
        every = self.steps // CURVE_POINTS if self.seed == 0 else self.steps
        fixed = {
            "steps": self.steps, "seed": self.seed, "batch_size": b.batch_size,
            "seq_len": b.seq_len, "shape.width": b.width, "shape.depth": b.depth, "shape.heads": b.heads,
            "dtype": "float32", "device": "cpu", "eval_every": max(1, every),
            "eval_rows": b.eval_rows, "sample_every": 0, "save_every": 500, "keep": 1,
        }  # fmt: skip
        for dotted, value in (fixed | self.setting.overrides()).items():
            put(tree, dotted, value)
        marks = [fingerprint(self.data), fingerprint(self.target), code()]
        key = hashlib.sha256(json.dumps([tree, marks], sort_keys=True).encode()).hexdigest()[:10]
        name = "-".join(self.setting.name.split())
        put(tree, "data", [str(self.data.resolve())])
        put(tree, "out", str(self.runs / f"{name}-{self.steps}-{self.seed}-{key}"))
        return from_dict(TrainConfig, tree)

    @property
    def result(self) -> Result | None:
        """What the run gave, if it has ended."""
        path = self.config.out / RESULT
        if not path.is_file():
            return None
        return Result(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Result:
    """What a run cost and gave. FLOPs are of all its steps; seconds those of its steps alone, on one core."""

    setting: str
    steps: int
    seed: int
    loss: float  # held-out nats a token
    bits_per_byte: float
    tokens: int
    model_flops: float
    optimizer_flops: float
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    parameters: int
    active: int
    tables: int
    cache_bytes: float  # a token, 16 bits an element
    curve: list[list[float]]  # [step, held-out loss]
    folder: str

    @property
    def flops(self) -> float:
        return self.model_flops + self.optimizer_flops


def run(job: Job) -> Result | None:
    """Train the job in this process, on one thread, and keep its result; None where a signal stopped it first."""
    import torch

    from rorqual.data.loader import Loader, LoaderConfig
    from rorqual.model.cost import cost
    from rorqual.model.transformer import Transformer
    from rorqual.text.tokenizer import Tokenizer
    from rorqual.train import checkpoint
    from rorqual.train.candidates import share_of
    from rorqual.train.metrics import read
    from rorqual.train.optim import Optimizer, flops
    from rorqual.train.run import conduct, model_config
    from rorqual.train.validation import Validation

    torch.set_num_threads(1)
    config = job.config
    tokenizer = Tokenizer.load(job.data)
    shape = model_config(config, tokenizer)
    target = from_dict(TrainConfig, {**to_dict(config), "data": [str(job.target)]})
    loader = Loader(
        LoaderConfig(config.data, seed=config.seed), config.batch_size, config.seq_len, config.steps,
        vocab_size=shape.vocab_size,
    )  # fmt: skip
    validation = Validation(target, tokenizer, shape.vocab_size)
    if _moved(config):
        shutil.rmtree(config.out)  # a part of a run, whose config names another place: begun anew
    resume = checkpoint.latest(config.out, lambda _: None) is not None
    ended = conduct(config, shape, loader, job.data, validation, resume, Silent())
    if ended.stopped is not None:
        return None
    lines = read(config.out)
    bill, last = cost(shape), lines[-1]
    with torch.device("meta"):
        optimizer = Optimizer(Transformer(shape).named_parameters(), config.optim)
        update_flops = flops(optimizer, config.tokens_per_step)
    result = Result(
        job.setting.name, job.steps, job.seed, last["heldout_loss"], last["heldout_bpb"], last["tokens"],
        bill.train_flops(config.seq_len, share_of(last, shape.vocab_size)) * last["tokens"], update_flops * job.steps,
        last["stepping_seconds"], last["processor_seconds"], peak_bytes(), bill.parameters, bill.active, bill.tables,
        bill.cache_bytes(), [[x["step"], x["heldout_loss"]] for x in lines if "heldout_loss" in x], config.out.name,
    )  # fmt: skip
    write_whole(config.out / RESULT, json.dumps(asdict(result)) + "\n")
    shutil.rmtree(config.out / "checkpoints")  # a comparison makes hundreds; the config makes each again
    return result


class Silent:
    """A view that shows nothing."""

    def update(self, line: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _moved(config: TrainConfig) -> bool:
    """Whether a run was begun here on the same text at another place."""
    path = config.out / "run.json"
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["data"] != to_dict(config)["data"])


@functools.cache
def code() -> str:
    """A hash of the source that trains and judges: a run of other code is another run."""
    root = Path(rorqual.__file__).parent
    files = [p for d in ("kernels", "model", "train") for p in (root / d).rglob("*") if p.suffix in SOURCE]
    files += [root / "data" / "loader.py", root / "compare" / "job.py"]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """What a built set is known by: the checksums of its shards, wherever it lies. Raises RunError."""
    path = folder / "meta.json"
    if not path.is_file():
        raise RunError(f"{folder}: not a folder of `rorqual data build` (no meta.json)")
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
