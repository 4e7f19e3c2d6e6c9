"""Quantise a model in place: which matrix gets which format, and activation statistics to weigh the errors with.

Norms, routers and gates stay wide. The head, the embedding and kv_b_proj, whose halves fold into queries and
outputs at every step, get 8 bits at the least: MLA models that round them further lose most
(ikawrakow/ik_llama.cpp#245).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from rorqual.engine.quantised import QuantAbsorbed, QuantEmbedding, QuantExperts, QuantLinear, QuantSwiGLU
from rorqual.errors import ConfigError
from rorqual.kernels.quantised import GROUPS, Format, Kind
from rorqual.model.attend import Causal
from rorqual.model.config import ModelConfig
from rorqual.model.layers import SwiGLU
from rorqual.model.mla import MLA
from rorqual.model.moe import Experts
from rorqual.model.transformer import Transformer

KIND: dict[int, Kind] = {4: "int4_min", 8: "int8"}
SENSITIVE = ("lm_head", "embed_tokens", "kv_b_proj", "eh_proj")
WIDE = ("value_embeddings", "ngram", "triples", "induction", "smear_gate")


def check(bits: int, group: int) -> None:
    """Raise ConfigError for what is not a scheme."""
    if bits not in KIND:
        raise ConfigError(f"bits={bits}: must be 4 or 8")
    if group not in GROUPS:
        raise ConfigError(f"group={group}: must be 32 or 128")


def formats(model: Transformer, bits: int, group: int = 32, head: int = 8) -> dict[str, Format]:
    """The format of every module that is quantised, by its name.

    `head`: bits of the output head. Of DeepSeek-V2-Lite cut to 6 layers it is two fifths of all that a token reads
    at 8 bits; at 4 SmolLM2's perplexity rises by 7%. A tied head's bits are the embedding's too.
    """
    check(bits, group)
    check(head, group)
    chosen = {name: _format(name, bits, group) for name, _ in _matrices(model)}
    chosen["lm_head"] = Format(KIND[head])
    if model.config.tie_word_embeddings:
        chosen["embed_tokens"] = chosen["lm_head"]
    return chosen


def _matrices(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """What is quantised; a feed-forward without biases as a whole."""
    fused = tuple(
        f"{name}." for name, m in model.named_modules() if isinstance(m, SwiGLU) and m.gate_proj.bias is None
    )
    for name, module in model.named_modules():
        if name.startswith(fused) or any(w in name for w in WIDE):
            continue
        if isinstance(module, (nn.Linear, nn.Embedding, Experts)) or f"{name}." in fused:
            yield name, module


def _format(name: str, bits: int, group: int) -> Format:
    return Format("int8") if name.endswith(SENSITIVE) else Format(KIND[bits], group)


@torch.no_grad()
def quantize(
    model: Transformer, chosen: dict[str, Format], importance: dict[str, Tensor] | None = None
) -> Transformer:
    """Replace modules by packed ones, in place, and return the model.

    `importance`: mean squares of each module's inputs [in], by its name (`calibrate`).
    """
    known = importance or {}
    for name, format in chosen.items():
        module = model.get_submodule(name)
        if name.endswith("kv_b_proj"):
            attn = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(attn, MLA)
            attn.absorbed = QuantAbsorbed.of(attn, format)
        if isinstance(module, Experts):
            replace(model, name, QuantExperts.of(module, format, known.get(name)))
        elif isinstance(module, SwiGLU):
            inputs, middle = known.get(f"{name}.gate_proj"), known.get(f"{name}.down_proj")
            replace(model, name, QuantSwiGLU.of(module, format, inputs, middle))
        elif isinstance(module, nn.Embedding):
            replace(model, name, QuantEmbedding.of(module, format))
        elif isinstance(module, nn.Linear):
            replace(model, name, QuantLinear.of(module, format, known.get(name)))
    share_tied(model)
    return model


def empty(model: Transformer, chosen: dict[str, Format]) -> Transformer:
    """The same without values: modules of the right shapes, for a folder to fill."""
    for name, format in chosen.items():
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            count, twice, hidden = module.gate_up_proj.shape
            replace(model, name, QuantExperts(format, count, hidden, twice // 2))
        elif isinstance(module, SwiGLU):
            replace(
                model, name, QuantSwiGLU(format, module.gate_proj.in_features, module.gate_proj.out_features)
            )
        elif isinstance(module, nn.Embedding):
            rows, width = module.weight.shape
            replace(model, name, QuantEmbedding(format, rows, width, module.weight.dtype))
        elif isinstance(module, nn.Linear):
            new = QuantLinear(format, module.out_features, module.in_features, module.bias is not None)
            replace(model, name, new)
        else:
            raise ConfigError(f"{name}: not a matrix of this model")
        if name.endswith("kv_b_proj"):
            _empty_absorbed(model, name, format)
    share_tied(model)
    return model


def _empty_absorbed(model: Transformer, name: str, format: Format) -> None:
    attn = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(attn, MLA)
    attn.absorbed = QuantAbsorbed(
        format, attn.num_heads, attn.qk_nope_head_dim, attn.v_head_dim, attn.kv_lora_rank
    )


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def share_tied(model: Transformer) -> None:
    """A tied head reads the embedding's packed rows."""
    head, embedding = model.lm_head, model.embed_tokens
    if model.config.tie_word_embeddings and isinstance(embedding, QuantEmbedding):
        cast(QuantLinear, head).packed = embedding.packed


@torch.no_grad()
def calibrate(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """Mean squares of every matrix's inputs [in] over token ids `rows` [B, T], by module name."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Experts)):
            continue

        def record(_: nn.Module, inputs: tuple[Tensor, ...], key: str = name) -> None:
            square = inputs[0].flatten(0, -2).float().square().mean(0)
            sums[key] = sums[key] + square if key in sums else square

        hooks.append(module.register_forward_pre_hook(record))
    try:
        for row in rows:
            model.logits(model(row[None], torch.arange(len(row))[None], Causal()))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / len(rows) for name, total in sums.items()}


def bits_a_weight(config: ModelConfig, chosen: dict[str, Format]) -> float:
    """Bits that a weight takes on average, wide ones counted at 16."""
    with torch.device("meta"):
        model = Transformer(config)
    tied = config.tie_word_embeddings
    bits = weights = 0.0
    for name, p in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        module = name.rpartition(".")[0]
        format = chosen.get(module) or chosen.get(module.rpartition(".")[0])
        bits += p.numel() * (16 if format is None else format.bits)
        weights += p.numel()
    return bits / weights
