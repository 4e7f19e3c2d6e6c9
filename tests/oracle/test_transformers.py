"""Tiny random models beside transformers' own code, through files, both ways.

Tolerance: 1e-4 on logits that reach 5; head sizes deliberately unequal, 48 positions, batch 2, YaRN on and off.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import rorqual
from rorqual.checkpoint import hf
from rorqual.model.attend import Cached, KVCache

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of much; we only compare numbers

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
DENSE = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MOE = {
    **DENSE,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
GLM = {k: v for k, v in MOE.items() if k != "first_k_dense_replace"}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "v2-lite": (tf.DeepseekV2Config, tf.DeepseekV2ForCausalLM, {**MOE, "q_lora_rank": None}),
    "v2": (
        tf.DeepseekV2Config,
        tf.DeepseekV2ForCausalLM,
        {
            **MOE,
            "q_lora_rank": 24,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
    ),
    "v3": (
        tf.DeepseekV3Config,
        tf.DeepseekV3ForCausalLM,
        {**MOE, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    ),
    "glm": (
        tf.Glm4MoeLiteConfig,
        tf.Glm4MoeLiteForCausalLM,
        {**GLM, "q_lora_rank": 24, "n_shared_experts": 1, "rms_norm_eps": 1e-5},
    ),
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {**DENSE, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "qwen2": (
        tf.Qwen2Config,
        tf.Qwen2ForCausalLM,
        {**DENSE, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {**DENSE, "num_key_value_heads": 2, "head_dim": 16}),
}


def theirs(name: str, yarn: bool) -> Any:
    make, build, sizes = CASES[name]
    torch.manual_seed(1)
    config = make(**sizes, **({"rope_parameters": dict(YARN)} if yarn else {}))
    config._attn_implementation = "eager"
    model = build(config).eval()
    for key, p in model.named_parameters():
        p.data.normal_(1 if "norm" in key else 0, 0.2 if p.dim() == 1 else 0.15)
    for key, b in model.named_buffers():
        if "bias" in key:
            b.data.normal_(0, 0.3)
    return model


@pytest.fixture(
    params=[(n, y) for n in CASES for y in (False, True)],
    ids=lambda p: f"{p[0]}-{'yarn' if p[1] else 'plain'}",
)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    model = theirs(*request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, rorqual.load(tmp_path / "theirs", dtype="float32"), tmp_path


def test_logits_and_greedy_text_agree_and_the_export_loads_back(pair) -> None:
    model, ours, folder = pair
    ids = torch.randint(2, 160, (2, 48))
    with torch.no_grad():
        want = model(ids).logits
    torch.testing.assert_close(ours.logits(ids), want, atol=1e-4, rtol=0)
    for form in ("expanded", "absorbed"):
        for chunk in (1, 13):
            cache = KVCache()
            parts = []
            with torch.no_grad():
                for s in range(0, 48, chunk):
                    piece = ids[:, s : s + chunk]
                    positions = torch.arange(s, s + piece.shape[1]).expand_as(piece)
                    parts.append(ours.model.logits(ours.model(piece, positions, Cached(cache, form))))
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)
    tokens = model.generate(ids[:, :40], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours.config = dataclasses.replace(ours.config, eos_token_id=None)
    assert torch.equal(ours.generate(ids[:, :40], max_new_tokens=8), tokens)

    hf.save_model(ours.model, folder / "ours")
    again, info = type(model).from_pretrained(folder / "ours", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, want, atol=1e-4, rtol=0)


def test_sharded_exports_load_in_both(tmp_path: Path) -> None:
    theirs("v3", False).save_pretrained(tmp_path / "one")
    ours = rorqual.load(tmp_path / "one", dtype="float32")
    hf.save_model(ours.model, tmp_path / "many", shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    ids = torch.randint(0, 160, (1, 9))
    assert torch.equal(rorqual.load(tmp_path / "many").logits(ids), ours.logits(ids))
    again, info = tf.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "many", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in again.state_dict().values()) * 4


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_trained_preset_is_a_deepseek_v3_for_transformers(tmp_path: Path, chosen: int) -> None:
    from rorqual.model.transformer import Transformer
    from rorqual.train.config import Shape

    config = Shape(depth=2, experts=4, experts_per_token=chosen).model(100, 64, 0, 1)
    model = Transformer(config).init_weights(0).eval()
    hf.save_model(model, tmp_path / "m")
    again, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 100, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            again(ids).logits, rorqual.load(tmp_path / "m").logits(ids), atol=1e-4, rtol=0
        )
