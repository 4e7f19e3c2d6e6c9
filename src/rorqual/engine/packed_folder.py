"""Folders of quantised models: safetensors with packed tensors under the published names, mapped when loaded.

config.json's quantization_config says how each matrix is stored:
    {"quant_method": "rorqual", "version": 1, "formats": {"model.layers.0.self_attn.q_proj": "int4_min/32", …}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.checkpoint import fp8, gguf, hf
from rorqual.checkpoint.files import whole_folder
from rorqual.checkpoint.names import persistent_buffers, published_name
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.device import require_memory
from rorqual.engine import quantize
from rorqual.engine.quantised import PACKED
from rorqual.errors import CheckpointError, ConfigError
from rorqual.kernels.quantised import GROUPS, KINDS, Format
from rorqual.model.config import ModelConfig
from rorqual.model.layers import SwiGLU
from rorqual.model.transformer import Transformer

METHOD, VERSION = fp8.PACKED, 1


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a folder that `save` wrote."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def with_scheme(config: ModelConfig, formats: Mapping[str, Format]) -> ModelConfig:
    """The config with its quantization_config."""
    listed = {_published(config, name): f"{f.kind}/{f.group}" for name, f in formats.items()}
    scheme = {"quant_method": METHOD, "version": VERSION, "formats": listed}
    return dataclasses.replace(config, quantization_config=scheme)


def _published(config: ModelConfig, module: str) -> str:
    return published_name(config, f"{module}.weight").removesuffix(".weight")


def save(
    model: Transformer, formats: Mapping[str, Format], folder: Path, tokenizer_from: Path | None = None
) -> None:
    """Write a quantised model's folder, whole or not at all, with the tokenizer of the folder or GGUF file that it was
    made from."""
    with whole_folder(folder) as work:
        write_config(with_scheme(model.config, formats), work)
        write_tensors(work / hf.SINGLE, tensors(model))
        from_gguf = tokenizer_from is not None and tokenizer_from.suffix == ".gguf"
        hf.write_companions(model.config.to_hf(), work, None if from_gguf else tokenizer_from)
        if tokenizer_from is not None and from_gguf:
            for name, text in gguf.tokenizer_files(gguf.GGUF(tokenizer_from)).items():
                (work / name).write_text(text, encoding="utf-8")


def write_config(config: ModelConfig, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")


def tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name, packed ones by their own: q_proj.packed, experts.up, …"""
    for name, tensor in [*model.named_parameters(), *persistent_buffers(model), *_packed_buffers(model)]:
        yield published_name(model.config, name), tensor


def _packed_buffers(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, PACKED) and not (name == "lm_head" and model.config.tie_word_embeddings):
            for key, tensor in module.named_buffers(recurse=False):
                yield f"{name}.{key}", tensor


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """A quantised folder's model: packed tensors are views of the file, read when they are first used; what is
    wide is cast to `dtype`, which is also that of the activations.

    Raises CheckpointError for a scheme we do not know and for missing, unexpected or mis-shaped tensors.
    """
    config = hf.load_config(folder)
    file = TensorFile(folder / hf.SINGLE)
    model = empty_model(config, dtype, folder)
    _compare(folder, dict(tensors(model)), file)
    wide = sum(e.size for e in file.entries.values() if e.dtype != torch.uint8)
    require_memory(2 * wide, f"{folder.resolve()}, its wide weights", "use a larger machine")
    for name, module in model.named_modules():
        _fill(model, name, module, file, dtype)
    model.inv_freq = model._inv_freq()
    quantize.share_tied(model)
    return model.eval()


def empty_model(config: ModelConfig, dtype: torch.dtype, folder: Path) -> Transformer:
    """The model of a quantised config without storage, its modules those that the folder holds."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        try:
            return quantize.empty(model, read_formats(model, folder))
        except ConfigError as e:
            raise CheckpointError(f"{folder.resolve()}: quantization_config formats: {e}") from e


def read_formats(model: Transformer, folder: Path) -> dict[str, Format]:
    """The formats of a model's modules as its config lists them."""
    scheme = model.config.quantization_config or {}
    if scheme.get("version") != VERSION or not isinstance(scheme.get("formats"), dict):
        raise CheckpointError(
            f"{folder.resolve()}: quantization_config version={scheme.get('version')!r}: only {VERSION} is read; "
            "quantize the model again"
        )
    own = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    own += [name for name, m in model.named_modules() if isinstance(m, SwiGLU)]
    ours = {_published(model.config, name): name for name in own if name}
    found = {}
    for name, text in scheme["formats"].items():
        kind, _, group = str(text).partition("/")
        if name not in ours or kind not in KINDS or group not in map(str, GROUPS):
            raise CheckpointError(
                f"{folder.resolve()}: quantization_config formats {name}={text!r}: must name a module of the model "
                f"and one of {', '.join(KINDS)} in groups of {' or '.join(map(str, GROUPS))}"
            )
        found[ours[name]] = Format(kind, int(group))
    return found


def _compare(folder: Path, wanted: dict[str, Tensor], file: TensorFile) -> None:
    missing = [n for n in wanted if n not in file.entries]
    extra = [n for n in file.entries if n not in wanted]
    shapes = [
        f"{n} {list(file.entries[n].shape)} (needs {list(t.shape)})"
        for n, t in wanted.items()
        if n in file.entries and file.entries[n].shape != tuple(t.shape)
    ]
    for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes)):
        if names:
            raise CheckpointError(
                f"{folder.resolve()}: {len(names)} tensors {what} ({', '.join(names[:4])}); they do not fit "
                "config.json's quantization_config; quantize the model again"
            )


def _fill(model: Transformer, name: str, module: nn.Module, file: TensorFile, dtype: torch.dtype) -> None:
    """Give a module its own tensors: packed ones as views of the file, wide ones read and cast."""
    for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        full = published_name(model.config, f"{name}.{key}" if name else key)
        if full not in file.entries:
            continue  # computed, or shared by a tied head
        if file.entries[full].dtype == torch.uint8:
            setattr(module, key, file.map(full))
        elif key in module._buffers:
            setattr(module, key, file.read(full).float())
        else:
            setattr(module, key, nn.Parameter(file.read(full).to(dtype), False))
