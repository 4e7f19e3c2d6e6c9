"""Hugging Face model folders: config.json, safetensors in one file or in shards with an index, tokenizer
files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint import fp8
from rorqual.checkpoint.files import whole_folder
from rorqual.checkpoint.names import Slot, fused_slots, ignored, slots
from rorqual.checkpoint.pieces import Pieces
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.device import format_bytes, require_memory
from rorqual.errors import CheckpointError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import SPECIAL_IDS, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SHARD_BYTES = 5_000_000_000
PIECES, MODEL = (
    "pieces",
    "model",
)  # the folder of parts in a checkpoint of many processes, and what is before a name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as it is written."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder.resolve()}: no config.json; a model folder has config.json, *.safetensors and tokenizer.json"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path.resolve()}: not valid JSON ({e})") from e
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path.resolve()}: must be a JSON object")
    return tree


def load_config(folder: Path) -> ModelConfig:
    """The checked config of a model folder."""
    return ModelConfig.from_hf(read_config(folder))


class Weights:
    """The tensors of a folder, over all its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path.name: TensorFile(path) for path in _weight_files(folder)}
        self.where: dict[str, TensorFile] = {}
        for name, file in self.files.items():
            for tensor in file.entries:
                if tensor in self.where:
                    raise CheckpointError(
                        f"{folder}: tensor {tensor} is in {self.where[tensor].path.name} and {name}"
                    )
                self.where[tensor] = file
        _check_index(folder, self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.where[name].entries[name].dtype


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if not (folder / name).is_file() or Path(name).name != name:
                raise CheckpointError(
                    f"{index.resolve()}: names {name}, which is not there; download it again"
                )
        return [folder / name for name in names]
    single = folder / SINGLE
    if single.is_file():
        return [single]
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise CheckpointError(
            f"{folder.resolve()}: {pickled[0]} is a pickle, which can run code when it is read; convert it to "
            "safetensors with the program that wrote it"
        )
    raise CheckpointError(f"{folder.resolve()}: no weights; expected {SINGLE} or {INDEX} with its shards")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(found, dict)
        assert all(isinstance(v, str) for v in found.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as e:
        raise CheckpointError(f"{index.resolve()}: no valid weight_map ({e})") from e
    return found


def _check_index(folder: Path, where: Mapping[str, TensorFile]) -> None:
    index = folder / INDEX
    if index.is_file():
        listed = _weight_map(index)
        wrong = [n for n, file in listed.items() if n not in where or where[n].path.name != file]
        if wrong:
            raise CheckpointError(f"{index.resolve()}: {_some(wrong)} not in the shard that it names")


def check(config: ModelConfig, weights: Weights) -> None:
    """Compare names, shapes and scales with the config. Raises CheckpointError naming all that is wrong."""
    with torch.device("meta"):
        model = Transformer(_without_absent_mtp(config, weights))
    _plan(model, weights, fp8.scheme(config.quantization_config))


def load_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
    config: ModelConfig | None = None,
) -> Transformer:
    """The model of a folder in `dtype` (None: as stored), on the CPU.

    Raises CheckpointError for missing, unexpected, mis-shaped, unscaled or non-finite tensors, with their
    names; CapacityError before any is read where memory does not suffice.
    """
    if (folder / PIECES).is_dir():
        return _from_pieces(folder, config or load_config(folder), dtype or torch.float32, check_finite)
    weights = Weights(folder)
    config = config or load_config(folder)
    config = _without_absent_mtp(config, weights)
    scheme = fp8.scheme(config.quantization_config)
    dtype = dtype or _stored_dtype(weights)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    _plan(model, weights, scheme)  # all that is wrong is said before memory is taken
    needed = sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
    require_memory(
        needed,
        f"{folder.resolve()} in {str(dtype).removeprefix('torch.')}",
        f"load it as bfloat16 ({format_bytes(needed // dtype.itemsize * 2)}), quantize it, or use a larger machine",
    )
    _allocate(model)
    for slot in _plan(model, weights, scheme):
        _fill(slot, weights, scheme)
        if check_finite:
            _check_finite(slot, weights)
    return model.eval()


def check_pieces(config: ModelConfig, pieces: Pieces) -> None:
    """`check` for a checkpoint that many processes wrote in parts."""
    with torch.device("meta"):
        own = Transformer(config).state_dict()
    own = {n: t for n, t in own.items() if not (config.tie_word_embeddings and n == "lm_head.weight")}
    there = {n.removeprefix(f"{MODEL}."): n for n in pieces.parts if n.startswith(f"{MODEL}.")}
    wrong = [f"missing: {_some(missing)}"] if (missing := sorted(set(own) - set(there))) else []
    wrong += [f"unexpected: {_some(more)}"] if (more := sorted(set(there) - set(own))) else []
    for name in sorted(set(own) & set(there)):
        if tuple(own[name].shape) != pieces.shape(there[name]):
            wrong.append(f"{name} is {pieces.shape(there[name])}, the config wants {tuple(own[name].shape)}")
    if wrong:
        raise CheckpointError(f"{pieces.folder.resolve()}: {'; '.join(wrong)}")


def _from_pieces(folder: Path, config: ModelConfig, dtype: torch.dtype, check_finite: bool) -> Transformer:
    """The model of a checkpoint that many processes wrote in parts."""
    pieces = Pieces(folder / PIECES)
    check_pieces(config, pieces)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    own = model.state_dict(keep_vars=True)
    needed = sum(t.numel() * t.element_size() for t in own.values())
    require_memory(
        needed, f"{folder.resolve()} in {str(dtype).removeprefix('torch.')}", "use a larger machine"
    )
    _allocate(model)
    for name, t in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # the embedding's
        t.copy_(pieces.read(f"{MODEL}.{name}"))
        if check_finite and not t.isfinite().all():
            raise CheckpointError(
                f"{pieces.folder.resolve()}: tensor {name} has values that are NaN or infinite; the checkpoint is damaged"
            )
    return model.eval()


def _allocate(model: Transformer) -> None:
    """Give storage to a model built without any; rope tables are computed, not loaded."""
    tied = model.config.tie_word_embeddings
    model.to_empty(device="cpu")
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.inv_freq.copy_(model._inv_freq())
    for p in model.parameters():
        p.requires_grad_(True)


def _without_absent_mtp(config: ModelConfig, weights: Weights) -> ModelConfig:
    """Exports leave the MTP modules out while config.json still counts them."""
    first = config.num_hidden_layers
    there = {
        int(n.split(".")[2])
        for n in weights.where
        if n.startswith("model.layers.") and n.split(".")[2].isdigit()
    }
    if config.num_nextn_predict_layers and not any(layer >= first for layer in there):
        return dataclasses.replace(config, num_nextn_predict_layers=0)
    return config


def _stored_dtype(weights: Weights) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for name in weights.where:
        d = weights.dtype(name)
        d = torch.bfloat16 if d in fp8.DTYPES else d
        if d.is_floating_point:
            sizes[d] = sizes.get(d, 0) + weights.where[name].entries[name].size
    return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32


def _plan(model: Transformer, weights: Weights, scheme: fp8.Scheme | None) -> list[Slot]:
    """Match the model's slots with the file's tensors by name and shape, or say all that is wrong."""
    fused = fused_slots(model)
    whole = {slot.parameter for name, entry in fused.items() if name in weights.where for slot in entry}
    plan = [s for s in slots(model) if s.parameter not in whole]
    plan += [slot for name, entry in fused.items() if name in weights.where for slot in entry]
    wanted = {s.name: s for s in plan}
    missing = [n for n in wanted if n not in weights.where]
    known = set(wanted) | {n + fp8.SCALE for n in wanted}
    unexpected = [n for n in weights.where if n not in known and not ignored(model.config, n)]
    shapes = [
        f"{n} {list(weights.shape(n))} (needs {list(s.tensor.shape)})"
        for n, s in wanted.items()
        if n in weights.where and weights.shape(n) != tuple(s.tensor.shape)
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if problems:
        raise CheckpointError(
            f"{weights.folder.resolve()}: tensors do not fit config.json: {'; '.join(problems)}; take config.json and "
            "weights of one model"
        )
    fp8.check(wanted, weights.where, scheme, weights.folder)
    return plan


def _fill(slot: Slot, weights: Weights, scheme: fp8.Scheme | None) -> None:
    file = weights.where[slot.name]
    with torch.no_grad():
        if weights.dtype(slot.name) in fp8.DTYPES:
            assert scheme is not None
            scale = weights.where[slot.name + fp8.SCALE].read(slot.name + fp8.SCALE)
            slot.tensor.copy_(fp8.dequantize(file.read(slot.name), scale, scheme.block))
        else:
            file.read_into(slot.name, slot.tensor.data)


def _check_finite(slot: Slot, weights: Weights) -> None:
    with torch.no_grad():
        # the sum of a finite tensor of these types is finite in float64 and the cheapest full pass
        if not slot.tensor.sum(dtype=torch.float64).isfinite() and not slot.tensor.isfinite().all():
            bad = int((~slot.tensor.isfinite()).sum())
            raise CheckpointError(
                f"{weights.where[slot.name].path}: tensor {slot.name} has {bad} values that are NaN or infinite"
                "; the checkpoint is damaged, or its values do not fit float16 (load it as bfloat16)"
            )


def save_model(
    model: Transformer,
    folder: Path,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    texts: Mapping[str, str] | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
    more: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that transformers loads unchanged (without our extensions), whole or not at all.

    `tokenizer_from`: a folder whose tokenizer files come along; `texts`: further small files, name to
    content.

    `more` writes further files into the folder before it takes its name.
    """
    with whole_folder(Path(folder), replace) as work:
        _write_weights(model, work, dtype, shard_bytes)
        write_config(model.config, work, dtype or next(model.parameters()).dtype, tokenizer_from)
        for name, content in (texts or {}).items():
            (work / name).write_text(content, encoding="utf-8")
        if more is not None:
            more(work)


def write_config(config: ModelConfig, work: Path, dtype: torch.dtype, tokenizer_from: Path | None) -> None:
    """config.json, generation_config.json and the tokenizer's files of a folder with weights of `dtype`."""
    tree = dataclasses.replace(config, quantization_config=None).to_hf()
    tree["dtype"] = tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    (work / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    write_companions(tree, work, tokenizer_from)


def write_companions(config: Mapping[str, Any], work: Path, source: Path | None) -> None:
    """generation_config.json and the tokenizer's files, as the folder `source` has them: a model ends its turns by tokens
    that often only its generation_config.json lists."""
    generation = {k: config[k] for k in SPECIAL_IDS if config.get(k) is not None}
    if source is not None:
        generation |= read_json(source / "generation_config.json")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
    (work / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _write_weights(model: Transformer, work: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = total = 0
    for slot in slots(model):
        keep = slot.name.endswith("e_score_correction_bias")
        tensor = slot.tensor.detach() if keep else _cast(slot.tensor.detach(), dtype)
        bytes_ = slot.tensor.numel() * (4 if keep else (dtype or slot.tensor.dtype).itemsize)
        if size and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((slot.name, tensor))
        size, total = size + bytes_, total + bytes_
    if len(shards) == 1:
        write_tensors(work / SINGLE, shards[0])
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(work / name, shard)
    weight_map = {n: file for file, shard in zip(names, shards, strict=True) for n, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (work / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _some(names: Sequence[str], limit: int = 4) -> str:
    """The first few names and how many more."""
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
