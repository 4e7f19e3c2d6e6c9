"""One training run as a frozen dataclass: sizes from one dial, everything else with a default that worked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig

Family = Literal["deepseek", "llama"]


@dataclass(frozen=True)
class Shape:
    """Model sizes from `depth`: layers, and 64 of width each. The two families differ only in what this makes of it.

    deepseek: multi-head latent attention, one dense layer, then `experts` fine-grained experts of which
    `experts_per_token` and a shared one are as wide together as the dense layer. llama: grouped-query attention,
    dense. The options below the line are ours: a model with one of them cannot be exported to other programs.
    """

    family: Family = "deepseek"
    depth: int = 4
    width: int = 0  # 0: 64 * depth
    heads: int = 0  # 0: width / 64
    vocab_size: int = 0  # 0: the data's, rounded up to a multiple of 64
    experts: int = 16
    experts_per_token: int = 3
    kv_lora_rank: int = 0  # 0: half the width
    mtp: int = 0  # multi-token prediction modules
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    value_embeddings: bool = False
    ngram_table_size: int = 0
    x0_residual: bool = False
    smear: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "experts_per_token"):
            if getattr(self, name) < 1:
                raise ConfigError(f"shape.{name}={getattr(self, name)}: must be 1 or more")
        if self.experts and self.experts <= self.experts_per_token:
            raise ConfigError(
                f"shape.experts={self.experts}: must be more than experts_per_token={self.experts_per_token}"
            )
        width = self.width or 64 * self.depth
        if width % (self.heads or max(width // 64, 1)):
            raise ConfigError(f"shape.heads={self.heads}: must divide the width {width}")

    def model(self, vocab_size: int, context: int, bos: int | None, eos: int | None) -> ModelConfig:
        """The model's config for a vocabulary, a context and the data's special tokens."""
        width = self.width or 64 * self.depth
        heads = self.heads or max(width // 64, 1)
        dense = _multiple(width * 8 / 3, 16)
        extensions: dict[str, Any] = {
            "logit_softcap": self.logit_softcap,
            "value_embeddings": self.value_embeddings,
            "ngram_table_size": self.ngram_table_size,
            "x0_residual": self.x0_residual,
            "smear": self.smear,
        }
        ours = any(extensions.values()) or (self.qk_norm and self.family == "deepseek")
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size or _multiple(vocab_size, 64),
            "hidden_size": width,
            "intermediate_size": dense,
            "num_hidden_layers": self.depth,
            "num_attention_heads": heads,
            "max_position_embeddings": context,
            "tie_word_embeddings": self.tie_word_embeddings,
            "qk_norm": self.qk_norm,
            # near 1/sqrt(width): the published 0.02 is for widths of thousands and starves a small model
            "initializer_range": width**-0.5,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "num_nextn_predict_layers": self.mtp,
        }
        if self.family == "llama":
            plain = "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"
            return ModelConfig(
                architecture="RorqualForCausalLM" if ours else plain,
                num_key_value_heads=heads,
                head_dim=width // heads,
                **common,
                **(extensions if ours else {}),
            )
        size = width // heads
        return ModelConfig(
            architecture="RorqualForCausalLM" if ours else "DeepseekV3ForCausalLM",
            num_key_value_heads=heads,
            kv_lora_rank=self.kv_lora_rank or max(width // 2, 32),
            qk_nope_head_dim=size // 2,
            qk_rope_head_dim=size // 2,
            v_head_dim=size,
            rope_interleave=True,
            n_routed_experts=self.experts,
            n_shared_experts=1,
            num_experts_per_tok=self.experts_per_token,
            moe_intermediate_size=_multiple(dense / (self.experts_per_token + 1), 8),
            first_k_dense_replace=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            aux_loss_alpha=1e-4,
            **common,
            **(extensions if ours else {}),
        )


@dataclass(frozen=True)
class Optim:
    """Muon for matrices and AdamW for the rest, or AdamW alone. Rates are those of AdamW and Muon as Moonlight has it
    (arXiv 2502.16982): an update's size does not depend on a matrix's shape."""

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 0.0  # of matrices; 0: 0.008 under Muon, 0.008 under AdamW
    embedding_lr: float = 0.03
    head_lr: float = 0.006
    vector_lr: float = 0.01  # norms, biases, routers
    weight_decay: float = 0.1
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    bias_speed: float = 0.01  # of the experts' selection biases, per step

    @property
    def matrix_lr(self) -> float:
        return self.lr or 0.008


@dataclass(frozen=True)
class Schedule:
    """Rates over the run: warm-up, then a plateau and a linear cool-down (wsd), or half a cosine."""

    name: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.02  # share of the steps
    cooldown: float = 0.5  # share of the steps, wsd only
    floor: float = 0.05  # share of the rate at the end


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. `data` are folders of `rorqual data build`; `weights` and `stages` as in the loader."""

    out: Path = Path("runs/run")
    data: tuple[Path, ...] = ()
    shape: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    steps: int = 1000
    batch_size: int = 8  # rows of a micro-batch
    accumulate: int = 1  # micro-batches of a step
    seq_len: int = 256
    document_masks: bool = True  # tokens see their own document only
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of products; weights and optimizer are float32
    mtp_weight: float = 0.3
    recompute: bool = False  # drop activations and compute them again: slower, less memory
    compile: bool = False
    curriculum: tuple[tuple[float, tuple[float, ...]], ...] = ()  # (share of the run, weights of the sets)
    init_from: Path | None = None  # a model folder to go on from, with its own shape
    extend_context: int | None = None  # with init_from: stretch its positions to this many by YaRN
    eval_every: int = 100  # steps; 0: only at the end
    eval_rows: int = 64
    sample_every: int = 200  # steps; 0: never
    save_every: int = 200  # steps; 0: only at the end
    keep: int = 2  # checkpoints
    log_every: int = 1
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "seq_len", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("eval_every", "eval_rows", "sample_every", "save_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 (off) or more")
        if self.extend_context is not None and self.init_from is None:
            raise ConfigError(f"extend_context={self.extend_context}: needs init_from, the model to extend")
        if self.extend_context is not None and self.extend_context < self.seq_len:
            raise ConfigError(
                f"extend_context={self.extend_context}: must be at least seq_len={self.seq_len}"
            )
        for name, share in (("warmup", self.schedule.warmup), ("cooldown", self.schedule.cooldown)):
            if not 0 <= share <= 1:
                raise ConfigError(f"schedule.{name}={share}: must be 0 to 1")
        if self.schedule.warmup + self.schedule.cooldown > 1:
            raise ConfigError("schedule: warmup and cooldown overlap; together they must be at most 1")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.seq_len


def _multiple(value: float, of: int) -> int:
    """The nearest multiple, at least one."""
    return max(of, round(value / of) * of) if value != int(value) or int(value) % of else int(value)
