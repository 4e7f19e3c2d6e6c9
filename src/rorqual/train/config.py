"""One training run as a frozen dataclass: the model from one dial, everything else with a default that worked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import ConfigError
from rorqual.parallel.config import Parallel
from rorqual.train.shape import Shape


@dataclass(frozen=True)
class Optim:
    """Muon for matrices and AdamW for the rest, or AdamW alone; tables have a rule of their own (`table_reference`).
    Rates are those of AdamW and Muon as Moonlight has it (arXiv 2502.16982): an update's size does not depend on a
    matrix's shape."""

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 0.008  # of matrices
    embedding_lr: float = 0.03  # of embeddings
    head_lr: float = 0.006
    vector_lr: float = 0.01  # of norms, biases, routers
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    table_lr: float = 1.0  # of pair and triple tables, whose rows are updated when a batch reads them
    table_memory: float = 0.99  # share of a row's squared gradients that its next update keeps
    momentum: float = 0.95  # Muon
    momentum_start: float = 0.85  # where the momentum begins
    momentum_warmup: int = 300  # steps over which it rises
    even_rows: bool = True  # NorMuon's second moments of rows
    clip: float = 1.0  # norm of all gradients; 0: never
    bias_speed: float = 0.01  # of the experts' selection biases, per step

    @classmethod
    def even(cls, name: Literal["muon", "adamw"], lr: float, **more: Any) -> Optim:
        """One rate for every kind of parameter, as a model that is trained already is tuned with."""
        rates = dict.fromkeys(("lr", "embedding_lr", "head_lr", "vector_lr", "table_lr"), lr)
        return cls(name, **(rates | more))

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr", "table_lr", "head_lr", "vector_lr"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: must be above 0")
        for name in ("weight_decay", "clip", "bias_speed", "momentum_warmup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: must be 0 or more")
        for name, value in (
            ("betas", max(self.betas)),
            ("betas", min(self.betas)),
            ("momentum", self.momentum),
            ("momentum_start", self.momentum_start),
            ("table_memory", self.table_memory),
        ):
            if not 0 <= value < 1:
                raise ConfigError(f"optim.{name}={getattr(self, name)}: must be 0 to below 1")
        if self.name == "adamw":
            for name in ("momentum", "momentum_start", "momentum_warmup", "even_rows"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(f"optim.{name}={getattr(self, name)}: is Muon's; optim.name is 'adamw'")


@dataclass(frozen=True)
class Schedule:
    """Rates over the run: warm-up, then a plateau and a linear cool-down (wsd), or half a cosine."""

    name: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02  # share of the steps
    cooldown: float = 0.5  # share of the steps, wsd only
    floor: float = 0.05  # share of the rate at the end

    def __post_init__(self) -> None:
        for name in ("warmup", "cooldown", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name}={getattr(self, name)}: must be a share, 0 to 1")
        if self.name == "cosine" and self.cooldown != Schedule.cooldown:
            raise ConfigError(f"schedule.cooldown={self.cooldown}: is for wsd; schedule.name is 'cosine'")
        if self.name == "wsd" and self.warmup + self.cooldown > 1:
            raise ConfigError("schedule: warmup and cooldown overlap; together they must be at most 1")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: its model, its data, its steps and what is shown and kept of it."""

    out: Path = Path("runs/run")
    data: tuple[Path, ...] = ()  # folders of `rorqual data build`
    shape: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    parallel: Parallel = field(default_factory=Parallel)  # with `--nproc` or torchrun
    steps: int = 1000
    batch_size: int = 8  # rows of a micro-batch, over all processes: what is in memory at once
    accumulate: int = 1  # micro-batches of a step
    seq_len: int = 256
    document_masks: bool = True  # tokens see their own document only
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights and optimizer are float32
    device: str = "auto"
    mtp_weight: float = 0.3
    softmax_share: float = 1.0  # of the vocabulary that a step's loss is over; below 1: sampled softmax
    recompute: bool = False  # drop activations and compute them again: slower, less memory
    compile: bool = False
    curriculum: tuple[tuple[float, tuple[float, ...]], ...] = ()  # (share of the run, weights of the sets)
    init_from: Path | None = None  # a model folder to go on from, with its own shape
    extend_context: int | None = None  # with init_from: stretch its positions to this many by YaRN
    stop_at: int | None = None  # leave at this step with a checkpoint; rates stay those of all `steps`
    eval_every: int = 100  # steps; 0 or less: only at the end
    eval_rows: int = 64  # of each set's held-out rows
    sample_every: int = 200  # steps; 0 or less: never
    save_every: int = 200  # steps; 0 or less: only at the end
    keep: int = 2  # checkpoints
    log_every: int = 1
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "seq_len",
            "keep",
            "log_every",
            "eval_rows",
            "stop_at",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be 1 or more")
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ConfigError(f"stop_at={self.stop_at}: must be at most steps={self.steps}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")
        if self.mtp_weight < 0:
            raise ConfigError(f"mtp_weight={self.mtp_weight}: must be 0 or more")
        if not 0 < self.softmax_share <= 1:
            raise ConfigError(f"softmax_share={self.softmax_share}: must be above 0 and at most 1")
        if self.init_from is None:
            if self.extend_context is not None:
                raise ConfigError(
                    f"extend_context={self.extend_context}: needs init_from, the model to extend"
                )
            if self.mtp_weight != TrainConfig.mtp_weight and not self.shape.mtp:
                raise ConfigError(f"mtp_weight={self.mtp_weight}: needs MTP modules; set shape.mtp=1")
        elif self.shape != Shape():
            changed = next(
                f.name for f in dataclasses.fields(Shape) if getattr(self.shape, f.name) != f.default
            )
            raise ConfigError(
                f"shape.{changed}={getattr(self.shape, changed)!r}: init_from={self.init_from} brings its own shape; "
                "leave one of them out"
            )
        if self.extend_context is not None and self.extend_context < self.seq_len:
            raise ConfigError(
                f"extend_context={self.extend_context}: must be at least seq_len={self.seq_len}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.seq_len


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps is due; 0 or less is off."""
    return every > 0 and step % every == 0
