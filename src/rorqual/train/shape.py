"""Model sizes from one dial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rorqual.errors import ConfigError
from rorqual.model.config import EXTENSION_KEYS, ModelConfig

Family = Literal["deepseek", "llama"]


@dataclass(frozen=True)
class Shape:
    """Model sizes from `depth`: layers, and 64 of width each. The two families differ only in what this makes of it.

    deepseek: multi-head latent attention, one dense layer, then `experts` fine-grained experts of which
    `experts_per_token` and a shared one are as wide together as the dense layer. llama: grouped-query attention,
    dense. From `qk_norm` on the options are ours: a model with one of them cannot be exported to other programs
    (but llama with qk_norm alone is Qwen3). `rorqual train --show` prints what each costs.
    """

    family: Family = "deepseek"
    depth: int = 4
    width: int | None = None  # 64 * depth
    heads: int | None = None  # width / 64
    kv_heads: int | None = None  # llama: as many as heads
    vocab_size: int | None = None  # the data's, rounded up to a multiple of 64
    experts: int = 16
    experts_per_token: int = 3
    # bias: DeepSeek-V3's sigmoid router with selection biases and the sequence-wise loss; loss: V2's softmax router
    # with the expert-level loss
    balance: Literal["bias", "loss"] = "bias"
    balance_alpha: float | None = None  # 1e-4 with bias (V3), 0.003 with loss (V2)
    attention: Literal["mla", "gqa"] | None = None  # the family's own; deepseek may take gqa, to compare
    kv_lora_rank: int | None = None  # half the width
    mtp: int = 0  # multi-token prediction modules
    tie_word_embeddings: bool = False
    initializer_range: float | None = None  # 1/sqrt(width): the published 0.02 starves a narrow model
    zero_output: bool = True  # output projections start at 0: each layer begins as the identity
    qk_norm: bool = False
    logit_softcap: float | None = None
    value_embeddings: bool = False
    ngram_table_size: int = 0
    triple_table_size: int = 0
    induction: int = 0
    x0_residual: bool = False
    smear: bool = False

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "width",
            "heads",
            "kv_heads",
            "vocab_size",
            "experts_per_token",
            "kv_lora_rank",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"shape.{name}={value}: must be 1 or more")
        for name in ("experts", "mtp", "balance_alpha", "ngram_table_size", "triple_table_size", "induction"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"shape.{name}={value}: must be 0 (off) or more")
        if self.initializer_range is not None and self.initializer_range <= 0:
            raise ConfigError(f"shape.initializer_range={self.initializer_range}: must be above 0")
        if self.family == "llama":
            names = ("experts", "experts_per_token", "balance", "balance_alpha", "kv_lora_rank", "attention")
            self._refuse("family='llama'", *names)
        else:
            if self.attention == "gqa":
                self._refuse("attention='gqa'", "kv_lora_rank")
            else:
                self._refuse("family='deepseek'", "kv_heads")
            if self.experts and self.experts <= self.experts_per_token:
                raise ConfigError(
                    f"shape.experts={self.experts}: must be more than experts_per_token={self.experts_per_token}, "
                    "or 0 for a dense model"
                )
            if not self.experts:
                self._refuse("experts=0", "balance", "balance_alpha", "experts_per_token")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            raise ConfigError(
                f"shape.heads={self.num_heads}: must divide the width {self.hidden_size} into heads of a multiple of 4"
            )
        if self.num_heads % (self.kv_heads or self.num_heads):
            raise ConfigError(f"shape.kv_heads={self.kv_heads}: must divide heads={self.num_heads}")

    def _refuse(self, because: str, *names: str) -> None:
        """An option that would be ignored is a contradiction."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"shape.{name}={value!r}: contradicts shape.{because}; leave one of them out"
                )

    @property
    def hidden_size(self) -> int:
        return self.width or 64 * self.depth

    @property
    def num_heads(self) -> int:
        return self.heads or max(self.hidden_size // 64, 1)

    def model(
        self, vocab_size: int, context: int, bos: int | None = None, eos: int | None = None
    ) -> ModelConfig:
        """The model's config for a vocabulary, a context and the data's special tokens."""
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise ConfigError(f"shape.vocab_size={self.vocab_size}: the tokenizer has {vocab_size} tokens")
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size or -(-vocab_size // 64) * 64,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.dense_width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": context,
            "tie_word_embeddings": self.tie_word_embeddings,
            "qk_norm": self.qk_norm,
            "initializer_range": self.initializer_range or self.hidden_size**-0.5,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "num_nextn_predict_layers": self.mtp,
        }
        family = self._llama() if self.family == "llama" else self._deepseek()
        extensions = {k: getattr(self, k) for k in EXTENSION_KEYS}
        mixed = self.attention == "gqa"  # no published class has these experts on this attention
        if any(extensions.values()) or mixed or (self.qk_norm and self.family == "deepseek"):
            family |= extensions | {"architecture": "RorqualForCausalLM"}
        return ModelConfig(**common, **family)

    @property
    def dense_width(self) -> int:
        """SwiGLU's three matrices of 8/3 the width weigh as much as two of 4."""
        return _rounded(self.hidden_size * 8 / 3, 16)

    def _llama(self) -> dict[str, Any]:
        return {
            "architecture": "Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM",
            "num_key_value_heads": self.kv_heads or self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
        }

    def _deepseek(self) -> dict[str, Any]:
        size = self.hidden_size // self.num_heads
        attention: dict[str, Any] = {
            "architecture": "DeepseekV3ForCausalLM",
            "num_key_value_heads": self.num_heads,
            "kv_lora_rank": self.kv_lora_rank or max(self.hidden_size // 2, 32),
            "qk_nope_head_dim": size // 2,
            "qk_rope_head_dim": size // 2,
            "v_head_dim": size,
            "rope_interleave": True,
        }
        if self.attention == "gqa":
            attention = self._llama()
        if not self.experts:
            # All layers dense; transformers' class still wants the experts' keys.
            return {**attention, "first_k_dense_replace": self.depth}
        experts = {
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": _rounded(self.dense_width / (self.experts_per_token + 1), 8),
            "first_k_dense_replace": 1,
            "norm_topk_prob": self.experts_per_token > 1,  # the weight of an only expert would always be 1
        }
        if self.balance == "bias":
            router: dict[str, Any] = {
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "aux_loss_alpha": 1e-4,
            }
        else:
            router = {
                "architecture": "DeepseekV2ForCausalLM",
                "aux_loss_alpha": 0.003,
                "seq_aux": False,
                "norm_topk_prob": False,
                "scale_after_norm": False,
            }
        if self.balance_alpha is not None:
            router["aux_loss_alpha"] = self.balance_alpha
        return {**attention, **experts, **router}


def _rounded(value: float, to: int) -> int:
    """The nearest multiple, at least one."""
    return max(1, round(value / to)) * to
