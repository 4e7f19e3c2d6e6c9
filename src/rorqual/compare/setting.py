"""What is compared: the baseline, the recipe, and the parts that lie between them, as overrides of one run's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.config import scalar
from rorqual.errors import ConfigError

Overrides = Mapping[str, Any]

BASELINE: Overrides = {
    # No straw man: initialised for its width (shape.initializer_range is 1/sqrt(width) by default), embeddings at a
    # rate of their own, every rate swept, its output projections drawn as its class has them.
    "shape.family": "llama",
    "shape.zero_output": False,
    "optim.name": "adamw",
    "optim.lr": 0.004,
    "optim.embedding_lr": 0.02,
    "optim.head_lr": 0.008,
    # For both sides: the usual 0.9 and 0.95 end 0.02 nats above, with the tables and without.
    "optim.betas": [0.7, 0.99],
    "schedule.name": "cosine",
    "schedule.warmup": 0.05,
    "schedule.floor": 0.1,
}

# Each part of the recipe: what it sets, on top of the baseline.
PARTS: dict[str, Overrides] = {
    "muon": {
        "optim.name": "muon", "optim.lr": 0.012, "optim.embedding_lr": 0.14, "optim.head_lr": 0.0125,
        "optim.momentum": 0.9, "optim.weight_decay": 0.0, "optim.vector_lr": 0.005,
    },
    "wsd": {
        "schedule.name": "wsd", "schedule.warmup": 0.02, "schedule.cooldown": 0.5,
    },
    "zero-output": {"shape.zero_output": True},
    "qk-norm": {"shape.qk_norm": True},
    "softcap": {"shape.logit_softcap": 15.0},
    "pairs": {"shape.ngram_table_size": 262144},
    "triples": {"shape.triple_table_size": 262144},
    "values": {"shape.value_embeddings": True},
    "induction": {"shape.induction": 4},
    # What a token reads from tables and from its context spares layers: at equal FLOPs one layer beat three by 0.1 nats
    # with them; without, two are best.
    "shallow": {"shape.depth": 1},
    "sampled": {"softmax_share": 0.375},
    "x0": {"shape.x0_residual": True},
    "smear": {"shape.smear": True},
    "experts": {"shape.family": "deepseek", "shape.experts": 32, "shape.attention": "gqa"},
    "mla": {"shape.family": "deepseek", "shape.attention": "mla"},
}  # fmt: skip
TABLES = ("pairs", "triples", "values")  # parameters without products


@dataclass(frozen=True)
class Setting:
    """A named way to train: parts of the recipe on the baseline, and overrides on top (`shape.width=96`)."""

    name: str
    parts: tuple[str, ...] = ()
    more: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        for part in self.parts:
            known(part)

    def overrides(self) -> dict[str, Any]:
        """Dotted keys and their values."""
        tree = dict(BASELINE)
        for part in PARTS:  # in the table's order, whatever the order asked for: mla after experts
            if part in self.parts:
                tree |= PARTS[part]
        if "mla" in self.parts and "experts" not in self.parts:
            tree["shape.experts"] = 0
        return tree | dict(self.more)

    def without(self, part: str) -> Setting:
        """This setting less one part. Raises ConfigError where it does not have it."""
        if known(part) not in self.parts:
            raise ConfigError(
                f"--without {part}: {self.name} does not have it; it has {', '.join(self.parts)}"
            )
        return Setting(f"{self.name} without {part}", tuple(p for p in self.parts if p != part), self.more)

    def plus(self, name: str, parts: Sequence[str]) -> Setting:
        """This setting with further parts; what a part sets is its own, not what was chosen for the setting before."""
        own = {key for part in parts for key in PARTS[known(part)]}
        return Setting(name, (*self.parts, *parts), tuple((k, v) for k, v in self.more if k not in own))

    def at(self, **more: Any) -> Setting:
        """With values of dotted keys, `__` for the dot."""
        extra = tuple((k.replace("__", "."), v) for k, v in more.items())
        return Setting(self.name, self.parts, (*self.more, *extra))


def with_overrides(setting: Setting, pairs: Sequence[str]) -> Setting:
    """`optim.lr=0.01` and the like on top of a setting. Raises ConfigError for what is not KEY=VALUE."""
    more = list(setting.more)
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(f"--idea {pair}: must be KEY=VALUE, such as optim.lr=0.01")
        if key in MEASURE or key.startswith("parallel."):
            raise ConfigError(
                f"--idea {pair}: {key} belongs to the measure, which is the same for both sides"
            )
        more.append((key, scalar(value)))
    return Setting(setting.name, setting.parts, tuple(more))


def known(part: str) -> str:
    """The part's name; raises ConfigError for one that is not in the table."""
    if part not in PARTS:
        raise ConfigError(f"part {part!r}: must be one of {', '.join(PARTS)}")
    return part


# What an idea cannot set: the measure itself.
MEASURE = frozenset({
    "data", "out", "steps", "seed", "seq_len", "device", "stop_at", "eval_every", "eval_rows", "sample_every",
    "save_every", "keep", "log_every", "tensorboard", "init_from", "extend_context",
})  # fmt: skip

BASE = Setting("baseline")
RECIPE = Setting(
    "recipe",
    # Norms of queries and keys, a soft cap, x0 and smear were worth nothing here (0.99 to 1.01 of the steps each).
    ("muon", "wsd", "zero-output", "pairs", "triples", "values", "induction", "shallow", "sampled"),
)
