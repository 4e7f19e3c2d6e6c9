"""How a run is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig


@dataclass(frozen=True)
class Parallel:
    """Every process is `data` parallel but for those that share attention heads: `tensor` neighbours work on the same
    rows. `expert` neighbours share the experts, whatever their rows. `shard` divides weights, gradients and moments
    over the processes (FSDP2); without it each holds a copy of all but its experts and heads."""

    shard: bool = False
    expert: int = 1
    tensor: int = 1
    timeout: float = 300.0  # seconds that a process waits for the others

    def __post_init__(self) -> None:
        for name in ("expert", "tensor"):
            if getattr(self, name) < 1:
                raise ConfigError(f"parallel.{name}={getattr(self, name)}: must be 1 (off) or more")
        if self.timeout <= 0:
            raise ConfigError(f"parallel.timeout={self.timeout}: must be above 0 seconds")
        if self.shard and self.tensor > 1:
            raise ConfigError(
                f"parallel.shard with parallel.tensor={self.tensor}: heads that are divided are not sharded as well; "
                "leave one of them out"
            )

    def check(self, world: int, rows: int, model: ModelConfig) -> None:
        """Raise ConfigError where `world` processes cannot share the model, or `rows` of a micro-batch, evenly."""
        for name in ("expert", "tensor"):
            if world % getattr(self, name):
                raise ConfigError(
                    f"parallel.{name}={getattr(self, name)}: must divide the number of processes, {world}"
                )
        data = world // self.tensor
        if rows % data:
            raise ConfigError(
                f"batch_size={rows}: must be a multiple of {data}, the processes that take rows of their own "
                f"({world} / parallel.tensor={self.tensor}); batch_size counts the rows of all of them"
            )
        if self.expert > 1:
            self._check_experts(model)
        if self.tensor > 1:
            self._check_heads(model)

    def _check_experts(self, model: ModelConfig) -> None:
        experts, groups = model.n_routed_experts, model.n_group
        if not experts or experts % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert}: must divide n_routed_experts={experts} of the model evenly"
            )
        # Device-limited routing (DeepSeek-V2, section 2.1.2): a group of experts lies on one device.
        if groups and groups > 1 and groups % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert}: must divide n_group={groups}, so that no group of experts is on two "
                "processes"
            )

    def _check_heads(self, model: ModelConfig) -> None:
        names = ["num_attention_heads"] + (["num_key_value_heads"] if model.attention == "gqa" else [])
        for name in names:
            if getattr(model, name) % self.tensor:
                raise ConfigError(
                    f"parallel.tensor={self.tensor}: must divide {name}={getattr(model, name)} of the model"
                )
        if model.attention_bias:
            raise ConfigError(
                f"parallel.tensor={self.tensor}: attention_bias adds o_proj's bias once a process; set tensor=1"
            )
