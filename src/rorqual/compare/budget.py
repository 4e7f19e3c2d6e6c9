"""How much a comparison may cost: one size of model, the baseline's steps, and where the recipe's runs may lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import inf

from rorqual.errors import ConfigError

LEAST_STEPS = 10  # of a recipe's run


@dataclass(frozen=True)
class Budget:
    """Sizes of every run of a comparison. `steps` are the baseline's; the recipe runs its full schedule at
    steps / f for f in `fractions`. `depth` is where the search for the baseline's begins, at equal FLOPs."""

    name: str = "standard"
    width: int = 64
    depth: int = 2
    search_depth: bool = True
    heads: int = 2
    seq_len: int = 128
    batch_size: int = 16
    steps: int = 2000
    vocab_size: int = 2048
    pool_mb: float = 40.0  # of text that the pool is built from
    fractions: tuple[float, ...] = (
        1.5, 2, 2.3, 2.6, 2.8, 3, 3.1, 3.2, 3.4, 3.6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16,
    )  # fmt: skip
    # Where the search for the baseline's rates begins, in factors of two, and how often it goes on from an end at once.
    lr: float = 0.004  # of matrices
    embedding_lr: float = 0.02
    head_lr: float = 0.008
    more_rates: int = 2
    seeds: int = 3
    control_seeds: int = 3
    eval_rows: int = 1024

    def __post_init__(self) -> None:
        for name in (
            "width",
            "depth",
            "heads",
            "seq_len",
            "batch_size",
            "steps",
            "seeds",
            "control_seeds",
            "eval_rows",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"budget.{name}={getattr(self, name)}: must be 1 or more")
        if not self.fractions or min(self.fractions) < 1 or list(self.fractions) != sorted(self.fractions):
            raise ConfigError(f"budget.fractions={self.fractions}: must be 1 or more, the smallest first")
        if self.control_seeds > self.seeds:
            raise ConfigError(
                f"budget.control_seeds={self.control_seeds}: must be at most seeds={self.seeds}"
            )
        if max(self.fractions) * LEAST_STEPS > self.steps:
            raise ConfigError(
                f"budget.steps={self.steps}: too few for a run of 1/{max(self.fractions):g} of them; at least "
                f"{max(self.fractions) * LEAST_STEPS:.0f}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of one step of the baseline."""
        from rorqual.model.cost import cost
        from rorqual.train.shape import Shape

        shape = Shape("llama", self.depth, self.width, self.heads, zero_output=False)
        return (
            cost(shape.model(self.vocab_size, self.seq_len)).train_flops(self.seq_len) * self.tokens_per_step
        )

    def at_depth(self, depth: int) -> Budget:
        """This budget's FLOPs in a baseline of another depth: more layers, fewer steps, and no fraction too fine for
        them."""
        more = dataclasses.replace(self, depth=depth).flops_per_step / self.flops_per_step
        steps = round(self.steps / more)
        fractions = tuple(f for f in self.fractions if f * LEAST_STEPS <= steps)
        return dataclasses.replace(self, depth=depth, steps=steps, fractions=fractions)

    def like(self, other: Budget) -> Budget:
        """This budget's FLOPs at another's depth and rates."""
        return dataclasses.replace(
            self.at_depth(other.depth), lr=other.lr, embedding_lr=other.embedding_lr, head_lr=other.head_lr
        )

    def steps_at(self, fraction: float) -> int:
        """The recipe's steps at 1/fraction of the baseline's."""
        return max(1, round(self.steps / fraction))


PRESETS = {
    "quick": Budget(
        "quick", depth=1, steps=320, pool_mb=12.0, fractions=(1.5, 2, 2.5, 3, 4, 5, 6, 8), lr=0.008, embedding_lr=0.16,
        head_lr=0.032, control_seeds=1, eval_rows=256,
    ),
    "standard": Budget(),
}  # fmt: skip


def budget(text: str, sizes: Budget | None = None) -> Budget:
    """A preset's name, or the FLOPs of one baseline run ('3e13') of the sizes given. Raises ConfigError."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        flops = float(text)
    except ValueError:
        raise ConfigError(
            f"--budget {text}: must be {', '.join(PRESETS)} or the FLOPs of one baseline run, such as 3e13"
        ) from None
    if not 0 < flops < inf:
        raise ConfigError(f"--budget {text}: must be above 0 and finite")
    sizes = sizes or Budget()
    return dataclasses.replace(
        sizes, name=f"{flops:.1e} FLOPs", steps=max(1, round(flops / sizes.flops_per_step))
    )
