"""How our parameters are called in Hugging Face checkpoints, both ways.

A `Slot` is one tensor of the file and the piece of a parameter that it fills: experts are fused in memory
and, as published, apart in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer


@dataclass(frozen=True)
class Slot:
    """A tensor of a checkpoint: its published name, and the parameter or piece of one that holds it."""

    name: str
    tensor: Tensor
    parameter: str  # our name


def slots(model: Transformer) -> Iterator[Slot]:
    """Every tensor of the checkpoint of this model, experts one by one."""
    tied = model.config.tie_word_embeddings
    for ours, tensor in [*model.named_parameters(), *persistent_buffers(model)]:
        if ours == "lm_head.weight" and tied:
            continue
        if ".experts." in ours:
            yield from _expert_slots(model.config, ours, tensor)
        else:
            yield Slot(published_name(model.config, ours), tensor, ours)


def persistent_buffers(model: Transformer) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the checkpoint: the routers' selection biases."""
    return [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]


def published_name(config: ModelConfig, ours: str) -> str:
    """The Hugging Face name of one of our parameters (of fused experts: the fused name)."""
    name = ours.replace(".mlp.router.", ".mlp.gate.")
    if name.startswith("mtp."):
        _, number, rest = name.split(".", 2)
        layer = config.num_hidden_layers + int(number)
        rest = rest.removeprefix("block.")
        return f"model.layers.{layer}." + ("shared_head.norm.weight" if rest == "norm.weight" else rest)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _expert_slots(config: ModelConfig, ours: str, tensor: Tensor) -> Iterator[Slot]:
    prefix, _, kind = published_name(config, ours).rpartition(".")
    for expert in range(tensor.shape[0]):
        if kind == "gate_up_proj":
            gate, up = tensor[expert].chunk(2, 0)
            yield Slot(f"{prefix}.{expert}.gate_proj.weight", gate, ours)
            yield Slot(f"{prefix}.{expert}.up_proj.weight", up, ours)
        else:
            yield Slot(f"{prefix}.{expert}.down_proj.weight", tensor[expert], ours)


def fused_slots(model: Transformer) -> dict[str, list[Slot]]:
    """Of each fused expert tensor's published name, the one slot that takes it whole (transformers' layout in
    memory, which some programs also write)."""
    return {
        published_name(model.config, ours): [Slot(published_name(model.config, ours), tensor, ours)]
        for ours, tensor in model.named_parameters()
        if ".experts." in ours
    }


def ignored(config: ModelConfig, name: str) -> bool:
    """Tensors that files carry and no forward pass needs: rope tables, and MTP's copies of embedding and
    head."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return True
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) >= config.num_hidden_layers:
        return ".".join(parts[3:]) in ("embed_tokens.weight", "shared_head.head.weight")
    return False
