"""Between `ModelConfig` and the config.json files of published models, both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rorqual.errors import ConfigError
from rorqual.model.config import EXTENSION_KEYS, ModelConfig, RopeConfig

MODEL_TYPES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "RorqualForCausalLM": "rorqual",
}
_DEEPSEEK = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM")

# Keys that say nothing about the forward pass: book-keeping, training settings, cache and parallel layout.
# fmt: off
_HARMLESS = frozenset({
    "architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "pretraining_tp", "attention_dropout", "hidden_dropout", "output_router_logits",
    "router_aux_loss_coef", "ep_size", "return_dict", "output_attentions", "output_hidden_states",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "chunk_size_feed_forward", "id2label",
    "label2id", "problem_type", "qk_head_dim", "task_specific_params", "num_local_experts",
    "max_window_layers", "sliding_window", "cross_attention_hidden_size", "rope_theta", "rope_scaling",
    "rope_parameters", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "_attn_implementation_autoset", "attn_implementation", "_commit_hash", "tokenizer_class",
    "num_mtp_layers", "default_theta",
    "ignore_keys_at_rope_validation",
})
# fmt: on


def read(tree: dict[str, Any]) -> ModelConfig:
    """The config of a config.json. Raises ConfigError for an architecture or key that we do not know."""
    architecture = _architecture(tree)
    deepseek = architecture in _DEEPSEEK or (
        architecture == "RorqualForCausalLM" and tree.get("kv_lora_rank")
    )
    known: dict[str, Any] = {"architecture": architecture, "rope": _read_rope(tree)}
    names = {f.name for f in dataclasses.fields(ModelConfig)} - {"architecture", "rope"}
    if architecture != "RorqualForCausalLM":
        names -= {
            *EXTENSION_KEYS,
            "qkv_bias",
            "scale_after_norm",
            *(() if architecture == "Qwen3ForCausalLM" else ("qk_norm",)),
        }
    for key, value in tree.items():
        if key in names:
            if value is not None:
                known[key] = tuple(value) if isinstance(value, list) else value
                _check_type(key, known[key])
        elif key not in _HARMLESS and not _neutral(architecture, key, value, tree):
            raise ConfigError(
                f"config.json {key}={value!r}: not a key that {architecture} is known to read, so it may "
                "change the maths; remove it if it is only a note"
            )
    if known.get("num_nextn_predict_layers") is None and tree.get("num_mtp_layers") is not None:
        known["num_nextn_predict_layers"] = tree["num_mtp_layers"]
    if architecture == "Qwen2ForCausalLM":
        known["qkv_bias"] = True
    if architecture == "Qwen3ForCausalLM":
        known["qk_norm"] = True
    heads = known.get("num_attention_heads")
    if known.get("num_key_value_heads") is None and heads is not None:
        known["num_key_value_heads"] = heads
    if deepseek:
        known["head_dim"] = 0  # transformers keeps qk_rope_head_dim under this name
        _deepseek_defaults(architecture, known, tree)
    elif not known.get("head_dim") and heads and known.get("hidden_size"):
        known["head_dim"] = known["hidden_size"] // heads
    known = {
        k: v
        for k, v in known.items()
        if k in names | {"architecture", "rope", "qkv_bias", "qk_norm", "scale_after_norm"}
    }
    required = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in known]
    if missing:
        raise ConfigError(f"config.json of {architecture}: missing {', '.join(missing)}")
    for key, value in known.items():
        _check_type(key, value)
    return ModelConfig(**known)


def _architecture(tree: Mapping[str, Any]) -> str:
    named = tree.get("architectures")
    if named is None and tree.get("model_type") in MODEL_TYPES.values():
        return next(a for a, t in MODEL_TYPES.items() if t == tree["model_type"])
    if not isinstance(named, list) or len(named) != 1 or named[0] not in MODEL_TYPES:
        raise ConfigError(f"config.json architectures={named!r}: must be one of {', '.join(MODEL_TYPES)}")
    return str(named[0])


def _neutral(architecture: str, key: str, value: Any, tree: Mapping[str, Any]) -> bool:
    """Keys that would change the maths, at the one value for which they do not."""
    layers = tree.get("num_hidden_layers")
    neutral: dict[str, Any] = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "use_mrope": False,
        "rope_interleaved": False,
        "layer_types": ["full_attention"] * layers if isinstance(layers, int) else None,
        "partial_rotary_factor": 1.0,
        "mlp_bias": False,
        "logits_scaling": 1.0,
        "final_logit_softcapping": None,
        "use_qk_norm": False,
    }
    if key == "mlp_layer_types" and isinstance(value, list) and isinstance(layers, int):
        dense = sum(kind == "dense" for kind in value)
        return value == ["dense"] * dense + ["sparse"] * (layers - dense)
    return (key in neutral and value == neutral[key]) or value is None


def _deepseek_defaults(architecture: str, known: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """What the published code assumes where a config leaves a key out."""
    v2 = architecture == "DeepseekV2ForCausalLM"
    if architecture != "RorqualForCausalLM":
        known["scale_after_norm"] = not v2
    if known.get("n_routed_experts"):
        known.setdefault("scoring_func", "softmax" if v2 else "sigmoid")
        known.setdefault("topk_method", "greedy" if v2 else "noaux_tc")
        for key in ("n_group", "topk_group"):
            known.setdefault(key, 1)
        if not v2:
            known.setdefault("norm_topk_prob", True)
            known.setdefault("routed_scaling_factor", {"Glm4MoeLiteForCausalLM": 1.8}.get(architecture, 2.5))
    kinds = tree.get("mlp_layer_types")
    if architecture == "Glm4MoeLiteForCausalLM" and "first_k_dense_replace" not in known:
        known["first_k_dense_replace"] = 1 if kinds is None else sum(kind == "dense" for kind in kinds)
    known.setdefault("rope_interleave", True)


def _read_rope(tree: Mapping[str, Any]) -> RopeConfig:
    """Old files: rope_theta beside rope_scaling{type}; transformers 5: rope_parameters{rope_type,
    rope_theta}."""
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = tree.get(key)
        if not isinstance(found, Mapping | None):
            raise ConfigError(f"config.json {key}={found!r}: must be an object or null")
        scaling |= found or {}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    scaling.setdefault("rope_theta", tree.get("rope_theta") or 10000.0)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json rope partial_rotary_factor: only 1.0 is supported")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ConfigError(f"config.json rope_type={kind!r}: must be one of default, linear, yarn, llama3")
    truncate = scaling.pop("truncate", True)
    if truncate is not True:
        raise ConfigError(f"config.json rope truncate={truncate!r}: only true is supported")
    fields = {f.name: f for f in dataclasses.fields(RopeConfig)}
    unknown = sorted(set(scaling) - set(fields))
    if unknown:
        raise ConfigError(
            f"config.json rope {unknown[0]}={scaling[unknown[0]]!r}: unknown key; known: {', '.join(fields)}"
        )
    values = {k: v for k, v in scaling.items() if v is not None}
    for key, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"config.json rope {key}={value!r}: must be a number")
    if kind != "default":
        values.setdefault("original_max_position_embeddings", tree.get("max_position_embeddings"))
        original = values["original_max_position_embeddings"]
        if "factor" not in values:
            if not original or not tree.get("max_position_embeddings"):
                raise ConfigError(f"config.json rope_type={kind!r}: missing factor")
            values["factor"] = tree["max_position_embeddings"] / original
    return RopeConfig(rope_type=kind, **values)


def _check_type(key: str, value: Any) -> None:
    hint = str(ModelConfig.__dataclass_fields__[key].type)
    if value is None and "None" in hint:
        return
    if hint == "bool":
        ok = isinstance(value, bool)
    elif hint.startswith("int"):
        ok = (isinstance(value, int) and not isinstance(value, bool)) or (
            "tuple" in hint and isinstance(value, tuple)
        )
    elif hint.startswith("float"):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        return
    if not ok:
        raise ConfigError(f"config.json {key}={value!r}: must be {hint.replace(' | None', '')}")


def write(c: ModelConfig) -> dict[str, Any]:
    """The config.json of a config."""
    tree: dict[str, Any] = {"architectures": [c.architecture], "model_type": MODEL_TYPES[c.architecture]}
    skip = {"architecture", "rope", "quantization_config"}
    if c.architecture != "RorqualForCausalLM":
        skip |= {*EXTENSION_KEYS, "qkv_bias", "qk_norm", "scale_after_norm"}
    if c.attention == "gqa":
        skip |= {
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "rope_interleave",
        }
        skip |= {"attention_bias", "mlp_bias"} if c.architecture == "Qwen2ForCausalLM" else set()
        skip |= {"mlp_bias"} if c.architecture == "Qwen3ForCausalLM" else set()
    else:
        skip |= {"head_dim"}
    if not c.n_routed_experts and c.architecture not in _DEEPSEEK:
        skip |= {
            f.name
            for f in dataclasses.fields(c)
            if "expert" in f.name
            or f.name.startswith(
                (
                    "moe_",
                    "topk_",
                    "n_group",
                    "norm_topk",
                    "scoring",
                    "routed",
                    "aux_",
                    "seq_aux",
                    "first_k",
                    "scale_after",
                )
            )
        }
    if c.architecture not in (*_DEEPSEEK, "RorqualForCausalLM"):
        skip |= {"num_nextn_predict_layers"}
    for f in dataclasses.fields(c):
        if f.name not in skip:
            value = getattr(c, f.name)
            tree[f.name] = list(value) if isinstance(value, tuple) else value
    tree["hidden_act"] = "silu"
    if c.num_experts_per_tok == 1 and "norm_topk_prob" in tree:
        # DeepSeek's code leaves the weight of an only expert alone, transformers makes it 1.
        tree["norm_topk_prob"] = False
    rope = {k: v for k, v in dataclasses.asdict(c.rope).items() if v is not None}
    scaled = {"rope_theta", "rope_type", "factor", "mscale", "mscale_all_dim"}
    bounds = {"low_freq_factor", "high_freq_factor"}
    keep = {
        "default": {"rope_theta", "rope_type"},
        "linear": scaled,
        "llama3": scaled | bounds | {"original_max_position_embeddings"},
        "yarn": set(rope) - bounds,
    }[c.rope.rope_type]
    tree["rope_parameters"] = {k: v for k, v in rope.items() if k in keep}
    tree["rope_theta"] = c.rope.rope_theta  # programs older than transformers 5 read it here
    if c.rope.rope_type != "default":
        tree["rope_scaling"] = {
            "type": c.rope.rope_type,
            **{k: v for k, v in tree["rope_parameters"].items() if k != "rope_theta"},
        }
    if c.quantization_config is not None:
        tree["quantization_config"] = dict(c.quantization_config)
    return tree
