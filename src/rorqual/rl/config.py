"""One reinforcement run as a frozen dataclass: a model or the shape of a new one, tasks, sampling, loss, guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import ConfigError
from rorqual.rl.losses import LossConfig, Scale
from rorqual.train.config import Schedule
from rorqual.train.shape import Shape


@dataclass(frozen=True)
class TaskMix:
    """A family of problems: how often it is drawn, and how hard it is at the start and from `ramp` of the run on."""

    name: str = "sums"  # one of rorqual.verify.tasks, or path/to/file.py:function that makes one of your own
    options: Mapping[str, Any] = field(default_factory=dict)  # the family's own
    weight: float = 1.0
    difficulty: int | None = None  # level at the start; none: the hardest
    difficulty_end: int | None = None  # none: as at the start
    ramp: float = 0.5  # share of the steps over which the difficulty rises

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"tasks.weight={self.weight}: must be above 0; leave {self.name!r} out instead")
        if self.difficulty is None and self.difficulty_end is not None:
            raise ConfigError(
                f"tasks.difficulty_end={self.difficulty_end}: needs difficulty, where it begins"
            )
        if not 0 < self.ramp <= 1:
            raise ConfigError(f"tasks.ramp={self.ramp}: must be above 0, at most 1")

    @property
    def label(self) -> str:
        """What the family is called in figures: its name and, where given, its options of text."""
        own = [str(v) for v in self.options.values() if isinstance(v, str)]
        return " ".join([self.name.rpartition("/")[2], *own])

    def difficulty_at(self, share: float) -> int | None:
        """The difficulty when this share of the run is done: it rises in even steps."""
        if self.difficulty is None:
            return None
        end = self.difficulty if self.difficulty_end is None else self.difficulty_end
        done = min(share / self.ramp, 1.0)
        return self.difficulty + round((end - self.difficulty) * done)


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn. There is no top_p or top_k: the sampler's distribution is the trainer's."""

    prompts: int = 32  # groups of an update that have something to teach
    group: int = 16  # rollouts of a prompt
    max_tokens: int = 32  # of a completion
    max_prompt: int = 64  # tokens; longer prompts are refused
    temperature: float = 1.0
    refill: int = 2  # further draws in place of groups all right or all wrong
    at_once: int = 512  # rollouts in the engine together
    block_size: int = 1  # a prompt's tokens are computed once for its group but for the last block
    replay: bool = True  # score the experts that sampling chose
    prompt: Literal["plain", "chat"] = "plain"  # chat: through the model's template, as a user's message
    # Put before every problem, such as an instruction
    prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("prompts", "max_tokens", "max_prompt", "at_once", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.{name}={getattr(self, name)}: must be 1 or more")
        if self.group < 2:
            raise ConfigError(f"sampling.group={self.group}: must be 2 or more, the group is the baseline")
        if self.refill < 0:
            raise ConfigError(f"sampling.refill={self.refill}: must be 0 (off) or more")
        if self.temperature < 1e-5:
            raise ConfigError(
                f"sampling.temperature={self.temperature}: must be above 0, greedy rollouts are all alike"
            )


@dataclass(frozen=True)
class ColdStart:
    """Supervised steps on worked examples before reinforcement: a new model learns the form and the beginnings of the
    task, a chat model the form only."""

    steps: int = 0  # at most; 0: none
    batch: int = 64  # examples of a step
    examples: int = 0  # how many different ones there are; 0: without end
    lr: float = 0.003
    optimizer: Literal["muon", "adamw"] = "muon"
    warmup: int = 20  # steps
    eval_every: int = 20
    until: float = 0.12  # stop once greedy held-out accuracy is at least this
    whole: bool = False  # learn the prompt's tokens as well

    def __post_init__(self) -> None:
        for name in ("steps", "examples", "warmup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cold_start.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("batch", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cold_start.{name}={getattr(self, name)}: must be 1 or more")
        if self.lr <= 0:
            raise ConfigError(f"cold_start.lr={self.lr}: must be above 0")
        if not 0 < self.until <= 1:
            raise ConfigError(f"cold_start.until={self.until}: must be a share above 0")


@dataclass(frozen=True)
class Guard:
    """When a run is taken for collapsed: few live groups, and reward far below its best. It then goes back to its best
    checkpoint, at a lower rate."""

    live: float = 0.15  # share of groups that are neither all right nor all wrong
    fall: float = 0.5  # of the best reward
    memory: float = 0.8  # of the running means
    slower: float = 0.5  # the rate's factor after going back
    most: int = 3  # times; then the run ends

    def __post_init__(self) -> None:
        for name in ("live", "fall", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"guard.{name}={getattr(self, name)}: must be 0 to below 1")
        if not 0 < self.slower <= 1:
            raise ConfigError(f"guard.slower={self.slower}: must be above 0, at most 1")
        if self.most < 0:
            raise ConfigError(f"guard.most={self.most}: must be 0 or more")


@dataclass(frozen=True)
class RLConfig:
    """A whole run. With `model` it goes on from a folder, without it from a new model of `shape`."""

    out: Path = Path("runs/rl")
    model: Path | None = None
    shape: Shape = field(default_factory=Shape)
    tasks: tuple[TaskMix, ...] = (TaskMix(),)
    sampling: Sampling = field(default_factory=Sampling)
    loss: LossConfig = field(default_factory=LossConfig)
    cold_start: ColdStart = field(default_factory=ColdStart)
    guard: Guard = field(default_factory=Guard)
    scale: Scale = "none"  # what advantages are divided by: the group's deviation, the batch's, or nothing
    keep_truncated: bool = False  # learn from rollouts that ran into max_tokens too
    steps: int = 200
    updates: int = 2  # of a step: its rollouts are shuffled and split
    negative: float = (
        1.0  # factor of advantages below 0: less of it keeps a model that is mostly wrong from drifting
    )
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of all gradients
    # Of the rates over the steps; at a full rate to the end accuracy swings by ten points between evaluations
    schedule: Schedule = field(default_factory=lambda: Schedule("wsd", warmup=0.04, cooldown=0.6, floor=0.1))
    micro_tokens: int = 8192  # tokens that are in memory at once in an update, padding included
    dtype: Literal["float32", "bfloat16"] = "float32"  # of products; weights and optimizer are float32
    eval_every: int = 10  # steps; 0 or less: only at both ends
    eval_problems: int = 256  # different held-out ones of each family, or all that it has
    pass_k: int = (
        16  # at both ends, pass@1 and pass@k of a quarter of them at the sampling temperature; 0: not
    )
    enough: float | None = None  # end once the interval of held-out accuracy begins above this
    stop_at: int | None = (
        None  # leave at this step (the cold start's count) with a checkpoint; rates stay those of all
    )
    save_every: int = 25
    keep: int = 2  # checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "updates", "micro_tokens", "eval_problems", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr}: must be above 0")
        for name in ("weight_decay", "clip", "pass_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not self.tasks:
            raise ConfigError("tasks: name at least one family of problems")
        if len({t.label for t in self.tasks}) < len(self.tasks):
            raise ConfigError("tasks: a family is named twice; give one entry with both weights together")
        if self.model is not None and self.shape != Shape():
            raise ConfigError(f"shape: model={self.model} brings its own; leave one of them out")
        if self.model is None and not self.cold_start.steps:
            raise ConfigError("cold_start.steps=0: a new model needs a cold start, or name a model")
        if self.updates > self.sampling.prompts:
            raise ConfigError(f"updates={self.updates}: more than sampling.prompts={self.sampling.prompts}")
        if self.enough is not None and not 0 < self.enough < 1:
            raise ConfigError(f"enough={self.enough}: must be a share between 0 and 1")
        if self.stop_at is not None and self.stop_at < 1:
            raise ConfigError(f"stop_at={self.stop_at}: must be 1 or more")

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.sampling.max_prompt + self.sampling.max_tokens
