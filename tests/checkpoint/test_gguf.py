"""GGUF files written here with the `gguf` package and read back: names, permutations, quantised types, tokenizers."""

import json
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch

import rorqual
from rorqual.checkpoint import gguf, hf
from rorqual.engine import gguf_formats
from rorqual.engine.llm import load_any
from rorqual.engine.quantised import QuantLinear
from rorqual.errors import CapacityError, CheckpointError
from rorqual.kernels.quantised import Format, Packed, dequantise, quantise
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

Q = package.GGMLQuantizationType


def dense(architecture: str, **extra: object) -> ModelConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return ModelConfig(architecture=architecture, **{**sizes, **extra})


def names_of(config: ModelConfig) -> dict[str, str]:
    """Our names → GGUF's for a dense model, written out by hand from llama.cpp's table."""
    table = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                table[f"layers.{i}.{ours}.{kind}"] = f"blk.{i}.{theirs}.{kind}"
    return table


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of llama models."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path: Path, model: Transformer, architecture: str, qtype: Q = Q.F32) -> None:
    c = model.config
    w = package.GGUFWriter(str(path), architecture)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_rope_freq_base(c.rope.rope_theta)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    tokens = [bytes([b]).decode("latin-1") for b in range(33, 127)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(["<s>", "</s>", *tokens, "ab"])
    w.add_token_types([3, 3, *[1] * (len(tokens) + 1)])
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_chat_template("{{ messages[0].content }}")
    names = names_of(c)
    for ours, p in model.named_parameters():
        data = p.detach().numpy()
        if architecture == "llama" and ours.endswith(("q_proj.weight", "k_proj.weight")):
            data = permuted(data, c.num_attention_heads if "q_proj" in ours else c.num_key_value_heads)
        if p.dim() == 2 and qtype != Q.F32:
            w.add_tensor(names[ours], package.quants.quantize(data, qtype), raw_dtype=qtype)
        else:
            w.add_tensor(names[ours], data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize(
    ("architecture", "name", "extra"),
    [
        ("llama", "LlamaForCausalLM", {}),
        ("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}),
        ("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}),
    ],
)
def test_layouts_read_back_equal(
    tmp_path: Path, architecture: str, name: str, extra: dict[str, object]
) -> None:
    model = Transformer(dense(name, **extra)).init_weights(0)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    write(tmp_path / "m.gguf", model, architecture)
    again = rorqual.load(tmp_path / "m.gguf", dtype="float32")
    assert again.config == model.config
    want = model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.model.state_dict().items())
    assert again.template is not None
    assert again.tokenizer is not None
    assert again.tokenizer.bos_id == 0
    assert again.tokenizer.decode(again.tokenizer.encode("ab!", add_bos=False)) == "ab!"


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_quantised_types_read_as_the_package_dequantises_them(tmp_path: Path, qtype: str) -> None:
    model = Transformer(dense("Qwen2ForCausalLM", qkv_bias=True)).init_weights(0)
    write(tmp_path / "m.gguf", model, "qwen2", Q[qtype])
    again = rorqual.load(tmp_path / "m.gguf", dtype="float32").model
    for name in ("layers.1.mlp.down_proj.weight", "embed_tokens.weight", "layers.0.self_attn.q_proj.weight"):
        w = model.get_parameter(name).detach().numpy()
        want = package.quants.dequantize(package.quants.quantize(w, Q[qtype]), Q[qtype])
        assert torch.equal(again.get_parameter(name), torch.from_numpy(want))


@pytest.mark.parametrize("qtype", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_read_block_by_block(tmp_path: Path, qtype: str) -> None:
    """The package cannot write them: random bytes of finite blocks, compared with its reference reader."""
    model = Transformer(dense("Qwen2ForCausalLM", qkv_bias=True)).init_weights(0)
    rows, size = 256, package.GGML_QUANT_SIZES[Q[qtype]][1]
    raw = np.random.default_rng(0).integers(0, 64, (rows, size), dtype=np.uint8)
    writer = package.GGUFWriter(str(tmp_path / "m.gguf"), "qwen2")
    writer.add_tensor("blk.0.attn_output.weight", raw, raw_dtype=Q[qtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = gguf.GGUF(tmp_path / "m.gguf").read("blk.0.attn_output.weight")
    want = package.quants.dequantize(raw, Q[qtype])
    assert got.shape == model.layers[0].self_attn.o_proj.weight.shape
    np.testing.assert_array_equal(got.numpy(), want)


def test_deepseek2_with_split_kv_b(tmp_path: Path, tiny: Transformer) -> None:
    """attn_k_b is transposed per head, experts are stacked, the bias is exp_probs_b."""
    c = tiny.config
    w = package.GGUFWriter(str(tmp_path / "m.gguf"), "deepseek2")
    for key, value in {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": c.q_lora_rank,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": 28,
        "attention.value_length": 20,
        "attention.key_length_mla": 20,
        "attention.value_length_mla": 10,
        "rope.dimension_count": 8,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 24,
        "expert_gating_func": 2,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "leading_dense_block_count": 1,
    }.items():
        w.add_uint32(f"deepseek2.{key}", int(value or 0))
    w.add_float32("deepseek2.attention.layer_norm_rms_epsilon", 1e-6)
    w.add_float32("deepseek2.rope.freq_base", 10000.0)
    w.add_float32("deepseek2.expert_weights_scale", 2.5)
    w.add_bool("deepseek2.expert_weights_norm", True)
    table = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "self_attn.q_a_proj.weight": "attn_q_a.weight",
        "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
        "self_attn.q_b_proj.weight": "attn_q_b.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
        "self_attn.o_proj.weight": "attn_output.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.e_score_correction_bias": "exp_probs_b.bias",
        "mlp.experts.down_proj": "ffn_down_exps.weight",
        "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
        "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
        "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    }
    for name, p in tiny.state_dict().items():
        data = p.detach().numpy()
        if name.startswith("mtp."):
            continue
        if name in table:
            w.add_tensor(table[name], data)
            continue
        _, layer, rest = name.split(".", 2)
        block = f"blk.{layer}."
        if rest == "self_attn.kv_b_proj.weight":
            heads = data.reshape(4, 22, 20)
            w.add_tensor(block + "attn_k_b.weight", np.ascontiguousarray(heads[:, :12].swapaxes(1, 2)))
            w.add_tensor(block + "attn_v_b.weight", np.ascontiguousarray(heads[:, 12:]))
        elif rest == "mlp.experts.gate_up_proj":
            w.add_tensor(block + "ffn_gate_exps.weight", np.ascontiguousarray(data[:, :24]))
            w.add_tensor(block + "ffn_up_exps.weight", np.ascontiguousarray(data[:, 24:]))
        else:
            w.add_tensor(block + parts[rest], data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    again = gguf.load_model(tmp_path / "m.gguf", torch.float32)
    want = tiny.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in again.state_dict().items())
    assert again.config.scale_after_norm
    assert again.config.routed_scaling_factor == 2.5


def test_unknown_types_and_architectures_are_named(tmp_path: Path) -> None:
    w = package.GGUFWriter(str(tmp_path / "a.gguf"), "mamba")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(CheckpointError, match="'mamba' is not read"):
        gguf.GGUF(tmp_path / "a.gguf")
    w = package.GGUFWriter(str(tmp_path / "b.gguf"), "llama")
    w.add_tensor("t", np.zeros((1, 66), dtype=np.uint8), raw_dtype=Q.IQ2_XXS)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(CheckpointError, match="IQ2_XXS"):
        gguf.GGUF(tmp_path / "b.gguf")


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    model = Transformer(dense("LlamaForCausalLM")).init_weights(0)
    write(tmp_path / "m.gguf", model, "llama")
    file = gguf.GGUF(tmp_path / "m.gguf")
    file.tensors["blk.9.extra.weight"] = file.tensors.pop("blk.1.ffn_up.weight")
    with pytest.raises(
        CheckpointError, match=r"missing blk\.1\.ffn_up\.weight, unexpected blk\.9\.extra\.weight"
    ):
        gguf.load_model(tmp_path / "m.gguf", torch.float32, file)


def test_convert_writes_a_folder_with_its_tokenizer(tmp_path: Path, run) -> None:
    model = Transformer(dense("LlamaForCausalLM")).init_weights(0)
    write(tmp_path / "m.gguf", model, "llama", Q.Q8_0)
    assert run("convert", tmp_path / "m.gguf", tmp_path / "out", "--dtype", "float32") == 0
    again = rorqual.load(tmp_path / "out")
    assert again.tokenizer is not None
    assert again.template is not None
    ids = torch.randint(0, 300, (1, 7))
    assert torch.equal(again.logits(ids), rorqual.load(tmp_path / "m.gguf", dtype="float32").logits(ids))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert hf.load_config(tmp_path / "out") == model.config


@pytest.mark.parametrize(("qtype", "kind"), [("Q8_0", "int8"), ("Q4_0", "int4"), ("Q4_1", "int4_min")])
def test_the_engine_runs_a_file_in_its_own_precision(tmp_path: Path, qtype: str, kind: str) -> None:
    """Every packed weight is the file's, value for value; told a dtype, the weights are wide."""
    path = tmp_path / "m.gguf"
    write(path, Transformer(dense("Qwen3ForCausalLM", qk_norm=True)).init_weights(0), "qwen3", Q[qtype])
    wide = rorqual.load(path, dtype="float32").model
    packed = load_any(path).model
    found = {n: m for n, m in packed.named_modules() if isinstance(m, QuantLinear)}
    assert {m.format for m in found.values()} == {Format(kind)}
    assert len(found) == 4 * wide.config.num_hidden_layers + 1  # the head; feed-forwards are fused
    for name, module in found.items():
        torch.testing.assert_close(
            dequantise(module.matrix), wide.get_submodule(name).weight.detach(), atol=1e-6, rtol=1e-5
        )
    ids = torch.arange(2, 40)
    torch.testing.assert_close(packed.embed_tokens(ids), wide.embed_tokens(ids), atol=1e-6, rtol=1e-5)
    mlp = packed.layers[0].mlp
    down = dequantise(Packed(mlp.down, mlp.hidden, mlp.inner, mlp.format))
    torch.testing.assert_close(down, wide.layers[0].mlp.down_proj.weight.detach(), atol=1e-6, rtol=1e-5)
    assert not any(isinstance(m, QuantLinear) for m in load_any(path, "bfloat16").model.modules())


def test_float_files_stay_wide_and_mixed_feed_forwards_take_the_wider(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    model = Transformer(dense("Qwen3ForCausalLM", qk_norm=True)).init_weights(0)
    write(path, model, "qwen3", Q.F16)
    assert not any(isinstance(m, QuantLinear) for m in load_any(path).model.modules())
    write(path, model, "qwen3", Q.Q4_0)
    file = gguf.GGUF(path)
    for name in file.tensors:
        if name.endswith("ffn_down.weight"):
            file.tensors[name] = file.tensors[name]._replace(tensor_type=Q.Q6_K)
    chosen = gguf_formats.formats(rorqual.load(path, dtype="float32").model, file)
    assert chosen["layers.0.mlp"] == Format("int8")
    assert chosen["layers.0.self_attn.q_proj"] == Format("int4")


def test_q4_k_becomes_int4_min_within_two_percent() -> None:
    """Its blocks of 32 have a scale and a minimum as ours do, but the search does not know them."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (16, 2, 144), dtype=np.uint8)
    raw[..., 0:4] = np.frombuffer(np.array([0.01, 0.01], dtype=np.float16).tobytes(), np.uint8)
    wide = torch.from_numpy(package.quants.dequantize(raw.reshape(16, -1), Q.Q4_K)).view(16, 512)
    again = dequantise(quantise(wide, Format("int4_min")))
    assert (again - wide).norm() / wide.norm() < 2e-2


def test_a_file_too_large_to_pack_runs_wide_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.gguf"
    write(path, Transformer(dense("Qwen3ForCausalLM", qk_norm=True)).init_weights(0), "qwen3", Q.Q8_0)

    with monkeypatch.context() as m:
        small_limit = path.stat().st_size * 3  # between its two bytes a weight and its four

        def check(needed: int, *_: str) -> None:
            if needed > small_limit:
                raise CapacityError("too large")

        m.setattr(gguf, "require_memory", check)
        model = load_any(path).model
    assert next(model.parameters()).dtype == torch.bfloat16
    assert "runs in bfloat16" in caplog.text


def other(monkeypatch: pytest.MonkeyPatch, path: Path, **methods: Any) -> Path:
    """A file whose writer was told something else."""
    changed = type("Changed", (package.GGUFWriter,), methods)
    monkeypatch.setattr(package, "GGUFWriter", changed)
    write(path, Transformer(dense("LlamaForCausalLM")).init_weights(0), "llama")
    return path


def skipped(*_: Any) -> None: ...


W = package.GGUFWriter


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"add_token_merges": skipped}, "tokenizer.ggml.merges is missing"),
        ({"add_token_list": skipped}, "tokenizer.ggml.tokens is missing"),
        ({"add_eos_token_id": lambda w, _: W.add_eos_token_id(w, 5000)}, "eos_token_id=5000"),
        ({"add_head_count_kv": lambda w, _: W.add_head_count_kv(w, [2, 2])}, "differ from layer to layer"),
        ({"add_key_length": lambda w, n: (W.add_key_length(w, n), W.add_rope_dimension_count(w, n // 2))},
         "rope.dimension_count=32"),
        ({"add_rope_freq_base": lambda w, x: (
            W.add_rope_scaling_type(w, package.RopeScalingType.YARN), W.add_rope_scaling_factor(w, 4.0),
            W.add_rope_scaling_orig_ctx_len(w, 64), W.add_rope_scaling_attn_factors(w, 2.5))}, "attn_factor=2.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_metadata_that_is_missing_or_not_computed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, methods: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        rorqual.load(other(monkeypatch, tmp_path / "m.gguf", **methods))


def test_bounds_of_yarn_and_the_begin_of_llamas_texts_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stretched(w: Any, _: float) -> None:
        W.add_rope_scaling_type(w, package.RopeScalingType.YARN)
        W.add_rope_scaling_factor(w, 4.0)
        W.add_rope_scaling_orig_ctx_len(w, 64)
        W.add_rope_scaling_yarn_beta_fast(w, 8.0)

    path = other(
        monkeypatch, tmp_path / "m.gguf", add_rope_freq_base=stretched,
        add_tokenizer_pre=lambda w, _: W.add_tokenizer_pre(w, "llama-bpe"),
    )  # fmt: skip
    assert gguf.config(gguf.GGUF(path)).rope.beta_fast == 8.0
    tokenizer = rorqual.load(path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("ab")[0] == 0
