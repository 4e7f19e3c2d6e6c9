"""Models of published sizes with random weights, as a quantised folder and as a GGUF file that llama.cpp loads.

Every value is random, so nothing is said of quality; speed and memory depend on sizes alone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.tensors import _NAMES
from rorqual.engine import packed_folder, quantize
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer


def write_quantised(config: ModelConfig, folder: Path, bits: int = 4, head: int = 8) -> None:
    """A folder as `rorqual quantize` writes it."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
        formats = quantize.formats(model, bits, head=head)
        quantize.empty(model, formats)
    generator = torch.Generator().manual_seed(0)
    mins = {name for name, f in formats.items() if f.kind == "int4_min"}

    def fill(name: str, like: torch.Tensor) -> torch.Tensor:
        if like.dtype == torch.uint8:
            out = torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator)
            four = name.rpartition(".")[0].removeprefix("model.") in mins
            # Behind the values lie the halves: scales, and mins that centre them.
            body = like.shape[-1] * (16 if four else 32) // (20 if four else 34)
            scales = (like.shape[-1] - body) // (4 if four else 2)
            halves = torch.full((scales,), 0.01 if four else 0.0005, dtype=torch.float16)
            if four:
                halves = torch.cat((halves, -7.5 * halves))
            out[..., body:] = halves.view(torch.uint8)
            return out
        if "norm" in name:
            return torch.ones(like.shape, dtype=like.dtype)
        return (torch.randn(like.shape, generator=generator) * 0.02).to(like.dtype)

    shapes = list(packed_folder.tensors(model))
    _stream(folder / hf.SINGLE, shapes, ((name, fill(name, t)) for name, t in shapes))
    packed_folder.write_config(packed_folder.with_scheme(config, formats), folder)


def _stream(
    path: Path, shapes: list[tuple[str, torch.Tensor]], tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Write one tensor after the other, so that a model larger than memory can be made."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in shapes:
        size = t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, t in tensors:
            file.write(memoryview(t.contiguous().view(-1).view(torch.uint8).numpy()))


def write_gguf(config: ModelConfig, path: Path) -> None:
    """A deepseek2 file of Q4_K weights (Q6_K head and half of the down projections, as Q4_K_M mixes them)."""
    import gguf

    rng = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType
    w = gguf.GGUFWriter(str(path), "deepseek2", use_temp_file=True)
    heads, rank, rotary = config.num_attention_heads, config.kv_lora_rank or 0, config.qk_rope_head_dim
    for key, value in {
        "block_count": config.num_hidden_layers,
        "context_length": 16384,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + rotary,
        "attention.value_length": rank,
        "attention.key_length_mla": config.qk_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rotary,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "vocab_size": config.vocab_size,
    }.items():
        w.add_uint32(f"deepseek2.{key}", int(value))
    w.add_float32("deepseek2.attention.layer_norm_rms_epsilon", 1e-6)
    w.add_float32("deepseek2.rope.freq_base", 10000.0)
    w.add_float32("deepseek2.expert_weights_scale", 1.0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("deepseek-llm")
    w.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    w.add_token_types([1] * config.vocab_size)
    w.add_token_merges(["t 1"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def blocks(kind: types, rows: int, columns: int) -> np.ndarray:
        per, size = gguf.GGML_QUANT_SIZES[kind]
        out = rng.integers(0, 256, (rows, columns // per, size), dtype=np.uint8)
        d = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
        if kind == types.Q4_K:
            out[..., 0:2], out[..., 2:4] = d, d
        elif kind == types.Q6_K:
            out[..., -2:] = np.frombuffer(np.float16(1e-5).tobytes(), np.uint8)
        else:
            out[..., 0:2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        return out.reshape(rows, -1)

    def add(name: str, *shape: int, kind: types = types.Q4_K) -> None:
        rows = int(np.prod(shape[:-1]))
        kind = kind if shape[-1] % 256 == 0 else types.Q8_0 if kind == types.Q6_K else types.Q5_0
        data = blocks(kind, rows, shape[-1])
        w.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=kind)

    def ones(name: str, size: int) -> None:
        w.add_tensor(name, np.ones(size, dtype=np.float32))

    hidden, inner = config.hidden_size, config.moe_intermediate_size
    add("token_embd.weight", config.vocab_size, hidden)
    add("output.weight", config.vocab_size, hidden, kind=types.Q6_K)
    ones("output_norm.weight", hidden)
    for i in range(config.num_hidden_layers):
        b = f"blk.{i}."
        for norm, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_kv_a_norm", rank)):
            ones(f"{b}{norm}.weight", size)
        add(f"{b}attn_q.weight", heads * config.qk_head_dim, hidden)
        add(f"{b}attn_kv_a_mqa.weight", rank + rotary, hidden)
        add(f"{b}attn_k_b.weight", heads, rank, config.qk_nope_head_dim)
        add(f"{b}attn_v_b.weight", heads, config.v_head_dim, rank)
        add(f"{b}attn_output.weight", hidden, heads * config.v_head_dim)
        more = types.Q6_K if i % 2 else types.Q4_K
        if not config.is_moe(i):
            add(f"{b}ffn_gate.weight", config.intermediate_size, hidden)
            add(f"{b}ffn_up.weight", config.intermediate_size, hidden)
            add(f"{b}ffn_down.weight", hidden, config.intermediate_size, kind=more)
            continue
        w.add_tensor(
            f"{b}ffn_gate_inp.weight",
            (rng.standard_normal((config.n_routed_experts, hidden)) * 0.02).astype(np.float32),
        )
        add(f"{b}ffn_gate_exps.weight", config.n_routed_experts, inner, hidden)
        add(f"{b}ffn_up_exps.weight", config.n_routed_experts, inner, hidden)
        add(f"{b}ffn_down_exps.weight", config.n_routed_experts, hidden, inner, kind=more)
        shared = inner * config.n_shared_experts
        add(f"{b}ffn_gate_shexp.weight", shared, hidden)
        add(f"{b}ffn_up_shexp.weight", shared, hidden)
        add(f"{b}ffn_down_shexp.weight", hidden, shared, kind=more)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
