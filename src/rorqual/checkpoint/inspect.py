"""What is in a checkpoint, what we would do with it, and what is wrong with it, without reading its weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rorqual.checkpoint import fp8, gguf, hf
from rorqual.checkpoint.loaded import check_vocabulary, locate
from rorqual.checkpoint.pieces import Pieces
from rorqual.device import available_memory, format_bytes
from rorqual.errors import RorqualError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import cost
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer


@dataclass
class Report:
    """Facts in the order in which a person asks for them; `problems` stop a load."""

    path: str
    kind: str = ""
    architecture: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # dtype → count and bytes
    plan: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def inspect(path: str | Path) -> Report:
    """Look at a folder, a GGUF file or a config.json. Raises CheckpointError only where there is nothing to look at."""
    given = Path(path).expanduser()
    where = given if given.suffix == ".json" and given.is_file() else locate(given)
    report = Report(str(where.resolve()))
    if where.suffix == ".gguf":
        _inspect_gguf(where, report)
    elif where.suffix == ".json":
        _inspect_config(hf.read_config(where.parent) if where.name == "config.json" else _tree(where), report)
    else:
        _inspect_folder(where, report)
    return report


def _tree(path: Path) -> dict[str, Any]:
    from rorqual.config import read_tree

    return read_tree(path)


def _inspect_gguf(path: Path, report: Report) -> None:
    report.kind = "GGUF file"
    with _noting(report):
        file = gguf.GGUF(path)
        report.tensors = _count((t.tensor_type.name, int(t.n_bytes)) for t in file.tensors.values())
        config = gguf.config(file)
        _describe(config, report)
        report.plan.append("dequantise to bfloat16 when loaded")
        files = gguf.tokenizer_files(file)
        report.facts["tokenizer"] = (
            f"byte-level BPE rebuilt from the metadata ({file.value('tokenizer.ggml.pre', 'default')})"
        )
        report.facts["chat template"] = (
            "in the metadata" if "chat_template.jinja" in files else "none: chatml is assumed"
        )


def _inspect_config(tree: dict[str, Any], report: Report) -> None:
    report.kind = "config alone"
    with _noting(report):
        _describe(ModelConfig.from_hf(tree), report)


def _inspect_folder(folder: Path, report: Report) -> None:
    report.kind = "Hugging Face folder"
    config = None
    with _noting(report):
        config = hf.load_config(folder)
        _describe(config, report)
    if (folder / hf.PIECES).is_dir():
        report.kind = "checkpoint in parts"
        with _noting(report):
            pieces = Pieces(folder / hf.PIECES)
            parts = [p for parts in pieces.parts.values() for p in parts]
            entries = [p.file.entries[p.name] for p in parts]
            report.tensors = _count((str(e.dtype).removeprefix("torch."), e.size) for e in entries)
            report.facts["files"] = len({p.file.path for p in parts})
            if config is not None:
                hf.check_pieces(config, pieces)
    elif any(folder.glob("*.safetensors")) or (folder / hf.INDEX).exists():
        with _noting(report):
            weights = hf.Weights(folder)
            whole = (f.entries[n] for n, f in weights.where.items())
            report.tensors = _count((str(e.dtype).removeprefix("torch."), e.size) for e in whole)
            report.facts["files"] = len(weights.files)
            if config is not None and _is_packed(config):
                report.kind = "folder of rorqual quantize"
                report.plan.append(
                    "run from the packed weights, which are compared with config.json when loaded"
                )
            elif config is not None:
                hf.check(config, weights)
                if config.quantization_config:
                    report.plan.append("dequantise float8 blocks when loaded")
    else:
        report.kind = "config alone"
    if config is not None:
        _inspect_text(folder, config, report)


def _inspect_text(folder: Path, config: ModelConfig, report: Report) -> None:
    if (folder / "tokenizer.json").is_file():
        with _noting(report):
            tokenizer = Tokenizer.load(folder)
            report.facts["tokenizer"] = (
                f"{tokenizer.vocab_size} tokens, BOS {tokenizer.bos_id}, EOS {list(tokenizer.eos_ids)}"
            )
            check_vocabulary(tokenizer, config.vocab_size, folder)
    else:
        report.facts["tokenizer"] = "none: only token ids can be used"
    with _noting(report):
        template = ChatTemplate.load(folder)
        report.facts["chat template"] = "none: chatml is assumed" if template is None else template.origin


def _describe(config: ModelConfig, report: Report) -> None:
    c = cost(config)
    report.architecture = config.architecture
    moe = (
        f", {config.n_routed_experts} experts of which {config.num_experts_per_tok}"
        if config.n_routed_experts
        else ""
    )
    report.facts |= {
        "attention": "multi-head latent" if config.attention == "mla" else "grouped-query",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}{moe}",
        "parameters": f"{c.parameters / 1e9:.2f}B, {c.active / 1e9:.2f}B active",
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "cache": f"{c.cache_bytes():.0f} bytes a token in bfloat16",
    }
    needed, there = c.weight_bytes(16), available_memory()
    report.facts["memory"] = f"{format_bytes(needed)} in bfloat16, {format_bytes(there)} available"
    if needed > there and not _is_packed(config):
        report.plan.append(
            f"refuse to load in bfloat16: {format_bytes(needed - there)} more memory is needed"
        )
    if config.extensions:
        report.plan.append(f"run, but not export to other programs: {', '.join(config.extensions)}")


def _is_packed(config: ModelConfig) -> bool:
    return (config.quantization_config or {}).get("quant_method") == fp8.PACKED


def _count(pairs: Any) -> dict[str, dict[str, Any]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for dtype, size in pairs:
        counts[dtype] += 1
        sizes[dtype] += size
    return {d: {"tensors": counts[d], "bytes": sizes[d]} for d in sorted(counts)}


class _noting:
    """Turn an error into a problem of the report and go on."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, RorqualError):
            self.report.problems.append(str(error))
            return True
        return False
