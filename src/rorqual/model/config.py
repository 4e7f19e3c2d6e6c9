"""A checkpoint's config.json is our config: the published Hugging Face keys, checked.

`ModelConfig.from_hf` reads DeepseekV2, DeepseekV3 (also Moonlight and Kimi-K2), Glm4MoeLite, Llama, Qwen2 and
Qwen3, and our own `RorqualForCausalLM`: the same keys plus the extensions at the end of `ModelConfig`, which
no other program knows. A key that is neither read nor known to leave the maths alone stops the load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from rorqual.errors import ConfigError

RopeType = Literal["default", "linear", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. YaRN's constants are named as in the published configs (arXiv
    2309.00071)."""

    rope_theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        """Raises ConfigError for what gives no frequencies."""
        stretched = self.rope_type != "default"
        bounds = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("low_freq_factor", "high_freq_factor")}
        positive = ("rope_theta", *(("factor",) if stretched else ()), *bounds.get(self.rope_type, ()))
        if self.rope_type in bounds:
            positive += ("original_max_position_embeddings",)
        for name in positive:
            value = getattr(self, name)
            if value is None or not 0 < value < inf:
                raise ConfigError(
                    f"rope {name}={value!r}: must be above 0 and finite under {self.rope_type!r}"
                )
        if self.rope_type == "yarn" and self.rope_theta == 1:
            raise ConfigError("rope rope_theta=1: must not be 1 under 'yarn'")
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor={self.high_freq_factor!r}: must differ from low_freq_factor under 'llama3'"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one transformer. Derived sizes are properties; every field is a published key."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0  # of grouped-query attention; 0 under MLA, which has its own four sizes
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    qkv_bias: bool = False  # Qwen2's biases on q, k and v
    attention_bias: bool = False  # biases on q, k, v and o (Llama); on the low-rank inputs and o (MLA)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before the rotation, as in Qwen3
    # Multi-head Latent Attention, where kv_lora_rank is set
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope_interleave: bool = False
    # DeepSeekMoE, where n_routed_experts is set
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    scale_after_norm: bool = True  # V3 normalises and then scales; V2's own code normalises or scales
    aux_loss_alpha: float = 0.0  # V2's expert-level balance loss, or V3's sequence-wise one where seq_aux
    seq_aux: bool = True
    # Multi-token prediction modules after the last layer
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    quantization_config: Mapping[str, Any] | None = None
    # Our extensions (architecture RorqualForCausalLM): FLOP-free or nearly so, no other program reads them
    logit_softcap: float | None = None  # c * tanh(logits / c)
    value_embeddings: bool = False  # a gated table row of the token added to the values, on every other layer
    ngram_table_size: int = 0  # rows of the table of hashed token pairs, added before each layer
    triple_table_size: int = 0  # rows of another, of token triples
    induction: int = (
        0  # longest run of tokens looked up in the context, whose follower's row each layer reads
    )
    x0_residual: bool = False  # each layer reads a learned mix of its input and the embeddings
    smear: bool = False  # each embedding takes a gated part of its predecessor's

    def __post_init__(self) -> None:
        _check(self)

    @property
    def attention(self) -> Literal["mla", "gqa"]:
        return "gqa" if self.kv_lora_rank is None else "mla"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head, rotary part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.attention == "mla" else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.head_dim

    @property
    def eos_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def extensions(self) -> tuple[str, ...]:
        """The names of our own options in use: such a model cannot be exported to other programs."""
        names = []
        if self.qk_norm and self.attention == "mla":
            names.append("qk_norm")
        for name in EXTENSION_KEYS:
            if getattr(self, name) != _DEFAULTS[name]:
                names.append(name)
        return tuple(names)

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward part is a mixture of experts (MTP modules follow the last layer's
        kind)."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read the published keys. Raises ConfigError for an architecture or key that we do not know."""
        from rorqual.model.published_keys import read

        return read(dict(config))

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads (with our extensions: that only we read)."""
        from rorqual.model.published_keys import write

        return write(self)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
EXTENSION_KEYS = (
    "logit_softcap",
    "value_embeddings",
    "ngram_table_size",
    "triple_table_size",
    "induction",
    "x0_residual",
    "smear",
)


def _check(c: ModelConfig) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"{name}={getattr(c, name)!r}: {rule}")

    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        need(getattr(c, name) >= 1, name, "must be 1 or more")
    need(
        c.num_attention_heads % c.num_key_value_heads == 0,
        "num_key_value_heads",
        f"must divide num_attention_heads={c.num_attention_heads}",
    )
    for name in ("num_nextn_predict_layers", "n_shared_experts"):
        need(getattr(c, name) >= 0, name, "must be 0 or more")
    need(c.moe_layer_freq >= 1, "moe_layer_freq", "must be 1 or more")
    need(c.logit_softcap is None or c.logit_softcap > 0, "logit_softcap", "must be above 0, or null")
    for name in ("ngram_table_size", "triple_table_size", "induction"):
        need(getattr(c, name) >= 0, name, "must be 0 (off) or more")
    need(
        c.rotary_dim % 2 == 0 and c.rotary_dim > 0,
        "qk_rope_head_dim" if c.attention == "mla" else "head_dim",
        "must be even and above 0",
    )
    if c.attention == "mla":
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            need((getattr(c, name) or 0) >= 1, name, "must be 1 or more under MLA")
        need(
            c.q_lora_rank is None or c.q_lora_rank >= 1,
            "q_lora_rank",
            "must be 1 or more, or null for a plain query projection",
        )
        need(
            c.num_key_value_heads == c.num_attention_heads,
            "num_key_value_heads",
            "must equal num_attention_heads under MLA: all heads share one latent",
        )
        need(not c.qkv_bias, "qkv_bias", "is for grouped-query attention")
    if c.n_routed_experts:
        need(
            1 <= c.num_experts_per_tok <= c.n_routed_experts,
            "num_experts_per_tok",
            f"must be 1 to n_routed_experts={c.n_routed_experts}",
        )
        need(c.moe_intermediate_size >= 1, "moe_intermediate_size", "must be 1 or more")
        need(
            c.n_group >= 1 and c.n_routed_experts % c.n_group == 0,
            "n_group",
            f"must divide n_routed_experts={c.n_routed_experts}",
        )
        need(1 <= c.topk_group <= c.n_group, "topk_group", f"must be 1 to n_group={c.n_group}")
        need(
            c.topk_group * (c.n_routed_experts // c.n_group) >= c.num_experts_per_tok,
            "topk_group",
            "the kept groups must hold at least num_experts_per_tok experts",
        )
        need(
            (c.topk_method == "noaux_tc") == (c.scoring_func == "sigmoid"),
            "topk_method",
            f"noaux_tc goes with sigmoid scores, not scoring_func={c.scoring_func!r}",
        )
        need(
            c.topk_method != "greedy" or c.n_group == 1 or c.topk_group == c.n_group,
            "topk_method",
            f"greedy ignores groups, but n_group={c.n_group} and topk_group={c.topk_group}",
        )
        need(
            c.topk_method != "noaux_tc" or c.n_group == 1 or c.n_routed_experts // c.n_group >= 2,
            "n_group",
            "groups are scored by their two best experts and must hold at least 2",
        )
    if c.extensions and c.architecture != "RorqualForCausalLM":
        raise ConfigError(
            f"architecture={c.architecture!r}: {', '.join(c.extensions)} needs RorqualForCausalLM"
        )
