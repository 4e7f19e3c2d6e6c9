"""Models at 4 and 8 bits a weight: modules over the packed kernels, and folders that hold them.

What stays wide: norms, routers, the embedding, MTP modules, and kv_b_proj, whose halves are folded into queries and
outputs at every step (quantised MLA models that round it lose most: ikawrakow/ik_llama.cpp#245). The head gets 8 bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.checkpoint import hf
from rorqual.checkpoint.files import whole_folder
from rorqual.checkpoint.names import persistent_buffers, published_name
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.device import require_memory
from rorqual.errors import CheckpointError, ConfigError
from rorqual.kernels import quantised
from rorqual.model.config import ModelConfig
from rorqual.model.moe import Experts
from rorqual.model.transformer import Transformer

METHOD = "rorqual"
WIDE = ("kv_b_proj", "router", "mtp.", "value_embeddings", "smear_gate", "eh_proj")


class QuantLinear(nn.Module):
    """A linear layer over packed weights; biases stay wide."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, bits: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.bits, self.out_features, self.in_features = bits, out_features, in_features
        shape = (out_features // quantised.LANES, in_features // quantised.GROUP, quantised.block_bytes(bits))
        self.register_buffer("packed", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [*L, in] → [*L, out] in x's dtype."""
        y = quantised.linear(x.reshape(-1, self.in_features), self.packed, self.bits)
        y = y if self.bias is None else y + self.bias.float()
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


class QuantExperts(nn.Module):
    """All routed experts of a layer over packed weights."""

    up: Tensor
    down: Tensor

    def __init__(self, experts: int, hidden: int, inner: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        size = quantised.block_bytes(bits)
        lanes, group = quantised.LANES, quantised.GROUP
        self.register_buffer(
            "up", torch.empty((experts, 2 * inner // lanes, hidden // group, size), dtype=torch.uint8)
        )
        self.register_buffer(
            "down", torch.empty((experts, hidden // lanes, inner // group, size), dtype=torch.uint8)
        )

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """As `Experts.forward`; the load is not needed here."""
        return quantised.experts(x, ids, weights, self.up, self.down, self.bits).to(x.dtype)


def fits(width: int, out: int) -> bool:
    """Whether a matrix can be packed: whole groups of inputs and lanes of outputs."""
    return width % quantised.GROUP == 0 and out % quantised.LANES == 0


def check(config: ModelConfig, bits: int) -> None:
    """Raise ConfigError for what cannot be quantised."""
    if bits not in (4, 8):
        raise ConfigError(f"bits={bits}: must be 4 or 8")
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
    }
    for name, value in sizes.items():
        if value % quantised.GROUP:
            raise ConfigError(f"{name}={value}: must be a multiple of {quantised.GROUP} to be quantised")


def targets(model: Transformer, bits: int) -> Iterator[tuple[str, nn.Module, int]]:
    """(name, module, bits) of every module to be quantised; the head at 8 bits."""
    for name, module in model.named_modules():
        if any(w in name for w in WIDE):
            continue
        if isinstance(module, Experts):
            yield name, module, bits
        elif isinstance(module, nn.Linear) and fits(module.in_features, module.out_features):
            yield name, module, 8 if name == "lm_head" else bits


@torch.no_grad()
def quantize(model: Transformer, bits: int, importance: dict[str, Tensor] | None = None) -> Transformer:
    """Replace the model's matrices by packed ones, in place, and return it. `importance`: mean squares of each
    module's inputs [in] by its name, which weigh the rounding errors."""
    check(model.config, bits)
    for name, module, width in list(targets(model, bits)):
        weigh = (importance or {}).get(name)
        if isinstance(module, Experts):
            _set(model, name, _experts(module, width, weigh))
        elif isinstance(module, nn.Linear):
            new = QuantLinear(module.out_features, module.in_features, width, module.bias)
            new.packed.copy_(_packed(module.weight, width, weigh))
            _set(model, name, new)
    return model


def _experts(module: Experts, bits: int, weigh: Tensor | None) -> QuantExperts:
    count, inner2, hidden = module.gate_up_proj.shape
    new = QuantExperts(count, hidden, inner2 // 2, bits)
    for e in range(count):
        new.up[e] = _packed(module.gate_up_proj[e], bits, weigh)
        new.down[e] = _packed(module.down_proj[e], bits, None)
    return new


def _packed(weight: Tensor, bits: int, weigh: Tensor | None) -> Tensor:
    return quantised.pack(*quantised.quantise(weight.detach(), _bits(bits), weigh), bits)


def _bits(bits: int) -> quantised.Bits:
    return 4 if bits == 4 else 8


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


@torch.no_grad()
def calibrate(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """Mean squares of every module's inputs over ids `rows` [B, T], by module name."""
    from rorqual.model.attend import Causal

    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module, _ in targets(model, 8):

        def record(_: nn.Module, inputs: tuple[Tensor, ...], key: str = name) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[key] = sums.get(key, torch.zeros(flat.shape[1])) + flat.square().mean(0)

        hooks.append(module.register_forward_pre_hook(record))
    try:
        for row in rows:
            model.logits(model(row[None], torch.arange(len(row))[None], Causal()))
    finally:
        for hook in hooks:
            hook.remove()
    return {k: v / len(rows) for k, v in sums.items()}


def save(model: Transformer, folder: Path, bits: int, tokenizer_from: Path | None) -> None:
    """Write a quantised model's folder, whole or not at all."""
    with whole_folder(folder) as work:
        config = dataclasses.replace(
            model.config, quantization_config={"quant_method": METHOD, "bits": bits, "group_size": 32}
        )
        (work / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
        write_tensors(work / hf.SINGLE, _named(model))
        for name in hf.TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                (work / name).write_bytes((tokenizer_from / name).read_bytes())


def _named(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name; packed ones end in .packed, experts' in .up and .down."""
    tied = isinstance(model.lm_head, nn.Linear) and model.config.tie_word_embeddings
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]:
        if not (name == "lm_head.weight" and tied):
            yield published_name(model.config, name), tensor
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantExperts)):
            for key, tensor in module.named_buffers():
                yield published_name(model.config, f"{name}.{key}"), tensor


def is_quantised(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a folder that `save` wrote."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """A quantised folder, its packed tensors mapped from the file; what stayed wide is cast to `dtype`, but for the
    embedding, of which a token reads one row.

    float32: products of one row run at the memory's speed in it, and at a tenth of that in bfloat16 in torch.

    Raises CheckpointError for missing, unexpected or mis-shaped tensors.
    """
    config = hf.load_config(folder)
    scheme = config.quantization_config or {}
    bits = scheme.get("bits")
    if bits not in (4, 8) or scheme.get("group_size") != quantised.GROUP:
        raise CheckpointError(
            f"{folder.resolve()}: quantization_config {dict(scheme)!r}: bits must be 4 or 8, group_size 32"
        )
    check(config, bits)
    file = TensorFile(folder / hf.SINGLE)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        for name, module, width in list(targets(model, bits)):
            _set(model, name, _empty(module, width))
    wanted = dict(_named(model))
    _compare(folder, wanted, file)
    wide = sum(e.size for n, e in file.entries.items() if not n.endswith((".packed", ".up", ".down")))
    require_memory(2 * wide, f"{folder.resolve()} at {bits} bits", "use a larger machine")
    _assign(model, file, dtype)
    return model.eval()


def _empty(module: nn.Module, bits: int) -> nn.Module:
    if isinstance(module, Experts):
        count, inner2, hidden = module.gate_up_proj.shape
        return QuantExperts(count, hidden, inner2 // 2, bits)
    assert isinstance(module, nn.Linear)
    bias = None if module.bias is None else torch.empty(module.out_features)
    return QuantLinear(module.out_features, module.in_features, bits, bias)


def _compare(folder: Path, wanted: dict[str, Tensor], file: TensorFile) -> None:
    missing = [n for n in wanted if n not in file.entries]
    extra = [n for n in file.entries if n not in wanted]
    shapes = [n for n, t in wanted.items() if n in file.entries and file.entries[n].shape != tuple(t.shape)]
    for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes)):
        if names:
            raise CheckpointError(
                f"{folder.resolve()}: {len(names)} tensors {what} ({', '.join(names[:4])}); quantize the model again"
            )


def _assign(model: Transformer, file: TensorFile, dtype: torch.dtype) -> None:
    """Put the file's tensors into the modules: packed ones as views of the file, wide ones read and cast."""
    config = model.config
    for name, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, _ in tensors:
            full = published_name(config, f"{name}.{key}" if name else key)
            if isinstance(module, (QuantLinear, QuantExperts)) and key != "bias":
                setattr(module, key, file.map(full))
            elif key == "e_score_correction_bias":
                setattr(module, key, file.read(full))
            elif name == "lm_head" and full not in file.entries:
                setattr(module, key, model.embed_tokens.weight)  # a tied head that stayed wide
            elif key != "inv_freq":
                value = file.read(full)
                value = value if name == "embed_tokens" else value.to(dtype)
                setattr(
                    module,
                    key,
                    value if key == "bias" and key in module._buffers else nn.Parameter(value, False),
                )
    model.inv_freq = model._inv_freq()
