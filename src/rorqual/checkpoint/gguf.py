"""GGUF files (llama.cpp's format): llama, qwen2, qwen3 and deepseek2 layouts, through the `gguf` package.

Names, key spellings and the permutation of llama's q and k are those of llama.cpp's converter and loader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rorqual.checkpoint.hf import _allocate, _some
from rorqual.device import format_bytes, require_memory
from rorqual.errors import CheckpointError
from rorqual.model.config import ModelConfig, RopeConfig
from rorqual.model.transformer import Transformer

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "deepseek2": "DeepseekV2ForCausalLM",  # V3 where its experts are scored by sigmoid
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")


class GGUF:
    """One GGUF file: its metadata as plain values, its tensors dequantised when asked for."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader: GGUFReader = GGUFReader(str(path))
        except (ValueError, OSError, KeyError, IndexError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{path.resolve()}: not a readable GGUF file ({e}); copy it again") from e
        self.tensors = {t.name: t for t in self._reader.tensors}
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path.resolve()}: architecture {self.architecture!r} is not read; known: {', '.join(ARCHITECTURES)}"
            )
        foreign = [
            f"{t.name} {t.tensor_type.name}" for t in self._reader.tensors if t.tensor_type.name not in TYPES
        ]
        if foreign:
            raise CheckpointError(
                f"{path.resolve()}: quantised types not read: {_some(foreign)}; known: {', '.join(TYPES)}"
            )

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; raises CheckpointError where it is missing and has no default."""
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise CheckpointError(
                f"{self.path.resolve()}: metadata {key} is missing; the file is not complete"
            )
        return default

    def has(self, key: str) -> bool:
        return key in self._reader.fields

    def size(self, key: str, default: Any = None) -> Any:
        """A metadata value of the architecture, such as `block_count`."""
        return self.value(f"{self.architecture}.{key}", default)

    def read(self, name: str) -> Tensor:
        """A tensor in float32, in torch's order of dimensions."""
        from gguf.quants import dequantize

        t = self.tensors[name]
        flat = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        return flat.view(tuple(int(n) for n in reversed(t.shape)))

    def texts(self, key: str) -> list[str]:
        """A list of texts, such as the vocabulary, faster than the package's own accessor."""
        field = self._listed(key)
        return [bytes(field.parts[i]).decode("utf-8", errors="surrogateescape") for i in field.data]

    def _listed(self, key: str) -> Any:
        self.value(key)
        return self._reader.fields[key]

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        field = self._listed(key)
        return [int(field.parts[i][0]) for i in field.data]


def config(file: GGUF) -> ModelConfig:
    """The config that a file's metadata describes."""
    heads, kv_heads = (file.size(f"attention.head_count{x}", y) for x, y in (("", None), ("_kv", 0)))
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise CheckpointError(
            f"{file.path.resolve()}: attention.head_count={heads}, head_count_kv={kv_heads}: heads that differ from "
            "layer to layer are not read"
        )
    common: dict[str, Any] = {
        "architecture": ARCHITECTURES[file.architecture],
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_size": file.size("embedding_length"),
        "intermediate_size": file.size("feed_forward_length"),
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": file.size("context_length"),
        "rms_norm_eps": round(float(file.size("attention.layer_norm_rms_epsilon")), 12),
        "rope": _rope(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for name in ("bos", "eos", "padding"):
        if file.has(f"tokenizer.ggml.{name}_token_id"):
            key = {"padding": "pad"}.get(name, name)
            common[f"{key}_token_id"] = int(file.value(f"tokenizer.ggml.{name}_token_id"))
    if file.architecture == "deepseek2":
        return ModelConfig(**{**common, **_deepseek(file, heads)})
    head_dim = file.size("attention.key_length", common["hidden_size"] // heads)
    if file.size("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path.resolve()}: rope.dimension_count={file.size('rope.dimension_count')}: heads of {head_dim} that "
            "are rotated in part are not read"
        )
    extra: dict[str, Any] = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}.get(
        file.architecture, {}
    )
    if file.size("expert_count", 0):
        raise CheckpointError(f"{file.path.resolve()}: {file.architecture} with experts is not read")
    return ModelConfig(**common, head_dim=head_dim, **extra)


def _rope(file: GGUF) -> RopeConfig:
    kind = str(file.size("rope.scaling.type", "none"))
    theta = float(file.size("rope.freq_base", 10000.0))
    if "rope_freqs.weight" in file.tensors:
        raise CheckpointError(
            f"{file.path.resolve()}: rope_freqs.weight (Llama 3.1 scaling) is not read from GGUF"
        )
    if kind == "none":
        return RopeConfig(rope_theta=theta)
    factor = float(file.size("rope.scaling.factor"))
    if kind == "linear":
        return RopeConfig(rope_theta=theta, rope_type="linear", factor=factor)
    if kind != "yarn":
        raise CheckpointError(
            f"{file.path.resolve()}: rope scaling {kind!r} is not read; known: none, linear, yarn"
        )
    for key, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        if float(file.size(f"rope.scaling.{key}", neutral)) not in (neutral, -1.0):
            raise CheckpointError(
                f"{file.path.resolve()}: rope.scaling.{key}={file.size(f'rope.scaling.{key}')}: not read"
            )
    original = int(file.size("rope.scaling.original_context_length"))
    # stored as 0.1 * mscale_all_dim
    weight = float(file.size("rope.scaling.yarn_log_multiplier", 0.0)) * 10
    weight = round(weight, 6)
    return RopeConfig(
        rope_theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=float(file.size("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(file.size("rope.scaling.yarn_beta_slow", 1.0)),
        mscale=weight or None,
        mscale_all_dim=weight or None,
    )


def _deepseek(file: GGUF, heads: int) -> dict[str, Any]:
    sigmoid = int(file.size("expert_gating_func", 1)) == 2
    rank, rotary = file.size("attention.kv_lora_rank"), file.size("rope.dimension_count")
    key, value = (
        file.size(f"attention.{n}_length_mla", file.size(f"attention.{n}_length")) for n in ("key", "value")
    )
    groups = int(file.size("expert_group_count", 1))
    kept = int(file.size("expert_group_used_count", 1))
    if sigmoid and groups == 1 and file.size("expert_count") == 256:
        groups, kept = 8, 4  # files from before the group keys: DeepSeek-V3's own numbers
    return {
        "architecture": "DeepseekV3ForCausalLM" if sigmoid else "DeepseekV2ForCausalLM",
        "num_key_value_heads": heads,
        "q_lora_rank": file.size("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        "rope_interleave": True,
        "n_routed_experts": file.size("expert_count"),
        "n_shared_experts": file.size("expert_shared_count", 0),
        "num_experts_per_tok": file.size("expert_used_count"),
        "moe_intermediate_size": file.size("expert_feed_forward_length"),
        "first_k_dense_replace": file.size("leading_dense_block_count", 0),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": bool(file.size("expert_weights_norm", False)),
        "routed_scaling_factor": float(file.size("expert_weights_scale", 1.0)) or 1.0,
        "scale_after_norm": sigmoid,
    }


def load_model(path: Path, dtype: torch.dtype | None = None, file: GGUF | None = None) -> Transformer:
    """The model of a GGUF file, dequantised to `dtype` (None: bfloat16). Raises as `hf.load_model` does."""
    file = file or GGUF(path)
    dtype = dtype or torch.bfloat16
    found = config(file)
    with torch.device("meta"):
        model = Transformer(found).to(dtype)
    needed = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
    require_memory(
        needed,
        f"{path.resolve()} in {str(dtype).removeprefix('torch.')}",
        f"load it as bfloat16 ({format_bytes(needed // dtype.itemsize * 2)}) or use a larger machine",
    )
    _allocate(model)
    used: set[str] = set()
    problems: list[str] = []
    for target, names, combine in sources(model, file):
        absent = [n for n in names if n not in file.tensors]
        used.update(names)
        if absent:
            problems.append(f"missing {_some(absent)}")
            continue
        value = combine(*(file.read(n) for n in names))
        if value.shape != target.shape:
            problems.append(f"{names[0]} gives {list(value.shape)} (needs {list(target.shape)})")
        elif not value.isfinite().all():
            raise CheckpointError(
                f"{path.resolve()}: tensor {names[0]} has NaN or infinite values; the file is damaged"
            )
        else:
            with torch.no_grad():
                target.copy_(value)
    extra = [n for n in file.tensors if n not in used and not n.startswith("rope_freqs")]
    if extra:
        problems.append(f"unexpected {_some(extra)}")
    if problems:
        raise CheckpointError(f"{path.resolve()}: tensors do not fit the metadata: {_some(problems)}")
    return model.eval()


Combine = Callable[..., Tensor]


def sources(model: Transformer, file: GGUF) -> Iterator[tuple[Tensor, list[str], Combine]]:
    """(parameter, GGUF tensors, how they become it) for every parameter of the model."""
    c = model.config

    def one(x: Tensor) -> Tensor:
        return x

    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, p in parameters.items():
        if name == "inv_freq" or (name == "lm_head.weight" and c.tie_word_embeddings):
            continue
        if not name.startswith("layers."):
            top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            yield p, [top[name.split(".")[0]] + ".weight"], one
            continue
        _, number, rest = name.split(".", 2)
        block = f"blk.{number}."
        if rest.endswith("experts.gate_up_proj"):
            names = [block + "ffn_gate_exps.weight", block + "ffn_up_exps.weight"]
            yield p, names, lambda gate, up: torch.cat((gate, up), 1)
        elif rest == "self_attn.kv_b_proj.weight" and block + "attn_k_b.weight" in file.tensors:
            yield p, [block + "attn_k_b.weight", block + "attn_v_b.weight"], _join_kv_b
        else:
            heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
            part = rest.rsplit(".", 1)[0]
            permuted = file.architecture == "llama" and part in heads
            combine = (lambda x, h=heads[part]: _unpermute(x, h)) if permuted else one
            yield p, [block + _block_name(rest)], combine


def _block_name(rest: str) -> str:
    """Our name of a layer's parameter → GGUF's, without the block number."""
    if rest == "mlp.experts.down_proj":
        return "ffn_down_exps.weight"
    if rest == "mlp.router.e_score_correction_bias":
        return "exp_probs_b.bias"
    part, kind = rest.rsplit(".", 1)
    return f"{_BLOCK[part]}.{kind}"


_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


def _unpermute(x: Tensor, heads: int) -> Tensor:
    """Undo the converter's reordering of rotary rows from halves to pairs."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(x.shape)


def _join_kv_b(k_b: Tensor, v_b: Tensor) -> Tensor:
    """k_b [H, C, n] (transposed per head) and v_b [H, v, C] → kv_b_proj [H * (n + v), C]."""
    return torch.cat((k_b.transpose(1, 2), v_b), 1).flatten(0, 1)


def tokenizer_files(file: GGUF) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja, from the metadata."""
    model = str(file.value("tokenizer.ggml.model"))
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path.resolve()}: tokenizer {model!r} is not rebuilt; only byte-level BPE (gpt2) is"
        )
    tokens = file.texts("tokenizer.ggml.tokens")
    kinds = (
        file.numbers("tokenizer.ggml.token_type")
        if file.has("tokenizer.ggml.token_type")
        else [1] * len(tokens)
    )
    merges = [tuple(m.split(" ", 1)) for m in file.texts("tokenizer.ggml.merges")]
    pre = str(file.value("tokenizer.ggml.pre", "default"))
    if pre not in _PRE:
        raise CheckpointError(
            f"{file.path.resolve()}: pre-tokenizer {pre!r} is not known; known: {', '.join(_PRE)}"
        )
    added = [
        {"id": i, "content": t, "special": kinds[i] == 3, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, t in enumerate(tokens)
        if kinds[i] in (3, 4)
    ]  # fmt: skip
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre in ("qwen2",) else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE[pre]},
        "post_processor": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in ("llama-bpe",),
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": merges,
        },
    }
    special: dict[str, Any] = {}
    for name, key in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        if file.has(f"tokenizer.ggml.{name}_token_id"):
            number = int(file.value(f"tokenizer.ggml.{name}_token_id"))
            if not 0 <= number < len(tokens):
                raise CheckpointError(
                    f"{file.path.resolve()}: tokenizer.ggml.{name}_token_id={number}: the file has {len(tokens)} tokens"
                )
            special[key] = tokens[number]
    # Where a file does not say, llama.cpp begins texts with BOS for this one of the pre-tokenizers that are read here.
    special["add_bos_token"] = bool(file.value("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    special["tokenizer_class"] = "PreTrainedTokenizerFast"
    special["clean_up_tokenization_spaces"] = False
    files = {
        "tokenizer.json": json.dumps(tree, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(special, ensure_ascii=False, indent=1),
    }
    if file.has("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(file.value("tokenizer.chat_template"))
    return files


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_BYTES_GPT2 = {**_BYTES, "use_regex": True}
# How each family cuts text before merging: the patterns of the models' own tokenizer.json files.
_PRE: dict[str, list[dict[str, Any]]] = {
    "default": [_BYTES_GPT2],
    "gpt-2": [_BYTES_GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES_GPT2],
    "llama-bpe": [
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _BYTES,
    ],
    "qwen2": [
        _split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _BYTES,
    ],
    "deepseek-llm": [
        _split(r"[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split(r"[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True},
        _BYTES,
    ],
    "deepseek-v3": [
        _split(r"\p{N}{1,3}"),
        _split(r"[一-龥぀-ゟ゠-ヿ]+"),
        _split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
        ),
        _BYTES,
    ],
}
