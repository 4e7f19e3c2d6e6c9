"""Folders come back bit for bit; whatever does not fit is named before memory is taken."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rorqual
from rorqual.checkpoint import fp8, hf
from rorqual.errors import CapacityError, CheckpointError
from rorqual.model.transformer import Transformer

Edit = Callable[[dict[str, torch.Tensor]], None]


def edit(folder: Path, change: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_saved_and_loaded_is_equal_bit_for_bit(tiny: Transformer, saved: Path) -> None:
    """huggingface/transformers#48805: experts are apart in the file and fused in memory; MTP comes along."""
    again = hf.load_model(saved)
    assert again.config == tiny.config
    want = tiny.state_dict()
    assert again.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in again.state_dict().items())
    names = load_file(saved / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight"} <= set(names)


def test_fused_experts_in_the_file_load_too(tiny: Transformer, saved: Path) -> None:
    def fuse(t: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            p = f"model.layers.{layer}.mlp.experts"
            gates, ups, downs = (
                [t.pop(f"{p}.{e}.{n}_proj.weight") for e in range(4)] for n in ("gate", "up", "down")
            )
            t[f"{p}.gate_up_proj"] = torch.stack([torch.cat(x) for x in zip(gates, ups, strict=True)])
            t[f"{p}.down_proj"] = torch.stack(downs)

    edit(saved, fuse)
    want = tiny.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in hf.load_model(saved).state_dict().items())


def test_the_selection_bias_stays_float32(tiny: Transformer, tmp_path: Path) -> None:
    """sgl-project/sglang#37133."""
    bias = tiny.layers[1].mlp.router.e_score_correction_bias.clone()
    hf.save_model(tiny.to(torch.bfloat16), tmp_path / "m")
    again = hf.load_model(tmp_path / "m")
    assert next(again.parameters()).dtype == torch.bfloat16
    router = again.layers[1].mlp.router
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, bias)


def test_a_renamed_tensor_is_one_missing_and_one_unexpected(saved: Path) -> None:
    """huggingface/transformers#47407."""
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"

    def rename(t: dict[str, torch.Tensor]) -> None:
        t[name + "X"] = t.pop(name)

    edit(saved, rename)
    with pytest.raises(CheckpointError, match=rf"1 missing \({name}\); 1 unexpected \({name}X\)"):
        rorqual.load(saved)


def test_wrong_shapes_are_named_with_both(saved: Path) -> None:
    def cut(t: dict[str, torch.Tensor]) -> None:
        t["model.norm.weight"] = t["model.norm.weight"][:40].clone()

    edit(saved, cut)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[40\] \(needs \[48\]\)"):
        rorqual.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(saved: Path, value: float) -> None:
    def spoil(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    edit(saved, spoil)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight has 1 values"):
        rorqual.load(saved)
    assert rorqual.load(saved, check_finite=False).tokenizer is None


def test_values_beyond_float16_are_refused_in_float16(saved: Path) -> None:
    """vllm-project/vllm#8283: overflow, not endless exclamation marks."""

    def scale(t: dict[str, torch.Tensor]) -> None:
        t["lm_head.weight"] *= 1e7

    edit(saved, scale)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*float16"):
        rorqual.load(saved, dtype="float16")


def to_fp8(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    want: dict[str, torch.Tensor] = {}

    def convert(t: dict[str, torch.Tensor]) -> None:
        for name in names:
            q, scale = fp8.quantize(t[name], (16, 16))
            t[name], t[name + fp8.SCALE] = q, scale
            rows, columns = q.shape
            wide = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
            want[name] = q.float() * wide

    edit(folder, convert)
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    edit_config(folder, quantization_config=block)
    return want


def test_fp8_blocks_are_scaled_also_at_ragged_edges(saved: Path) -> None:
    """ggml-org/llama.cpp#14781. kv_a is 28 x 48: two blocks by three, the last row block of 12."""
    names = [
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
    ]
    want = to_fp8(saved, names)
    model = rorqual.load(saved, dtype="float32").model
    assert torch.equal(model.layers[0].self_attn.kv_a_proj_with_mqa.weight, want[names[0]])
    assert torch.equal(model.layers[1].mlp.experts.gate_up_proj[2, 24:], want[names[1]])


def test_fp8_without_its_scale_is_named(saved: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    to_fp8(saved, [name])
    edit(saved, lambda t: t.__delitem__(name + fp8.SCALE))
    with pytest.raises(CheckpointError, match=name):
        rorqual.load(saved)


def test_fp8_metadata_that_does_not_fit_is_refused(saved: Path) -> None:
    """vllm-project/vllm-gaudi#1220: a scale of another layout than the config says."""
    name = "model.layers.0.self_attn.o_proj.weight"
    to_fp8(saved, [name])
    edit_config(saved, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_scale_inv is \[3, 3\].*needs \[1, 1\]"):
        rorqual.load(saved)
    edit_config(saved, quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="quant_method='awq'"):
        rorqual.load(saved)


def test_power_of_two_scales_are_rounded_before_the_division() -> None:
    """huggingface/transformers#46763: about 0.02 relative error for e4m3, 0.6 when rounded after."""
    w = torch.randn(256, 256)
    q, scale = fp8.quantize(w, (128, 128), power_of_two=True)
    assert torch.equal(scale.log2(), scale.log2().round())
    error = (fp8.dequantize(q, scale, (128, 128)) - w).norm() / w.norm()
    assert error < 0.04


def test_mtp_left_out_by_an_export_is_left_out_here(saved: Path) -> None:
    edit(saved, lambda t: [t.pop(k) for k in list(t) if k.startswith("model.layers.2.")] and None)
    assert len(rorqual.load(saved).model.mtp) == 0


def test_saving_never_overwrites_and_leaves_nothing_half_done(tiny: Transformer, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        hf.save_model(tiny, saved)

    def fail(work: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        hf.save_model(tiny, saved.parent / "full", more=fail)
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rorqual.device.available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match=r"needs .* of memory, 1\.0 kB is available"):
        rorqual.load(saved)


@pytest.mark.slow
def test_peak_memory_stays_under_one_and_a_fifth_of_the_weights(tmp_path: Path) -> None:
    """200 MB stored in bfloat16, loaded as float32 (400 MB) and as stored."""
    from rorqual.model.config import ModelConfig

    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = Transformer(config).init_weights(0).to(torch.bfloat16)
    hf.save_model(model, tmp_path / "m")
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    code = (
        "import sys, resource, torch, rorqual\n"
        "from rorqual.checkpoint import hf\n"
        "from rorqual.model.transformer import Transformer\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "torch.zeros(4).sum(); before = peak()\n"
        "m = rorqual.load(sys.argv[1], dtype=sys.argv[2]); print(peak() - before)\n"
    )
    for dtype, weights in (("bfloat16", size), ("float32", 2 * size)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "m"), dtype],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) < 1.2 * weights
